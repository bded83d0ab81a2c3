"""Rows as they come, ``[B, Hk, K, D]``; shorter heads and samples hold empty rows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from tokred.core.reduction import Reduction
from tokred.kernels.decode_attention import SENTINEL
from tokred.kernels.gather_rows import gather_cache
from tokred.kernels.rows import offsets
from tokred.kv.stores.store import Shelf, Store


@dataclass(frozen=True)
class Rectangle(Store):
    """Keys and values of the model's type, as many rows in every head as in the longest."""

    name: ClassVar[str] = "rectangle"
    can: ClassVar[frozenset[str]] = frozenset({"take", "merge", "rewrite", "ragged", "crop", "return"})

    def open(self) -> Shelf:
        return RectangleShelf()


class SlottedShelf(Shelf):
    """Base of shelves whose rows may go, which know the slots of those that are left."""

    def __init__(self) -> None:
        # [B, Hk, n] int32, of the first rows, as far as somebody has asked; None while row i is slot i.
        self._slots: Tensor | None = None

    @property
    def moved(self) -> bool:
        return self._slots is not None

    def positions(self, seen: int) -> Tensor | None:
        self._slots = up_to_date(self._slots, self.width, seen)
        return self._slots

    def place(self, slots: Tensor, seen: int) -> None:
        count = slots.shape[1]
        known = up_to_date(self._slots, self.width - count, seen)
        assert known is not None  # tokens had left
        self._slots = torch.cat([known, slots[:, None].expand(-1, known.shape[1], -1)], 2)

    def select(self, index: Tensor, listed: Callable[[], list[int]]) -> None:
        """The slots of other samples; a subclass selects their rows."""
        self._slots = None if self._slots is None else self._slots.index_select(0, index)


