"""Mean and variance of the attention of a window."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from tokred.kv.parts import Score, check_count
from tokred.kv.scores.window import check_pool, pooled
from tokred.kv.site import CacheSite


@dataclass(frozen=True)
class Dispersion(Score):
    """Mean of a window's attention plus ``gamma`` times its variance, pooled: rows that matter now and then count.

    Args:
        size: queries of the window.
        gamma: factor of the variance (unbiased).
        pool: width of the pooling, odd.

    Source: CAKE, ICLR 2025.
    """

    name: ClassVar[str] = "dispersion"
    reads: ClassVar[frozenset[str]] = frozenset({"q", "k"})

    size: int = 32
    gamma: float = 200.0
    pool: int = 5

    def __post_init__(self) -> None:
        check_count(self.size, "the window", 2)
        check_pool(self.pool, "avg")

    @property
    def window(self) -> int:
        """The queries."""
        return self.size

    @property
    def recent(self) -> int:
        """The window's tokens."""
        return self.size

    def __call__(self, site: CacheSite) -> Tensor:
        """Pooled per head, then averaged over the query heads."""
        found = site.statistics(self.size)
        m = self.size
        variance = (found.sum_squares - found.sum**2 / m) / (m - 1)
        score = found.sum / m + self.gamma * variance
        b, h, n = score.shape
        score = score.view(b, site.heads, h // site.heads, n).mean(2)
        return pooled(site, score.masked_fill(site.stands_behind(self.size), 0.0), self.pool, "avg")
