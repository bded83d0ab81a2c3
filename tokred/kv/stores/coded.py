"""``Coded``: the newest rows as they came, older ones in a code. Formats are subclasses that say which, and when."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from tokred.core.reduction import Reduction
from tokred.core.registry import parts
from tokred.kernels.decode_attention import SENTINEL
from tokred.kernels.gather_rows import gather_rows
from tokred.kv.described import POSITION, Made, plain_bytes
from tokred.kv.site import CacheSite
from tokred.kv.stores.codecs import Codec
from tokred.kv.stores.grown import ROOM, SPARE
from tokred.kv.stores.rectangle import SlottedShelf, merged_slots, without_empty
from tokred.kv.stores.sides import SPARE_CODES, Side, Window
from tokred.kv.stores.store import Query, Store

# Share of the rows of a layer that may have been evicted and still take room, before all others are encoded anew.
HOLES = 0.25
# Codes that are held for one of a row that is left, with the room behind them.
HELD = (1 + 1 / SPARE_CODES) / (1 - HOLES)
# Bytes of a row's position, of where it stands, and of whether what stands there is a row, that of evicted ones too.
NOTED = 2 * POSITION + 2


class Form(NamedTuple):
    """How one of keys and values is held: the code of old rows, and which rows are old."""

    codec: Codec
    window: Window


@dataclass(frozen=True)
class Coded(Store):
    """Base of formats. A subclass answers :meth:`forms`.

    Rows are encoded once. Where some are evicted, the others keep their codes, and a list says where each stands; when
    more than a quarter of what is held is of evicted rows, those that are left are encoded anew.
    """

    can: ClassVar[frozenset[str]] = frozenset({"take", "merge", "ragged", "tight", "crop", "attend"})
    reads: ClassVar[frozenset[str]] = frozenset({"k"})
    replaces: ClassVar[frozenset[str]] = frozenset({"plain", "quantised"})

    @abstractmethod
    def forms(self, keys: Tensor, values: Tensor) -> tuple[Form, Form]:
        """Of keys and of values ``[B, Hk, n, D]``; those of no rows will do.

        Raises:
            ValueError: their head size cannot be packed.
        """

    def open(self) -> CodedShelf:
        return CodedShelf(self)

    def check(self, keys: Tensor, values: Tensor) -> None:
        self.forms(keys, values)

    def row_bytes(self, keys: Tensor, values: Tensor) -> int:
        """Codes, with those of evicted rows that may be among them and the room behind; and what is noted of a row."""
        key, value = self.forms(keys, values)
        return math.ceil((key.codec.row_bits(keys) + value.codec.row_bits(values)) / 8 * HELD) + NOTED

    def fresh_bytes(self, keys: Tensor, values: Tensor) -> int:
        """Bytes of a row as it comes; or in a code, where that takes more with the room behind."""
        return max(plain_bytes(keys) + plain_bytes(values) + NOTED, self.row_bytes(keys, values))

    def whole_rows(self, keys: Tensor, values: Tensor) -> tuple[tuple[int, int], ...]:
        """Rows in full precision, and the room behind them."""
        found = []
        for form, rows in zip(self.forms(keys, values), (keys, values), strict=True):
            most, plain = form.window.most, plain_bytes(rows)
            found += [(most, plain), (min(most, ROOM * SPARE), -(-plain // SPARE))]
        return tuple(found)

    def note_bytes(self, heads: int, width: int, *, uneven: bool) -> int:
        """The row of each side that steps write over, of float32."""
        return 2 * 4 * heads * width

    def tight(self) -> Store:
        """Every head with codes of its own."""
        if "tight" not in self.can:
            return super().tight()
        made: Store = parts.get("tight")(self)  # which is made of formats, and knows them
        return made


class CodedShelf(SlottedShelf):
    """A log of rows in the order in which they came, of which the policy's rows are all or some.

    Args:
        store: what it belongs to.
    """

    def __init__(self, store: Coded) -> None:
        super().__init__()
        self.store = store
        self._type = torch.float32
        self._sides: tuple[Side, ...] = ()  # of keys and of values, each with all rows of the log
        # [B, Hk, K] int32, which row of the log each row is, -1 for empty ones; None: all, in order.
        self._index: Tensor | None = None
        self._ragged = False
        self._new = 0  # rows of this forward
        self._settled = False  # since the last of them came
        self._since = 0  # rows since rows were last evicted
        self._seen: Tensor | None = None  # [B, Hk, M] bool, which of the first rows of the log are rows

    # ------------------------------------------------------------------ rows, as a rectangle

    @property
    def keys(self) -> Tensor | None:
        return self._made(0) if self._sides else None

    @property
    def values(self) -> Tensor | None:
        return self._made(1) if self._sides else None

    def _made(self, which: int) -> Tensor:
        return _restored(self._sides[which], self._index, self._type)

    @property
    def newest(self) -> tuple[Tensor, Tensor]:
        keys, values = (side.tail.rows for side in self._sides)
        return (keys, values) if self.complete else (keys[:, :, -self._new :], values[:, :, -self._new :])

    @property
    def complete(self) -> bool:
        return not any(side.parts for side in self._sides)

    @property
    def width(self) -> int:
        if self._index is not None:
            return self._index.shape[2]
        return self._sides[0].count if self._sides else 0

    @property
    def samples(self) -> int:
        return self._sides[0].tail.buffer.shape[0]

    def show(self) -> tuple[Tensor | Made, Tensor | Made]:
        if self.complete:
            return super().show()
        return self._shown(0), self._shown(1)

    def _shown(self, which: int) -> Made:
        side = self._sides[which]
        return Made.of(side.tail.buffer, self.width, partial(_restored, side, self._index, self._type), self._type)

    # ------------------------------------------------------------------ what happens to them

    def append(self, keys: Tensor, values: Tensor) -> None:
        self._type = keys.dtype
        n = keys.shape[2]
        if self._sides:
            self._sides = self._sides[0].append(keys), self._sides[1].append(values)
        else:
            forms = self.store.forms(keys, values)
            self._sides = tuple(Side.of(*form, x) for form, x in zip(forms, (keys, values), strict=True))
        if self._index is not None:
            log = self._sides[0].count
            later = torch.arange(log - n, log, dtype=torch.int32, device=keys.device)
            self._index = torch.cat([self._index, later.expand(*self._index.shape[:2], n)], 2)
        self._new, self._settled = n, False
        self._since += n

    def settle(self, site: CacheSite | None) -> None:
        self._settled = True
        if not any(side.due for side in self._sides):
            return
        seen = self._log_mask()
        # Padding must not widen anybody's range. What is left of an eviction in this forward is none.
        real = None if site is None or (self.moved and self._since == 0) else site.real
        if real is not None:
            real = real.expand(site.extent)  # type: ignore[union-attr]
            seen = real if self._index is None else scattered(real, self._index, self._sides[0].count)
        self._sides = tuple(side.settled(seen) for side in self._sides)

    def take(self, step: Reduction, slots: Tensor) -> None:
        index = step.representative
        self._moves(slots.gather(2, index), step)
        self._keep(self._places(index, step.mask), None)
        self._late()

    def merge(self, step: Reduction, slots: Tensor, weights: Tensor | None) -> None:
        keys, values = self._made(0), self._made(1)
        merged = step.merge(keys, weights), step.merge(values, weights)
        self._moves(merged_slots(step, slots), step)
        if not self.complete:
            # Only rows that others went into are new: they join the rows in full precision, all others keep their code.
            into = torch.where(step.target < 0, step.slots, step.target)
            changed = torch.zeros(*into.shape[:2], step.slots + 1, device=into.device)
            changed = changed.scatter_(2, into, 1.0)[..., :-1]
            count, log = int(changed.sum(-1).max()), self._sides[0].count
            where = changed.topk(count, -1).indices
            places = self._places(step.representative, None)
            new = torch.arange(log, log + count, dtype=torch.int32, device=where.device).expand(where.shape)
            places = places.scatter(2, where, new)
            if step.mask is not None:
                places = places.masked_fill(~step.mask, -1)
            self._sides = tuple(s.append(_picked(x, where)) for s, x in zip(self._sides, merged, strict=True))
            self._keep(places, merged)
        else:
            self._sides = tuple(s.anew(x) for s, x in zip(self._sides, merged, strict=True))
        self._late()

    def _late(self) -> None:
        """Where the forward is over already, rows that have changed must not wait for the next in full precision."""
        if self._settled:
            self.settle(None)

    def _moves(self, slots: Tensor, step: Reduction) -> None:
        self._slots, self._ragged = without_empty(slots, step.mask).contiguous(), step.mask is not None
        self._since = 0
        self._seen = None

    def _places(self, index: Tensor, mask: Tensor | None) -> Tensor:
        """``[B, Hk, K]`` int32: rows of the log that the rows ``index`` are; -1 where ``mask`` is False."""
        places = index.int() if self._index is None else self._index.gather(2, index)
        return places if mask is None else places.masked_fill(~mask, -1)

    def _keep(self, places: Tensor, rows: tuple[Tensor, Tensor] | None) -> None:
        """Hold the rows ``places`` of the log, where they stand, or anew; ``rows`` are the same, if they are known."""
        log, count = self._sides[0].count, places.shape[2]
        # What is said to fit into the windows stands there, so that bytes can be told from the number of rows alone.
        if not self.complete and count >= (1 - HOLES) * log and count > max(s.window.most for s in self._sides):
            self._index = places
            return
        if rows is None:
            rows = (
                _picked(self._sides[0].restored(self._type), places),
                _picked(self._sides[1].restored(self._type), places),
            )
        self._sides = tuple(s.anew(x) for s, x in zip(self._sides, rows, strict=True))
        self._index = None

    def crop(self, count: int) -> None:
        self._cut(count)

    def detach(self, count: int) -> tuple[Tensor, Tensor]:
        keys, values = (side.tail.rows[:, :, side.tail.count - count :] for side in self._sides)
        self._cut(count)
        self._new -= count
        return keys, values

    def _cut(self, count: int) -> None:
        if count == 0 or not self._sides:
            return
        left = self.width - count
        self._sides = tuple(side.cropped(count, self._type) for side in self._sides)
        self._index = None if self._index is None else self._index[:, :, :left]
        self._slots = None if self._slots is None else self._slots[:, :, :left]
        self._since -= count
        self._seen = None

    def select(self, index: Tensor, listed: Callable[[], list[int]]) -> None:
        super().select(index, listed)
        self._sides = tuple(side.select(index) for side in self._sides)
        for name in ("_index", "_seen"):
            value = getattr(self, name)
            if value is not None:
                setattr(self, name, value.index_select(0, index))

    # ------------------------------------------------------------------ one query

    def attend(self, query: Query) -> Tensor | None:
        keys, values = self._sides
        q = query.q
        if "attend" not in self.store.can or not keys.answers(q) or not values.answers(q):
            return None
        b, h, _, d = q.shape
        heads = keys.tail.buffer.shape[1]
        scale = d**-0.5 if query.scale is None else query.scale
        logits = keys.scores(q.reshape(b, heads, h // heads, d).float() * scale)
        if query.softcap is not None:
            logits = torch.tanh(logits / query.softcap) * query.softcap
        mask, padding = self._log_mask(), query.padding(self._since)
        if mask is not None:
            logits = logits.masked_fill(~mask[:, :, None], -torch.inf)
        if padding is not None:
            hidden = ~padding[:, None].expand(-1, heads, -1)
            if self._index is not None:
                hidden = scattered(hidden, self._index[:, :, -hidden.shape[2] :], logits.shape[-1])
            n = hidden.shape[2]
            old, new = logits.split([logits.shape[-1] - n, n], -1)  # type: ignore[no-untyped-call]
            logits = torch.cat([old, new.masked_fill(hidden[:, :, None], -torch.inf)], -1)
        weights = logits.softmax(-1)
        if padding is not None:
            weights = weights.nan_to_num(0.0)  # a query that sees nothing at all
        self.answered(weights)
        return values.sums(weights).reshape(b, h, 1, -1).to(q.dtype)

    def answered(self, weights: Tensor) -> None:
        """A query has been answered: ``weights`` ``[B, Hk, G, n]`` went to the rows of the log."""

    def _log_mask(self) -> Tensor | None:
        """``[B, Hk, n]`` bool: which rows of the log are rows; None: all. Later rows always are."""
        if self._index is None and not self._ragged:
            return None
        log = self._sides[0].count
        seen = self._seen
        if seen is None:
            if self._index is not None:
                seen = scattered(self._index >= 0, self._index, log)
            else:
                assert self._slots is not None  # ragged since an eviction
                seen = self._slots != SENTINEL
        if seen.shape[2] < log:
            seen = torch.cat([seen, seen.new_ones(*seen.shape[:2], log - seen.shape[2])], 2)
        self._seen = seen
        return seen


def _restored(side: Side, index: Tensor | None, dtype: torch.dtype) -> Tensor:
    """``[B, Hk, K, D]``: the rows ``index`` of a log, or all."""
    rows = side.restored(dtype)
    return rows if index is None else _picked(rows, index)


def _picked(rows: Tensor, index: Tensor) -> Tensor:
    """``[B, Hk, K, D]``: rows of each head; any one for those below 0."""
    return gather_rows(rows, index.clamp(min=0).long())


def scattered(values: Tensor, index: Tensor, count: int) -> Tensor:
    """``[B, Hk, count]`` bool by row of the log, False where ``index`` ``[B, Hk, K]`` does not point."""
    index = torch.where(index < 0, count, index).long()
    out = torch.zeros(*index.shape[:2], count + 1, dtype=torch.bool, device=index.device)
    return out.scatter_(2, index, values)[..., :-1]
