"""Selection of rows of a cache: the best of every sample and head, guarded rows first, ties to the older row."""

from __future__ import annotations

import torch
from torch import Tensor

from tokred.core.reduction import Reduction
from tokred.core.schedules import kept_ceil

# Rows to keep: one number a sample, or ``[B, Hk]`` int64, one a head.
Counts = tuple[int, ...] | Tensor


def kept_mask(score: Tensor, real: Tensor | None, guard: Tensor | None, counts: Counts) -> Tensor:
    """``[B, Hk, K]`` bool: the ``counts`` best rows of every sample and head.

    Args:
        score: ``[B, Hk, K]`` float, larger is kept; not NaN.
        real: ``[B, 1 or Hk, K]`` bool, False rows are never kept; None: all real.
        guard: ``[B or 1, 1 or Hk, K]`` bool, rows that are kept before all others; None: none.
        counts: rows to keep.
    """
    if guard is not None:
        score = score.masked_fill(guard, torch.inf)
    if real is not None:
        score = score.masked_fill(~real, -torch.inf)
    kept = _best(score, counts)
    return kept if real is None else kept & real


def _best(score: Tensor, counts: Counts) -> Tensor:
    """The mask of the ``counts`` largest, without sorting those that are not."""
    n = score.shape[-1]
    most = min(largest(counts), n)
    if most == 0:
        return torch.zeros_like(score, dtype=torch.bool)
    count = _column(counts, score.device).clamp(max=n).expand(*score.shape[:-1], 1)
    top = score.topk(most, -1, sorted=not equal(counts)).values
    last = top.amin(-1, keepdim=True) if equal(counts) else top.gather(-1, (count - 1).clamp(min=0))
    above, level = score > last, score == last
    left = count - above.sum(-1, keepdim=True)
    kept = above | (level & (level.cumsum(-1) <= left))
    return kept if equal(counts) else kept & (count > 0)


def rows_of(kept: Tensor, slots: int) -> tuple[Tensor, Tensor]:
    """The rows that ``kept`` ``[B, Hk, K]`` marks, in order.

    Args:
        kept: bool.
        slots: at least the largest number of marked rows of any head.

    Returns:
        ``[B, Hk, min(slots, K)]`` int64, and which of them are meant.
    """
    n = kept.shape[-1]
    slots = min(slots, n)
    rows = torch.arange(n, device=kept.device).expand_as(kept)
    place = torch.where(kept, kept.long().cumsum(-1) - 1, slots)
    index = torch.full((*kept.shape[:-1], slots + 1), n, device=kept.device).scatter_(-1, place, rows)[..., :slots]
    return index.clamp(max=n - 1), index < n


def largest(counts: Counts) -> int:
    """The largest count; for counts on a device this waits for it, since memory is to be allocated."""
    return int(counts.max()) if isinstance(counts, Tensor) else max(counts)


def ceils(n: Tensor, share: float) -> Tensor:
    """:func:`~tokred.core.schedules.kept_ceil` of each of ``n``, int64 of any shape; once for those that are equal."""
    distinct, place = torch.unique(n, return_inverse=True)
    return torch.tensor([kept_ceil(one, share) for one in distinct.tolist()], device=n.device)[place]


def equal(counts: Counts) -> bool:
    """True if all counts are known to be the same."""
    return not isinstance(counts, Tensor) and len(set(counts)) == 1


def keep(score: Tensor, real: Tensor | None, guard: Tensor | None, counts: Counts, *, exact: bool) -> Reduction:
    """The reduction that keeps the best rows and drops the others; arguments as in :func:`kept_mask`.

    Args:
        score, real, guard, counts: see there.
        exact: whether every head is known to have as many real rows as are counted.
    """
    n = score.shape[-1]
    if real is None and equal(counts) and largest(counts) == n - 1:
        return Reduction.keep(_without_one(score, guard), n)
    kept = kept_mask(score, real, guard, counts)
    index, meant = rows_of(kept, largest(counts))
    return Reduction.keep(index, score.shape[-1], None if exact and equal(counts) else meant)


def lowest(score: Tensor, guard: Tensor | None, slots: Tensor | None) -> Tensor:
    """``[B, Hk, 1]`` int64: the worst row, the newest of equals; what a step needs, without sorting.

    Args:
        score: ``[B, Hk, K]`` float, of rows that are all real.
        guard: as in :func:`kept_mask`.
        slots: ``[B, Hk, K]``, larger for newer rows; None: they stand in their order.
    """
    if guard is not None:
        score = score.masked_fill(guard, torch.inf)
    slots = torch.arange(score.shape[-1], device=score.device) if slots is None else slots
    return torch.where(score == score.amin(-1, keepdim=True), slots, -1).argmax(-1, keepdim=True)


def _without_one(score: Tensor, guard: Tensor | None) -> Tensor:
    """``[B, Hk, K - 1]``: all rows but the worst."""
    rows = torch.arange(score.shape[-1] - 1, device=score.device)
    return rows + (rows >= lowest(score, guard, None))


def _column(counts: Counts, device: torch.device) -> Tensor:
    if isinstance(counts, Tensor):
        return counts[:, :, None]
    return torch.tensor(counts, device=device)[:, None, None]
