"""Mustafar: every row stays, without its smallest numbers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from tokred.core.method import Parameters
from tokred.core.registry import register
from tokred.kv import stores
from tokred.kv.keeping import Keeping


@register("mustafar")
@dataclass(frozen=True)
class Mustafar(Keeping):
    """No token is evicted; every key and value but the newest loses a share of its numbers, the smallest in size.

    Args:
        k_sparsity, v_sparsity: share of the numbers of a key and of a value that go, rounded down.
        window: newest tokens that stay whole.

    Source: Joo et al., MUSTAFAR, NeurIPS 2025 (arXiv 2505.22913), magnitudes per token.
    """

    summary: ClassVar[str] = "all rows, each without its smallest numbers"
    source: ClassVar[str] = "Joo et al., NeurIPS 2025 (arXiv 2505.22913)"
    example: ClassVar[Parameters] = {"window": 4}
    nothing: ClassVar[Parameters | None] = {"k_sparsity": 0.0, "v_sparsity": 0.0}
    form = stores.Mustafar

    k_sparsity: float = 0.5
    v_sparsity: float = 0.5
    window: int = 32
