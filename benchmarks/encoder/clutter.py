"""Scenes to train the embedded model on, drawn at random: garments of Fashion-MNIST on crops of photographs."""

from __future__ import annotations

import gzip
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from tokred.bench.data.model import SIZE
from tokred.bench.data.scenes import GARMENT, Scenes

# Photographs of scikit-image (skimage/data). Those held out travel with tokred: all three are CC0 by their
# photographers. The others are looked at in training only.
HELD_OUT = ("chelsea.png", "coffee.png", "rocket.jpg")
TRAINED_ON = (
    "astronaut.png", "brick.png", "camera.png", "coins.png", "grass.png", "gravel.png", "hubble_deep_field.jpg",
    "ihc.png", "moon.png", "motorcycle_left.png", "motorcycle_right.png", "page.png", "retina.jpg", "text.png",
)  # fmt: skip


def draw(
    garments: Tensor, photos: Sequence[Tensor], size: int = SIZE, generator: torch.Generator | None = None
) -> Scenes:
    """A random scene for each index of ``garments`` ``(N,)``, on crops of ``size`` pixels of ``photos`` (see below)."""
    n, g = len(garments), generator
    photo = torch.randint(len(photos), (n,), generator=g)
    room = torch.tensor([[p.shape[0] - size + 1, p.shape[1] - size + 1] for p in photos])[photo]
    crop = (torch.rand(n, 2, generator=g) * room).long()
    place = torch.randint(size - GARMENT + 1, (n, 2), generator=g)
    tint = 0.55 + 0.45 * torch.rand(n, 3, generator=g)
    return Scenes(
        garments,
        torch.rand(n, generator=g) < 0.5,
        photo,
        crop,
        place,
        tint / tint.amax(1, keepdim=True),
        0.35 + 0.4 * torch.rand(n, generator=g),
    )


def load(folder: Path, split: str) -> tuple[Tensor, Tensor]:
    """Garments ``(N, 28, 28)`` uint8 and labels ``(N,)`` int64 of one split ('train' or 't10k') of Fashion-MNIST."""
    with gzip.open(folder / f"{split}-images-idx3-ubyte.gz") as f:
        images = np.frombuffer(f.read(), np.uint8, offset=16).reshape(-1, 28, 28)
    with gzip.open(folder / f"{split}-labels-idx1-ubyte.gz") as f:
        labels = np.frombuffer(f.read(), np.uint8, offset=8)
    return torch.from_numpy(images.copy()), torch.from_numpy(labels.astype(np.int64))


def photographs(folder: Path, names: tuple[str, ...], shorter: tuple[int, ...]) -> list[Tensor]:
    """Photographs ``(H, W, 3)`` uint8 of a folder, each once for every length of its shorter side; needs pillow."""
    from PIL import Image

    found = []
    for name in names:
        with Image.open(folder / name) as opened:
            picture = opened.convert("RGB")
        for side in shorter:
            scale = side / min(picture.size)
            size = round(picture.width * scale), round(picture.height * scale)
            small = picture.resize(size, Image.Resampling.LANCZOS)
            found.append(torch.from_numpy(np.array(small)))
    return found
