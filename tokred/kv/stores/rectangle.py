"""Rows as they come, ``[B, Hk, K, D]``; shorter heads and samples hold empty rows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tokred.core.reduction import Reduction
from tokred.kernels.decode_attention import SENTINEL
from tokred.kernels.gather_rows import gather_cache
from tokred.kv.stores.store import Shelf, Store


@dataclass(frozen=True)
class Rectangle(Store):
    """Keys and values of the model's type, as many rows in every head as in the longest."""

    name: ClassVar[str] = "rectangle"
    can: ClassVar[frozenset[str]] = frozenset({"take", "merge", "rewrite", "ragged", "crop"})

    def open(self) -> Shelf:
        return RectangleShelf()


class RectangleShelf(Shelf):
    """Two tensors, and the slots of their rows once these are not the first ones.

    No tensor is changed in place, so a snapshot is a reference.
    """

    def __init__(self) -> None:
        self._keys: Tensor | None = None
        self._values: Tensor | None = None
        self._slots: Tensor | None = None

    @property
    def keys(self) -> Tensor | None:
        return self._keys

    @property
    def values(self) -> Tensor | None:
        return self._values

    @property
    def newest(self) -> tuple[Tensor, Tensor]:
        assert self._keys is not None  # asked for after an update
        assert self._values is not None
        return self._keys, self._values

    @property
    def width(self) -> int:
        return 0 if self._keys is None else self._keys.shape[2]

    @property
    def samples(self) -> int:
        return self.newest[0].shape[0]

    @property
    def moved(self) -> bool:
        return self._slots is not None

    def positions(self, seen: int) -> Tensor | None:
        self._slots = up_to_date(self._slots, self.width, seen)
        return self._slots

    def append(self, keys: Tensor, values: Tensor) -> None:
        if self._keys is None or self._values is None:
            self._keys, self._values = keys.contiguous(), values.contiguous()
        else:
            self._keys, self._values = torch.cat([self._keys, keys], 2), torch.cat([self._values, values], 2)

    def take(self, step: Reduction, slots: Tensor) -> None:
        keys, values = self.keys, self.values
        assert keys is not None  # something was there to decide on
        assert values is not None
        self._keys, self._values, kept = gather_cache(keys, values, slots, step.representative)
        self._slots = without_empty(kept, step.mask).contiguous()

    def merge(self, step: Reduction, slots: Tensor, weights: Tensor | None) -> None:
        keys, values = self.keys, self.values
        assert keys is not None  # something was there to decide on
        assert values is not None
        self._keys, self._values = step.merge(keys, weights), step.merge(values, weights)
        self._slots = without_empty(merged_slots(step, slots), step.mask).contiguous()

    def rewrite(self, values: Tensor, slots: Tensor | None) -> None:
        self._values = values

    def crop(self, count: int) -> None:
        if count == 0 or self._keys is None or self._values is None:
            return
        left = self._keys.shape[2] - count
        self._keys, self._values = first_rows(self._keys, left), first_rows(self._values, left)
        self._slots = None if self._slots is None else self._slots[:, :, :left]

    def detach(self, count: int) -> tuple[Tensor, Tensor]:
        keys, values = self.newest
        self._keys, self._values = keys[:, :, :-count], values[:, :, :-count]
        return keys[:, :, -count:], values[:, :, -count:]

    def select(self, index: Tensor, listed: Callable[[], list[int]]) -> None:
        for name in ("_keys", "_values", "_slots"):
            value = getattr(self, name)
            if value is not None:
                setattr(self, name, value.index_select(0, index))


def newest_slots(seen: int, count: int, device: torch.device) -> Tensor:
    """``[count]`` int32: the newest of ``seen`` slots."""
    return torch.arange(seen - count, seen, dtype=torch.int32, device=device)


def up_to_date(known: Tensor | None, width: int, seen: int) -> Tensor | None:
    """Slots ``[B, Hk, K]`` of all ``width`` rows, by those that are known of the first; None where none has moved.

    They are written down when someone asks: a step that nobody looks at need not.
    """
    count = 0 if known is None else width - known.shape[2]
    if known is None or not count:
        return known
    new = newest_slots(seen, count, known.device).expand(*known.shape[:2], count)
    return torch.cat([known, new], 2)


def merged_slots(step: Reduction, slots: Tensor) -> Tensor:
    """``[B, Hk, K']``: of the rows that went into one, the newest slot."""
    b, heads = step.batch
    into = torch.where(step.target < 0, step.slots, step.target)
    # Rows that go nowhere are sent to a slot behind the last, which is cut off.
    last = torch.cat([slots.gather(2, step.representative), slots.new_zeros(b, heads, 1)], 2)
    return last.scatter_reduce(2, into, slots.gather(2, step.source), "amax")[..., :-1]


def without_empty(slots: Tensor, mask: Tensor | None) -> Tensor:
    """``[B, Hk, K]`` with ``SENTINEL`` where ``mask`` is False."""
    return slots if mask is None else slots.masked_fill(~mask, SENTINEL)


def first_rows(rows: Tensor, count: int) -> Tensor:
    """``[B, Hk, count, D]``; a copy where a view would keep much more alive than it shows."""
    part = rows[:, :, :count]
    return part if count * 8 > rows.shape[2] * 7 else part.clone()