class RectangleShelf(SlottedShelf):
    """Two tensors, keys and values.

    Tensors are changed in place only by :meth:`swap`, and by the row that comes after it, as long as nobody else can
    hold them: a snapshot is a reference, after which the next change copies.
    """

    def __init__(self) -> None:
        super().__init__()
        self._keys: Tensor | None = None
        self._values: Tensor | None = None
        self._own = False  # keys and values have been made here, and nobody else holds them
        # [B, Hk, K + 1, D] of which keys and values are the first rows, between a swap and the row that comes next.
        self._room: tuple[Tensor, Tensor] | None = None

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

    def append(self, keys: Tensor, values: Tensor) -> None:
        if self._keys is None or self._values is None:
            self._hold(keys.contiguous(), values.contiguous(), own=False)
        elif self._fits(keys, values):
            room = self._room
            assert room is not None  # or nothing would fit
            for x, new in zip(room, (keys, values), strict=True):
                x.narrow(2, x.shape[2] - 1, 1).copy_(new)
            self._hold(*room)
        else:
            self._hold(torch.cat([self._keys, keys], 2), torch.cat([self._values, values], 2))

    def _hold(self, keys: Tensor, values: Tensor, *, own: bool = True) -> None:
        self._keys, self._values, self._own, self._room = keys, values, own, None

    def _fits(self, keys: Tensor, values: Tensor) -> bool:
        """True if rows can be written into the room that a swap has left."""
        graph = torch.is_grad_enabled() and (keys.requires_grad or values.requires_grad)
        return self._room is not None and keys.shape[2] == 1 and not graph and self._free(*self._room)

    def _free(self, *rows: Tensor) -> bool:
        """True if rows may be changed in place."""
        if not self._own or any(x.requires_grad or not x.is_contiguous() for x in rows):
            return False
        return torch.is_inference_mode_enabled() or not any(x.is_inference() for x in rows)

    @property
    def swaps(self) -> bool:
        return type(self) is RectangleShelf  # others that are made of one may hold more than these rows

    def swap(self, gone: Tensor, slots: Tensor) -> None:
        keys, values = self.newest
        if not self._free(keys, values):
            keys, values = (x.clone(memory_format=torch.contiguous_format) for x in (keys, values))
        pairs, n = gone.shape[0] * gone.shape[1], keys.shape[2]
        first = offsets(pairs, n, gone)
        place, last = (gone.view(pairs, 1) + first).view(-1), first.view(-1) + (n - 1)
        for x in (keys, values):
            rows = x.view(pairs * n, x.shape[3])
            rows.index_copy_(0, place, rows.index_select(0, last))
        self._hold(keys.narrow(2, 0, n - 1), values.narrow(2, 0, n - 1))
        self._room = keys, values
        self._slots = without_row(slots, gone)

    def lend(self) -> None:
        self._own = False

    def snapshot(self) -> dict[str, Any]:
        self.lend()
        # Room that a swap has left is no state: the row that comes after a snapshot copies.
        return {**super().snapshot(), "_room": None}

    def take(self, step: Reduction, slots: Tensor) -> None:
        keys, values = self.keys, self.values
        assert keys is not None  # something was there to decide on
        assert values is not None
        keys, values, kept = gather_cache(keys, values, slots, step.representative)
        self._hold(keys, values)
        self._slots = without_empty(kept, step.mask).contiguous()

    def merge(self, step: Reduction, slots: Tensor, weights: Tensor | None) -> None:
        keys, values = self.keys, self.values
        assert keys is not None  # something was there to decide on
        assert values is not None
        self._hold(step.merge(keys, weights), step.merge(values, weights))
        self._slots = without_empty(merged_slots(step, slots), step.mask).contiguous()

    def rewrite(self, values: Tensor, slots: Tensor | None, keys: Tensor | None = None) -> None:
        assert self._keys is not None  # there are rows
        self._hold(self._keys if keys is None else keys, values, own=False)

    def crop(self, count: int) -> None:
        if count == 0 or self._keys is None or self._values is None:
            return
        left = self._keys.shape[2] - count
        self._hold(first_rows(self._keys, left), first_rows(self._values, left), own=False)
        self._slots = None if self._slots is None else self._slots[:, :, :left]

    def detach(self, count: int) -> tuple[Tensor, Tensor]:
        keys, values = self.newest
        self._hold(keys[:, :, :-count], values[:, :, :-count], own=False)
        return keys[:, :, -count:], values[:, :, -count:]

    def select(self, index: Tensor, listed: Callable[[], list[int]]) -> None:
        super().select(index, listed)
        if self._keys is not None and self._values is not None:
            self._hold(self._keys.index_select(0, index), self._values.index_select(0, index))


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
    if count == 1:
        return F.pad(known, (0, 1), value=seen - 1)
    new = newest_slots(seen, count, known.device).expand(*known.shape[:2], count)
    return torch.cat([known, new], 2)


def merged_slots(step: Reduction, slots: Tensor) -> Tensor:
    """``[B, Hk, K']``: of the rows that went into one, the newest slot."""
    b, heads = step.batch
    into = torch.where(step.target < 0, step.slots, step.target)
    # Rows that go nowhere are sent to a slot behind the last, which is cut off.
    last = torch.cat([slots.gather(2, step.representative), slots.new_zeros(b, heads, 1)], 2)
    return last.scatter_reduce(2, into, slots.gather(2, step.source), "amax")[..., :-1]


def without_row(state: Tensor, gone: Tensor) -> Tensor:
    """``[B, Hk, K - 1]``: the last one in place of ``gone`` ``[B, Hk, 1]``, which may be the last itself."""
    return state.scatter(2, gone, state[..., -1:])[..., :-1]


def without_empty(slots: Tensor, mask: Tensor | None) -> Tensor:
    """``[B, Hk, K]`` with ``SENTINEL`` where ``mask`` is False."""
    return slots if mask is None else slots.masked_fill(~mask, SENTINEL)


def first_rows(rows: Tensor, count: int) -> Tensor:
    """``[B, Hk, count, D]``; a copy where a view would keep much more alive than it shows."""
    part = rows[:, :, :count]
    return part if count * 8 > rows.shape[2] * 7 else part.clone()
