"""RPC: every so many generated tokens, the generated part of the cache shrinks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from tokred.core.method import Parameters
from tokred.core.registry import register
from tokred.kv.budgets import Growing
from tokred.kv.parts import When
from tokred.kv.policy import CachePolicy, Parts
from tokred.kv.scores import Judges
from tokred.kv.site import CacheSite


@register("rpc")
@dataclass(frozen=True)
class RPC(CachePolicy):
    """Reasoning path compression: the newest queries judge the generated rows; the prompt is never touched.

    Args:
        period: generated tokens between evictions.
        window: queries that judge, and newest tokens that stay.
        ratio: one of so many generated rows survives a period.
        pool: width of the pooling, odd.
        pooling: "avg", "max" or "none".
        aggregation: "all" heads of a layer keep the same rows, or each "group" its own.

    Source: Song et al., Reasoning Path Compression, NeurIPS 2025, section 4; exactly the newest distinct queries judge.
    """

    summary: ClassVar[str] = "every so many generated tokens, the newest queries judge the generated rows"
    source: ClassVar[str] = "Song et al., NeurIPS 2025 (arXiv 2505.13866)"
    example: ClassVar[Parameters] = {"period": 4, "window": 2, "ratio": 2, "pool": 3}
    nothing: ClassVar[Parameters | None] = None

    period: int = 1024
    window: int = 32
    ratio: int = 4
    pool: int = 7
    pooling: str = "avg"
    aggregation: str = "all"

    def __post_init__(self) -> None:
        if self.window >= self.period:
            raise ValueError(f"window must be smaller than period, got {self.window} and {self.period}")
        Growing(self.period, self.ratio, self.window)
        Judges(self.window, self.pool, self.pooling, self.aggregation)

    @property
    def parts(self) -> Parts:
        """Judgements of the newest queries, every ``period`` tokens."""
        score = Judges(self.window, self.pool, self.pooling, self.aggregation)
        budget = Growing(self.period, self.ratio, self.window)
        return Parts(score, budget, when=When(prefill=False, every=self.period, start=self.window))

    def guarded(self, site: CacheSite, rows: tuple[int, ...]) -> Tensor:
        """The prompt, and the window."""
        return (site.token < site.column(site.prompt)) | site.stands_behind(self.window)
