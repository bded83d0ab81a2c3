"""``Grouped``: rows in groups, each a frame of a stream, rounded to four bits; queries attend to the groups they are
nearest to."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import groupby
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from tokred.core.checks import check_count
from tokred.kernels.decode_attention import SENTINEL
from tokred.kv.described import POSITION, plain_bytes
from tokred.kv.site import CacheSite
from tokred.kv.stores.pairs import Rows, appended, counted, joined, selected
from tokred.kv.stores.store import Query, Shelf, Store

LEVELS = 15  # of four bits, beside zero


class Codes(NamedTuple):
    """Rows of one group in four bits, a scale for each channel.

    Attributes:
        codes: ``[B, Hk, ceil(n * D / 2)]`` uint8, two numbers in each.
        low, high: ``[B, Hk, D]`` of the rows' type, the least and the largest number of each channel.
        size: rows ``n``.
    """

    codes: Tensor
    low: Tensor
    high: Tensor
    size: int

    @classmethod
    def of(cls, rows: Tensor) -> Codes:
        """Rows ``[B, Hk, n, D]``, rounded to the nearest step of their channel, half-way up."""
        low, high = rows.amin(2), rows.amax(2)
        x, start = rows.float(), low.float().unsqueeze(2)
        step = (high.float().unsqueeze(2) - start) / LEVELS
        codes = ((x - start) / torch.where(step > 0, step, 1.0) + 0.5).floor().clamp(0, LEVELS)
        flat = torch.where(step > 0, codes, 0.0).to(torch.uint8).flatten(2)
        if flat.shape[2] % 2:
            flat = torch.cat([flat, torch.zeros_like(flat[..., :1])], 2)
        return cls(flat[..., 0::2] | flat[..., 1::2] << 4, low, high, rows.shape[2])

    def rows(self) -> Tensor:
        """``[B, Hk, n, D]`` of the rows' type."""
        both = torch.stack([self.codes & LEVELS, self.codes >> 4], -1).flatten(2)
        width = self.low.shape[-1]
        codes = both[..., : self.size * width].unflatten(2, (self.size, width)).float()  # type: ignore[no-untyped-call]
        low, high = self.low.float().unsqueeze(2), self.high.float().unsqueeze(2)
        # The largest number is given back as it was, not as so many rounded steps.
        found = torch.where(codes == LEVELS, high, codes * ((high - low) / LEVELS) + low)
        return found.to(self.low.dtype)

    def select(self, index: Tensor) -> Codes:
        """Other samples, ``index`` ``[B']`` of the old ones."""
        codes, low, high = (x.index_select(0, index) for x in self[:3])
        return Codes(codes, low, high, self.size)

    def sample(self, i: int) -> Codes:
        """The rows of one sample, views."""
        codes, low, high = (x[i : i + 1] for x in self[:3])
        return Codes(codes, low, high, self.size)


def _in_a_row(groups: Iterable[Codes]) -> Tensor:
    """``[B, Hk, n, D]``: rows of groups, one behind the other.

    Each step makes them anew, so neighbours of one size are made at once.
    """
    parts = []
    for size, alike in groupby(groups, lambda one: one.size):
        some = list(alike)
        codes, low, high = (torch.cat(x) for x in zip(*(one[:3] for one in some), strict=True))
        rows = Codes(codes, low, high, size).rows()
        parts.append(rows.view(len(some), -1, *rows.shape[1:]).movedim(0, 2).flatten(2, 3))
    return torch.cat(parts, 2)


class Group(NamedTuple):
    """The rows of a frame, of one layer."""

    keys: Codes
    values: Codes


