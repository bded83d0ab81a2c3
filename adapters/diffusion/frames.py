"""Samples of a batch: the frames of clips one by one, what was found for each as one reduction of the clip, and the
reduction of some samples alone."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from tokred.core.reduction import Reduction
from tokred.core.tiles import Tile, TileReduction
from tokred.diffusion.site import SublayerPlace
from tokred.errors import UnsupportedModelError


def one_frame(place: SublayerPlace) -> SublayerPlace:
    """The place of a single frame of a clip."""
    return place if place.frames == 1 else place._replace(length=place.length // place.frames, frames=1)


def join_frames(reduction: Reduction, frames: int) -> Reduction:
    """One reduction of clips, joined from a reduction whose samples are their frames.

    Args:
        reduction: batch ``(B * frames,)``, of ``n`` tokens to ``m`` slots.
        frames: of a clip; they stand one after another.

    Returns:
        Batch ``(B,)``, of ``frames * n`` tokens to ``frames * m`` slots. Where all frames of all clips share their
        tensors (stride 0), so do all clips.

    Raises:
        UnsupportedModelError: the reduction is of another kind.
    """
    if frames == 1 or reduction.trivial:
        return reduction
    if isinstance(reduction, TileReduction):
        return reduction.join(frames)
    # Subclasses hold more than these index tensors, which would come out of `replace` with the shapes of frames.
    if type(reduction) is not Reduction:
        raise UnsupportedModelError(f"a {type(reduction).__name__} cannot be joined over the frames of a clip")
    b, n, m = reduction.batch[0] // frames, reduction.length, reduction.slots
    masks = [t if t is None else t.reshape(b, -1) for t in (reduction.weight, reduction.mask)]
    return replace(
        reduction,
        representative=_shifted(reduction.representative, b, frames, n),
        source=_shifted(reduction.source, b, frames, n),
        target=_shifted(reduction.target, b, frames, m),
        length=frames * n,
        weight=masks[0],
        mask=masks[1],
    )


def samples_of(reduction: Reduction, rows: Tensor) -> Reduction:
    """The reduction of some samples.

    Args:
        reduction: batch ``(B,)``.
        rows: ``(B',)`` int64, which samples.

    Raises:
        UnsupportedModelError: the reduction is of another kind.
    """
    if type(reduction) is not Reduction and not isinstance(reduction, TileReduction):
        raise UnsupportedModelError(f"a {type(reduction).__name__} cannot be cut to some samples of a batch")

    def take(t: Tensor) -> Tensor:
        # What all samples share stays shared: it is used faster.
        return t[:1].expand(len(rows), *t.shape[1:]) if t.stride(0) == 0 else t.index_select(0, rows)

    names = ("representative", "source", "target", "weight", "mask")
    found = {name: getattr(reduction, name) for name in names}
    parts: dict[str, Any] = {name: None if t is None else take(t) for name, t in found.items()}
    if isinstance(reduction, TileReduction):
        parts["tiles"] = tuple(Tile(tile.rows, take(tile.share), take(tile.weight)) for tile in reduction.tiles)
    return replace(reduction, **parts)


def _shifted(index: Tensor, batch: int, frames: int, step: int) -> Tensor:
    """``(B * F, K)`` to ``(B, F * K)``, each frame's numbers after those of the frame before; -1 stays."""
    offset = torch.arange(frames, device=index.device).unsqueeze(1) * step
    if index.stride(0) == 0:
        row = index[0] + offset
        return torch.where(index[0] < 0, index[0], row).reshape(1, -1).expand(batch, -1)
    rows = index.view(batch, frames, -1)
    return torch.where(rows < 0, rows, rows + offset).reshape(batch, -1)
