"""Random eviction: what any choice has to beat."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from tokred.core.registry import register
from tokred.kv.policy import BudgetLike, CachePolicy, Parts, as_budget, check_room
from tokred.kv.scores import Random


@register("random_evict")
@dataclass(frozen=True)
class RandomEvict(CachePolicy):
    """Random rows stay, the same for all heads and samples.

    Args:
        budget: what is kept: a share in (0, 1], tokens, bytes such as "64 MiB", or a budget of :mod:`tokred.kv`.
        seed: which random choice.
        sinks, recent: first and newest tokens that stay.

    Source: baseline.
    """

    summary: ClassVar[str] = "random rows of the cache (the floor)"
    source: ClassVar[str] = "baseline"

    budget: BudgetLike = 0.5
    seed: int = 0
    sinks: int = 0
    recent: int = 1

    def __post_init__(self) -> None:
        object.__setattr__(self, "budget", as_budget(self.budget))
        check_room(self)

    @property
    def parts(self) -> Parts:
        """Random scores."""
        return Parts(Random(self.seed), as_budget(self.budget), sinks=self.sinks, recent=self.recent)
