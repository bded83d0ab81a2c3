"""Selection: which tokens stay, by their importance. Ties go to the lower index, everywhere."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def ranked(scores: Tensor) -> Tensor:
    """Positions by descending score ``(..., N)``; equal scores in ascending position."""
    return scores.argsort(dim=-1, descending=True, stable=True)


def besides(rows: Tensor, n: int) -> Tensor:
    """``(B, n - k)`` int64 ascending: the positions below ``n`` that are not among the ``(B, k)`` of ``rows``."""
    stands = torch.zeros(rows.shape[0], n, dtype=torch.uint8, device=rows.device).scatter(1, rows, 1)
    return stands.argsort(dim=1, stable=True)[:, : n - rows.shape[1]]


def protected_rows(b: int, n: int, prefix: int, suffix: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Positions ``(B, P)`` and ``(B, S)`` of the leading and the trailing protected tokens."""
    lead = torch.arange(prefix, device=device).expand(b, -1)
    tail = torch.arange(n - suffix, n, device=device).expand(b, -1)
    return lead, tail


def hash_uniform(n: int, seed: int, layer: int, step: int = 0, device: torch.device | str | None = None) -> Tensor:
    """``(n,)`` float64 numbers in [0, 1) that depend only on the arguments and the position.

    Counter-based, so the global generator is never touched, the same call gives the same numbers on every device, and
    every sample of a batch sees the same ones (a sample's result does not depend on its batch-mates).
    """
    mask = 0xFFFFFFFF
    key = (seed * 0x9E3779B1 + layer * 0x85EBCA6B + step * 0xC2B2AE35 + 0x27D4EB2F) & mask
    h = (torch.arange(n, device=device, dtype=torch.int64) * 0x9E3779B1 + key) & mask
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        h = ((h ^ (h >> shift)) * factor) & mask
    return (h ^ (h >> 16)).double() / 2**32


def random_order(
    b: int, n: int, seed: int, layer: int, step: int = 0, device: torch.device | str | None = None
) -> Tensor:
    """``(B, n)`` the same pseudo-random permutation of ``range(n)`` for every sample, see :func:`hash_uniform`."""
    return ranked(hash_uniform(n, seed, layer, step, device)).expand(b, -1)


def largest(weight: Tensor, count: int | Tensor) -> Tensor:
    """``(B, N)`` bool: the ``count`` (a number, or ``(B, 1)``) largest weights of each row, ties to the lower index."""
    place = torch.arange(weight.shape[1], device=weight.device)
    taken = (place < count).expand_as(weight)
    return torch.zeros_like(taken).scatter(1, ranked(weight), taken)


def best_among(scores: Tensor, among: Tensor, counts: Sequence[int]) -> Tensor:
    """``(B, N)`` bool: so many of the highest scores of each sample among some positions; ties to the lower one.

    Args:
        scores: ``(B, N)``.
        among: ``(B, N)`` bool.
        counts: of each sample; where fewer are among them, it is all of these.
    """
    limit = torch.tensor(counts, device=scores.device).unsqueeze(1)
    return largest(scores.masked_fill(~among, -torch.inf), limit) & among


def highest(scores: Tensor, k: int, count: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
    """Positions of the ``k`` highest scores, in ascending order; ties to the lower position.

    Args:
        scores: ``(B, N)``; where samples have padding, it scores lowest.
        k: how many, at most ``N``.
        count: ``(B, 1)`` how many of the ``k`` a sample has; None: all.

    Returns:
        ``(B, k)`` int64; and where ``count`` is given, ``(B, k)`` bool, False on padding, which stands last and repeats
        position 0.
    """
    rows = ranked(scores)[:, :k]
    if count is None:
        return rows.sort(dim=1).values, None
    n = scores.shape[1]
    rows = torch.where(torch.arange(k, device=rows.device) < count, rows, n).sort(dim=1).values
    real = rows < n
    return torch.where(real, rows, 0), real
