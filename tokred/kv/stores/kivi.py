"""KIVI: keys in few bits per channel, values per token, and the newest tokens as they came."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from tokred.core.checks import check_count
from tokred.kv.stores.codecs import Affine, AsTheyCome, check_bits, group_for
from tokred.kv.stores.coded import Coded, Form
from tokred.kv.stores.sides import Window

BITS = (1, 2, 3, 4, 5, 6, 7, 8, 16)


@dataclass(frozen=True)
class KIVI(Coded):
    """Keys are rounded in groups of tokens, one channel at a time; values in groups of channels, one token at a time.

    The newest 0 to ``residual_length - 1`` keys and exactly ``residual_length`` values are in full precision. A prompt
    attends, and is judged, before its rows are rounded. Queries are answered without unpacking where a kernel can.

    Args:
        bits: of keys and values: 1 to 8, or 16, which rounds nothing.
        k_bits, v_bits: of keys and of values, where they differ; None: ``bits``.
        group_size: numbers that share a scale. Where it does not divide a head, its largest divisor below does, for
            values.
        residual_length: tokens in full precision, a multiple of the group.

    Source: Liu et al., KIVI, ICML 2024 (arXiv 2402.02750).
    """

    name: ClassVar[str] = "kivi"

    bits: int = 2
    k_bits: int | None = None
    v_bits: int | None = None
    group_size: int = 32
    residual_length: int = 128

    def __post_init__(self) -> None:
        check_bits(self.bits, "bits", BITS)
        for name in ("k_bits", "v_bits"):
            value = getattr(self, name)
            if value is not None:
                check_bits(value, name, BITS)
        check_count(self.group_size, "group_size", 2)
        check_count(self.residual_length, "residual_length", self.group_size)
        if self.residual_length % self.group_size:
            raise ValueError(
                f"residual_length must be a multiple of group_size={self.group_size}, got {self.residual_length}"
            )

    def forms(self, keys: Tensor, values: Tensor) -> tuple[Form, Form]:
        k_bits = self.bits if self.k_bits is None else self.k_bits
        v_bits = self.bits if self.v_bits is None else self.v_bits
        rows, group = self.residual_length, group_for(values.shape[-1], self.group_size, "value heads")
        key = AsTheyCome() if k_bits == 16 else Affine(k_bits, self.group_size, tokens=True)
        value = AsTheyCome() if v_bits == 16 else Affine(v_bits, group)
        return Form(key, Window(0, rows)), Form(value, Window(rows, 1))
