"""KIVI: every row stays, old ones in few bits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from tokred.core.method import Parameters
from tokred.core.registry import register
from tokred.kv import stores
from tokred.kv.keeping import Keeping


@register("kivi")
@dataclass(frozen=True)
class KIVI(Keeping):
    """Nothing is evicted; all but the newest keys and values are rounded to a few bits, keys by channel.

    Args:
        bits: of keys and values: 1 to 8, or 16, which rounds nothing.
        k_bits, v_bits: of keys and of values, where they differ; None: ``bits``.
        group_size: numbers that share a scale.
        residual_length: newest tokens in full precision, a multiple of the group.

    Source: Liu et al., KIVI, ICML 2024 (arXiv 2402.02750).
    """

    summary: ClassVar[str] = "all rows in few bits, keys by channel, the newest as they came"
    source: ClassVar[str] = "Liu et al., ICML 2024 (arXiv 2402.02750)"
    example: ClassVar[Parameters] = {"bits": 4, "group_size": 4, "residual_length": 8}
    nothing: ClassVar[Parameters | None] = {"bits": 16}
    form = stores.KIVI

    bits: int = 2
    k_bits: int | None = None
    v_bits: int | None = None
    group_size: int = 32
    residual_length: int = 128
