"""The newest queries as judges of all earlier rows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from tokred.kv.newest import as_they_stand, ordered
from tokred.kv.parts import Score, check_count
from tokred.kv.site import CacheSite

POOLINGS = ("avg", "max", "none")


@dataclass(frozen=True)
class Window(Score):
    """Mean attention of the last ``window`` queries, pooled along the sequence; the window itself is kept.

    Args:
        size: queries of the window.
        pool: width of the pooling, odd; 1: none.
        pooling: "avg" (zeros outside counted) or "max".
        group: "mean", "sum" or "max" over the query heads of a key/value head, after pooling.

    Source: Li et al., SnapKV, NeurIPS 2024 (arXiv 2404.14469).
    """

    name: ClassVar[str] = "window"
    reads: ClassVar[frozenset[str]] = frozenset({"q", "k"})

    size: int = 64
    pool: int = 5
    pooling: str = "avg"
    group: str = "mean"

    def __post_init__(self) -> None:
        check_count(self.size, "the window", 1)
        check_pool(self.pool, self.pooling)
        if self.group not in ("sum", "mean", "max"):
            raise ValueError(f"group must be 'sum', 'mean' or 'max', got {self.group!r}")

    @property
    def window(self) -> int:
        """The queries."""
        return self.size

    @property
    def recent(self) -> int:
        """The window's tokens."""
        return self.size

    def __call__(self, site: CacheSite) -> Tensor:
        """Columns before the window, pooled."""
        inside = site.stands_behind(self.size)
        # Averages may be taken over heads first, which is the smaller work; maxima may not.
        late = self.pooling == "max" and self.pool > 1
        received = site.columns(self.size, group="none" if late else self.group) / self.size
        if not late:
            return pooled(site, received.masked_fill(inside, 0.0), self.pool, self.pooling)
        b, h, n = received.shape
        grouped = received.view(b, site.heads, h // site.heads, n).masked_fill(inside.unsqueeze(2), 0.0)
        found = [pooled(site, grouped[:, :, i], self.pool, self.pooling) for i in range(h // site.heads)]
        stacked = torch.stack(found)
        return {"sum": stacked.sum(0), "mean": stacked.mean(0), "max": stacked.amax(0)}[self.group]


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
        """The judges."""
        return self.size

    @property
    def recent(self) -> int:
        """The judges' own tokens."""
        return self.size

    def __call__(self, site: CacheSite) -> Tensor:
        """Attention shared out among the candidates, summed over the judges."""
        candidates = ~site.stands_behind(self.size) & (site.token >= site.column(site.prompt))
        candidates = candidates.expand(site.shape[0], -1, -1)
        received = site.columns(self.size, candidates=candidates, causal=False)
        if self.aggregation == "all":
            received = received.mean(1, keepdim=True).expand_as(received)
        return pooled(site, received, self.pool, self.pooling)


def pooled(site: CacheSite, values: Tensor, width: int, pooling: str) -> Tensor:
    """``[B, Hk, K]`` pooled along the rows, with stride one; zeros outside count."""
    if width == 1 or pooling == "none":
        return values
    if site.order is None:
        # Padding, if any, stands before the real rows and holds zeros, as the outside does.
        return pooled_columns(values, width, pooling)
    assert site.real is not None  # or there would be no order
    found = ordered(values.masked_fill(~site.real, 0.0), site.order)
    return as_they_stand(pooled_columns(found, width, pooling), site.order)


def pooled_columns(x: Tensor, width: int, pooling: str) -> Tensor:
    """``[B, H, N]`` pooled along the last dimension, with stride one; zeros outside count."""
    if width == 1 or pooling == "none":
        return x
    if pooling == "avg":
        return F.avg_pool1d(x, width, 1, width // 2)
    return F.max_pool1d(x, width, 1, width // 2)


def check_pool(width: int, pooling: str) -> None:
    """Refuse an even width or an unknown pooling.

    Raises:
        ValueError: naming what was given.
    """
    check_count(width, "pool", 1)
    if width % 2 == 0:
        raise ValueError(f"pool must be odd, got {width}")
    if pooling not in POOLINGS:
        raise ValueError(f"pooling must be one of {', '.join(POOLINGS)}, got {pooling!r}")
