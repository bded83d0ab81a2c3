"""Choices of recursions: capacities, the tokens that go on, and what routers learn by."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from tokred.core.checks import check_share


class Chosen(NamedTuple):
    """Tokens that go on.

    Attributes:
        at: ``(B, M)`` int64, which of the candidates, ascending; padding stands last.
        real: ``(B, M)`` bool, False where a sample has fewer.
        mask: ``(B, N)`` bool, the same as a mask of the candidates.
    """

    at: Tensor
    real: Tensor
    mask: Tensor


def capacities(recursions: int) -> tuple[float, ...]:
    """Share of the tokens that each recursion takes: ``(R - r) / R``."""
    return tuple((recursions - r) / recursions for r in range(recursions))


def check_capacity(shares: Sequence[float], recursions: int, kv: str = "cache") -> None:
    """Refuse capacities that nested sets of tokens cannot have.

    Raises:
        ValueError: naming them.
    """
    if len(shares) != recursions:
        raise ValueError(f"capacity must have {recursions} shares, one a recursion, got {tuple(shares)}")
    for share in shares:
        check_share(share, "capacity")
    if any(a < b for a, b in itertools.pairwise(shares)):
        raise ValueError(f"capacity must not increase from recursion to recursion, got {tuple(shares)}")
    if kv == "share" and shares[0] < 1:
        raise ValueError(
            f"with kv='share' recursion 0 makes the keys of all tokens: its capacity must be 1, got {shares[0]}"
        )


def warmed(shares: Sequence[float], step: int, steps: int) -> tuple[float, ...]:
    """Capacities in a step of a warm-up of so many: from all tokens, by half a cosine, to ``shares``."""
    left = 0.0 if step >= steps else 0.5 * (1 + math.cos(math.pi * step / steps))
    return tuple(share + (1 - share) * left for share in shares)


def some_of(mask: Tensor) -> Chosen:
    """The tokens of a ``(B, N)`` bool mask, ascending, on as many columns as the sample with most of them needs."""
    width = int(mask.sum(1).max())
    order = mask.to(torch.uint8).argsort(dim=1, descending=True, stable=True)[:, :width]
    return Chosen(order, mask.gather(1, order), mask)


def top(scores: Tensor, real: Tensor, lengths: Tensor, share: float) -> Chosen:
    """The ``max(1, floor(share * length))`` candidates of each sample with the highest scores; ties to the earlier one.

    Args:
        scores: ``(B, N)`` of the candidates.
        real: ``(B, N)`` bool.
        lengths: ``(B,)`` int64, tokens of each text, of which ``share`` is meant.
        share: in (0, 1].
    """
    # 1 / 3 of 9 is 3, whatever the machine's thirds are
    counts = (lengths.double() * share + 1e-6).floor().long().clamp(min=1)
    order = scores.detach().float().masked_fill(~real, -torch.inf).argsort(dim=1, descending=True, stable=True)
    first = torch.arange(scores.shape[1], device=scores.device) < counts.unsqueeze(1)
    return some_of(torch.zeros_like(real).scatter(1, order, first) & real)


def moved(x: Tensor, at: Tensor, real: Tensor, gate: Tensor | None, f: Callable[[Tensor], Tensor], add: bool) -> Tensor:
    """``x`` with the tokens that were chosen behind ``f``; the others are what they were.

    Args:
        x: ``(B, N, C)``.
        at: ``(B, M)`` int64, which tokens; ``real``, ``(B, M)`` bool, which of them are there.
        real: see there.
        gate: ``(B, M)`` factor of what ``f`` gives; None: one.
        f: of ``(B, M, C)``.
        add: ``x + gate * f``, rather than ``gate * f`` in place of ``x``.
    """
    rows = at.unsqueeze(2).expand(-1, -1, x.shape[2])
    h = x.gather(1, rows)
    y = f(h)
    y = y if gate is None else y * gate.unsqueeze(2)
    y = h + y if add else y
    return x.scatter(1, rows, torch.where(real.unsqueeze(2), y, h))


def selection_loss(logits: Tensor, chosen: Tensor, among: Tensor) -> Tensor:
    """Cross-entropy of a router's ``(B, N)`` logits and the selection, mean over the candidates ``among``."""
    each = F.binary_cross_entropy_with_logits(logits.float(), chosen.float(), reduction="none")
    return (each * among).sum() / among.sum().clamp(min=1)


def z_loss(logits: Tensor, among: Tensor) -> Tensor:
    """Mean square of the log of the summed exponentials of ``(B, N, R)`` logits, of the tokens ``among``."""
    each = logits.float().logsumexp(-1).square()
    return (each * among).sum() / among.sum().clamp(min=1)


def balance_loss(shares: Tensor, depths: Tensor, among: Tensor) -> Tensor:
    """``sum_r P_r f_r``: mean share of each depth times ``R`` times the share of tokens that chose it; 1 where even.

    Args:
        shares: ``(B, N, R)`` of the depths.
        depths: ``(B, N)`` int64, counted from 0.
        among: ``(B, N)`` bool, tokens that count.
    """
    count = among.sum().clamp(min=1)
    mean = (shares.float() * among.unsqueeze(2)).sum((0, 1)) / count
    return (mean * used(depths, among, shares.shape[2]) * shares.shape[2]).sum()


def used(depths: Tensor, among: Tensor, recursions: int) -> Tensor:
    """``(R,)`` share of the tokens ``among`` that chose each depth."""
    chose = F.one_hot(depths, recursions) * among.unsqueeze(2)
    return chose.sum((0, 1)) / among.sum().clamp(min=1)
