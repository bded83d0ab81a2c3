"""Observed attention: the mean attention that each row has received."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from tokred.core.registry import register
from tokred.kv.policy import BudgetLike, CachePolicy, Parts, as_budget, check_room
from tokred.kv.scores import Observed


@register("observed_attention")
@dataclass(frozen=True)
class ObservedAttention(CachePolicy):
    """Accumulated attention, divided by the number of queries that could see the row.

    Args:
        budget: what is kept: a share in (0, 1], tokens, bytes such as "64 MiB", or a budget of :mod:`tokred.kv`.

    Source: NVIDIA/kvpress, ObservedAttentionPress; a relative of H2O.
    """

    summary: ClassVar[str] = "mean attention received from the queries that see a row"
    source: ClassVar[str] = "NVIDIA/kvpress, after Zhang et al., NeurIPS 2023"

    budget: BudgetLike = 0.5

    def __post_init__(self) -> None:
        object.__setattr__(self, "budget", as_budget(self.budget))
        check_room(self)

    @property
    def parts(self) -> Parts:
        """Mean attention, evicted at the end of the prompt."""
        return Parts(Observed(), as_budget(self.budget))
