"""ShadowKV: every row stays, most of a prompt as a shadow from which chunks come back when a query asks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from tokred.core.method import Parameters
from tokred.core.registry import register
from tokred.kv import stores
from tokred.kv.keeping import Keeping


@register("shadowkv")
@dataclass(frozen=True)
class ShadowKV(Keeping):
    """Nothing is forgotten; a prompt's keys are held in low rank, its values in host memory, and each query chooses
    chunks.

    Args:
        budget: tokens that a query chooses, a multiple of the chunk.
        rank: of the keys of all heads side by side.
        chunk: tokens that come together.
        outliers: chunks of each head that stay as they came.
        local: newest chunks that stay as they came.
        offload: whether values wait in host memory.
        refresh: rows behind the prompt with which, at the end of a later turn, all become a shadow anew; 0: never.

    Source: Sun et al., ShadowKV, ICML 2025 (arXiv 2410.21465), section 4.
    """

    summary: ClassVar[str] = "keys in low rank, values in host memory, chunks by query"
    source: ClassVar[str] = "Sun et al., ICML 2025 (arXiv 2410.21465)"
    example: ClassVar[Parameters] = {"budget": 4, "rank": 8, "chunk": 2, "outliers": 1, "local": 1}
    nothing: ClassVar[Parameters | None] = {"outliers": 1 << 20}
    form = stores.ShadowKV

    budget: int = 2048
    rank: int = 160
    chunk: int = 8
    outliers: int = 48
    local: int = 4
    offload: bool = True
    refresh: int = 0
