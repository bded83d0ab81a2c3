"""Parts of video methods: how much a place changes from frame to frame, and choices within frames."""

from __future__ import annotations

import torch
from torch import Tensor

from tokred.core.selection import ranked
from tokred.vlm.tools.greedy import directions


def apart(a: Tensor, b: Tensor) -> Tensor:
    """``(...,)`` float32: one less the cosine of rows ``(..., C)``; of a zero row 1.

    Made from the difference of the directions, so that like rows give 0 and near-copies keep their order, which one
    less a rounded cosine loses.
    """
    u, v = directions(a), directions(b)
    # A zero row has no direction: its cosine with any counts as 0.
    lost = ((u == 0).all(-1).float() + (v == 0).all(-1).float()) / 2
    return (u - v).square().sum(-1) / 2 + lost


def changes(x: Tensor) -> Tensor:
    """``(B, T - 1, N)`` float32: :func:`apart` of each place and the same place of the frame before.

    Args:
        x: ``(B, T, N, C)``.
    """
    return apart(x[:, 1:], x[:, :-1])


def within(scores: Tensor) -> Tensor:
    """``(B, T, N)`` int64: the rank of each token in its frame, 0 for the highest score; ties to the lower place.

    Args:
        scores: ``(B, T, N)``.
    """
    order = ranked(scores)
    place = torch.arange(scores.shape[-1], device=scores.device).expand_as(order)
    return torch.empty_like(order).scatter_(-1, order, place)


def chosen(stays: Tensor, count: int) -> Tensor:
    """``(B, count)`` int64 ascending: where ``(B, n)`` bool is True, so often in every row."""
    return stays.to(torch.uint8).argsort(dim=1, descending=True, stable=True)[:, :count]
