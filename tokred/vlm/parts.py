"""Reductions of samples that were decided apart, put together as a batch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from tokred.reduction import Reduction
from tokred.vlm.overlap import OverlapReduction


def stacked(parts: Sequence[Reduction]) -> Reduction:
    """Samples that were decided apart as one batch: shorter ones are padded behind and masked.

    Args:
        parts: of batch 1 or more, all of the same length; those that merge do so in the same mode.

    Raises:
        ValueError: lengths or modes differ.
    """
    modes = {(p.mode, p.by_size, p.inherit) for p in parts if p.source.shape[1]} or {("keep", True, True)}
    lengths = {p.length for p in parts}
    if len(modes) > 1 or len(lengths) > 1:
        raise ValueError(f"only reductions of one length and mode can be stacked, got {lengths} and {modes}")
    slots, sources = (max(sizes) for sizes in zip(*((p.slots, p.source.shape[1]) for p in parts), strict=True))
    uneven = any(p.slots < slots or p.mask is not None for p in parts)
    weighted = any(p.weight is not None for p in parts)
    weights = [_ones(p) if p.weight is None else p.weight for p in parts] if weighted else None
    (mode, by_size, inherit), (length,) = modes.pop(), lengths
    whole = Reduction(
        torch.cat([F.pad(p.representative, (0, slots - p.slots)) for p in parts]),
        torch.cat([F.pad(p.source, (0, sources - p.source.shape[1])) for p in parts]),
        torch.cat([F.pad(p.target, (0, sources - p.target.shape[1]), value=-1) for p in parts]),
        length,
        weight=None if weights is None else torch.cat(weights),
        mask=torch.cat([F.pad(_real(p), (0, slots - p.slots)) for p in parts]) if uneven else None,
        mode=mode,
        by_size=by_size,
        inherit=inherit,
        trivial=all(p.trivial for p in parts),
    )
    if any(isinstance(p, OverlapReduction) for p in parts):
        return OverlapReduction.stack(whole, parts)
    return whole


def _ones(part: Reduction) -> Tensor:
    return torch.ones(part.representative.shape[0], part.length, device=part.representative.device)


def _real(part: Reduction) -> Tensor:
    return torch.ones_like(part.representative, dtype=torch.bool) if part.mask is None else part.mask
