"""ZeroMerge: what falls out of a fixed cache is averaged into residual rows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from tokred.core.method import Parameters
from tokred.core.registry import register
from tokred.kv.fates import Merge
from tokred.kv.parts import Fate, Score, When
from tokred.kv.policy import BudgetLike, Parts
from tokred.kv.preset import KVPreset
from tokred.kv.site import CacheSite
from tokred.methods.kv.h2o import ColumnSum


@register("zeromerge")
@dataclass(frozen=True)
class ZeroMerge(KVPreset):
    """Residual rows, the best and the newest; each row that goes is merged, and its weight raises the logits.

    Args:
        budget: rows of a head: a share in (0, 1], tokens, or bytes.
        tail: newest rows that stay: a share of the budget, or a number, at least 2.
        dense: residual rows.
        alpha: factor of the log-weights in the attention; 1 makes rows of equal members exact.
        gamma: factor on earlier attention, for each step.
        metric: nearest residual row by "dot_product" or "l2".
        update: the score of a merged row is the "max" or the "sum".

    Source: Liu et al., ZeroMerge, arXiv 2503.10714, section 3; a short prompt merges at its first overflow (ours).
    """

    summary: ClassVar[str] = "rows that go are merged into residual rows, at every step"
    source: ClassVar[str] = "Liu et al., 2025 (arXiv 2503.10714)"
    example: ClassVar[Parameters] = {"budget": 9, "dense": 2, "tail": 3}

    budget: BudgetLike = 0.2
    tail: float | int = 0.1
    dense: int = 1
    alpha: float = 1.0
    gamma: float = 0.98
    metric: str = "dot_product"
    update: str = "max"

    def __post_init__(self) -> None:
        super().__post_init__()
        tokens = self.parts.budget.tokens
        least = sum(self.guards(0, tokens or 0)) + self.dense + 1
        if tokens is not None and tokens < least:
            raise ValueError(
                f"a budget of {tokens} tokens has no room for a best row besides {self.dense} residual rows and the "
                f"newest ones: it must be at least {least}"
            )

    def make_score(self) -> Score:
        return ColumnSum(self.gamma)

    def make_fate(self) -> Fate:
        return Merge(self.dense, self.alpha, self.metric, self.update)

    def make_when(self) -> When:
        return When(every=1)

    @property
    def parts(self) -> Parts:
        """The preset's, with the tail as newest tokens."""
        return super().parts._replace(recent=self.tail)

    def at_least(self, site: CacheSite, rows: tuple[int, ...]) -> tuple[int, ...]:
        """Residual rows, the tail, and one of the best."""
        found = super().at_least(site, rows)
        least = [sum(self.guards(n, r)) + self.dense + 1 for n, r in zip(site.lengths, rows, strict=True)]
        return tuple(min(n, max(r, few)) for n, r, few in zip(site.lengths, found, least, strict=True))

    def guards(self, n: int, rows: int) -> tuple[int, int]:
        """The tail, of at least two rows."""
        first, newest = super().guards(n, rows)
        return first, max(newest, 2)
