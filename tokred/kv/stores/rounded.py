"""``Rounded``: newest rows in a code of their own."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from tokred.kernels.gather_rows import gather_rows
from tokred.kv.stores.codecs import Codec
from tokred.kv.stores.grown import Grown
from tokred.kv.stores.sides import with_more


class Rounded(NamedTuple):
    """Rows in a code of their own, and behind them those of this forward as they came; used as :class:`Grown` is.

    Attributes:
        codec: of all but the fresh ones.
        parts: of the code; empty while there are none.
        fresh: ``[B, Hk, n, D]``.
        dtype: of the model.
    """

    codec: Codec
    parts: tuple[Grown, ...]
    fresh: Grown
    dtype: torch.dtype

    @classmethod
    def of(cls, tail: Grown | Rounded, codec: Codec, dtype: torch.dtype) -> Rounded:
        """All rows of a tail, in the code."""
        if isinstance(tail, Grown):
            tail = cls(codec, (), tail, dtype)
        if tail.fresh.count == 0 and tail.parts:
            return tail
        parts = with_more(tail.parts, codec.encode(tail.fresh.rows, None))
        return tail._replace(parts=parts, fresh=tail.fresh.first(0))

    def picked(self, index: Tensor) -> Rounded:
        """The rows ``index`` ``[B, Hk, n]``; none are fresh."""

        def of(part: Tensor) -> Tensor:
            return gather_rows(part.flatten(3), index).view(*index.shape, *part.shape[3:])

        return self._replace(parts=tuple(Grown.of(of(part.rows)) for part in self.parts))

    @property
    def buffer(self) -> Tensor:
        """A tensor whose first, second and last dimension are those of the rows."""
        return self.fresh.buffer

    @property
    def count(self) -> int:  # type: ignore[override]
        """Rows ``n``."""
        return self.fresh.count + (self.parts[0].count if self.parts else 0)

    @property
    def rows(self) -> Tensor:
        """``[B, Hk, n, D]``, made for the moment."""
        if not self.parts:
            return self.fresh.rows
        return torch.cat([self.codec.decode(tuple(part.rows for part in self.parts), self.dtype), self.fresh.rows], 2)

    def append(self, rows: Tensor, room: int) -> Rounded:
        """With more rows behind."""
        return self._replace(fresh=self.fresh.append(rows, room))

    def first(self, count: int) -> Rounded:
        """The first ``count``, of which none but fresh ones are cut off."""
        return self._replace(fresh=self.fresh.first(count - (self.count - self.fresh.count)))

    def select(self, index: Tensor) -> Rounded:
        """The rows of other samples: ``index`` ``[B']`` of the old ones."""
        return self._replace(parts=tuple(part.select(index) for part in self.parts), fresh=self.fresh.select(index))
