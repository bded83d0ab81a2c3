"""Codecs: what rows become when they leave full precision, and how they are read without unpacking them all."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from tokred.kernels.coded_rows import BLOCK
from tokred.kernels.packed_rows import PackedRows, bytes_of, pack, packed_scores, packed_sums, restore, why_not_packed

_LARGEST = torch.finfo(torch.float16).max

Parts = tuple[Tensor, ...]


class Codec(ABC):
    """A form of rows. Its parts are tensors ``[B, Hk, units, ...]``, so that units are cut off and put behind others.

    Attributes:
        unit: rows that are encoded together.
    """

    unit: int = 1

    @abstractmethod
    def encode(self, rows: Tensor, real: Tensor | None) -> Parts:
        """The parts of rows ``[B, Hk, n, D]``, whole units; ``real`` ``[B, Hk, n]`` is False where nobody will look."""

    @abstractmethod
    def decode(self, parts: Parts, dtype: torch.dtype) -> Tensor:
        """``[B, Hk, n, D]``."""

    def select(self, index: Tensor) -> Codec:
        """The codec of other samples: ``index`` ``[B']`` of the old ones."""
        return self

    @abstractmethod
    def row_bits(self, rows: Tensor) -> int:
        """Bits of one row of one head; ``rows`` ``[B, Hk, n, D]`` as they come."""

    def why_slow(self, query: Tensor) -> str | None:
        """Why the parts have to be decoded before a query ``[B, H, 1, D]`` can be answered; None: they need not be."""
        return "its codes have no path of their own"

    def scores(self, query: Tensor, parts: Parts) -> Tensor:
        """``[B, Hk, G, n]`` float32: products of queries ``[B, Hk, G, D]`` with the rows, decoded some at a time."""
        return torch.cat([query @ self.decode(some, torch.float32).mT for some in self.blocks(parts)], -1)

    def sums(self, weights: Tensor, parts: Parts) -> Tensor:
        """``[B, Hk, G, D]`` float32: sums of the rows by weights ``[B, Hk, G, n]``, decoded some at a time."""
        out, start = None, 0
        for some in self.blocks(parts):
            rows = self.decode(some, torch.float32)
            stop = start + rows.shape[2]
            part = weights[..., start:stop] @ rows
            out, start = part if out is None else out + part, stop
        assert out is not None  # of at least one block
        return out

    def blocks(self, parts: Parts) -> list[Parts]:
        """The parts of some rows at a time, views."""
        size = max(1, BLOCK // self.unit)
        return list(zip(*(part.split(size, 2) for part in parts), strict=True))  # type: ignore[no-untyped-call]


def why_no_gradient(query: Tensor) -> str | None:
    """Why what has no gradient does not answer a query; None: nobody asks for one."""
    return "a gradient is asked for" if torch.is_grad_enabled() and query.requires_grad else None


@dataclass(frozen=True)
class AsTheyCome(Codec):
    """No code at all: rows stay what they are, bit for bit. Of as many bits as the model has."""

    def encode(self, rows: Tensor, real: Tensor | None) -> Parts:
        return (rows,)

    def decode(self, parts: Parts, dtype: torch.dtype) -> Tensor:
        return parts[0]

    def row_bits(self, rows: Tensor) -> int:
        return 8 * rows.element_size() * rows.shape[-1]


@dataclass(frozen=True)
class Affine(Codec):
    """Numbers of a group between its least and its largest one, rounded to the nearest of ``2 ** bits`` even steps.

    Scale and least number are float16. Half-way goes to the even code. A group of one number repeated is restored as
    that number.

    Args:
        bits: of a code, 1 to 8.
        group: numbers that share a scale.
        tokens: whether they are those of ``group`` tokens in one channel, or of ``group`` channels of one token.
    """

    bits: int
    group: int
    tokens: bool = False

    @property
    def unit(self) -> int:  # type: ignore[override]
        return self.group if self.tokens else 1

    def encode(self, rows: Tensor, real: Tensor | None) -> Parts:
        rows, dim = rows.float(), 3 if self.tokens else 4
        if self.tokens:
            rows = rows.unflatten(2, (-1, self.group))  # type: ignore[no-untyped-call]
            rows = rows if real is None else _without(rows, real.unflatten(2, (-1, self.group)))  # type: ignore[no-untyped-call]
        else:
            rows = rows.unflatten(3, (-1, self.group))  # type: ignore[no-untyped-call]
        scale, zero, codes = affine(rows, self.bits, dim)
        return pack(codes, self.bits, dim), scale.squeeze(dim), zero.squeeze(dim)

    def packed(self, parts: Parts) -> PackedRows:
        """The parts, as kernels take them."""
        codes, scale, zero = parts
        return PackedRows(codes, scale, zero, self.bits, self.group, self.tokens)

    def decode(self, parts: Parts, dtype: torch.dtype) -> Tensor:
        return restore(self.packed(parts), dtype)

    def row_bits(self, rows: Tensor) -> int:
        width = rows.shape[-1]
        groups = width if self.tokens else -(-width // self.group)
        bits = groups * (8 * bytes_of(self.group, self.bits) + 32)
        return -(-bits // self.group) if self.tokens else bits

    def why_slow(self, query: Tensor) -> str | None:
        return why_not_packed(query, self.bits, self.group)

    def scores(self, query: Tensor, parts: Parts) -> Tensor:
        return packed_scores(query, self.packed(parts))

    def sums(self, weights: Tensor, parts: Parts) -> Tensor:
        return packed_sums(weights, self.packed(parts))


def affine(x: Tensor, bits: int, dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """Scale, zero (float16, ``dim`` kept) and uint8 codes of float32 groups along ``dim``."""
    low, high = x.amin(dim, keepdim=True), x.amax(dim, keepdim=True)
    zero = low.clamp(-_LARGEST, _LARGEST).half()
    scale = ((high - zero.float()) / (2**bits - 1)).clamp(0, _LARGEST).half()
    step = scale.float()
    codes = ((x - zero.float()) / torch.where(step > 0, step, 1.0)).round_().clamp_(0, 2**bits - 1)
    return scale, zero, torch.where(step > 0, codes, 0.0).to(torch.uint8)


def _without(rows: Tensor, real: Tensor) -> Tensor:
    """Groups ``[B, Hk, U, G, D]`` with the first real row, or zero, in place of those that are not real."""
    first = real.byte().argmax(3)[..., None, None].expand(*rows.shape[:3], 1, rows.shape[4])
    filled = torch.where(real.any(3)[..., None, None], rows.gather(3, first), 0.0)
    return torch.where(real[..., None], rows, filled)


def group_for(width: int, group: int, what: str) -> int:
    """The largest divisor of ``width`` that is no more than ``group``.

    Raises:
        ValueError: there is none but 1.
    """
    found = max(n for n in range(1, min(group, width) + 1) if width % n == 0)
    if found < min(2, width):
        raise ValueError(f"{what} of {width} numbers cannot be packed in groups of at most {group}: no divisor fits")
    return found


def check_bits(value: object, argument: str, allowed: tuple[int, ...]) -> None:
    """Refuse a number of bits that is not among those allowed.

    Raises:
        ValueError: with those that are.
    """
    if isinstance(value, bool) or value not in allowed:
        named = ", ".join(map(str, allowed))
        raise ValueError(f"{argument} must be one of {named} bits, got {value!r}")
