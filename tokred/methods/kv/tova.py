"""TOVA: the last query decides, at every step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from tokred.core.registry import register
from tokred.kv.parts import When
from tokred.kv.policy import BudgetLike, CachePolicy, Parts, as_budget, check_room
from tokred.kv.scores import LastQuery


@register("tova")
@dataclass(frozen=True)
class TOVA(CachePolicy):
    """All heads of a layer keep the rows that the newest query attends to; the lowest goes at every step.

    Args:
        budget: what is kept: a share in (0, 1], tokens, bytes such as "64 MiB", or a budget of :mod:`tokred.kv`.
        every: generated tokens between evictions.

    Source: Oren et al., Transformers are Multi-State RNNs, section 3.3.
    """

    summary: ClassVar[str] = "the last query decides for all heads, at every step"
    source: ClassVar[str] = "Oren et al., 2024 (arXiv 2401.06104)"

    budget: BudgetLike = 0.5
    every: int = 1

    def __post_init__(self) -> None:
        object.__setattr__(self, "budget", as_budget(self.budget))
        check_room(self)

    @property
    def parts(self) -> Parts:
        """The last query's attention, at every step."""
        return Parts(LastQuery(), as_budget(self.budget), when=When(every=self.every))
