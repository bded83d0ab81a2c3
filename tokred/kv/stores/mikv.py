"""MiKV: rows that have received much attention in full precision, all others in few bits."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, ClassVar

import torch
from torch import Tensor

from tokred.core.checks import check_count, check_share
from tokred.core.reduction import Reduction
from tokred.kernels.gather_rows import gather_rows
from tokred.kv.described import plain_bytes
from tokred.kv.parts import Score, as_part
from tokred.kv.site import CacheSite
from tokred.kv.stores.codecs import Affine, AsTheyCome, Codec, Parts, check_bits, group_for
from tokred.kv.stores.coded import HELD, NOTED, Coded, CodedShelf, Form, scattered
from tokred.kv.stores.grown import ROOM, Grown
from tokred.kv.stores.rounded import Rounded
from tokred.kv.stores.sides import SPARE_CODES, Side, Window, put, with_more

BITS = (2, 3, 4, 8, 16)
HIGH = (2, 4, 8, 16)
# Bytes of the attention that a row has received.
RECEIVED = 4


@dataclass(frozen=True)
class MiKV(Coded):
    """The newest rows, and those that have received most attention since they came, stay as they are, or almost. All
    others are rounded, channels of one token together; keys after their channels were brought to the size of the
    queries' ones.

    Nothing comes back. Attention is counted over all queries, as H2O does; a ``score`` chooses otherwise, at the end of
    every forward of several tokens, and rows that come later stay while they are among the newest.

    Args:
        high: share of the rows in full precision, rounded up.
        low: bits of the others: 2, 3, 4, 8, or 16, which rounds nothing.
        group: channels that share a scale; None: half a head.
        balance: whether keys are balanced; None: if ``low`` is 2.
        recent: share of those in full precision that are the newest.
        block: rows that are rounded at a time.
        high_bits: of the rows that matter: 2, 4, 8, or 16, which rounds nothing.
        score: who matters, an object of :mod:`tokred.kv` or its name; None: attention, added up.

    Source: Yang et al., No Token Left Behind, arXiv 2402.18096.
    """

    name: ClassVar[str] = "mikv"
    can: ClassVar[frozenset[str]] = frozenset({"take", "ragged", "attend"})
    high: float = 0.2
    low: int = 2
    group: int | None = None
    balance: bool | None = None
    recent: float = 0.5
    block: int = 1
    high_bits: int = 16
    score: Score | str | None = None

    def __post_init__(self) -> None:
        check_bits(self.high_bits, "high_bits", HIGH)
        if self.score is not None:
            object.__setattr__(self, "score", as_part(self.score, Score, "score"))  # type: ignore[type-abstract]
            if self.judge.accumulates or self.judge.repeats is not None or "module" in self.judge.needs:
                raise ValueError(
                    f"score is {self.judge.name!r}, which has to see every token, to read the prompt again, or to be "
                    "trained: give one that judges a forward by itself, such as 'window'"
                )
        check_share(self.high, "high")
        check_share(self.recent, "recent", zero=True)
        check_bits(self.low, "low", BITS)
        check_count(self.block, "block", 1)
        if self.group is not None:
            check_count(self.group, "group", 2)
        if not isinstance(self.balance, bool | None):
            raise TypeError(f"balance must be True, False or None, got {self.balance!r}")

    @property
    def judge(self) -> Score:
        """The score, where there is one."""
        assert isinstance(self.score, Score)  # made so above
        return self.score

    @property
    def reads(self) -> frozenset[str]:  # type: ignore[override]
        """Queries and keys, and what a score reads."""
        needs = frozenset() if self.score is None else self.judge.needs
        return needs | {"q", "k"}

    @property
    def balances(self) -> bool:
        """Balance: whether keys are balanced."""
        return self.low == 2 if self.balance is None else self.balance

    def forms(self, keys: Tensor, values: Tensor) -> tuple[Form, Form]:
        return self._form(keys.shape[-1], "key heads"), self._form(values.shape[-1], "value heads")

    def _form(self, width: int, what: str) -> Form:
        return Form(self._codec(self.low, width, what), Window(0, self.block))

    def _codec(self, bits: int, width: int, what: str) -> Codec:
        group = group_for(width, width // 2 if self.group is None else self.group, what)
        return AsTheyCome() if bits == 16 else Affine(bits, group)

    def upper(self, rows: Tensor) -> Codec:
        """The code of rows ``[B, Hk, n, D]`` that matter."""
        return self._codec(self.high_bits, rows.shape[-1], "heads")

    def open(self) -> MiKVShelf:
        return MiKVShelf(self)

    def row_bytes(self, keys: Tensor, values: Tensor) -> int:
        """Of the mean row: full precision by its share, codes with those of evicted rows, and what is noted."""
        forms, full = self.forms(keys, values), sum(self.upper(x).row_bits(x) for x in (keys, values)) / 8
        low = sum(form.codec.row_bits(x) for form, x in zip(forms, (keys, values), strict=True)) / 8
        room = 1 / SPARE_CODES if self.high_bits != 16 else 0.0
        return math.ceil(self.high * full * (1 + room) + (1 - self.high) * low * HELD) + NOTED + RECEIVED

    def fresh_bytes(self, keys: Tensor, values: Tensor) -> int:
        return max(plain_bytes(keys) + plain_bytes(values) + NOTED + RECEIVED, self.row_bytes(keys, values))

    def whole_rows(self, keys: Tensor, values: Tensor) -> tuple[tuple[int, int], ...]:
        """None but those that :meth:`row_bytes` has its share of, and those of :meth:`note_bytes`."""
        return ()

    def note_bytes(self, heads: int, width: int, *, uneven: bool) -> int:
        """The balance, rows that wait to be rounded, one that the share is rounded up by, and room; of float32."""
        return 4 * heads * width * (1 + 2 * (self.block + 1 + ROOM + 1))

    def full(self, count: int) -> int:
        """Rows in full precision of ``count``."""
        return math.ceil(round(self.high * count, 9))

    def quota(self, counts: Tensor) -> Tensor:
        """:meth:`full` of int64 numbers."""
        share = Fraction(self.high).limit_denominator(1_000_000)
        return -(-counts * share.numerator // share.denominator)


@dataclass(frozen=True, eq=False)
class Balanced(Codec):
    """Keys that are multiplied by a factor for each channel before they are rounded; queries are divided by it.

    Args:
        inner: of the products.
        factors: ``[B, Hk, 1, D]`` float32, of numbers that float16 has.
    """

    inner: Codec
    factors: Tensor

    def encode(self, rows: Tensor, real: Tensor | None) -> Parts:
        return self.inner.encode(rows.float() * self.factors, real)

    def decode(self, parts: Parts, dtype: torch.dtype) -> Tensor:
        return (self.inner.decode(parts, torch.float32) / self.factors).to(dtype)

    def row_bits(self, rows: Tensor) -> int:
        return self.inner.row_bits(rows)

    def why_slow(self, query: Tensor) -> str | None:
        return self.inner.why_slow(query)

    def scores(self, query: Tensor, parts: Parts) -> Tensor:
        return self.inner.scores(query / self.factors, parts)

    def select(self, index: Tensor) -> Balanced:
        return dataclasses.replace(self, factors=self.factors.index_select(0, index))


class MiKVShelf(CodedShelf):
    """A log whose codes are of rows from anywhere, and whose end is what is important or new.

    Args:
        store: what it belongs to.
    """

    store: MiKV

    def __init__(self, store: MiKV) -> None:
        super().__init__(store)
        self._received: Tensor | None = None  # [B, Hk, n] float32, attention to the rows in full precision
        self._weights: Tensor | None = None  # [B, Hk, n] of this step, where attend has it
        self._path: Tensor | None = None  # [B, Hk, K] rows of this forward's site that are left of an eviction
        self._counted = False  # whether its attention has been added to what rows have received
        self._real: Tensor | None = None  # [B, Hk, K], which rows are no padding; None: all

    def append(self, keys: Tensor, values: Tensor) -> None:
        super().append(keys, values)
        new = torch.zeros(*keys.shape[:3], device=keys.device)
        self._received = new if self._received is None else torch.cat([self._received, new], 2)
        self._weights = self._path = None
        self._counted = False
        if self._real is not None:  # until the site says otherwise
            self._real = torch.cat([self._real, self._real.new_ones(keys.shape[:3])], 2)

    def answered(self, weights: Tensor) -> None:
        self._weights = weights[:, :, :, self._sides[0].encoded :].sum(2)

    @property
    def newest(self) -> tuple[Tensor, Tensor]:
        tails: list[Any] = [side.tail for side in self._sides]
        if not self.complete and all(isinstance(tail, Rounded) and tail.fresh.count >= self._new for tail in tails):
            keys, values = (tail.fresh.rows[:, :, -self._new :] for tail in tails)
            return keys, values  # without restoring the others
        return super().newest

    def settle(self, site: CacheSite | None) -> None:
        self._settled = True
        self._count(site)
        self._round(site)
        self._weights = self._path = None
        if self.store.high_bits != 16:
            self._sides = tuple(
                side._replace(tail=Rounded.of(side.tail, self.store.upper(side.tail.buffer), self._type))  # type: ignore[arg-type]
                for side in self._sides
            )

    def _round(self, site: CacheSite | None) -> None:
        """Round what has to be."""
        keys = self._sides[0]
        count = max(0, keys.tail.count - self.store.full(self.width)) // self.store.block * self.store.block
        live = self._live(site)
        if count > 0 or (live is not None and keys.encoded):
            if self.store.balances and not isinstance(keys.codec, Balanced) and self.store.low != 16:
                self._balance(site)
            self._demote(count, live)

    def _live(self, site: CacheSite | None) -> Tensor | None:
        """``[B, Hk, n]`` bool: rows of the log that are rows of tokens; None: heads and samples have as many."""
        if site is not None:
            self._real = None if site.real is None else site.real.expand(site.extent)
            if self._real is not None and self._path is not None:
                self._real = self._real.gather(2, self._path)
        live, seen = self._real, self._log_mask()
        if live is None:
            return None
        live = live if self._index is None else scattered(live, self._index, self._sides[0].count)
        return live if seen is None else live & seen

    def _count(self, site: CacheSite | None) -> None:
        """Add the attention of this forward to what rows in full precision have received."""
        encoded, received = self._sides[0].encoded, self._received
        assert received is not None  # there are rows
        if self.store.score is not None:
            if site is None or site.q.shape[2] == 1:
                return  # rows that have come since are worth nothing once they are not the newest
            received = torch.zeros_like(received)
        if self._weights is not None:
            self._received = received + self._weights
        elif site is not None and not self._counted:
            # Of models in float64 attention is, too.
            found = (site.columns(group="sum") if self.store.score is None else self.store.judge(site)).float()
            if self._path is not None:
                found = found.gather(2, self._path)
            if self._index is None:
                self._received = received + found[:, :, encoded:]
            else:
                log = torch.zeros(*found.shape[:2], self._sides[0].count + 1, device=found.device)
                places = torch.where(self._index < 0, log.shape[2] - 1, self._index).long()
                self._received = received + log.scatter_(2, places, found)[:, :, encoded:-1]

    def _balance(self, site: CacheSite | None) -> None:
        """Factors by the largest number of each channel, in queries of this forward and in keys."""
        if site is None:
            return
        k, q = site.k.float().abs(), site.q.float().abs()
        b, heads, _, d = k.shape
        if site.real is not None:
            k = k * site.real[..., None]
        if site.padding is not None:
            q = q * site.padding.mask[:, None, -q.shape[2] :, None]
        most = q.amax(2).view(b, heads, -1, d).amax(2)
        factors = (most / k.amax(2)).sqrt()
        factors = torch.where(factors.isfinite() & (factors > 0), factors, 1.0).clamp(1e-4, 1e4).half().float()
        side = self._sides[0]
        self._sides = side._replace(codec=Balanced(side.codec, factors.unsqueeze(2))), self._sides[1]

    def _demote(self, count: int, live: Tensor | None) -> None:
        """Round the ``count`` rows that have received least and are none of the newest; of ``live`` ones ``[B, Hk, n]``
        so many that each head and sample is left with its own share."""
        tail, encoded, received = self._sides[0].tail.count, self._sides[0].encoded, self._received
        assert received is not None  # there are rows
        left, surplus = tail - count, None
        if live is None:
            recent = min(left, int(self.store.full(self.width) * self.store.recent))
            worth, seen = received.clone(), self._log_mask()
            if seen is not None:
                worth = worth.masked_fill(~seen[:, :, encoded:], -torch.inf)
            worth[:, :, tail - recent :] = torch.inf
        else:
            seen = self._log_mask()
            surplus, worth = self._surplus(live, left), live[:, :, encoded:]
            worth = 1 - worth.byte() + 2 * (worth & ~surplus).byte()  # padding before what is too much
        order = worth.sort(dim=-1, descending=True, stable=True).indices  # of equals the older one stays
        stay, go = order[..., :left].sort(-1).values, order[..., left:].sort(-1).values
        sides = []
        for side in self._sides:
            parts = side.parts
            if count:
                parts = with_more(parts, side.codec.encode(gather_rows(side.tail.rows, go), None))
            if self.store.high_bits == 16:
                others: Any = Grown.of(gather_rows(side.tail.rows, stay))
            else:  # what goes was rounded from what it was, if it has just come
                others = Rounded.of(side.tail, self.store.upper(side.tail.buffer), self._type).picked(stay)
            sides.append(Side(side.codec, side.window, others, None, parts))
        places = torch.empty_like(order, dtype=torch.int32)
        later = torch.arange(tail, dtype=torch.int32, device=order.device) + encoded
        places.scatter_(2, torch.cat([go, stay], 2), later.expand(order.shape).contiguous())
        index = self._index
        if index is None:
            index = places if seen is None else places.masked_fill(~seen, -1)
        else:
            moved = places.gather(2, (index - encoded).clamp(min=0).long())
            index = torch.where(index < encoded, index, moved)
        self._sides, self._index, self._seen = tuple(sides), index, None
        self._received = received.gather(2, stay)
        if live is not None and surplus is not None and encoded and (self._new > 1 or count == 0):
            live = torch.cat([live[:, :, :encoded], live[:, :, encoded:].gather(2, go)], 2)
            self._exchange(surplus.gather(2, stay), live)

    def _surplus(self, live: Tensor, left: int) -> Tensor:
        """``[B, Hk, n]`` bool: rows in full precision that are too many for their head and sample, if ``left`` stay."""
        block, received = self.store.block, self._received
        assert received is not None  # there are rows
        rows, here = live.sum(-1, keepdim=True), live[:, :, self._sides[0].encoded :]
        quota, held = self.store.quota(rows), here.sum(-1, keepdim=True)
        keep = (held - (held - quota).clamp(min=0) // block * block).clamp(max=left)
        keep = torch.maximum(keep, left - live.shape[2] + rows)  # where there is no padding in their place
        newer = here.flip(-1).cumsum(-1).flip(-1)
        worth = received.masked_fill(here & (newer <= (quota * self.store.recent).int()), torch.inf)
        order = worth.masked_fill(~here, -torch.inf).sort(dim=-1, descending=True, stable=True).indices
        return here & (order.argsort(-1) >= keep)

    def _exchange(self, surplus: Tensor, live: Tensor) -> None:
        """Let rows in full precision that are too many and padding in the code change places.

        Args:
            surplus: ``[B, Hk, n]`` bool, of rows in full precision.
            live: ``[B, Hk, n']`` bool, rows in the code that are no padding.
        """
        most = min(self.store.block * self._new, surplus.shape[2], live.shape[2])
        (some, rows), (free, units) = surplus.byte().topk(most, -1), (~live).byte().topk(most, -1)
        both, index = (some & free).bool(), self._index
        assert index is not None  # some are in the code
        sides = []
        for side in self._sides:
            new = side.codec.encode(gather_rows(side.tail.rows, rows), None)
            sides.append(side._replace(parts=put(side.parts, new, units, both)))
        self._sides = tuple(sides)
        places = torch.arange(self._sides[0].count, device=index.device).expand(*index.shape[:2], -1)
        rows = rows + live.shape[2]
        places = places.scatter(2, units, torch.where(both, rows, units))
        places = places.scatter(2, rows, torch.where(both, units, rows))
        self._index = torch.where(index < 0, index, places.gather(2, index.clamp(min=0).long()).int())

    def take(self, step: Reduction, slots: Tensor) -> None:
        index = step.representative
        places = self._places(index, None)
        if self._weights is not None and self._received is not None and self.store.score is None:
            # Of the rows as they are now: afterwards nobody would know whose they were.
            self._received, self._counted, self._weights = self._received + self._weights, True, None
        encoded, received = self._sides[0].encoded, self._received
        late, self._settled = self._settled, False
        super().take(step, slots)
        if self._index is None and received is not None:
            # All are in full precision again; of those that were not, nothing is known.
            known = received.gather(2, (places - encoded).clamp(min=0).long())
            self._received = torch.where(places < encoded, 0.0, known)
        self._path = index if self._path is None else self._path.gather(2, index)
        self._real = None if self._real is None else self._real.gather(2, index)
        self._settled = late
        self._late()

    def detach(self, count: int) -> tuple[Tensor, Tensor]:
        rows = super().detach(count)
        assert self._received is not None  # there were rows
        self._received = self._received[:, :, : self._received.shape[2] - count]
        self._real = None if self._real is None else self._real[:, :, : self.width]
        return rows

    def select(self, index: Tensor, listed: Callable[[], list[int]]) -> None:
        super().select(index, listed)
        for name in ("_received", "_weights", "_path", "_real"):
            value = getattr(self, name)
            if value is not None:
                setattr(self, name, value.index_select(0, index))
