"""DuoAttention: retrieval heads keep everything, streaming heads the first and the newest tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from tokred.core.method import Parameters
from tokred.core.registry import register
from tokred.kv.budgets import Split
from tokred.kv.parts import Budget, Score
from tokred.kv.preset import Preset
from tokred.methods.kv.streaming_llm import Recency


@register("duoattention")
@dataclass(frozen=True)
class DuoAttention(Preset):
    """A gate for each key/value head says which it is. Gates are trained once per model and given here.

    Args:
        gates: for each compressed layer a gate for each key/value head; None: nothing is evicted.
        sparsity: share of the heads that stream.
        sinks, recent: what a streaming head keeps.
        every: generated tokens between evictions.

    Source: Xiao et al., DuoAttention, ICLR 2025, section 2.
    """

    summary: ClassVar[str] = "streaming heads keep the first and the newest tokens"
    source: ClassVar[str] = "Xiao et al., ICLR 2025 (arXiv 2410.10819)"
    example: ClassVar[Parameters] = {"gates": ((0.9, 0.1), (0.4, 0.6), (0.7, 0.2)), "sinks": 2, "recent": 5}
    nothing: ClassVar[Parameters | None] = {"gates": None}
    usual: ClassVar[Parameters] = {"gates": ...}

    gates: tuple[tuple[float, ...], ...] | None = None
    sparsity: float = 0.5
    sinks: int = 64
    recent: int = 256
    every: int = 1

    def __post_init__(self) -> None:
        object.__setattr__(self, "gates", Split(self.gates, self.sparsity, self.sinks, self.recent).gates)
        super().__post_init__()

    def make_score(self) -> Score:
        return Recency()

    def make_budget(self) -> Budget:
        return Split(self.gates, self.sparsity, self.sinks, self.recent)
