"""The definition of the greedy choices in plain torch: also the path on a CPU."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def farthest_rows(distance: Tensor, first: Tensor, n: int) -> Tensor:
    """Rows picked one by one, each the one whose smallest distance to the picks is largest.

    Args:
        distance: ``(B, N, N)``, minus infinity on the diagonal.
        first: ``(B,)`` int64.
        n: how many, at least 1.

    Returns:
        ``(B, n)`` int64, in the order of the picks.
    """
    batch = torch.arange(distance.shape[0], device=distance.device)
    picks = [first]
    nearest = distance[batch, first]
    for _ in range(n - 1):
        picks.append(nearest.argmax(1))
        nearest = torch.minimum(nearest, distance[batch, picks[-1]])
    return torch.stack(picks, 1)


def determinant_rows(kernel: Tensor, gains: Tensor, least: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """:func:`determinant_steps` on a kernel ``(B, N, N)``."""
    batch = torch.arange(kernel.shape[0], device=kernel.device).unsqueeze(1)
    return determinant_steps(lambda pick: kernel[batch, pick], gains, least, n)


def determinant_steps(
    row_of: Callable[[Tensor], Tensor], gains: Tensor, least: Tensor, n: int
) -> tuple[Tensor, Tensor]:
    """Rows picked one by one, each the one that multiplies the determinant among the picks most.

    Args:
        row_of: from picks ``(B, 1)`` int64 to rows ``(B, 1, N)`` of a symmetric kernel.
        gains: ``(B, N)``, its diagonal.
        least: ``(B, N)``, gains that are no larger count as none.
        n: how many, at least 1.

    Returns:
        ``(B, n)`` int64 the picks in their order, and ``(B, n)`` what each multiplied the determinant with; once that
        is 0 for all rows, picks mean nothing.
    """
    b, length = gains.shape
    factor = gains.new_zeros(b, n, length)
    order, gained = [], []
    for t in range(n):
        best, pick = gains.max(1, keepdim=True)
        row = row_of(pick)
        if t:
            known = factor[:, :t]
            row = torch.baddbmm(row, known.gather(2, pick.unsqueeze(1).expand(-1, t, 1)).mT, known, alpha=-1)
        best = best.clamp_min(0)
        step = row.squeeze(1) * torch.where(best > 0, best.rsqrt(), 0)
        factor[:, t] = step
        gains = torch.addcmul(gains, step, step, value=-1)
        gains = torch.where(gains > least, gains, 0).scatter_(1, pick, -1)
        order.append(pick)
        gained.append(best)
    return torch.cat(order, 1), torch.cat(gained, 1)
