"""Scenes for the next embedded model: one garment of Fashion-MNIST at a random place on a crop of a photograph.

The model that is trained on them, :func:`build`, has ViT-B/16's token geometry (14 x 14 patches and a class token) on
112 pixels. A garment of 28 pixels touches 16 to 25 of the 196 patches: what is lost of them is lost for the answer.
"""

from __future__ import annotations

import gzip
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

MEAN, STD = 0.40, 0.27
SIZE, PATCH, GARMENT = 112, 8, 28
MODEL: dict[str, Any] = {
    "img_size": SIZE,
    "patch_size": PATCH,
    "in_chans": 3,
    "embed_dim": 96,
    "depth": 8,
    "num_heads": 3,
    "num_classes": 10,
}
# Photographs of scikit-image (skimage/data). Those held out travel with tokred: all three are CC0 by their
# photographers. The others are looked at in training only.
HELD_OUT = ("chelsea.png", "coffee.png", "rocket.jpg")
TRAINED_ON = (
    "astronaut.png", "brick.png", "camera.png", "coins.png", "grass.png", "gravel.png", "hubble_deep_field.jpg",
    "ihc.png", "moon.png", "motorcycle_left.png", "motorcycle_right.png", "page.png", "retina.jpg", "text.png",
)  # fmt: skip


def conv(i: int, o: int, stride: int = 1) -> nn.Sequential:
    """A 3 x 3 convolution, batch norm and ReLU."""
    return nn.Sequential(nn.Conv2d(i, o, 3, stride, 1, bias=False), nn.BatchNorm2d(o), nn.ReLU(inplace=True))


def build() -> nn.Module:
    """The model with random weights; needs timm.

    The patch embedding is three convolutions of stride 2 and a projection. A token sees 15 pixels across, about twice
    its own patch and a quarter of a garment: no single token knows the answer.
    """
    from timm.layers import PatchEmbed
    from timm.models.vision_transformer import VisionTransformer

    class ConvPatchEmbed(PatchEmbed):  # type: ignore[misc]
        def __init__(self, embed_dim: int = 96, **kwargs: Any) -> None:
            super().__init__(embed_dim=embed_dim, **kwargs)
            self.stem = nn.Sequential(conv(3, 24, 2), conv(24, 48, 2), conv(48, 96, 2))
            self.proj = nn.Conv2d(96, embed_dim, 1)

        def forward(self, x: Tensor) -> Tensor:
            normed: Tensor = self.norm(self.proj(self.stem(x)).flatten(2).transpose(1, 2))
            return normed

    model: nn.Module = VisionTransformer(embed_layer=ConvPatchEmbed, **MODEL)
    return model


class Scenes(NamedTuple):
    """Where each garment stands on which photograph: everything that :func:`compose` needs, one row a scene.

    Attributes:
        garment: index of the garment ``(N,)`` int64.
        flip: whether it is mirrored ``(N,)`` bool.
        photo: index of the photograph ``(N,)`` int64.
        crop: top and left of the crop in the photograph ``(N, 2)`` int64.
        place: top and left of the garment in the crop ``(N, 2)`` int64.
        tint: colour of the garment ``(N, 3)`` float32, its largest channel 1.
        light: brightness of the photograph ``(N,)`` float32.
    """

    garment: Tensor
    flip: Tensor
    photo: Tensor
    crop: Tensor
    place: Tensor
    tint: Tensor
    light: Tensor


def draw(garments: Tensor, photos: list[Tensor], size: int = SIZE, generator: torch.Generator | None = None) -> Scenes:
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


def compose(scenes: Scenes, images: Tensor, photos: list[Tensor], size: int = SIZE) -> Tensor:
    """The scenes as pictures.

    Args:
        scenes: from :func:`draw`.
        images: garments ``(M, 28, 28)`` uint8, black around them.
        photos: photographs ``(H, W, 3)`` uint8, at least ``size`` pixels each way.
        size: pixels of a picture each way.

    Returns:
        ``(N, 3, size, size)`` float32 in 0..1.
    """
    n, at = len(scenes.garment), torch.arange(size)
    crops = torch.empty(n, size, size, 3, dtype=torch.uint8)
    for i, (top, left) in enumerate(scenes.crop.tolist()):
        crops[i] = photos[int(scenes.photo[i])][top : top + size, left : left + size]
    out = crops.permute(0, 3, 1, 2).float().mul_(scenes.light.view(n, 1, 1, 1) / 255)
    image = images[scenes.garment]
    image = torch.where(scenes.flip.view(n, 1, 1), image.flip(-1), image).float() / 255
    mask = (image * 8).clamp(max=1)[:, None]
    drawn = (0.25 + 0.75 * image)[:, None] * scenes.tint.view(n, 3, 1, 1)
    inside = at[:GARMENT]
    sample = torch.arange(n).view(n, 1, 1, 1)
    channel = torch.arange(3).view(1, 3, 1, 1)
    rows = (scenes.place[:, :1] + inside).view(n, 1, GARMENT, 1)
    columns = (scenes.place[:, 1:] + inside).view(n, 1, 1, GARMENT)
    out[sample, channel, rows, columns] = out[sample, channel, rows, columns] * (1 - mask) + drawn * mask
    return out


def normalise(pictures: Tensor) -> Tensor:
    """Pictures in 0..1 as the model wants them."""
    return (pictures - MEAN) / STD


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
