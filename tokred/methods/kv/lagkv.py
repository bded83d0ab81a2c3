"""LagKV: rows that stand out in the frame of the tokens that follow them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from tokred.core.method import Parameters
from tokred.core.registry import register
from tokred.kv.policy import BudgetLike, CachePolicy, Parts, as_budget, check_room
from tokred.kv.scores import LagRelative


@register("lagkv")
@dataclass(frozen=True)
class LagKV(CachePolicy):
    """Keys and values, scaled by the extremes of the next partition; sinks and the last partitions stay.

    Args:
        budget: what is kept: a share in (0, 1], tokens, bytes such as "64 MiB", or a budget of :mod:`tokred.kv`.
        lag: tokens of a partition.
        sinks: first tokens, which stay.
        cross_scoring: compare scores across partitions, instead of ranks within them.

    Source: LagKV, arXiv 2504.04704, section 3.
    """

    summary: ClassVar[str] = "rows that stand out against the next partition"
    source: ClassVar[str] = "LagKV, 2025 (arXiv 2504.04704)"
    example: ClassVar[Parameters] = {"budget": 9, "lag": 4, "sinks": 2}

    budget: BudgetLike = 0.5
    lag: int = 128
    sinks: int = 4
    cross_scoring: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "budget", as_budget(self.budget))
        check_room(self)

    @property
    def parts(self) -> Parts:
        """Scores against the next partition."""
        return Parts(LagRelative(self.lag, self.sinks, self.cross_scoring), as_budget(self.budget), sinks=self.sinks)
