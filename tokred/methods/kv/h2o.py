"""H2O: the rows that have received most attention, and the newest."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from tokred.core.registry import register
from tokred.kv.parts import When
from tokred.kv.policy import BudgetLike, CachePolicy, Parts, as_budget, check_room
from tokred.kv.scores import ColumnSum


@register("h2o")
@dataclass(frozen=True)
class H2O(CachePolicy):
    """Heavy hitters by accumulated attention, and a recent window; one row goes for each that comes.

    Args:
        budget: what is kept: a share in (0, 1], tokens, bytes such as "64 MiB", or a budget of :mod:`tokred.kv`.
            It counts the prompt's tokens, and is held during generation.
        recent: share of the kept rows that are the newest (a whole number: tokens).
        every: generated tokens between evictions.

    Source: Zhang et al., H2O, NeurIPS 2023, section 4; scores are summed over the heads of a group (ours).
    """

    summary: ClassVar[str] = "accumulated attention and the newest tokens, at every step"
    source: ClassVar[str] = "Zhang et al., NeurIPS 2023 (arXiv 2306.14048)"

    budget: BudgetLike = 0.5
    recent: float | int = 0.5
    every: int = 1

    def __post_init__(self) -> None:
        object.__setattr__(self, "budget", as_budget(self.budget))
        check_room(self)

    @property
    def parts(self) -> Parts:
        """Accumulated attention, at every step."""
        return Parts(ColumnSum(), as_budget(self.budget), when=When(every=self.every), recent=self.recent)
