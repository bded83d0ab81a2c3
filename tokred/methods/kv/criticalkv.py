"""CriticalKV: a score, weighted by what each value adds to the output."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from tokred.core.method import Parameters
from tokred.core.registry import register
from tokred.kv.parts import Score, as_part
from tokred.kv.policy import BudgetLike, CachePolicy, Parts, as_budget, check_room
from tokred.kv.scores import Critical


@register("criticalkv")
@dataclass(frozen=True)
class CriticalKV(CachePolicy):
    """Half of the budget by a score alone, the rest by score times the value's norm after the output projection.

    Args:
        budget: what is kept: a share in (0, 1], tokens, bytes such as "64 MiB", or a budget of :mod:`tokred.kv`.
        score: the score that is weighted, an object of :mod:`tokred.kv` or its name.
        first: share of the budget that the score alone gives away.
        epsilon: added to the score before it is weighted.

    Source: Feng et al., CriticalKV, arXiv 2502.03805, algorithm 1.
    """

    summary: ClassVar[str] = "a score, weighted by the value's share of the output"
    source: ClassVar[str] = "Feng et al., 2025 (arXiv 2502.03805)"
    example: ClassVar[Parameters] = {"budget": 9, "score": {"part": "window", "size": 4, "pool": 3}}

    budget: BudgetLike = 0.5
    score: Score | str = "window"
    first: float = 0.5
    epsilon: float = 1e-4

    def __post_init__(self) -> None:
        object.__setattr__(self, "score", as_part(self.score, Score, "score"))  # type: ignore[type-abstract]
        object.__setattr__(self, "budget", as_budget(self.budget))
        check_room(self)

    @property
    def parts(self) -> Parts:
        """The wrapped score, evicted at the end of the prompt."""
        inner = as_part(self.score, Score, "score")  # type: ignore[type-abstract]
        return Parts(Critical(inner, self.first, self.epsilon), as_budget(self.budget))
