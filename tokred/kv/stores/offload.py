"""``Offloaded``: rows in host memory, which come to the device when their layer is about to run."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from tokred.core.checks import check_count, check_flags
from tokred.core.reduction import Reduction
from tokred.kernels.gather_rows import gather_cache
from tokred.kv.described import Made
from tokred.kv.site import CacheSite
from tokred.kv.stores.rectangle import SlottedShelf, merged_slots, without_empty
from tokred.kv.stores.store import Shelf, Store

Rows = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Offloaded(Store):
    """Rows as they come, in host memory but for those of the layer that runs, of the next one, and a few new ones.

    Under CUDA host memory is pinned, and the next layer's rows come on a stream of their own while this one attends.
    Elsewhere the same happens without streams. Copies on the device are not counted as held.

    Args:
        block: rows of new tokens that wait on the device until they are moved together.
        prefetch: whether the next layer's rows set off before it runs.
    """

    name: ClassVar[str] = "offloaded"
    can: ClassVar[frozenset[str]] = frozenset({"take", "merge", "rewrite", "ragged", "crop"})
    replaces: ClassVar[frozenset[str]] = frozenset({"plain", "offloaded"})

    block: int = 64
    prefetch: bool = True

    def __post_init__(self) -> None:
        check_count(self.block, "block", 1)
        check_flags(prefetch=self.prefetch)

    def open(self) -> Shelf:
        return self.shelves(1)[0]

    def shelves(self, depth: int) -> list[Shelf]:
        chain = Chain(self.prefetch)
        chain.shelves = [OffloadedShelf(self.block, chain, i) for i in range(depth)]
        return list(chain.shelves)


class Away(NamedTuple):
    """Keys and values ``[B, Hk, n, D]`` in host memory.

    Attributes:
        keys, values: they; pinned where they came from CUDA.
        written: event of CUDA after which they are there; None: they are.
    """

    keys: Tensor
    values: Tensor
    written: Any = None

    @classmethod
    def of(cls, keys: Tensor, values: Tensor) -> Away:
        """Rows of any device."""
        away = in_host_memory(keys), in_host_memory(values)
        return cls(*away, torch.cuda.current_stream(keys.device).record_event() if keys.is_cuda else None)

    def to_file(self) -> dict[str, Any]:
        """Rows that are there, for a file; an event is none."""
        return dict(zip(("keys", "values"), self.rows, strict=True))

    @classmethod
    def from_file(cls, keys: Tensor, values: Tensor) -> Away:
        """Rows of a file, on the device where their layer runs."""
        return cls.of(keys, values)

    def __deepcopy__(self, memo: dict[int, Any]) -> Away:
        """Copies of rows that are there: an event cannot be copied."""
        return Away(*(same_memory(x, x) for x in self.rows))

    @property
    def rows(self) -> Rows:
        """Keys and values; waits until they are there."""
        if self.written is not None:
            self.written.synchronize()
        return self.keys, self.values

    def first(self, count: int) -> Away:
        """The first ``count`` rows."""
        keys, values = self.rows
        return Away(same_memory(keys, keys[:, :, :count]), same_memory(values, values[:, :, :count]))

    def select(self, index: Tensor) -> Away:
        """The rows of other samples: ``index`` ``[B']`` of the old ones."""
        index = index.cpu()
        return Away(*(same_memory(x, x.index_select(0, index)) for x in self.rows))

    def fetch(self, device: torch.device) -> Fetch:
        """Begin to bring the rows to a device."""
        if device.type != "cuda":
            return Fetch(self, (self.keys.to(device), self.values.to(device)), None)
        stream = _side_stream(device)
        if self.written is not None:
            stream.wait_event(self.written)
        with torch.cuda.stream(stream):
            rows = self.keys.to(device, non_blocking=True), self.values.to(device, non_blocking=True)
        return Fetch(self, rows, stream.record_event())


class Fetch(NamedTuple):
    """Rows on their way to a device.

    Attributes:
        source: that they are copies of.
        rows: keys and values ``[B, Hk, n, D]``, which may not be there yet.
        done: event of CUDA after which they are; None: they are.
    """

    source: Away
    rows: Rows
    done: Any

    def wait(self) -> Rows:
        """The rows; what is done with them on this stream comes after their arrival."""
        if self.done is not None:
            stream = torch.cuda.current_stream(self.rows[0].device)
            stream.wait_event(self.done)
            for x in self.rows:
                x.record_stream(stream)  # they were made on another stream, whose next copies must not overwrite them
        return self.rows


class Chain:
    """The shelves of one cache in the order of its layers, and rows that have set off for one of them.

    Args:
        prefetch: whether they do so before their layer runs.
    """

    of_empty = True  # a file of a cache does not hold it

    def __init__(self, prefetch: bool) -> None:
        self.prefetch = prefetch
        self.shelves: list[OffloadedShelf] = []
        self._coming: dict[int, Fetch] = {}

    def __getstate__(self) -> dict[str, Any]:
        """The chain without what is under way: events cannot be copied."""
        return {**self.__dict__, "_coming": {}}

    def bring(self, number: int, away: Away, device: torch.device) -> Rows:
        """Rows of a layer that is about to run; the next layer's set off."""
        found = self._coming.pop(number, None)
        # Rows may have changed since they set off, by a crop for example.
        if found is None or found.source is not away:
            found = away.fetch(device)
        return found.wait()

    def send_for_next(self, number: int) -> None:
        """Begin to bring the rows of the layer after ``number``; after the last comes the first, for the next token."""
        following = (number + 1) % len(self.shelves)
        away, device = self.shelves[following].whereabouts
        if self.prefetch and following != number and away is not None:
            self._coming = {following: away.fetch(device)}


class OffloadedShelf(SlottedShelf):
    """Rows of one layer: whole on the device from a forward's append to its settling, otherwise away but for the tail.

    No tensor is changed in place, so a snapshot is a reference.

    Args:
        block: rows of the tail at which it follows the others.
        chain: of the cache.
        number: place in it.
    """

    def __init__(self, block: int, chain: Chain, number: int) -> None:
        super().__init__()
        self._block = block
        self._chain = chain
        self._number = number
        self._whole: Rows | None = None
        self._away: Away | None = None
        self._tail: Rows | None = None  # newest rows, on the device, that are not away
        self._device = torch.device("cpu")

    # ------------------------------------------------------------------ rows, as a rectangle

    @property
    def whereabouts(self) -> tuple[Away | None, torch.device]:
        """Rows that would have to be brought, and the device where the layer runs."""
        return (self._away if self._whole is None else None), self._device

    @property
    def keys(self) -> Tensor | None:
        return self.newest[0] if self.width else None

    @property
    def values(self) -> Tensor | None:
        return self.newest[1] if self.width else None

    @property
    def newest(self) -> Rows:
        if self._whole is not None:
            return self._whole
        assert self._away is not None  # rows are asked for where there are some
        return _joined(self._away.fetch(self._device).wait(), self._tail)

    @property
    def width(self) -> int:
        if self._whole is not None:
            return self._whole[0].shape[2]
        return (0 if self._away is None else self._away.keys.shape[2]) + _count(self._tail)

    @property
    def samples(self) -> int:
        rows = self._whole or self._away
        assert rows is not None  # asked for where there are some
        return rows[0].shape[0]

    def show(self) -> tuple[Tensor | Made, Tensor | Made]:
        if self._whole is not None:
            return super().show()
        return self._made(0), self._made(1)

    def _made(self, which: int) -> Made:
        away, tail, device = self._away, self._tail, self._device  # of now: rows may go before somebody asks
        assert away is not None
        held = away[which]
        shape = (*held.shape[:2], self.width, held.shape[3])
        empty = torch.empty((), dtype=held.dtype, device=device).expand(shape)
        return Made(empty, lambda: _joined(away.fetch(device).wait(), tail)[which].detach())

    @property
    def away(self) -> Iterator[Tensor]:
        if self._away is not None:
            yield from self._away.rows

    # ------------------------------------------------------------------ what happens to them

    def append(self, keys: Tensor, values: Tensor) -> None:
        self._device = keys.device
        new = keys, values
        if self._whole is not None:
            self._whole = _joined(self._whole, new)
        elif self._away is not None:
            self._whole = _joined(self._chain.bring(self._number, self._away, self._device), self._tail, new)
            self._tail = None
        else:
            self._whole = keys.contiguous(), values.contiguous()
        self._chain.send_for_next(self._number)

    def settle(self, site: CacheSite | None) -> None:
        if self._whole is None:
            return
        keys, values = self._whole
        fresh = keys.shape[2] - (0 if self._away is None else self._away.keys.shape[2])
        if self._away is None or fresh >= self._block:
            self._away, self._tail = Away.of(keys, values), None
        elif fresh:
            # A view would keep all rows on the device.
            self._tail = keys[:, :, -fresh:].clone(), values[:, :, -fresh:].clone()
        self._whole = None

    def _change(self, keys: Tensor, values: Tensor, closed: bool) -> None:
        """Other rows than before: none of them is away yet."""
        self._whole, self._away, self._tail = (keys, values), None, None
        if closed:
            self.settle(None)

    def take(self, step: Reduction, slots: Tensor) -> None:
        closed = self._whole is None
        keys, values, kept = gather_cache(*self.newest, slots, step.representative)
        self._slots = without_empty(kept, step.mask).contiguous()
        self._change(keys, values, closed)

    def merge(self, step: Reduction, slots: Tensor, weights: Tensor | None) -> None:
        closed, (keys, values) = self._whole is None, self.newest
        self._slots = without_empty(merged_slots(step, slots), step.mask).contiguous()
        self._change(step.merge(keys, weights), step.merge(values, weights), closed)

    def rewrite(self, values: Tensor, slots: Tensor | None, keys: Tensor | None = None) -> None:
        self._change(self.newest[0] if keys is None else keys, values, self._whole is None)

    def crop(self, count: int) -> None:
        left = self.width - count
        if count == 0 or left < 0:
            return
        if self._whole is not None:
            self.settle(None)
        assert self._away is not None  # there are rows
        held = self._away.keys.shape[2]
        if left < held:
            self._away, self._tail = self._away.first(left), None
        elif self._tail is not None:
            keys, values = self._tail
            self._tail = (keys[:, :, : left - held], values[:, :, : left - held]) if left > held else None
        self._slots = None if self._slots is None else self._slots[:, :, :left]

    def detach(self, count: int) -> Rows:
        keys, values = self.newest
        self._whole = keys[:, :, :-count], values[:, :, :-count]
        return keys[:, :, -count:], values[:, :, -count:]

    def select(self, index: Tensor, listed: Callable[[], list[int]]) -> None:
        super().select(index, listed)
        self._whole, self._tail = _selected(self._whole, index), _selected(self._tail, index)
        self._away = None if self._away is None else self._away.select(index)


_streams: dict[torch.device, Any] = {}


def _side_stream(device: torch.device) -> Any:
    """The stream on which rows come to a device of CUDA."""
    if device not in _streams:
        _streams[device] = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    return _streams[device]


def in_host_memory(rows: Tensor, *, wait: bool = False) -> Tensor:
    """Rows in host memory, contiguous: pinned where they come from CUDA, and then perhaps not there yet.

    ``wait``: come back when they are, for those who have no event that says so.
    """
    if not rows.is_cuda:
        return rows.cpu().contiguous()
    return torch.empty(rows.shape, dtype=rows.dtype, pin_memory=True).copy_(rows, non_blocking=not wait)


def same_memory(like: Tensor, rows: Tensor) -> Tensor:
    """A contiguous copy of rows, pinned if ``like`` is."""
    if rows.is_cuda or not like.is_pinned():
        return rows.clone(memory_format=torch.contiguous_format)
    return torch.empty(rows.shape, dtype=rows.dtype, pin_memory=True).copy_(rows)


def _joined(*lots: Rows | None) -> Rows:
    """Keys and values of several lots of rows, in one copy; of one, as they are."""
    keys, values = zip(*(rows for rows in lots if rows is not None), strict=True)
    return (keys[0], values[0]) if len(keys) == 1 else (torch.cat(keys, 2), torch.cat(values, 2))


def _count(rows: Rows | None) -> int:
    return 0 if rows is None else rows[0].shape[2]


def _selected(rows: Rows | None, index: Tensor) -> Rows | None:
    return None if rows is None else (rows[0].index_select(0, index), rows[1].index_select(0, index))
