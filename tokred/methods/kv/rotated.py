"""Rotated formats under the names of their papers: every row stays, old ones rotated and in few bits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from tokred.core.method import Parameters
from tokred.core.registry import register
from tokred.kv import stores
from tokred.kv.keeping import Keeping


@register("oscar")
@dataclass(frozen=True)
class Oscar(Keeping):
    """Nothing is evicted; all but the first and newest keys and values are rotated, clipped, and rounded to two bits.

    Args:
        bits: of a number: 1 to 8, or 16, which rounds nothing.
        group: channels that share a scale; a head that is smaller has one.
        clip_k, clip_v: share of the numbers of a row that are left as they are; 0: no clipping.
        sinks, recent: first and newest tokens in full precision.
        block: tokens that are rounded at a time.

    Source: Zhou et al., OSCAR, arXiv 2605.17757, section 3, with Hadamard's rotation.
    """

    summary: ClassVar[str] = "all rows in few bits, rotated, sinks and the newest as they came"
    source: ClassVar[str] = "Zhou et al., arXiv 2605.17757"
    example: ClassVar[Parameters] = {"bits": 4, "sinks": 2, "recent": 4, "block": 2}
    nothing: ClassVar[Parameters | None] = {"bits": 16}
    form = stores.Oscar

    bits: int = 2
    group: int = 128
    clip_k: float = 0.96
    clip_v: float = 0.92
    sinks: int = 64
    recent: int = 256
    block: int = 64


@register("turbo")
@dataclass(frozen=True)
class Turbo(Keeping):
    """Nothing is evicted; keys become a length and a rotated direction of few levels, values are rounded by token.

    Args:
        bits: of keys and values: 2, 3 or 4, or 16, which rounds nothing.
        v_bits: of values, where they differ: 1 to 8, or 16; None: ``bits``.
        norm_correction: whether rounded directions are brought to length one.

    Source: Zandieh et al., TurboQuant, ICLR 2026 (arXiv 2504.19874), without its residual, as vLLM ships it.
    """

    summary: ClassVar[str] = "all rows in few bits, keys as rotated directions"
    source: ClassVar[str] = "Zandieh et al., ICLR 2026 (arXiv 2504.19874)"
    example: ClassVar[Parameters] = {"bits": 4}
    nothing: ClassVar[Parameters | None] = {"bits": 16}
    form = stores.Turbo

    bits: int = 3
    v_bits: int | None = None
    norm_correction: bool = True
