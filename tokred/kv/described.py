"""Descriptions that a cache's site holds: which slots are real, what a row costs, values that are made on demand."""

from __future__ import annotations

import bisect
import functools
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

# Bytes of a row's position, an int32.
POSITION = 4


class Padding:
    """Mask of the slots of a batch that are real tokens; made once a forward and shared by all layers.

    Args:
        mask: ``[B, L]`` bool, False on padding.
    """

    def __init__(self, mask: Tensor) -> None:
        self.mask = mask

    @functools.cached_property
    def _ends(self) -> tuple[list[int], list[int]]:
        """Real tokens of each sample, and where its first one stands."""
        counts, first = torch.stack([self.mask.sum(1), self.mask.int().argmax(1)]).tolist()
        return counts, first

    @property
    def lengths(self) -> tuple[int, ...]:
        """Real tokens of each sample; asking waits for the device."""
        return tuple(self._ends[0])

    @property
    def aligned(self) -> bool:
        """True if all padding stands before a sample's first token, none between turns or behind; waits likewise."""
        width = self.mask.shape[1]
        return all(n in (0, width - first) for n, first in zip(*self._ends, strict=True))

    @functools.cached_property
    def token(self) -> Tensor:
        """``[B, L]`` int64: how many real tokens stand before each slot."""
        return self.mask.long().cumsum(1) - self.mask.long()

    def until(self, seen: int) -> Padding | None:
        """The first ``seen`` slots; None where they hold no padding."""
        cut = self if self.mask.shape[1] == seen else Padding(self.mask[:, :seen])
        return None if all(n == seen for n in cut.lengths) else cut


class Rope(Protocol):
    """The rotary embedding of one layer."""

    def unrotate(self, q: Tensor) -> Tensor:
        """The queries ``[B, H, M, D]`` of this forward before rotation."""

    def mean(self, start: int, count: int) -> tuple[Tensor, Tensor]:
        """Cosines and sines ``[D]`` of ``count`` positions from ``start`` on, averaged."""

    def turns(self) -> tuple[Tensor, float]:
        """Angle ``[D/2]`` float32 by which each pair of channels turns from one position to the next, and the factor
        that queries and keys are multiplied by."""


class Made(NamedTuple):
    """Keys or values that are put together only when someone reads them.

    Attributes:
        like: of their shape, type and device, but without memory of that size.
        make: gives them.
    """

    like: Tensor
    make: Callable[[], Tensor]

    @classmethod
    def of(cls, rows: Tensor, width: int, make: Callable[[], Tensor], dtype: torch.dtype | None = None) -> Made:
        """All rows ``[B, Hk, width, D]`` of a layer, of which ``rows`` ``[B, Hk, n, D]`` are some, without gradients.

        Args:
            rows: of their samples, heads, channels and device.
            width: how many.
            make: gives them, as they are now: rows may go before somebody asks.
            dtype: of them; None: that of ``rows``.
        """
        return cls(like(rows, (*rows.shape[:2], width, rows.shape[3]), dtype), lambda: make().detach())


class Priced(Protocol):
    """A store, as far as it says what rows cost; see :class:`tokred.kv.stores.Store`."""

    def row_bytes(self, keys: Tensor, values: Tensor) -> int:
        """Bytes of one row of one head in the end."""

    def fresh_bytes(self, keys: Tensor, values: Tensor) -> int:
        """Bytes of one that has just come."""

    def whole_rows(self, keys: Tensor, values: Tensor) -> tuple[tuple[int, int], ...]:
        """Rows of a head that may take more than that in the end, and how many bytes more."""

    def note_bytes(self, heads: int, width: int, *, uneven: bool) -> int:
        """Bytes of a layer besides its rows."""


class Place(NamedTuple):
    """The room that a budget in bytes divides: what a row costs, and under a hard limit what else needs room.

    Attributes:
        heads: that each have a row of their own.
        row_bytes: of one row of one head.
        fixed: bytes of all layers together that are no rows to choose from.
        coming: rows of one head, added up over all layers, that the budget leaves free: the next chunk needs them.
        whole: of every head the first ``n`` rows take ``more`` bytes besides, each; pairs of these, which add up.
    """

    heads: int
    row_bytes: int
    fixed: int = 0
    coming: int = 0
    whole: tuple[tuple[int, int], ...] = ()

    def held(self, rows: int) -> int:
        """Bytes of a layer whose heads have so many rows."""
        return self.heads * (self.row_bytes * rows + sum(more * min(rows, n) for n, more in self.whole))

    def rows(self, held: int) -> int:
        """The most rows that a head of a layer of so many bytes has; negative where there are less than none.

        Whatever is more in one layer is less in another: the first rows are the dearest, so layers of different lengths
        take no more than equal ones.
        """
        most = held // (self.heads * self.row_bytes)
        if most <= 0 or not self.whole:
            return most
        return bisect.bisect_right(range(1, most + 1), held, key=self.held)


def storage_bytes(values: Iterable[Any]) -> int:
    """Bytes of the memory behind tensors, each counted once, whatever part of it they show."""
    memory = (t.untyped_storage() for t in values if isinstance(t, Tensor))
    return sum({m.data_ptr(): m.nbytes() for m in memory}.values())


def plain_bytes(rows: Tensor) -> int:
    """Bytes of one row of one head of ``[B, Hk, n, D]``, as it comes from the model."""
    return rows.shape[-1] * rows.element_size()


def like(rows: Tensor, shape: tuple[int, ...], dtype: torch.dtype | None = None) -> Tensor:
    """A tensor of a shape and type, on the device of ``rows``, without memory of that size."""
    return rows.new_empty((), dtype=dtype).expand(shape)
