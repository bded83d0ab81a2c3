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
from tokred.kv.stores.grown import room_for
from tokred.kv.stores.store import Shelf, Store


@dataclass(frozen=True)
class Rectangle(Store):
    """Keys and values of the model's type, as many rows in every head as in the longest."""

    name: ClassVar[str] = "rectangle"
    can: ClassVar[frozenset[str]] = frozenset({"take", "merge", "rewrite", "ragged", "crop", "return", "lead"})

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


class Ring:
    """Places that the oldest row leaves and the newest takes, one after the other, the same in every head.

    Attributes:
        first, end: places ``first`` to ``end - 1`` turn.
        at: the next that is taken: it is free, or holds the oldest row.
        came: rows that have taken places and whose slots are not written down yet.
        seen: slots when a place was last freed.
    """

    __slots__ = ("at", "came", "end", "first", "seen")

    def __init__(self, first: int, end: int) -> None:
        self.first, self.end, self.at = first, end, first
        self.came = self.seen = 0

    def taken(self) -> None:
        """A row comes."""
        self.came += 1
        self.at += 1
        if self.at == self.end:
            self.at = self.first

    def noted(self, slots: Tensor, *, free: bool) -> Tensor:
        """``[B, Hk, K]`` slots with those of rows that have come; ``free``: the next place is."""
        size = self.end - self.first
        back = torch.arange(min(self.came, size), device=slots.device)  # from the newest row on
        places = self.first + (self.at - 1 - self.first - back) % size
        new = (self.seen - int(free) - back).to(slots.dtype)
        self.came = 0
        return slots.index_copy(2, places, new.expand(*slots.shape[:2], -1))


