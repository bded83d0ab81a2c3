"""Rows in given proportions, layer by layer."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any, ClassVar

from tokred.kv.budgets.squeeze import spread_exactly
from tokred.kv.parts import Budget, check_amount
from tokred.kv.site import Place


@dataclass(frozen=True)
class Layered(Budget):
    """Each layer's rows are in proportion to a weight of its own; the mean over layers is the budget's.

    What a layer would get beyond the tokens that there are goes to the others.

    Args:
        amount: a share in (0, 1], tokens, or bytes; of all layers together as :class:`Uniform`'s.
        weights: one number of at least 0 for each compressed layer, on any scale; None: all the same.

    Source: ours; :func:`tokred.tune` finds weights.
    """

    name: ClassVar[str] = "layered"
    why_no_limit: ClassVar[str | None] = "layers that hold more than the mean do so while a chunk's rows come in"

    amount: float | int | str = 0.5
    weights: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        check_amount(self.amount)
        if self.weights is None:
            return
        given: Any = self.weights
        if isinstance(given, str) or not hasattr(given, "__iter__"):
            raise TypeError(f"weights must be one number for each layer, got {given!r}")
        found = []
        for i, weight in enumerate(given):
            if isinstance(weight, bool) or not isinstance(weight, int | float):
                raise TypeError(f"weights[{i}] must be a number, got {weight!r}")
            if not 0 <= weight < math.inf:
                raise ValueError(f"weights[{i}] must be at least 0 and finite, got {weight}")
            found.append(float(weight))
        if not sum(found) > 0:
            raise ValueError("weights must not all be 0: no layer would keep anything")
        object.__setattr__(self, "weights", tuple(found))

    def check(self, depth: int) -> None:
        """One weight a layer."""
        if self.weights is not None and len(self.weights) != depth:
            raise ValueError(f"weights has {len(self.weights)} numbers, but {depth} layers are compressed")

    def share(self, n: int, place: Place | None, layer: int, depth: int) -> int:
        """Rows of ``layer`` of ``depth``; of a depth that the weights are not for, the mean."""
        if self.full:
            return n
        if self.weights is None or len(self.weights) != depth:
            return self.mean(n, place, depth)
        return _divided(self.weights, min(self.total(n, place, depth), n * depth), n)[layer]


@functools.lru_cache(maxsize=256)
def _divided(weights: tuple[float, ...], total: int, most: int) -> tuple[int, ...]:
    """Rows of all layers, at least one and at most ``most`` each; kept, since every layer asks at every eviction."""
    scale = total / sum(weights)
    return spread_exactly([w * scale for w in weights], total, 1, most)
