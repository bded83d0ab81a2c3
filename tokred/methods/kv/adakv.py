"""Ada-KV: the heads of a layer share its rows by their scores."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from tokred.core.method import Parameters
from tokred.core.registry import register
from tokred.kv.budgets import Adaptive
from tokred.kv.parts import Budget, Score, as_part
from tokred.kv.policy import as_budget
from tokred.kv.preset import KVPreset


@register("adakv")
@dataclass(frozen=True)
class AdaKV(KVPreset):
    """Any score, but the layer's rows go to the best of all its heads; each head keeps a safe share of its own.

    Args:
        budget: the mean over heads: a share in (0, 1], tokens, bytes, or a budget of :mod:`tokred.kv` for the layers.
        safe: share of its rows that each head keeps whatever the others score.
        score: the score, an object of :mod:`tokred.kv` or its name.

    Source: Feng et al., Ada-KV, arXiv 2407.11550, section 4.
    """

    summary: ClassVar[str] = "heads share their layer's rows by their scores"
    source: ClassVar[str] = "Feng et al., NeurIPS 2025 (arXiv 2407.11550)"
    example: ClassVar[Parameters] = {"budget": 9, "score": {"part": "window", "size": 4, "pool": 3}}

    safe: float = 0.2
    score: Score | str = "window"

    def make_score(self) -> Score:
        return as_part(self.score, Score, "score")  # type: ignore[type-abstract]

    def make_budget(self) -> Budget:
        return Adaptive(safe=self.safe, layers=as_budget(self.budget))
