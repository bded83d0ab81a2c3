"""MiKV: every row stays, those that matter in full precision."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from tokred.core.method import Parameters
from tokred.core.registry import register
from tokred.kv import stores
from tokred.kv.keeping import Keeping
from tokred.kv.parts import Score, as_part


@register("mikv")
@dataclass(frozen=True)
class MiKV(Keeping):
    """Nothing is evicted; the newest rows and those that received most attention stay as they are, others are rounded.

    Args:
        high: share of the rows in full precision, rounded up.
        low: bits of the others: 2, 3, 4, 8, or 16, which rounds nothing.
        group: channels that share a scale; None: half a head.
        balance: whether keys are balanced before they are rounded; None: if ``low`` is 2.
        recent: share of those in full precision that are the newest.
        block: rows that are rounded at a time.
        high_bits: of the rows that matter: 2, 4, 8, or 16, which rounds nothing.
        score: who matters, an object of :mod:`tokred.kv` or its name, such as "window", SnapKV's; None: attention,
            added up.

    Source: Yang et al., No Token Left Behind, arXiv 2402.18096.
    """

    summary: ClassVar[str] = "all rows, those that received little attention in few bits"
    source: ClassVar[str] = "Yang et al., arXiv 2402.18096"
    example: ClassVar[Parameters] = {"high": 0.3, "low": 4}
    nothing: ClassVar[Parameters | None] = {"high": 1.0}
    form = stores.MiKV

    high: float = 0.2
    low: int = 2
    group: int | None = None
    balance: bool | None = None
    recent: float = 0.5
    block: int = 1
    high_bits: int = 16
    score: Score | str | None = None

    def __post_init__(self) -> None:
        if self.score is not None:
            object.__setattr__(self, "score", as_part(self.score, Score, "score"))  # type: ignore[type-abstract]
        super().__post_init__()
