"""``Tight``: a format whose heads hold their own rows, each as many as it keeps, and no empty ones."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from tokred.core.reduction import Reduction
from tokred.kernels.decode_attention import SENTINEL
from tokred.kv.described import Made
from tokred.kv.parts import as_part
from tokred.kv.site import CacheSite
from tokred.kv.stores.coded import Coded, CodedShelf
from tokred.kv.stores.mikv import MiKV
from tokred.kv.stores.store import Query, Shelf, Store


@dataclass(frozen=True)
class Tight(Store):
    """Every head of every sample has codes and newest rows of its own: uneven heads hold what they keep.

    Each head answers a step by itself, which takes longer where heads are many and rows few.

    Args:
        inner: a format of :mod:`tokred.kv`, an object or its name; not ``mikv``, which counts attention of all rows.
    """

    name: ClassVar[str] = "tight"
    can: ClassVar[frozenset[str]] = frozenset({"take", "ragged", "tight", "crop", "attend"})
    replaces: ClassVar[frozenset[str]] = Coded.replaces

    inner: Store | str = "kivi"

    def __post_init__(self) -> None:
        inner = as_part(self.inner, Store, "inner")  # type: ignore[type-abstract]
        if not isinstance(inner, Coded) or isinstance(inner, MiKV):
            raise ValueError(f"inner must be a format of kv other than 'mikv', such as 'kivi', got {inner!r}")
        object.__setattr__(self, "inner", inner)

    @property
    def format(self) -> Coded:
        """The format of each head."""
        assert isinstance(self.inner, Coded)  # made so above
        return self.inner

    @property
    def reads(self) -> frozenset[str]:  # type: ignore[override]
        """Inputs that the format takes from the site."""
        return self.format.reads

    def hint(self, lacking: frozenset[str]) -> str:
        return self.format.hint(lacking)

    def check(self, keys: Tensor, values: Tensor) -> None:
        self.format.check(keys, values)

    def row_bytes(self, keys: Tensor, values: Tensor) -> int:
        return self.format.row_bytes(keys, values)

    def fresh_bytes(self, keys: Tensor, values: Tensor) -> int:
        return self.format.fresh_bytes(keys, values)

    def whole_rows(self, keys: Tensor, values: Tensor) -> tuple[tuple[int, int], ...]:
        return self.format.whole_rows(keys, values)

    def note_bytes(self, heads: int, width: int, *, uneven: bool) -> int:
        return self.format.note_bytes(heads, width, uneven=uneven)

    def tight(self) -> Tight:
        return self

    def open(self) -> TightShelf:
        return TightShelf(self)


class _Seen(NamedTuple):
    """The part of a site that a head reads: ``real`` ``[1, 1, n]`` of its rows, or None; angles of the layer."""

    real: Tensor | None
    extent: tuple[int, int, int]
    rope: Any


class TightShelf(Shelf):
    """A shelf of one head for every sample and head.

    As part of a rectangle the rows of a head that were there when some were last evicted stand at its beginning, and
    those that came since at its end.

    Args:
        store: what it belongs to.
    """

    def __init__(self, store: Tight) -> None:
        self.store = store
        self._heads: tuple[tuple[CodedShelf, ...], ...] = ()  # of each sample
        self._counts: tuple[tuple[int, ...], ...] = ()  # rows when some were last evicted
        self._old = self._later = self._new = 0  # columns of those, rows that came since, and in this forward
        self._real: Tensor | None = None  # [B, Hk, n] bool, which of those columns have rows; None before any went

    def _each(self) -> list[tuple[int, int, CodedShelf]]:
        return [(b, h, shelf) for b, heads in enumerate(self._heads) for h, shelf in enumerate(heads)]

    @property
    def _uneven(self) -> bool:
        return any(n != self._old for counts in self._counts for n in counts)

    # ------------------------------------------------------------------ rows, as a rectangle

    @property
    def keys(self) -> Tensor | None:
        return self._together(lambda shelf: shelf.keys) if self._heads else None

    @property
    def values(self) -> Tensor | None:
        return self._together(lambda shelf: shelf.values) if self._heads else None

    def _together(self, rows: Callable[[CodedShelf], Tensor | None], empty: float | None = None) -> Tensor:
        """``[B, Hk, K, ...]`` of what the shelves have; empty rows repeat the last one, or are ``empty``."""
        found = []
        for b, h, shelf in self._each():
            own, n = rows(shelf), self._counts[b][h]
            assert own is not None  # there are rows
            if n < self._old:
                assert self._real is not None  # some went
                real, inner = self._real[b, h], own.shape[3:]
                old = own[:, :, :n] if n else own.new_zeros(1, 1, 1, *inner)
                old = old.index_select(2, (real.cumsum(0) - 1).clamp(min=0))
                if empty is not None:
                    old = old.masked_fill(~real, empty)
                own = torch.cat([old, own[:, :, n:]], 2)
            found.append(own)
        return self._side_by_side(found)

    @property
    def newest(self) -> tuple[Tensor, Tensor]:
        if self.complete:
            keys, values = self.keys, self.values
            assert keys is not None  # asked for after an update
            assert values is not None
            return keys, values
        each = [tuple(x[:, :, -self._new :] for x in shelf.newest) for *_, shelf in self._each()]
        return self._side_by_side(x[0] for x in each), self._side_by_side(x[1] for x in each)

    def _side_by_side(self, rows: Iterable[Tensor]) -> Tensor:
        """``[B, Hk, ...]`` of what each head has, ``[1, 1, ...]``."""
        found = torch.cat([*rows], 1)
        return found.view(self.samples, -1, *found.shape[2:])

    @property
    def complete(self) -> bool:
        return not self._uneven and all(shelf.complete for *_, shelf in self._each())

    @property
    def width(self) -> int:
        return self._old + self._later

    @property
    def mean_width(self) -> int:
        heads = sum(map(len, self._counts))
        return self._later + (-(-sum(map(sum, self._counts)) // heads) if heads else 0)

    @property
    def samples(self) -> int:
        return len(self._heads)

    def show(self) -> tuple[Tensor | Made, Tensor | Made]:
        if self.complete:
            return super().show()
        # What is asked for later is as it was now: shelves change, and what they held does not.
        kept = copy.copy(self)
        kept._heads = tuple(tuple(copy.copy(shelf) for shelf in heads) for heads in self._heads)
        makes = lambda: kept._together(lambda shelf: shelf.keys), lambda: kept._together(lambda shelf: shelf.values)
        some = (x.expand(self.samples, len(self._heads[0]), -1, -1) for x in self._heads[0][0].newest)
        keys, values = (Made.of(rows, self.width, make) for rows, make in zip(some, makes, strict=True))
        return keys, values

    @property
    def moved(self) -> bool:
        return self._real is not None

    def positions(self, seen: int) -> Tensor | None:
        if not self.moved:
            return None
        return self._together(lambda shelf: shelf.positions(seen), SENTINEL)

    # ------------------------------------------------------------------ what happens to them

    def append(self, keys: Tensor, values: Tensor) -> None:
        b, heads, n, _ = keys.shape
        if not self._heads:
            self._heads = tuple(tuple(self.store.format.open() for _ in range(heads)) for _ in range(b))
            self._counts = tuple((0,) * heads for _ in range(b))
        for i, h, shelf in self._each():
            shelf.append(keys[i : i + 1, h : h + 1], values[i : i + 1, h : h + 1])
        self._later, self._new = self._later + n, n

    def settle(self, site: CacheSite | None) -> None:
        # What is left of an eviction in this forward is no padding.
        known = None if site is None or (self.moved and self._later == 0) else site.real
        for b, h, shelf in self._each():
            part: Any = None
            if site is not None:
                real = None
                if known is not None:
                    real = self._own(b, h, known[b, min(h, known.shape[1] - 1)])[None, None]
                part = _Seen(real, (1, 1, shelf.width), getattr(site, "_rope", None))
            shelf.settle(part)

    def take(self, step: Reduction, slots: Tensor) -> None:
        index, (b, heads) = step.representative, step.batch
        mask = torch.ones(index.shape, dtype=torch.bool, device=index.device) if step.mask is None else step.mask
        counts = tuple(
            tuple(self._shrink(i, h, index[i, h], mask[i, h], slots[i, h]) for h in range(heads)) for i in range(b)
        )
        if bool((mask[..., 1:] <= mask[..., :-1]).all()):  # empty rows stand behind the others: some are not needed
            mask = mask[..., : max(map(max, counts))]
        self._counts, self._old, self._later, self._real = counts, mask.shape[2], 0, mask.contiguous()

    def _shrink(self, b: int, h: int, index: Tensor, mask: Tensor, slots: Tensor) -> int:
        """Hold the rows ``index`` ``[K]`` of one head's rectangle where ``mask`` says so; returns how many."""
        shelf = self._heads[b][h]
        places = torch.arange(self.width, device=index.device)
        if self._real is not None:
            ranks = self._real[b, h].cumsum(0) - 1
            places = torch.cat([ranks, places[self._old :] - self._old + self._counts[b][h]])
        own = places[index[mask]]
        shelf.take(Reduction.keep(own[None, None], shelf.width), self._own(b, h, slots)[None, None])
        return len(own)

    def _own(self, b: int, h: int, row: Tensor) -> Tensor:
        """Of a row ``[K]`` of the rectangle what belongs to rows of a head."""
        return row if self._real is None else torch.cat([row[: self._old][self._real[b, h]], row[self._old :]])

    def crop(self, count: int) -> None:
        for *_, shelf in self._each():
            shelf.crop(count)
        self._later -= count

    def detach(self, count: int) -> tuple[Tensor, Tensor]:
        each = [shelf.detach(count) for *_, shelf in self._each()]
        self._later, self._new = self._later - count, self._new - count
        return self._side_by_side(x[0] for x in each), self._side_by_side(x[1] for x in each)

    def select(self, index: Tensor, listed: Callable[[], list[int]]) -> None:
        chosen = listed()
        self._heads = tuple(tuple(copy.copy(shelf) for shelf in self._heads[i]) for i in chosen)
        self._counts = tuple(self._counts[i] for i in chosen)
        self._real = None if self._real is None else self._real.index_select(0, index)

    # ------------------------------------------------------------------ one query

    def attend(self, query: Query) -> Tensor | None:
        found: list[Tensor] = []
        group = query.q.shape[1] // len(self._heads[0])
        for b, h, shelf in self._each():

            def padding(count: int, b: int = b) -> Tensor | None:
                known = query.padding(count)
                return None if known is None else known[b : b + 1]

            own = query.q[b : b + 1, h * group : (h + 1) * group]
            answer = shelf.attend(query._replace(q=own, padding=padding))
            if answer is None:
                return None
            found.append(answer)
        return torch.cat(found, 1).view(*query.q.shape[:3], -1)

    # ------------------------------------------------------------------ memory

    def snapshot(self) -> dict[str, Any]:
        return {**self.__dict__, "_heads": tuple(tuple(shelf.snapshot() for shelf in heads) for heads in self._heads)}

    def restore(self, state: dict[str, Any]) -> None:
        super().restore(state)
        self._heads = tuple(tuple(map(self._opened, heads)) for heads in state["_heads"])

    def _opened(self, state: dict[str, Any]) -> CodedShelf:
        shelf = self.store.format.open()
        shelf.restore(state)
        return shelf