class RectangleShelf(SlottedShelf):
    """Two tensors, keys and values.

    They are changed in place only behind their rows, and where a row has left as long as nobody else can hold them: a
    snapshot is a reference, after which the next row that takes a place copies.
    """

    def __init__(self) -> None:
        super().__init__()
        self._keys: Tensor | None = None
        self._values: Tensor | None = None
        self._own = False  # keys and values have been made here, and nobody else holds them
        # [B, Hk, C, D] of which keys and values are the first rows; None: they are all of it.
        self._room: tuple[Tensor, Tensor] | None = None
        self._grows = False  # a row has come and none has left since, so that more are to be expected
        # The place of a row that has left, for the next that comes: [B, Hk, 1] int64, or one number for all heads.
        self._hole: Tensor | int | None = None
        self._late: tuple[Tensor, int] | None = None  # the place and the slot of a row that takes it, not noted yet
        self._ring: Ring | None = None

    @property
    def keys(self) -> Tensor | None:
        self.close()
        return self._keys

    @property
    def values(self) -> Tensor | None:
        self.close()
        return self._values

    @property
    def newest(self) -> tuple[Tensor, Tensor]:
        if self._hole is not None:
            self.close()
        assert self._keys is not None  # asked for after an update
        assert self._values is not None
        return self._keys, self._values

    @property
    def width(self) -> int:
        return 0 if self._keys is None else self._keys.shape[2] - (self._hole is not None)

    @property
    def samples(self) -> int:
        assert self._keys is not None  # once there are rows
        return self._keys.shape[0]

    def positions(self, seen: int) -> Tensor | None:
        self.close()
        if self._slots is not None:
            self._slots = self._noted(self._slots)
        return super().positions(seen)

    def _noted(self, slots: Tensor) -> Tensor:
        """Slots ``[B, Hk, K]``, with those of rows that have taken places."""
        if self._ring is not None and self._ring.came:
            slots = self._ring.noted(slots, free=self._hole is not None)
        if self._late is not None and self._hole is None:
            slots, self._late = slots.scatter(2, *self._late), None
        return slots

    # ------------------------------------------------------------------ rows that come

    def append(self, keys: Tensor, values: Tensor) -> None:
        count = keys.shape[2]
        if self._hole is not None:
            if count == 1 and not torch.is_grad_enabled():
                self._fill(self._hole, keys, values)
                return
            self.close()
        if self._keys is None or self._values is None:
            self._hold(keys.contiguous(), values.contiguous(), own=False)
            return
        held = self._keys.shape[2]
        if self._room is None or held + count > self._room[0].shape[2] or not _writable(*self._room):
            self._move(self._keys, self._values, keys, values)
            return
        own_keys, own_values = self._room
        own_keys.narrow(2, held, count).copy_(keys)
        own_values.narrow(2, held, count).copy_(values)
        self._keys, self._values = own_keys.narrow(2, 0, held + count), own_values.narrow(2, 0, held + count)

    def _move(self, old_keys: Tensor, old_values: Tensor, keys: Tensor, values: Tensor) -> None:
        """Hold rows and new ones behind them, with room for more where more will come."""
        spare = room_for(old_keys.shape[2]) if self.roomy and self._grows and not torch.is_grad_enabled() else 0
        made = _joined(old_keys, keys, spare), _joined(old_values, values, spare)
        count = old_keys.shape[2] + keys.shape[2]
        self._hold(made[0].narrow(2, 0, count), made[1].narrow(2, 0, count))
        self._room, self._grows = made if spare else None, True

    def _hold(self, keys: Tensor, values: Tensor, *, own: bool = True) -> None:
        self._keys, self._values, self._own, self._room = keys, values, own, None
        self._grows, self._hole, self._late, self._ring = False, None, None, None

    # ------------------------------------------------------------------ rows that take the place of others

    @property
    def swaps(self) -> bool:
        return type(self) is RectangleShelf  # others that are made of one may hold more than these rows

    @property
    def hole(self) -> Tensor | int | None:
        return self._hole

    def swap(self, gone: Tensor, slots: Tensor, seen: int) -> None:
        self._slots, self._hole, self._late, self._ring = slots, gone, (gone, seen), None

    @property
    def turned(self) -> int:
        ring, keys = self._ring, self._keys
        return ring.seen if ring is not None and keys is not None and ring.end == keys.shape[2] else -1

    def turn(self, first: int, seen: int) -> bool:
        if self._ring is None or self.turned < 0:
            slots = self.positions(seen)
            if slots is None:
                slots = newest_slots(seen, seen, self.newest[0].device).expand(*self.newest[0].shape[:2], -1)
            # This waits for the device, once in all steps that follow each other.
            if first and not bool((slots[:, :, first - 1] == first - 1).all()):
                return False
            self._slots, self._ring = slots, Ring(first, slots.shape[2])
        self._ring.seen, self._hole = seen, self._ring.at
        return True

    def _fill(self, hole: Tensor | int, keys: Tensor, values: Tensor) -> None:
        """Put rows ``[B, Hk, 1, D]`` in the place of those that have left."""
        whole = self._changeable()
        if isinstance(hole, int):
            whole[0].narrow(2, hole, 1).copy_(keys)
            whole[1].narrow(2, hole, 1).copy_(values)
        else:
            places = _in_table(hole, whole[0])
            for x, new in zip(whole, (keys, values), strict=True):
                x.view(-1, x.shape[3]).index_copy_(0, places, new.reshape(-1, x.shape[3]))
        self._hole = None
        if self._ring is not None:
            self._ring.taken()

    def _changeable(self) -> tuple[Tensor, Tensor]:
        """Keys and values ``[B, Hk, C, D]`` that nobody else holds, and their room."""
        held = self._keys, self._values
        assert held[0] is not None  # there are rows
        assert held[1] is not None
        whole = self._room or (held[0], held[1])
        alike = self._own and whole[0].is_contiguous() and whole[1].is_contiguous()
        if not (alike and _writable(*whole)):
            whole = _copy(held[0]), _copy(held[1])
            self._keys, self._values, self._own, self._room = *whole, True, None
        return whole

    def close(self) -> None:
        hole, slots = self._hole, self._slots
        if hole is None or slots is None:
            return
        slots = self._noted(slots)
        gone = torch.full((*slots.shape[:2], 1), hole, device=slots.device) if isinstance(hole, int) else hole
        whole, n = self._changeable(), slots.shape[2]
        last, places = (_in_table(x, whole[0]) for x in (torch.full_like(gone, n - 1), gone))
        for x in whole:
            rows = x.view(-1, x.shape[3])
            rows.index_copy_(0, places, rows.index_select(0, last))
        self._hold(*(x.narrow(2, 0, n - 1) for x in whole))
        self._room, self._grows = whole, True
        self._slots = without_row(slots, gone)

    def lend(self) -> None:
        self._own = False

    def snapshot(self) -> dict[str, Any]:
        self.close()
        self.lend()
        self._slots = None if self._slots is None else self._noted(self._slots)
        # Room is no state: the row that comes after a snapshot copies.
        return {**super().snapshot(), "_room": None, "_ring": None, "_grows": False}

    # ------------------------------------------------------------------ what happens to them

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
        held = self.keys if keys is None else keys
        assert held is not None  # there are rows
        self._hold(held, values, own=False)

    def lead(self, keys: Tensor) -> None:
        self.close()
        self._changeable()[0].narrow(2, 0, keys.shape[2]).copy_(keys)

    def crop(self, count: int) -> None:
        self.close()
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
        self.close()
        self._slots = None if self._slots is None else self._noted(self._slots)
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


def with_more(state: Tensor, count: int, value: float, place: Tensor | int | None) -> Tensor:
    """State of rows ``[B, Hk, K]`` with that of ``count`` more, behind them or in a ``place`` that is free."""
    if isinstance(place, Tensor):
        return state.scatter(2, place, value)
    return torch.nn.functional.pad(state, (0, count), value=value)


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


def _joined(old: Tensor, new: Tensor, spare: int) -> Tensor:
    """``[B, Hk, K + n + spare, D]``: rows, new ones behind, and room for more."""
    if not spare:
        return torch.cat([old, new], 2)
    held, count = old.shape[2], new.shape[2]
    made = old.new_empty(*old.shape[:2], held + count + spare, old.shape[3])
    made.narrow(2, 0, held).copy_(old)
    made.narrow(2, held, count).copy_(new)
    return made


def _copy(rows: Tensor) -> Tensor:
    return rows.clone(memory_format=torch.contiguous_format)


def _writable(*rows: Tensor) -> bool:
    """True if rows can be changed in place."""
    if torch.is_inference_mode_enabled():
        return True
    # What gradients are kept of must not be written over.
    return not torch.is_grad_enabled() and not any(x.is_inference() for x in rows)


def _in_table(index: Tensor, rows: Tensor) -> Tensor:
    """Places ``[B * Hk]`` int64 of rows ``[B, Hk, 1]`` in the table of all rows of ``[B, Hk, C, D]``."""
    pairs = index.shape[0] * index.shape[1]
    return (index.view(pairs, 1) + offsets(pairs, rows.shape[2], index)).view(-1)
