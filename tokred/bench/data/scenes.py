"""Scenes: one garment of Fashion-MNIST at a random place on a crop of a photograph, as data and as pictures.

A garment of 28 pixels touches 16 to 25 of the 196 patches of a picture: what is lost of them is lost for the answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from tokred.bench.data.model import MEAN, SIZE, STD

GARMENT = 28


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


def compose(scenes: Scenes, images: Tensor, photos: Sequence[Tensor], size: int = SIZE) -> Tensor:
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
