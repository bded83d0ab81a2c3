"""Mustafar: of every key and value its largest numbers, with a bit for each number that says which they are."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tokred.core.checks import check_count
from tokred.kernels.coded_rows import LARGEST, CodedRows, coded_scores, coded_sums, in_place
from tokred.kv.stores.codecs import AsTheyCome, Codec, Parts, why_no_gradient
from tokred.kv.stores.coded import Coded, Form
from tokred.kv.stores.sides import Window


@dataclass(frozen=True)
class Mustafar(Coded):
    """No token goes, and of each but the newest the smallest numbers do: a share of every key and of every value.

    What is left is in the model's own type. Numbers of equal size stay in the order of their channels. Steps restore a
    few rows at a time.

    Args:
        k_sparsity, v_sparsity: share of the numbers of a key and of a value that go, rounded down.
        window: newest tokens that stay whole.

    Source: Joo et al., MUSTAFAR, NeurIPS 2025 (arXiv 2505.22913), magnitudes per token.
    """

    name: ClassVar[str] = "mustafar"
    reads: ClassVar[frozenset[str]] = frozenset()

    k_sparsity: float = 0.5
    v_sparsity: float = 0.5
    window: int = 32

    def __post_init__(self) -> None:
        for name in ("k_sparsity", "v_sparsity"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1:
                raise ValueError(f"{name} must lie in [0, 1), got {value!r}")
        check_count(self.window, "window")

    def forms(self, keys: Tensor, values: Tensor) -> tuple[Form, Form]:
        return self._form(keys.shape[-1], self.k_sparsity), self._form(values.shape[-1], self.v_sparsity)

    def _form(self, width: int, sparsity: float) -> Form:
        keep = width - math.floor(round(sparsity * width, 9))
        return Form(AsTheyCome() if keep == width else Largest(keep, width), Window(self.window, 1))


@dataclass(frozen=True)
class Largest(Codec):
    """The numbers of a row that are largest in size, and ``width`` bits: number ``i`` on bit ``7 - i % 8`` of a byte.

    Args:
        keep: how many.
        width: of the row.
    """

    keep: int
    width: int

    def encode(self, rows: Tensor, real: Tensor | None) -> Parts:
        # Ranked in float32: of equals, which half precision has many of, the first stays.
        order = rows.float().abs().sort(dim=-1, descending=True, stable=True).indices[..., : self.keep]
        index = order.sort(-1).values
        mask = torch.zeros(rows.shape, dtype=torch.bool, device=rows.device).scatter_(-1, index, True)
        return rows.gather(-1, index), _bits(mask)

    def decode(self, parts: Parts, dtype: torch.dtype) -> Tensor:
        values, bits = parts
        return in_place(values, bits, self.width).to(dtype)

    def row_bits(self, rows: Tensor) -> int:
        return 8 * (self.keep * rows.element_size() + -(-self.width // 8))

    def coded(self, parts: Parts) -> CodedRows:
        """The parts, as kernels take them."""
        values, bits = parts
        one = torch.ones((), device=values.device).expand(values.shape[:3])
        return CodedRows(values, bits, one.new_empty(0), one, LARGEST, self.width)

    def why_slow(self, query: Tensor) -> str | None:
        return why_no_gradient(query)

    def scores(self, query: Tensor, parts: Parts) -> Tensor:
        return coded_scores(query, self.coded(parts))

    def sums(self, weights: Tensor, parts: Parts) -> Tensor:
        return coded_sums(weights, self.coded(parts))


def _bits(mask: Tensor) -> Tensor:
    """``[..., ceil(D / 8)]`` uint8 of ``[..., D]`` bool, the first in the highest bit."""
    n = mask.shape[-1]
    if n % 8:
        mask = torch.cat([mask, mask.new_zeros(*mask.shape[:-1], 8 - n % 8)], -1)
    weight = 1 << torch.arange(7, -1, -1, device=mask.device)
    return (mask.unflatten(-1, (-1, 8)) * weight).sum(-1).to(torch.uint8)  # type: ignore[no-any-return, no-untyped-call]
