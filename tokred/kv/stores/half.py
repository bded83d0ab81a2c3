"""Rows in two bytes a number, for models that run in more."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tokred.core.reduction import Reduction
from tokred.kv.described import POSITION, Made, plain_bytes
from tokred.kv.site import CacheSite
from tokred.kv.stores.rectangle import RectangleShelf
from tokred.kv.stores.store import Store

TYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Half(Store):
    """Rows are held in half precision, and attended to in the model's own; rows of two bytes stay as they are.

    A prompt attends, and is judged, before its rows are rounded. Steps make rows of the model's type for the layer
    that attends, so memory is saved, and not time.

    Args:
        dtype: "bfloat16", which has the range of float32, or "float16", which rounds less and ends at 65,504.
    """

    name: ClassVar[str] = "half"
    can: ClassVar[frozenset[str]] = frozenset({"take", "merge", "ragged", "crop"})

    dtype: str = "bfloat16"

    def __post_init__(self) -> None:
        if self.dtype not in TYPES:
            raise ValueError(f"dtype must be {' or '.join(map(repr, TYPES))}, got {self.dtype!r}")

    def open(self) -> HalfShelf:
        return HalfShelf(TYPES[self.dtype])

    def row_bytes(self, keys: Tensor, values: Tensor) -> int:
        """Two bytes a number, if the model's has more."""
        return sum(x.shape[-1] * min(2, x.element_size()) for x in (keys, values)) + POSITION

    def fresh_bytes(self, keys: Tensor, values: Tensor) -> int:
        return plain_bytes(keys) + plain_bytes(values) + POSITION


class HalfShelf(RectangleShelf):
    """A rectangle of rounded rows; from a forward's append to its settling, one of all rows in the model's type too.

    Args:
        half: type that rows are held in.
    """

    roomy = False  # what is held is half of what there was, to the byte

    def __init__(self, half: torch.dtype) -> None:
        super().__init__()
        self.half = half
        self._type = half  # the model's, if that has more bytes
        self._wide: tuple[Tensor, Tensor] | None = None
        self._fresh = 0  # rows of the wide ones that are not rounded yet

    @property
    def keys(self) -> Tensor | None:
        return None if self.width == 0 else self.newest[0]

    @property
    def values(self) -> Tensor | None:
        return None if self.width == 0 else self.newest[1]

    @property
    def newest(self) -> tuple[Tensor, Tensor]:
        if self._wide is not None:
            return self._wide
        keys, values = super().newest
        return (keys.to(self._type), values.to(self._type)) if keys.dtype == self.half else (keys, values)

    @property
    def width(self) -> int:
        return super().width + self._fresh

    @property
    def samples(self) -> int:
        return super().newest[0].shape[0] if self._wide is None else self._wide[0].shape[0]

    def show(self) -> tuple[Tensor | Made, Tensor | Made]:
        if self._wide is not None or self._type == self.half:
            return super().show()
        return self._made(0), self._made(1)

    def _made(self, which: int) -> Made:
        held = super().newest[which]
        return Made.of(held, held.shape[2], lambda: held.to(self._type), self._type)

    def append(self, keys: Tensor, values: Tensor) -> None:
        if keys.element_size() <= self.half.itemsize:
            super().append(keys, values)
            return
        self._type = keys.dtype
        if self.width:
            old = self.newest
            self._wide = torch.cat([old[0], keys], 2), torch.cat([old[1], values], 2)
        else:
            self._wide = keys.contiguous(), values.contiguous()
        self._fresh += keys.shape[2]

    def settle(self, site: CacheSite | None) -> None:
        if self._wide is None:
            return
        keys, values = (self._rounded(x[:, :, x.shape[2] - self._fresh :]) for x in self._wide)
        self._wide, self._fresh = None, 0
        super().append(keys, values)

    def take(self, step: Reduction, slots: Tensor) -> None:
        self._open()
        super().take(step, slots)
        self._close()

    def merge(self, step: Reduction, slots: Tensor, weights: Tensor | None) -> None:
        # Averages are made of what is known best, and rounded once.
        self._open()
        super().merge(step, slots, weights)
        self._close()

    def _open(self) -> None:
        if self.width:
            self._hold(*self.newest, own=False)
            self._wide, self._fresh = None, 0

    def _close(self) -> None:
        if self._type != self.half and self._keys is not None and self._values is not None:
            self._hold(self._rounded(self._keys), self._rounded(self._values), own=False)

    def _rounded(self, rows: Tensor) -> Tensor:
        limit = torch.finfo(self.half).max
        # Beyond the range of float16 there is infinity, which no softmax survives.
        return (rows if self.half == torch.bfloat16 else rows.clamp(-limit, limit)).to(self.half)

    def crop(self, count: int) -> None:
        self.settle(None)
        super().crop(count)

    def detach(self, count: int) -> tuple[Tensor, Tensor]:
        if self._wide is None:
            return super().detach(count)
        keys, values = self._wide
        self._wide, self._fresh = (keys[:, :, :-count], values[:, :, :-count]), self._fresh - count
        return keys[:, :, -count:], values[:, :, -count:]

    def select(self, index: Tensor, listed: Callable[[], list[int]]) -> None:
        super().select(index, listed)
        if self._wide is not None:
            keys, values = self._wide
            self._wide = keys.index_select(0, index), values.index_select(0, index)
