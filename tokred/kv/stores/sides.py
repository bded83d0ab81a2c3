"""``Side``: the keys or the values of a layer, some of them in a code."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from tokred.kv.stores.codecs import Codec, Parts
from tokred.kv.stores.grown import Grown, room_for

# Most rows that there is room for behind those in a code, and the share of these that it takes at most.
CODES, SPARE_CODES = 128, 8


class Window(NamedTuple):
    """Rows that stay in full precision.

    Attributes:
        recent: newest ones, at least.
        block: others are encoded so many at a time.
        first: oldest ones.
    """

    recent: int
    block: int
    first: int = 0

    def due(self, count: int) -> int:
        """Rows to encode of ``count`` that are not yet and are none of the first."""
        return max(0, count - self.recent) // self.block * self.block

    @property
    def most(self) -> int:
        """Rows that may be in full precision when a forward is over."""
        return self.recent + self.block - 1 + self.first


def with_more(parts: tuple[Grown, ...], new: Parts, unit: int = 1) -> tuple[Grown, ...]:
    """Parts of a code, or none, with more units of ``unit`` rows behind; see :meth:`Grown.append`."""
    if not parts:
        return tuple(Grown.of(x.contiguous()) for x in new)
    room = min(-(-CODES // unit), parts[0].count // SPARE_CODES)
    return tuple(old.append(x, room) for old, x in zip(parts, new, strict=True))


def put(parts: tuple[Grown, ...], new: Parts, index: Tensor, where: Tensor) -> tuple[Grown, ...]:
    """Parts of a code with other units ``new`` at ``index`` ``[B, Hk, n]`` ``where`` that is True; all are copied."""
    out = []
    for part, units in zip(parts, new, strict=True):
        rows, shape = part.rows, (*index.shape, *(1,) * (units.dim() - 3))
        at = index.view(shape).expand(units.shape)
        out.append(Grown.of(rows.scatter(2, at, torch.where(where.view(shape), units, rows.gather(2, at)))))
    return tuple(out)


class Side(NamedTuple):
    """Rows in the order in which they came: the first ones, those in the code, and the newest ones.

    Attributes:
        codec: of those in the middle.
        window: which they are.
        tail: ``[B, Hk, n, D]``, the newest.
        first: ``[B, Hk, n, D]``, or None until some are encoded.
        parts: of the code; empty while there is none.
    """

    codec: Codec
    window: Window
    tail: Grown
    first: Tensor | None = None
    parts: tuple[Grown, ...] = ()

    @classmethod
    def of(cls, codec: Codec, window: Window, rows: Tensor) -> Side:
        """All rows as they come."""
        return cls(codec, window, Grown.of(rows.contiguous()))

    def anew(self, rows: Tensor) -> Side:
        """Other rows in their place."""
        return Side.of(self.codec, self.window, rows)

    @property
    def encoded(self) -> int:
        """Rows in the code."""
        return self.parts[0].count * self.codec.unit if self.parts else 0

    @property
    def apart(self) -> int:
        """First rows that stand apart."""
        return 0 if self.first is None else self.first.shape[2]

    @property
    def count(self) -> int:  # type: ignore[override]
        """All rows."""
        return self.apart + self.encoded + self.tail.count

    @property
    def coded(self) -> tuple[Tensor, ...]:
        """The parts of the code."""
        return tuple(part.rows for part in self.parts)

    def restored(self, dtype: torch.dtype) -> Tensor:
        """``[B, Hk, n, D]``, all rows."""
        if not self.parts:
            return self.tail.rows
        middle = self.codec.decode(self.coded, dtype)
        return torch.cat([x for x in (self.first, middle, self.tail.rows) if x is not None], 2)

    def append(self, rows: Tensor) -> Side:
        """With more rows."""
        return self._replace(tail=self.tail.append(rows, room_for(self.tail.count)))

    @property
    def due(self) -> int:
        """Rows that are to be encoded now."""
        first = 0 if self.parts else min(self.window.first, self.tail.count)
        return self.window.due(self.tail.count - first)

    def settled(self, seen: Tensor | None) -> Side:
        """With what is due encoded; ``seen`` ``[B, Hk, n]`` is False for rows that nobody will look at."""
        count = self.due
        if count == 0:
            return self
        rows, first = self.tail.rows, self.first
        if not self.parts and self.window.first:
            first = rows[:, :, : self.window.first].clone()
            rows = rows[:, :, self.window.first :]
        begin = self.encoded + (0 if first is None else first.shape[2])
        seen = None if seen is None else seen[:, :, begin : begin + count]
        new = self.codec.encode(rows[:, :, :count], seen)
        parts = with_more(self.parts, new, self.codec.unit)
        left = rows.shape[2] - count
        tail = self.tail.without_first(self.tail.count - left)
        if tail.buffer.shape[2] > left + room_for(left) + 1:
            tail = Grown.of(tail.rows.clone())  # a view would keep all that have been encoded alive
        return Side(self.codec, self.window, tail, first, parts)

    def cropped(self, count: int, dtype: torch.dtype) -> Side:
        """Without the newest ``count``. Rows of a unit of the code of which some go are in full precision again, with
        the values that they were rounded to."""
        tail, rest = self.tail, count - self.tail.count
        if rest <= 0:
            return self._replace(tail=tail.first(tail.count - count))
        left, unit = self.encoded - rest, self.codec.unit
        if left <= 0:
            assert self.parts or left == 0  # no more rows go than there are
            first = None if self.first is None else self.first[:, :, : self.apart + left]
            return self.anew(tail.rows[:, :, :0] if first is None else first)
        whole = left // unit
        more = tuple(part.rows[:, :, whole : whole + 1] for part in self.parts)
        again = self.codec.decode(more, dtype)[:, :, : left - whole * unit]
        if whole == 0:
            again = again if self.first is None else torch.cat([self.first, again], 2)
            return self.anew(again)
        parts = tuple(part.first(whole) for part in self.parts)
        return self._replace(tail=Grown.of(again.contiguous()), parts=parts)

    def select(self, index: Tensor) -> Side:
        """The rows of other samples: ``index`` ``[B']`` of the old ones."""
        first = None if self.first is None else self.first.index_select(0, index)
        parts = tuple(part.select(index) for part in self.parts)
        return Side(self.codec.select(index), self.window, self.tail.select(index), first, parts)

    # ------------------------------------------------------------------ one query

    def answers(self, query: Tensor) -> bool:
        """True if a query need not wait until all is restored."""
        return not self.parts or self.codec.why_slow(query) is None

    def scores(self, query: Tensor) -> Tensor:
        """``[B, Hk, G, n]`` float32: products of float32 queries ``[B, Hk, G, D]`` with all rows."""
        found = [] if self.first is None else [query @ self.first.float().mT]
        if self.parts:
            found.append(self.codec.scores(query, self.coded))
        if self.tail.count:
            found.append(query @ self.tail.rows.float().mT)
        return torch.cat(found, -1)

    def sums(self, weights: Tensor) -> Tensor:
        """``[B, Hk, G, D]`` float32: sums of all rows by float32 weights ``[B, Hk, G, n]``."""
        first, middle, last = weights.split([self.apart, self.encoded, self.tail.count], -1)  # type: ignore[no-untyped-call]
        out = last @ self.tail.rows.float()
        if self.parts:
            out = out + self.codec.sums(middle, self.coded)
        return out if self.first is None else out + first @ self.first.float()  # type: ignore[no-any-return]
