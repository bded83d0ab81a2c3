"""NSNQuant: every row stays, windows of them looked up in one codebook."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from tokred.core.method import Parameters
from tokred.core.registry import register
from tokred.kv import stores
from tokred.kv.keeping import Keeping


@register("nsnquant")
@dataclass(frozen=True)
class NSNQuant(Keeping):
    """Nothing is evicted; windows of keys and values are normalised, shifted, normalised, and looked up in a codebook.

    Args:
        bits: of the codes, a number: 1, 2, or 16, which rounds nothing.
        window: rows that share a mean; fewer are in full precision.
        side_bits: of lengths and means: 4, or 16.
        o_group: channels of a mean that share a scale.
        pre_rope: whether keys are turned back before their mean is taken; models whose rotation is not known need
            False.

    Source: Son et al., NSNQuant, NeurIPS 2025 (arXiv 2505.18231).
    """

    summary: ClassVar[str] = "all rows in one or two bits, windows looked up in a codebook of noise"
    source: ClassVar[str] = "Son et al., NeurIPS 2025 (arXiv 2505.18231)"
    example: ClassVar[Parameters] = {"window": 16}
    nothing: ClassVar[Parameters | None] = {"bits": 16}
    form = stores.NSNQuant

    bits: int = 2
    window: int = 64
    side_bits: int = 4
    o_group: int = 32
    pre_rope: bool = True
