"""CAKE: layers share the cache by how spread out and restless their attention is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from tokred.core.method import Parameters
from tokred.core.registry import register
from tokred.kv.budgets import Preference
from tokred.kv.parts import Budget, Score, check_count
from tokred.kv.pooling import check_pool, pooled
from tokred.kv.preset import Preset
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
        return self.size

    @property
    def recent(self) -> int:
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


@register("cake")
@dataclass(frozen=True)
class CAKE(Preset):
    """Mean and variance of a window's attention as score; layers' budgets cascade while the prompt runs.

    Args:
        budget: the mean over layers, the window among it: a share in (0, 1], tokens, or bytes.
        tau1, tau2: how much entropy and variance of a layer count.
        gamma: how much the variance of a row counts.
        window: queries that choose, and newest tokens that stay.
        pool: width of the pooling, odd.

    Source: CAKE, ICLR 2025, sections 3.2 to 3.4; a clipped layer's excess is shared out until none is clipped (ours).
    """

    summary: ClassVar[str] = "mean and variance of attention; layers share by preference"
    source: ClassVar[str] = "CAKE, ICLR 2025"
    example: ClassVar[Parameters] = {"budget": 9, "window": 4, "pool": 3}

    budget: float | int | str = 0.5
    tau1: float = 1.6
    tau2: float = 0.4
    gamma: float = 200.0
    window: int = 32
    pool: int = 5

    def make_score(self) -> Score:
        return Dispersion(self.window, self.gamma, self.pool)

    def make_budget(self) -> Budget:
        return Preference(self.budget, self.tau1, self.tau2, self.window)
