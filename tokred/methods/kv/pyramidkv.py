"""PyramidKV: SnapKV's scores, more rows in early layers than in late ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from tokred.core.method import Parameters
from tokred.core.registry import register
from tokred.kv.budgets import Pyramid
from tokred.kv.parts import Budget, Score
from tokred.kv.preset import Preset
from tokred.methods.kv.snapkv import Window


@register("pyramidkv")
@dataclass(frozen=True)
class PyramidKV(Preset):
    """Window scores under a budget that falls linearly with depth.

    Args:
        budget: the mean over layers: a share in (0, 1], tokens, or bytes.
        beta: how steep the pyramid is.
        window: queries that choose, and newest tokens that stay.
        pool: width of the pooling, odd.

    Source: Cai et al., PyramidKV, arXiv 2406.02069, section 3, in the form of NVIDIA/kvpress.
    """

    summary: ClassVar[str] = "window scores, more rows in early layers"
    source: ClassVar[str] = "Cai et al., 2024 (arXiv 2406.02069)"
    example: ClassVar[Parameters] = {"budget": 9, "window": 2, "pool": 3, "beta": 4}

    budget: float | int | str = 0.5
    beta: int = 20
    window: int = 64
    pool: int = 5

    def make_score(self) -> Score:
        return Window(self.window, self.pool)

    def make_budget(self) -> Budget:
        return Pyramid(self.budget, self.beta, self.window)
