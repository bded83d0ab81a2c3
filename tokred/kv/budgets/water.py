"""``Water``: bits instead of rows. Every row and every channel of a head gets as many as it is worth; none is gone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tokred.core.checks import check_share
from tokred.kv import newest
from tokred.kv.parts import Budget, check_amount, check_count
from tokred.kv.select import Counts
from tokred.kv.site import CacheSite
from tokred.kv.stores.zones import BITS, CHANNELS, LEVELS

WHOLE = LEVELS[-1]
# Bits, and the square error that is left when numbers are rounded to so many, as a share of what it is without any.
Table = tuple[tuple[int, float], ...]
VALUES: Table = ((2, 0.312), (4, 0.0138), (8, 4.8e-5), (16, 0.0))
KEYS: Table = ((2, 0.277), (4, 0.011), (8, 6.1e-5))


@dataclass(frozen=True)
class Water(Budget):
    """Bits are shared out among the rows of a head, each where it takes away most error, and then among the channels.

    A head has as many as ``amount`` rows take in 16 bits, ``k_share`` of them for keys. Rows are worth their score, and
    those without a bit are evicted; channels of the keys of those that stay are worth the product of their mean squares
    in queries and keys. Rows that are never evicted get 16 bits before all others. Bytes of scales are not counted.

    Args:
        amount: a share in (0, 1], or tokens.
        k_share: of the bits that are for keys, between 0 and 1.
        v_table, k_table: bits that there are, 2, 4, 8 and 16, and the error of each. Those on no straight way down are
            passed over.
        window: newest queries whose squares are taken.

    Source: Zhang et al., RDKV (arXiv 2605.08317); shared out exactly, and never more than there is.
    """

    name: ClassVar[str] = "water"
    headwise: ClassVar[bool] = True
    levels: ClassVar[bool] = True
    reads: ClassVar[frozenset[str]] = frozenset({"q", "k"})
    why_no_limit: ClassVar[str | None] = "it counts bits of codes, and not the bytes of their scales"

    amount: float | int | str = 0.1
    k_share: float = 0.5
    v_table: Table = VALUES
    k_table: Table = KEYS
    window: int = 32

    def __post_init__(self) -> None:
        check_amount(self.amount)
        if isinstance(self.amount, str):
            raise ValueError(
                f"the budget water counts bits of codes, and not the bytes of their scales: give a share (0.1) or "
                f"tokens (1024) instead of {self.amount!r}"
            )
        check_share(self.k_share, "k_share")
        if self.k_share == 1:
            raise ValueError("k_share must lie in (0, 1), got 1: values need bits too")
        check_count(self.window, "window", 1)
        for name in ("v_table", "k_table"):
            table = tuple((bits, float(error)) for bits, error in getattr(self, name))
            if not table or any(bits not in LEVELS[1:] for bits, _ in table) or sorted(set(table)) != list(table):
                raise ValueError(f"{name} must be pairs of bits (of 2, 4, 8, 16, rising) and error, got {table!r}")
            object.__setattr__(self, name, table)

    @property
    def queries(self) -> int:
        return self.window

    def heads(self, site: CacheSite, score: Tensor, guard: Tensor | None, counts: tuple[int, ...]) -> Counts:
        """Rows of each head that have a bit; how many each has is left in the state of the rows."""
        real = score.new_ones((), dtype=torch.bool) if site.real is None else site.real
        real = real.expand_as(score)
        whole = torch.tensor([c >= n for c, n in zip(counts, site.lengths, strict=True)], device=score.device)
        whole = whole.view(-1, 1, 1)
        rows = torch.tensor(counts, device=score.device, dtype=torch.float64).view(-1, 1, 1)
        sure = torch.zeros_like(real) if guard is None else guard.expand_as(score) & real
        # Never evicted: paid first.
        bits = (2 * WHOLE * (1 - self.k_share) * rows - WHOLE * sure.sum(-1, keepdim=True)).clamp(min=0)
        given = water(score.masked_fill(~real | sure, -1.0), self.v_table, bits)
        given = torch.where(sure | (whole & real), WHOLE, given)
        kept = (given > 0).sum(-1)
        site.rows[BITS] = given.float()
        each = 2 * WHOLE * self.k_share * rows / kept.clamp(min=1).unsqueeze(-1)
        worth = self.channels(site)
        among = water(worth, self.k_table, each * worth.shape[-1])
        site.notes[CHANNELS] = torch.where(whole, WHOLE, among)
        return kept

    def channels(self, site: CacheSite) -> Tensor:
        """``[B, Hk, D]`` float32: mean squares of a channel in the newest queries of the group, times those in keys."""
        q, votes = newest.queries(site, self.window)
        squares = q.float().square()
        if votes is not None:
            squares = squares * votes[:, None, :, None]
        asked = squares.sum(2) / (q.shape[2] if votes is None else votes.sum(1).clamp(min=1)[:, None, None])
        b, h, d = asked.shape
        k, real = site.k.float().square(), site.real
        found = k.mean(2) if real is None else (k * real[..., None]).sum(2) / real.sum(2).clamp(min=1)[..., None]
        return asked.view(b, site.heads, h // site.heads, d).mean(2) * found


def water(worth: Tensor, table: Table, total: Tensor) -> Tensor:
    """Bits ``[..., n]`` int64: as many for each as bring the sum of ``worth * error`` down, within a total.

    Steps are taken in the order of what they gain for a bit; of equals those of the lower index, and the lower of one,
    come first. The first that does not fit is the end.

    Args:
        worth: ``[..., n]`` float; those below 0 get none.
        table: see :class:`Water`.
        total: ``[..., 1]`` bits.
    """
    steps = hull(table)
    size = torch.tensor([to - since for since, to, _ in steps], device=worth.device)
    slope = torch.tensor([gain for *_, gain in steps], dtype=torch.float64, device=worth.device)
    gains = (worth.double().unsqueeze(-1) * slope).flatten(-2)
    gains, order = gains.sort(dim=-1, descending=True, stable=True)
    cost = size.repeat(worth.shape[-1])[order]
    taken = (cost.cumsum(-1) <= total) & (gains >= 0)
    item = order // len(steps)
    return torch.zeros(worth.shape, dtype=torch.long, device=worth.device).scatter_add(-1, item, cost * taken)


def hull(table: Table) -> list[tuple[int, int, float]]:
    """Steps of a table, from no bit and error 1 on: bits before, bits after, and what the step gains for a bit."""
    points, found, at = [(0, 1.0), *table], [], 0
    while at < len(points) - 1:
        bits, error = points[at]
        gains = [(error - e) / (b - bits) for b, e in points[at + 1 :]]
        step = max(range(len(gains)), key=lambda i: (gains[i], i))
        if gains[step] < 0:
            break
        found.append((bits, points[at + 1 + step][0], gains[step]))
        at += 1 + step
    return found
