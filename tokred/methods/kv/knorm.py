"""KNorm: rows with small keys stay."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from tokred.core.registry import register
from tokred.kv.parts import When
from tokred.kv.policy import BudgetLike, CachePolicy, Parts, as_budget, check_room
from tokred.kv.scores import KeyNorm


@register("knorm")
@dataclass(frozen=True)
class KNorm(CachePolicy):
    """Keys of small length receive much attention; needs no query, so it can act on chunks.

    Args:
        budget: what is kept: a share in (0, 1], tokens, bytes such as "64 MiB", or a budget of :mod:`tokred.kv`.
        turns: evict again at the end of later turns, or of each chunk of a prompt.

    Source: Devoto et al., arXiv 2406.11430, section 3.
    """

    summary: ClassVar[str] = "rows with the shortest keys"
    source: ClassVar[str] = "Devoto et al., EMNLP 2024 (arXiv 2406.11430)"

    budget: BudgetLike = 0.5
    turns: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "budget", as_budget(self.budget))
        check_room(self)

    @property
    def parts(self) -> Parts:
        """Length of the key."""
        return Parts(KeyNorm(), as_budget(self.budget), when=When(turns=self.turns))
