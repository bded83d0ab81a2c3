"""Rows in few bits: how codes lie in bytes, and what scores and sums over them are. In plain torch, also the fall-back.

A group of numbers has a scale and a zero of its own, ``code * scale + zero``. It runs along the tokens of one channel
(:attr:`PackedRows.tokens`) or along the channels of one token. The codes of a group of ``G`` lie in ``W`` bytes:
with 1, 2, 4 or 8 bits byte ``i`` holds the codes ``i``, ``i + W``, ``i + 2 W``, ..., the first in the lowest bits; with
any other number of bits eight codes in a row take as many bytes as one has bits, the first lowest.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

# Numbers of bits of which a byte holds a whole number.
EVEN = (1, 2, 4, 8)


class PackedRows(NamedTuple):
    """Rows ``[B, Hk, P, D]`` in few bits.

    Attributes:
        codes: uint8, ``[B, Hk, P / G, W, D]`` where groups run along tokens, else ``[B, Hk, P, D / G, W]``.
        scale, zero: float16, ``[B, Hk, P / G, D]``, or ``[B, Hk, P, D / G]``.
        bits: of a code, 1 to 8.
        group: numbers ``G`` that share a scale.
        tokens: whether groups run along the tokens of a channel.
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor
    bits: int
    group: int
    tokens: bool

    @property
    def count(self) -> int:  # type: ignore[override]
        """Rows ``P`` of each head."""
        return self.codes.shape[2] * (self.group if self.tokens else 1)

    @property
    def width(self) -> int:
        """Numbers ``D`` of a row."""
        return self.codes.shape[4] if self.tokens else self.codes.shape[3] * self.group


def bytes_of(count: int, bits: int) -> int:
    """Bytes that ``count`` codes of one group take."""
    return -(-count // (8 // bits)) if bits in EVEN else -(-count // 8) * bits


def pack(codes: Tensor, bits: int, dim: int) -> Tensor:
    """Codes of whole groups, uint8 below ``2 ** bits`` along ``dim``, as bytes."""
    n, dim = codes.shape[dim], dim % codes.ndim
    per = 8 // bits if bits in EVEN else 8
    width = -(-n // per)
    if width * per != n:
        shape = [*codes.shape]
        shape[dim] = width * per - n
        codes = torch.cat([codes, codes.new_zeros(shape)], dim)
    if bits in EVEN:
        parts = codes.unflatten(dim, (per, width)).unbind(dim)  # type: ignore[no-untyped-call]
        out = parts[0].clone()
        for i, part in enumerate(parts[1:], 1):
            out |= part << bits * i
        return out  # type: ignore[no-any-return]
    parts = codes.unflatten(dim, (width, per)).long().unbind(dim + 1)  # type: ignore[no-untyped-call]
    number = sum(part << bits * i for i, part in enumerate(parts))
    assert isinstance(number, Tensor)  # eight parts
    return torch.stack([(number >> 8 * i & 255).to(torch.uint8) for i in range(bits)], dim + 1).flatten(dim, dim + 1)


def unpack(packed: Tensor, bits: int, dim: int, count: int) -> Tensor:
    """The ``count`` codes, uint8, that :func:`pack` made bytes of."""
    dim, mask = dim % packed.ndim, (1 << bits) - 1
    if bits == 8:
        return packed
    if bits in EVEN:
        out = torch.cat([packed >> bits * i & mask for i in range(8 // bits)], dim)
    else:
        parts = packed.unflatten(dim, (-1, bits)).long().unbind(dim + 1)  # type: ignore[no-untyped-call]
        number = sum(part << 8 * i for i, part in enumerate(parts))
        out = torch.stack([(number >> bits * i & mask).to(torch.uint8) for i in range(8)], dim + 1)
        out = out.flatten(dim, dim + 1)
    return out.narrow(dim, 0, count)


def restore(rows: PackedRows, dtype: torch.dtype) -> Tensor:
    """``[B, Hk, P, D]``: all rows, made in float32 and rounded to ``dtype``."""
    dim = 3 if rows.tokens else 4
    codes = unpack(rows.codes, rows.bits, dim, rows.group).float()
    made = torch.addcmul(rows.zero.float().unsqueeze(dim), codes, rows.scale.float().unsqueeze(dim))
    return (made.flatten(2, 3) if rows.tokens else made.flatten(3, 4)).to(dtype)


def scores_reference(q: Tensor, rows: PackedRows) -> Tensor:
    """``[B, Hk, G, P]`` float32: products of queries ``[B, Hk, G, D]`` with all rows."""
    return q.float() @ restore(rows, torch.float32).mT


def sums_reference(weights: Tensor, rows: PackedRows) -> Tensor:
    """``[B, Hk, G, D]`` float32: sums of all rows by weights ``[B, Hk, G, P]``."""
    return weights.float() @ restore(rows, torch.float32)
