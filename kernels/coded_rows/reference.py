"""Rows that are looked up in a table, or of which some numbers are left: what scores and sums over them are.

In plain torch, a block of rows at a time, which is also the fall-back: all rows of a cache are never in memory.

:data:`LEVELS`: a number is one of ``2 ** bits`` levels, whose codes lie in bytes as in
:mod:`tokred.kernels.packed_rows`. :data:`BOOK`: eight numbers are an entry of a table, whose signs another byte may
turn. :data:`LARGEST`: some numbers, and a bit for each channel that says whether it has one, the first in the highest
bit of a byte.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from tokred.kernels.packed_rows.reference import unpack

LEVELS, BOOK, LARGEST = range(3)
# Rows that are restored together, of each head.
BLOCK = 512
# Numbers of an entry.
SUB = 8


class CodedRows(NamedTuple):
    """Rows ``[B, Hk, P, D]`` in a code.

    Attributes:
        first: ``[B, Hk, P, n]`` uint8 codes or entries; numbers in the model's type where some are left.
        second: ``[B, Hk, P, n]`` uint8 signs, the first in the lowest bit, or the bits of channels; ``n`` may be 0.
        table: float32 ``[2 ** bits]`` levels, ``[entries, 8]``, or of nothing.
        factor: ``[B, Hk, P]`` float32 that a row is multiplied by.
        kind: :data:`LEVELS`, :data:`BOOK` or :data:`LARGEST`.
        width: numbers ``D`` of a row.
        bits: of a level's code.
        unit: whether rows of levels are brought to length one before they are multiplied.
    """

    first: Tensor
    second: Tensor
    table: Tensor
    factor: Tensor
    kind: int
    width: int
    bits: int = 1
    unit: bool = False

    @property
    def count(self) -> int:  # type: ignore[override]
        """Rows ``P`` of each head."""
        return self.first.shape[2]

    def part(self, start: int, stop: int) -> CodedRows:
        """The rows from ``start`` to before ``stop``."""
        first, second, factor = (x[:, :, start:stop] for x in (self.first, self.second, self.factor))
        return self._replace(first=first, second=second, factor=factor)

    def blocks(self) -> Iterator[tuple[int, int]]:
        """Where each block of rows begins and ends."""
        for start in range(0, self.count, BLOCK):
            yield start, min(start + BLOCK, self.count)


def in_place(numbers: Tensor, bits: Tensor, width: int) -> Tensor:
    """``[..., D]``: numbers ``[..., n]`` in the channels whose bits are set, and 0 in all others."""
    shift = torch.arange(7, -1, -1, dtype=torch.uint8, device=bits.device)
    mask = (bits.unsqueeze(-1) >> shift & 1).bool().flatten(-2)[..., :width]
    place = (mask.long().cumsum(-1) - 1).clamp(min=0)
    return torch.where(mask, numbers.gather(-1, place), 0.0)


def looked_up(table: Tensor, entries: Tensor, signs: Tensor | None) -> Tensor:
    """``[..., D]`` float32: entries ``[..., D / 8]`` of a table, with signs of as many bytes unless None."""
    found = table[entries.long()]
    if signs is not None:
        found = torch.where(unpack(signs.unsqueeze(-1), 1, -1, SUB).bool(), -found, found)
    return found.flatten(-2)


def restore_coded(rows: CodedRows) -> Tensor:
    """``[B, Hk, P, D]`` float32, all rows."""
    if rows.kind == LARGEST:
        found = in_place(rows.first.float(), rows.second, rows.width)
    elif rows.kind == BOOK:
        found = looked_up(rows.table, rows.first, rows.second if rows.second.shape[3] else None)
    else:
        found = rows.table[unpack(rows.first, rows.bits, -1, rows.width).long()]
        if rows.unit:
            found = found / torch.linalg.vector_norm(found, dim=-1, keepdim=True)
    return found * rows.factor.unsqueeze(-1)


def scores_reference(q: Tensor, rows: CodedRows) -> Tensor:
    """``[B, Hk, G, P]`` float32: products of queries ``[B, Hk, G, D]`` with all rows."""
    out = q.new_empty((*q.shape[:3], rows.count), dtype=torch.float32)
    for start, stop in rows.blocks():
        out[..., start:stop] = q.float() @ restore_coded(rows.part(start, stop)).mT
    return out


def sums_reference(weights: Tensor, rows: CodedRows) -> Tensor:
    """``[B, Hk, G, D]`` float32: sums of all rows by weights ``[B, Hk, G, P]``."""
    out = weights.new_zeros((*weights.shape[:3], rows.width), dtype=torch.float32)
    for start, stop in rows.blocks():
        out += weights[..., start:stop].float() @ restore_coded(rows.part(start, stop))
    return out
