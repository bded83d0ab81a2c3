"""A budget that all layers and heads share: rows compete by their scores."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tokred.core.schedules import kept
from tokred.kv.allocators import Allocator, Grant, Judged, Streams
from tokred.kv.parts import Budget, check_amount
from tokred.kv.select import kept_mask
from tokred.kv.site import CacheSite, Place


@dataclass(frozen=True)
class Global(Budget):
    """The highest scores of all layers and heads of a sample stay, so that layers and heads keep different numbers.

    For scores that mean the same everywhere, such as attention. Until the last layer has attended nothing is evicted.

    Args:
        amount: a share in (0, 1], tokens of a layer and head on average, or bytes.

    Source: Kim et al., KVzip, NeurIPS 2025 (arXiv 2505.23416).
    """

    name: ClassVar[str] = "global"
    deferred: ClassVar[bool] = True
    headwise: ClassVar[bool] = True

    amount: float | int | str = 0.5

    def __post_init__(self) -> None:
        check_amount(self.amount)

    def start(self, depth: int) -> Allocator:
        return Together(self)

    def total(self, n: int, place: Place | None, depth: int) -> int:
        """Rows of all layers and heads together of a sample of ``n`` tokens; a share evicts ``int`` of the rest."""
        heads = 1 if place is None else place.heads
        if isinstance(self.amount, float):
            every = n * depth * heads
            return every - kept(every, 1 - self.amount)
        return depth * heads * min(n, self.mean(n, place, depth))

    def together(
        self, sites: Sequence[CacheSite], scores: Sequence[Tensor], guards: Sequence[Tensor]
    ) -> list[Tensor] | None:
        """Rows of each head, ``[B, Hk]`` for each layer; None where everything stays.

        Args:
            sites, scores, guards: of each layer, where it lies: scores ``[B, Hk, K]``, and bool that broadcasts to
                them.
        """
        place, depth, here = sites[0].place, len(sites), scores[0].device
        totals = [self.total(n, place, depth) for n in self.length(sites[0])]
        flat, sure = [], []
        for site, score, guard in zip(sites, scores, guards, strict=True):
            real = site.real
            guard = guard.expand_as(score)
            flat.append((score if real is None else score.masked_fill(~real, -torch.inf)).flatten(1).to(here))
            sure.append((guard if real is None else guard & real).flatten(1).to(here))
        score, guard = torch.cat(flat, 1), torch.cat(sure, 1)
        held = [sum(site.held[b] for site in sites) * sites[0].heads for b in range(len(totals))]
        if all(t >= h for t, h in zip(totals, held, strict=True)):
            return None
        count = torch.tensor(totals, device=here)[:, None]
        count = torch.maximum(count, guard.sum(1, keepdim=True))
        chosen = kept_mask(score[:, None], (score > -torch.inf)[:, None], guard[:, None], count)[:, 0]
        parts = torch.split(chosen, [part.shape[1] for part in flat], 1)
        return [part.view(s.shape).sum(-1).to(s.device) for part, s in zip(parts, scores, strict=True)]


class Together(Allocator):
    """Every layer waits until all have been judged, and then their scores are compared.

    Args:
        budget: that compares them.
    """

    def __init__(self, budget: Global) -> None:
        self.budget = budget

    def after_layer(self, layer: Judged) -> Mapping[int, Grant]:
        """No grants yet: layers compete, so all have to be known."""
        return {}

    def after_forward(self, layers: Sequence[Judged], streams: Streams) -> Mapping[int, Grant]:
        """Rows of every head of every layer, unless everything stays."""
        sites, depth = [layer.site for layer in layers], len(layers)
        rows = [tuple(self.budget.mean(n, s.place, depth) for n in self.budget.length(s)) for s in sites]
        guards = [layer.guarded(r) for layer, r in zip(layers, rows, strict=True)]
        counts = self.budget.together(sites, [layer.score for layer in layers], guards)
        if counts is None:
            return {}
        return {s.layer: Grant(r, c) for s, r, c in zip(sites, rows, counts, strict=True)}
