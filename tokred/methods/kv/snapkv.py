"""SnapKV: the last queries of the prompt choose what stays."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from tokred.core.method import Parameters
from tokred.core.registry import register
from tokred.kv.parts import When
from tokred.kv.policy import BudgetLike, CachePolicy, Parts, as_budget, check_room
from tokred.kv.scores import Window


@register("snapkv")
@dataclass(frozen=True)
class SnapKV(CachePolicy):
    """Rows that the window's queries attend to, pooled so that neighbours stay together, and the window itself.

    Args:
        budget: what is kept: a share in (0, 1], tokens, bytes such as "64 MiB", or a budget of :mod:`tokred.kv`.
        window: queries that choose, and newest tokens that stay.
        pool: width of the pooling, odd.
        pooling: "avg" or "max".
        turns: choose again at the end of later turns, or of each chunk of a prompt.

    Source: Li et al., SnapKV, NeurIPS 2024, section 4; means instead of sums over the window, which rank alike.
    """

    summary: ClassVar[str] = "the last queries of the prompt choose, pooled"
    source: ClassVar[str] = "Li et al., NeurIPS 2024 (arXiv 2404.14469)"
    example: ClassVar[Parameters] = {"budget": 9, "window": 4, "pool": 3}

    budget: BudgetLike = 0.5
    window: int = 64
    pool: int = 5
    pooling: str = "avg"
    turns: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "budget", as_budget(self.budget))
        check_room(self)

    @property
    def parts(self) -> Parts:
        """Window scores, evicted at the end of the prompt."""
        return Parts(Window(self.window, self.pool, self.pooling), as_budget(self.budget), when=When(turns=self.turns))
