"""CAKE: layers share the cache by how spread out and restless their attention is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from tokred.core.method import Parameters
from tokred.core.registry import register
from tokred.kv.budgets import Preference
from tokred.kv.policy import CachePolicy, Parts, check_room
from tokred.kv.scores import Dispersion


@register("cake")
@dataclass(frozen=True)
class CAKE(CachePolicy):
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

    def __post_init__(self) -> None:
        Preference(self.budget, self.tau1, self.tau2, self.window)
        check_room(self)

    @property
    def parts(self) -> Parts:
        """Dispersion scores, layers by preference."""
        budget = Preference(self.budget, self.tau1, self.tau2, self.window)
        return Parts(Dispersion(self.window, self.gamma, self.pool), budget)
