"""Heads of a layer share its rows by their scores."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from tokred.core.checks import check_share
from tokred.core.schedules import kept
from tokred.kv.budgets.uniform import Uniform
from tokred.kv.parts import Budget, as_part
from tokred.kv.select import Counts, kept_mask
from tokred.kv.site import CacheSite, Place


@dataclass(frozen=True)
class Adaptive(Budget):
    """A layer's rows go to the highest scores of all its heads, but each head keeps a safe part for itself.

    Heads of a layer hold different numbers of rows; the layout of the cache says whether smaller heads leave empty
    rows.

    Args:
        amount: a share in (0, 1], tokens, or bytes.
        safe: share of its rows that each head keeps whatever the others score.
        layers: budget of the layers, an object or a name; None: uniform with ``amount``.

    Source: Feng et al., Ada-KV, arXiv 2407.11550.
    """

    name: ClassVar[str] = "adaptive"
    headwise: ClassVar[bool] = True

    amount: float | int | str = 0.5
    safe: float = 0.2
    layers: Budget | None = field(default=None)

    def __post_init__(self) -> None:
        check_share(self.safe, "safe", zero=True)
        layers = Uniform(self.amount) if self.layers is None else as_part(self.layers, Budget, "layers")
        if layers.deferred:
            raise ValueError(f"layers must be a budget that is known at once, got {layers.name!r}")
        object.__setattr__(self, "layers", layers)
        object.__setattr__(self, "amount", layers.amount)

    def of(self, amount: float | int | str) -> Adaptive:
        """This budget, with another amount for the layers."""
        assert self.layers is not None  # set above
        return Adaptive(safe=self.safe, layers=self.layers.of(amount))

    def share(self, n: int, place: Place | None, layer: int, depth: int) -> int:
        assert self.layers is not None  # set above
        return self.layers.share(n, place, layer, depth)

    def heads(self, site: CacheSite, score: Tensor, guard: Tensor | None, counts: tuple[int, ...]) -> Counts:
        """How many of the layer's best rows fall to each head."""
        b, hk, n = score.shape
        if all(c >= h for c, h in zip(counts, site.held, strict=True)):
            return counts
        least = [kept(c, self.safe) for c in counts]
        if self.safe > 0:
            least = [max(1, c) for c in least]
        real = site.real
        # A row that is safe or guarded is among the layer's best by definition.
        safe = kept_mask(score, real, guard, tuple(least))
        sure = safe if guard is None else safe | guard
        flat = score.masked_fill(sure, torch.inf)
        flat = flat if real is None else flat.masked_fill(~real, -torch.inf)
        total = tuple(c * hk for c in counts)
        chosen = kept_mask(flat.reshape(b, 1, hk * n), None, None, total)
        chosen = chosen.view(b, hk, n)
        chosen = chosen if real is None else chosen & real
        return chosen.sum(-1)