@dataclass(frozen=True)
class Grouped(Store):
    """The first rows as they came; behind them groups in four bits, of which queries attend to the nearest.

    Each group has a representative in full precision, the mean of its keys. The queries of a forward attend to the
    first rows, to the ``groups`` groups whose representatives have the largest cosine with them (mean of the heads and
    of the queries, each layer for itself), in the order of time, and to the rows that came since.

    Args:
        groups: that are attended to.
        group: rows of one; None: all rows of a forward of several tokens, or in a stream of every frame.
        sinks: first rows, which are in no group, never rounded and always attended to.
        most: groups that are held; the oldest leaves when there are more. None: all.

    Source: StreamingTOM, CVPR 2026 (arXiv 2510.18269), its memory; written from its description.
    """

    name: ClassVar[str] = "grouped"
    can: ClassVar[frozenset[str]] = frozenset({"attend", "lead"})
    searches: ClassVar[bool] = True

    groups: int = 250
    group: int | None = None
    sinks: int = 0
    most: int | None = None

    def __post_init__(self) -> None:
        check_count(self.groups, "groups", 1)
        check_count(self.sinks, "sinks")
        if self.group is not None:
            check_count(self.group, "group", 1)
        if self.most is not None:
            check_count(self.most, "most", 1)

    def open(self) -> GroupedShelf:
        return GroupedShelf(self)

    def row_bytes(self, keys: Tensor, values: Tensor) -> int:
        """Half a byte a number; what is held of a group beside that is not a row's."""
        return -(-(keys.shape[-1] + values.shape[-1]) // 2) + POSITION

    def fresh_bytes(self, keys: Tensor, values: Tensor) -> int:
        """Bytes of a row as it comes, which it takes until its frame is over."""
        return plain_bytes(keys) + plain_bytes(values) + POSITION


class GroupedShelf(Shelf):
    """Rows of a layer: the first, groups in codes, and the newest as they came.

    Args:
        store: what it belongs to.

    Attributes:
        asked: whether a question is being answered, whose rows are part of no group.
    """

    several: ClassVar[bool] = True

    def __init__(self, store: Grouped) -> None:
        self.store = store
        self.asked = False
        self._first: Rows | None = None
        self._tail: Rows | None = None
        self._groups: tuple[Group, ...] = ()
        self._means: Tensor | None = None  # [B, Hk, M, D] of the keys of each group
        self._left = 0  # rows of groups that are no longer held
        self._new = 0  # rows of this forward

    # ------------------------------------------------------------------ rows, as a rectangle

    @property
    def keys(self) -> Tensor | None:
        return self._all(0) if self.width else None

    @property
    def values(self) -> Tensor | None:
        return self._all(1) if self.width else None

    def _all(self, which: int) -> Tensor:
        parts = [x[which] for x in (self._first,) if x is not None]
        parts += [_in_a_row(one[which] for one in self._groups)] if self._groups else []
        parts += [x[which] for x in (self._tail,) if x is not None]
        return torch.cat(parts, 2)

    @property
    def newest(self) -> Rows:
        if not self.complete and self._tail is not None:
            return self._tail
        return joined(self._first, self._tail)  # rows are asked for where there are some

    @property
    def complete(self) -> bool:
        return not self._groups

    @property
    def width(self) -> int:
        return counted(self._first) + sum(one.keys.size for one in self._groups) + counted(self._tail)

    @property
    def samples(self) -> int:
        some = self._tail if self._first is None else self._first
        return self._groups[0].keys.low.shape[0] if some is None else some[0].shape[0]

    @property
    def moved(self) -> bool:
        return self._left > 0

    def positions(self, seen: int) -> Tensor | None:
        if not self._left:
            return None
        some = self._groups[0].keys.low
        first = counted(self._first)
        later = seen - (self.width - first)
        slots = [torch.arange(first), torch.arange(later, seen)]
        return torch.cat(slots).to(some.device, torch.int32).clamp(max=SENTINEL).expand(*some.shape[:2], -1)

    # ------------------------------------------------------------------ what happens to them

    def append(self, keys: Tensor, values: Tensor) -> None:
        self._tail = appended(self._tail, keys, values)
        self._new = keys.shape[2]

    def settle(self, site: CacheSite | None) -> None:
        tail, store = self._tail, self.store
        if tail is None or self.asked:
            return
        some = min(store.sinks - counted(self._first), counted(tail))
        if some > 0:
            self._first = appended(self._first, tail[0][:, :, :some], tail[1][:, :, :some])
            tail = tail[0][:, :, some:], tail[1][:, :, some:]
        size = tail[0].shape[2] if store.group is None else store.group
        # Single tokens, which somebody writes, wait for the next frame.
        over = store.group is not None or self._new > 1 or self.frames
        while 0 < size <= tail[0].shape[2] and over:
            self._close(tail[0][:, :, :size], tail[1][:, :, :size])
            tail = tail[0][:, :, size:], tail[1][:, :, size:]
        # What is left must not keep the rows alive that it was cut from.
        self._tail = (tail[0].clone(), tail[1].clone()) if tail[0].shape[2] else None

    def ask(self) -> None:
        self.asked = True

    def _close(self, keys: Tensor, values: Tensor) -> None:
        """Make a group of rows; the oldest leaves where there are too many."""
        mean = keys.float().mean(2, keepdim=True).to(keys.dtype)
        groups = (*self._groups, Group(Codes.of(keys), Codes.of(values)))
        means = mean if self._means is None else torch.cat([self._means, mean], 2)
        over = 0 if self.store.most is None else max(0, len(groups) - self.store.most)
        self._left += sum(one.keys.size for one in groups[:over])
        self._groups, self._means = groups[over:], means[:, :, over:].contiguous()

    def lead(self, keys: Tensor) -> None:
        assert self._first is not None  # the store's sinks, and no others
        self._first = keys, self._first[1]

    def detach(self, count: int) -> Rows:
        assert self._tail is not None  # they have come in this forward
        keys, values = self._tail
        self._tail = keys[:, :, :-count], values[:, :, :-count]
        return keys[:, :, -count:], values[:, :, -count:]

    def select(self, index: Tensor, listed: Callable[[], list[int]]) -> None:
        self._first, self._tail = selected(self._first, index), selected(self._tail, index)
        self._groups = tuple(Group(one.keys.select(index), one.values.select(index)) for one in self._groups)
        self._means = None if self._means is None else self._means.index_select(0, index)

    # ------------------------------------------------------------------ queries

    def chosen(self, q: Tensor) -> Tensor:
        """``[B, k]`` int64 ascending: the groups that queries ``[B, H, n, D]`` attend to.

        The one with the larger cosine goes first, the older of equal ones.
        """
        means = self._means
        assert means is not None  # there are groups
        kind = torch.promote_types(q.dtype, torch.float32)
        b, h, n, d = q.shape
        heads = means.shape[1]
        u = torch.nn.functional.normalize(q.to(kind), dim=-1).reshape(b, heads, -1, d)
        near = (u @ torch.nn.functional.normalize(means.to(kind), dim=-1).mT).sum((1, 2)) / (h * n)
        count = min(self.store.groups, means.shape[2])
        return near.argsort(dim=1, descending=True, stable=True)[:, :count].sort(dim=1).values

    def attend(self, query: Query) -> Tensor | None:
        tail = self._tail
        sizes = {one.keys.size for one in self._groups}
        if tail is None or query.padding(self.width) is not None or (len(sizes) > 1 and self.samples > 1):
            return None
        groups, rows = self.chosen(query.q).tolist(), list[Tensor]()
        for which in (0, 1):
            made = [_in_a_row(self._groups[g][which].sample(i) for g in some) for i, some in enumerate(groups)]
            first = [] if self._first is None else [self._first[which]]
            rows.append(torch.cat([*first, torch.cat(made), tail[which]], 2))
        return _attention(query, *rows)


def _attention(query: Query, keys: Tensor, values: Tensor) -> Tensor:
    """``[B, H, n, D]``: queries that are of the newest ``n`` rows see all rows up to their own."""
    q = query.q
    b, h, n, d = q.shape
    kind = torch.promote_types(q.dtype, torch.float32)
    grouped = q.to(kind).reshape(b, keys.shape[1], -1, d) * (d**-0.5 if query.scale is None else query.scale)
    logits = (grouped @ keys.to(kind).mT).view(b, h, n, -1)
    if query.softcap is not None:
        logits = torch.tanh(logits / query.softcap) * query.softcap
    if n > 1:
        rows = torch.arange(keys.shape[2], device=q.device)
        logits = logits.masked_fill(rows > rows[-n:, None], -torch.inf)
    weights = logits.softmax(-1).view(b, keys.shape[1], -1, keys.shape[2])
    return (weights @ values.to(kind)).view(b, h, n, -1).to(q.dtype)
