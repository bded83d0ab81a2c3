"""SqueezeAttention: layers whose attention changes little get few rows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from tokred.core.method import Parameters
from tokred.core.registry import register
from tokred.kv.budgets import Squeeze
from tokred.kv.parts import Budget, Score, as_part
from tokred.kv.preset import Preset


@register("squeezeattention")
@dataclass(frozen=True)
class SqueezeAttention(Preset):
    """Layers' budgets by the cosine of the stream before and after attention; any score inside a layer.

    Args:
        budget: the mean over layers: a share in (0, 1], tokens, or bytes.
        factor: what the least important group of layers keeps of the mean (the paper's p).
        groups: clusters of layers.
        score: the score inside a layer, an object of :mod:`tokred.kv` or its name.
        sinks: first tokens that stay.
        every: generated tokens between evictions; 0: only at the end of the prompt.

    Source: Wang et al., SqueezeAttention, ICLR 2025, section 3; the card's exact sums and exact clusters (ours).
    """

    summary: ClassVar[str] = "few rows for layers whose attention changes little"
    source: ClassVar[str] = "Wang et al., ICLR 2025 (arXiv 2404.04793)"
    example: ClassVar[Parameters] = {"budget": 9, "sinks": 2}

    budget: float | int | str = 0.2
    factor: float = 0.35
    groups: int = 3
    score: Score | str = "recency"
    sinks: int = 4
    every: int = 1

    def make_score(self) -> Score:
        return as_part(self.score, Score, "score")  # type: ignore[type-abstract]

    def make_budget(self) -> Budget:
        return Squeeze(self.budget, self.factor, self.groups, self.sinks + 1)
