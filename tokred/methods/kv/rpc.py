"""RPC: every so many generated tokens, the generated part of the cache shrinks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from tokred.core.method import Parameters
from tokred.core.registry import register
from tokred.kv.budgets import Growing
from tokred.kv.parts import Budget, Score, When, check_count
from tokred.kv.pooling import check_pool, pooled
from tokred.kv.preset import Preset
from tokred.kv.site import CacheSite


@dataclass(frozen=True)
class Judges(Score):
    """The newest queries judge the generated rows alone: prompt and window are no candidates.

    Args:
        size: queries that judge, and newest tokens that are kept.
        pool: width of the pooling, odd; 1: none.
        pooling: "avg" or "max".
        aggregation: "all": one list for the layer, the mean over all heads; "group": one for each key/value head.

    Source: Song et al., Reasoning Path Compression, NeurIPS 2025 (arXiv 2505.13866).
    """

    name: ClassVar[str] = "judges"
    reads: ClassVar[frozenset[str]] = frozenset({"q", "k"})
    why_no_chunks: ClassVar[str | None] = "its score judges generated rows alone"

    size: int = 32
    pool: int = 7
    pooling: str = "avg"
    aggregation: str = "all"

    def __post_init__(self) -> None:
        check_count(self.size, "the window", 1)
        check_pool(self.pool, self.pooling)
        if self.aggregation not in ("all", "group"):
            raise ValueError(f"aggregation must be 'all' or 'group', got {self.aggregation!r}")

    @property
    def window(self) -> int:
        return self.size

    @property
    def recent(self) -> int:
        return self.size

    def __call__(self, site: CacheSite) -> Tensor:
        """Attention shared out among the candidates, summed over the judges."""
        candidates = ~site.stands_behind(self.size) & (site.token >= site.column(site.prompt))
        candidates = candidates.expand(site.shape[0], -1, -1)
        received = site.columns(self.size, candidates=candidates, causal=False)
        if self.aggregation == "all":
            received = received.mean(1, keepdim=True).expand_as(received)
        return pooled(site, received, self.pool, self.pooling)


@register("rpc")
@dataclass(frozen=True)
class RPC(Preset):
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
        super().__post_init__()

    def make_score(self) -> Score:
        return Judges(self.window, self.pool, self.pooling, self.aggregation)

    def make_budget(self) -> Budget:
        return Growing(self.period, self.ratio, self.window)

    def make_when(self) -> When:
        return When(prefill=False, every=self.period, start=self.window)

    def guarded(self, site: CacheSite, rows: tuple[int, ...]) -> Tensor:
        """The prompt, and the window."""
        return (site.token < site.column(site.prompt)) | site.stands_behind(self.window)
