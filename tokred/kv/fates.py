"""Fates of rows that are not kept: they are evicted, or merged into what is kept."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tokred.core.reduction import Reduction
from tokred.kernels.gather_rows import gather_rows
from tokred.kv.parts import Fate, check_count
from tokred.kv.select import Counts, equal, keep, kept_mask, largest, rows_of
from tokred.kv.site import CacheSite

RESIDUAL = "residual"
# Where a row stands in the layout of the paper, from 1 on; 0: among the newest, which have no slot yet.
SLOT = "slot"
Choice = tuple[Tensor, Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class Evict(Fate):
    """They are dropped, and their memory is freed."""

    name: ClassVar[str] = "evict"

    def reduce(self, site: CacheSite, score: Tensor, guard: Tensor | None, counts: Counts) -> Reduction:
        """Keep the best rows and drop the others."""
        return keep(score, site.real, guard, counts, exact=site.slots is None or site.real is None)


@dataclass(frozen=True)
class Merge(Fate):
    """They are averaged into a few residual rows, whose logits are raised by the log of their weight.

    The first time, what is not kept is cut into ``dense`` runs, each of which becomes one row: the plain mean of its
    keys and values. Later, each row that goes is averaged into the residual row nearest to it, by weight. Of equal rows
    the one in the lowest slot goes, and its slot is taken by the row that leaves the newest ones.

    Args:
        dense: residual rows of each head, within its budget.
        scale: factor of the log-weights in the attention (the paper's alpha).
        metric: nearest by "dot_product" or "l2".
        update: the score of a merged row is the "max" or the "sum" of its members'.

    Source: Liu et al., ZeroMerge, arXiv 2503.10714.
    """

    name: ClassVar[str] = "merge"
    merges: ClassVar[bool] = True

    dense: int = 1
    scale: float = 1.0
    metric: str = "dot_product"
    update: str = "max"

    def __post_init__(self) -> None:
        check_count(self.dense, "dense", 1)
        if self.scale < 0:
            raise ValueError(f"scale must not be negative, got {self.scale}")
        if self.metric not in ("dot_product", "l2"):
            raise ValueError(f"metric must be 'dot_product' or 'l2', got {self.metric!r}")
        if self.update not in ("max", "sum"):
            raise ValueError(f"update must be 'max' or 'sum', got {self.update!r}")

    @property
    def alpha(self) -> float:
        return self.scale

    @property
    def merge_score(self) -> str:
        return self.update

    @property
    def room(self) -> int:
        return self.dense

    def reduce(self, site: CacheSite, score: Tensor, guard: Tensor | None, counts: Counts) -> Reduction:
        """The reduction: rows that stay, and the residual row that each of the others goes into.

        Marks the residual rows in ``site.rows``; the marks travel with the rows.
        """
        marks = site.rows.get(RESIDUAL)
        if marks is None or site.real is not None:
            kept, into, residual, slots = self._first(site, score, guard, counts)
        if marks is not None:
            later = self._later(site, score, guard, counts, marks > 0)
            # A short sample of a batch begins to merge later than the others.
            begun = None if site.real is None else (marks > 0).any(-1, keepdim=True)
            kept, into, residual, slots = (
                later
                if begun is None
                else tuple(map(lambda x, y: torch.where(begun, x, y), later, (kept, into, residual, slots)))
            )
        site.rows[RESIDUAL], site.rows[SLOT] = residual.float(), slots
        index, meant = rows_of(kept, largest(counts))
        slot = kept.long().cumsum(-1) - 1
        target = torch.where(into < 0, -1, slot.gather(-1, into.clamp(min=0)))
        source = torch.arange(kept.shape[-1], device=kept.device).expand_as(kept)
        mask = None if site.real is None and equal(counts) else meant
        return Reduction(index, source, target, kept.shape[-1], mask=mask, mode="mean")

    def _first(self, site: CacheSite, score: Tensor, guard: Tensor | None, counts: Counts) -> Choice:
        """Cut what is not among the best into runs; the last member of a run stands for it.

        Returns:
            Rows that stay, the row that each of the others goes into (or -1), the residual rows, and slots.
        """
        dense, n = self.dense, score.shape[-1]
        best = counts - dense if isinstance(counts, Tensor) else tuple(c - dense for c in counts)
        top = kept_mask(score, site.real, guard, best)
        rest = ~top if site.real is None else ~top & site.real
        order, total = rest.long().cumsum(-1) - 1, rest.long().sum(-1, keepdim=True)
        each, more = total // dense, total % dense
        long = more * (each + 1)
        run = torch.where(order < long, order // (each + 1), more + (order - long) // each.clamp(min=1))
        run = torch.where(rest, run.clamp(max=dense - 1), dense)
        position = torch.arange(n, device=run.device).expand_as(run)
        last = torch.full((*run.shape[:-1], dense + 1), -1, device=run.device)
        last = last.scatter_reduce(-1, run, position, "amax")[..., :dense]
        ends = torch.zeros((*run.shape[:-1], n + 1), dtype=torch.bool, device=run.device)
        ends = ends.scatter(-1, torch.where(last < 0, n, last), True)[..., :n]
        into = last.gather(-1, run.clamp(max=dense - 1))
        # Where every row of the rest is a run of its own, nothing has been merged yet.
        merged = total > dense
        slots = _first_slots(site, guard, top | ends)
        return top | ends, torch.where(rest & ~ends & merged, into, -1), ends & merged, slots

    def _later(self, site: CacheSite, score: Tensor, guard: Tensor | None, counts: Counts, residual: Tensor) -> Choice:
        """Merge every row that is not among the best into the nearest residual row."""
        sure = residual if guard is None else residual | guard
        slots = site.rows.get(SLOT)
        if slots is None:
            slots = torch.arange(1, score.shape[-1] + 1, device=score.device).expand_as(score).float()
        # Of equals the first in an order are kept: those in the highest slots.
        order = slots.masked_fill(slots == 0, torch.inf).sort(dim=-1, descending=True, stable=True).indices
        real = None if site.real is None else site.real.expand_as(score).gather(-1, order)
        chosen = kept_mask(score.gather(-1, order), real, sure.expand_as(score).gather(-1, order), counts)
        kept = torch.empty_like(chosen).scatter_(-1, order, chosen)
        gone = ~kept if site.real is None else ~kept & site.real
        slots = _later_slots(slots, gone, kept & ~residual)
        return kept, torch.where(gone, self._nearest(site.k, residual), -1), residual, slots

    def _nearest(self, k: Tensor, residual: Tensor) -> Tensor:
        """``[B, Hk, K]``: the residual row nearest to each row; ties to the older one."""
        count = self.dense
        index = rows_of(residual, count)[0]
        keys = k.float()
        dense = gather_rows(keys, index)
        if self.metric == "dot_product":
            near = keys @ dense.mT
        else:
            near = -(keys.square().sum(-1, keepdim=True) - 2 * keys @ dense.mT + dense.square().sum(-1).unsqueeze(2))
        found = residual.gather(-1, index)
        near = near.masked_fill(~found.unsqueeze(2), -torch.inf)
        return index.gather(-1, near.argmax(-1))


def _first_slots(site: CacheSite, guard: Tensor | None, kept: Tensor) -> Tensor:
    """Slots in the order of the rows, for all but the newest that are never evicted; of those the oldest has one."""
    slots = kept.cumsum(-1).float() * kept
    if guard is None:
        return slots
    free = ~guard.expand_as(kept) if site.real is None else ~guard & site.real
    newest = guard & ~(free.flip(-1).cumsum(-1).flip(-1) > 0)
    return slots.masked_fill(newest & (newest.cumsum(-1) > 1), 0.0)


def _later_slots(slots: Tensor, gone: Tensor, kept: Tensor) -> Tensor:
    """The slots of rows that go are taken by the oldest rows that have none yet."""
    freed = torch.where(gone & (slots > 0), slots, torch.inf).sort(dim=-1).values
    waiting = kept & (slots == 0)
    given = freed.gather(-1, (waiting.cumsum(-1) - 1).clamp(min=0))
    return torch.where(waiting & given.isfinite(), given, slots)
