"""KeyDiff: rows whose keys differ from the mean key stay."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from tokred.core.method import Parameters
from tokred.core.registry import register
from tokred.kv.parts import When
from tokred.kv.policy import BudgetLike, CachePolicy, Parts, as_budget, check_room
from tokred.kv.scores import KeyDifference


@register("keydiff")
@dataclass(frozen=True)
class KeyDiff(CachePolicy):
    """Distinctive keys; needs no query, and its paper's use is chunk by chunk under a limit of memory.

    Args:
        budget: what is kept: a share in (0, 1], tokens, bytes such as "64 MiB", or a budget of :mod:`tokred.kv`.
        turns: evict at the end of each chunk of a prompt and of later turns (the paper's use).

    Source: Park et al., KeyDiff, arXiv 2504.15364, section 3.
    """

    summary: ClassVar[str] = "rows whose keys differ most from the mean key"
    source: ClassVar[str] = "Park et al., 2025 (arXiv 2504.15364)"
    example: ClassVar[Parameters] = {"budget": 9, "turns": False}

    budget: BudgetLike = 0.5
    turns: bool = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "budget", as_budget(self.budget))
        check_room(self)

    @property
    def parts(self) -> Parts:
        """Cosine with the mean key, chunk by chunk."""
        return Parts(KeyDifference(), as_budget(self.budget), when=When(turns=self.turns))
