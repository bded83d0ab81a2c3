"""Expected Attention: what queries to come would attend to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from tokred.core.method import Parameters
from tokred.core.registry import register
from tokred.kv.policy import BudgetLike, CachePolicy, Parts, as_budget, check_room
from tokred.kv.scores import Expected


@register("expected_attention")
@dataclass(frozen=True)
class ExpectedAttention(CachePolicy):
    """Queries are modelled as Gaussian and rotated to the positions that follow, so no question has to be at hand.

    Args:
        budget: what is kept: a share in (0, 1], tokens, bytes such as "64 MiB", or a budget of :mod:`tokred.kv`.
        future: positions ahead over which the rotation is averaged.
        sinks: first tokens, left out of the statistics, which stay.
        epsilon: added to the attention before the length of the value weighs it.

    Source: Devoto et al., Expected Attention, arXiv 2510.00636, section 3.
    """

    summary: ClassVar[str] = "the attention that queries to come are expected to give"
    source: ClassVar[str] = "Devoto et al., 2025 (arXiv 2510.00636)"
    example: ClassVar[Parameters] = {"budget": 9, "sinks": 2, "future": 16}

    budget: BudgetLike = 0.5
    future: int = 512
    sinks: int = 4
    epsilon: float = 0.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "budget", as_budget(self.budget))
        check_room(self)

    @property
    def parts(self) -> Parts:
        """Expected attention times the value's length."""
        return Parts(Expected(self.future, self.sinks, self.epsilon), as_budget(self.budget), sinks=self.sinks)
