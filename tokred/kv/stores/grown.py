"""``Grown``: rows that grow at their end without a copy each time, and that a snapshot may still refer to."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

# Most rows in full precision that there is room for behind those that are held, so that a step need not copy all of
# them, and the share of these that it takes at most.
ROOM, SPARE = 32, 4


def room_for(count: int) -> int:
    """Rows that there is room for behind ``count`` in full precision."""
    return min(ROOM, count // SPARE)


class Grown(NamedTuple):
    """Rows ``[B, Hk, n, ...]`` of a buffer that may have room behind them.

    The value itself never changes. Several may share one buffer, such as those of a snapshot and of what came after it;
    room is written to by the first that comes to it, and whoever comes later copies.

    Attributes:
        buffer: ``[B, Hk, C, ...]``.
        start, stop: which of its rows.
        written: one number, the rows of the buffer that are in use by anybody.
    """

    buffer: Tensor
    start: int
    stop: int
    written: list[int]

    @classmethod
    def of(cls, rows: Tensor) -> Grown:
        """Rows as they are, without room."""
        return cls(rows, 0, rows.shape[2], [rows.shape[2]])

    @property
    def count(self) -> int:  # type: ignore[override]
        """Rows ``n``."""
        return self.stop - self.start

    @property
    def rows(self) -> Tensor:
        """``[B, Hk, n, ...]``, a view."""
        return self.buffer[:, :, self.start : self.stop]

    def append(self, rows: Tensor, room: int) -> Grown:
        """With more rows behind; where there is no room for them, a copy has it for ``room`` more."""
        n = rows.shape[2]
        if n == 0:
            return self
        if torch.is_grad_enabled() and (rows.requires_grad or self.buffer.requires_grad):
            return Grown.of(torch.cat([self.rows, rows], 2))  # what gradients are kept of is not written over
        buffer, start, written = self.buffer, self.start, self.written
        if written[0] != self.stop or self.stop + n > buffer.shape[2]:
            old, start, written = self.rows, 0, [0]
            shape = (*old.shape[:2], self.count + n + room, *old.shape[3:])
            buffer = old.new_empty(shape)
            buffer[:, :, : self.count] = old
        stop = start + self.count + n
        buffer[:, :, stop - n : stop] = rows
        written[0] = stop
        return Grown(buffer, start, stop, written)

    def without_first(self, count: int) -> Grown:
        """All but the first ``count``."""
        return self._replace(start=self.start + count) if count < self.count else Grown.of(self._nothing())

    def first(self, count: int) -> Grown:
        """The first ``count`` alone; a copy where much more would be kept alive than is meant."""
        if count == 0:
            return Grown.of(self._nothing())
        if count * 8 > self.buffer.shape[2] * 7:
            return self._replace(stop=self.start + count)
        return Grown.of(self.buffer[:, :, self.start : self.start + count].clone())

    def select(self, index: Tensor) -> Grown:
        """The rows of other samples: ``index`` ``[B']`` of the old ones."""
        return Grown.of(self.rows.index_select(0, index))

    def _nothing(self) -> Tensor:
        shape = (*self.buffer.shape[:2], 0, *self.buffer.shape[3:])
        return self.buffer.new_empty(shape)
