"""Rows of heads of different lengths, one after the other: memory is what is held, not heads times the longest."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from tokred.core.checks import check_share
from tokred.core.reduction import Reduction
from tokred.kernels.decode_attention import SENTINEL, decode_attention, decode_attention_flat
from tokred.kernels.dispatch import of_one_type
from tokred.kv.described import Made, like
from tokred.kv.stores.rectangle import RectangleShelf, newest_slots
from tokred.kv.stores.store import Query, Store


@dataclass(frozen=True)
class Flat(Store):
    """A rectangle, until heads or samples of different lengths would make it hold empty rows; then rows lie flat.

    Rows that come later stand beside the flat ones as a rectangle of their own, until rows are evicted again.

    Args:
        waste: share of empty rows that a rectangle may hold; 0: none.
    """

    name: ClassVar[str] = "flat"
    can: ClassVar[frozenset[str]] = frozenset({"take", "merge", "rewrite", "ragged", "tight", "crop", "attend", "lead"})

    waste: float = 0.15

    def __post_init__(self) -> None:
        check_share(self.waste, "waste", zero=True)

    def open(self) -> FlatShelf:
        return FlatShelf(self.waste)

    def note_bytes(self, heads: int, width: int, *, uneven: bool) -> int:
        """Bytes of the offsets at which the heads begin."""
        return 8 * (heads + 1) if uneven else 0

    def tight(self) -> Flat:
        """Flat as soon as one row would be empty."""
        return Flat(0.0)


class FlatShelf(RectangleShelf):
    """Flat rows, or none, and behind them a rectangle: of all rows, or of those that came since.

    Args:
        waste: as :class:`Flat`'s.
    """

    def __init__(self, waste: float) -> None:
        super().__init__()
        self.waste = waste
        self.flat: FlatRows | None = None

    @property
    def keys(self) -> Tensor | None:
        return super().keys if self.flat is None else self.flat.rectangle(self.flat.keys, self._keys)

    @property
    def values(self) -> Tensor | None:
        return super().values if self.flat is None else self.flat.rectangle(self.flat.values, self._values)

    @property
    def complete(self) -> bool:
        return self.flat is None

    @property
    def width(self) -> int:
        return super().width + (0 if self.flat is None else self.flat.width)

    @property
    def mean_width(self) -> int:
        if self.flat is None:
            return self.width
        return super().width + -(-self.flat.rows // (self.flat.samples * self.flat.heads))

    @property
    def samples(self) -> int:
        return super().samples if self.flat is None else self.flat.samples

    def show(self) -> tuple[Tensor | Made, Tensor | Made]:
        flat = self.flat
        if flat is None:
            return super().show()

        def made(rows: Tensor, later: Tensor | None) -> Made:
            shape = (flat.samples, flat.heads, self.width, rows.shape[-1])
            return Made(like(rows, shape), lambda: flat.rectangle(rows, later).detach())

        return made(flat.keys, self._keys), made(flat.values, self._values)

    @property
    def moved(self) -> bool:
        return self.flat is not None or super().moved

    def positions(self, seen: int) -> Tensor | None:
        flat = self.flat
        if flat is None:
            return super().positions(seen)
        count = super().width
        new = newest_slots(seen, count, flat.slots.device).expand(flat.samples, flat.heads, count)
        return flat.rectangle(flat.slots, new if count else None)

    def attend(self, query: Query) -> Tensor | None:
        if self.flat is None or self._keys is None or self._values is None:
            return None
        # Flat rows are real; those that came since, the query's own among them, may be padding.
        padding = query.padding(self._keys.shape[2])
        return attend_to_both(query.q, self.flat, self._keys, self._values, padding, query.scale, query.softcap)

    def take(self, step: Reduction, slots: Tensor) -> None:
        counts = self._lengths(step.mask)
        if counts is None or step.mask is None:
            super().take(step, slots)
            self.flat = None
            return
        index = step.representative
        self._lie(flatten(self.flat, self._keys, self._values, slots.gather(2, index), index, counts, step.mask))

    def merge(self, step: Reduction, slots: Tensor, weights: Tensor | None) -> None:
        super().merge(step, slots, weights)
        self.flat = None
        counts = self._lengths(step.mask)
        merged = self._slots
        if counts is not None and step.mask is not None and merged is not None:
            index = torch.arange(step.slots, device=merged.device).expand(merged.shape)
            self._lie(flatten(None, self._keys, self._values, merged, index, counts, step.mask))

    def rewrite(self, values: Tensor, slots: Tensor | None, keys: Tensor | None = None) -> None:
        if self.flat is not None:
            self._keys, self._slots, self.flat = self.keys, slots, None
        super().rewrite(values, slots, keys)

    def lead(self, keys: Tensor) -> None:
        if self.flat is None:
            super().lead(keys)
            return
        n = keys.shape[2]
        places = (self.flat.offsets[:-1, None] + torch.arange(n, device=keys.device)).view(-1)
        self.flat = self.flat._replace(keys=self.flat.keys.index_copy(0, places, keys.reshape(-1, keys.shape[3])))

    def _lie(self, flat: FlatRows) -> None:
        self.flat, self._keys, self._values, self._slots, self._room = flat, None, None, None, None
        self._hole, self._late, self._ring = None, None, None

    @property
    def swaps(self) -> bool:
        return self.flat is None

    def _lengths(self, mask: Tensor | None) -> list[int] | None:
        """Rows of each sample and head, if they are to lie flat; asking waits for the device, as all freeing does."""
        if mask is None:
            return None
        packed = (mask[..., 1:] <= mask[..., :-1]).all()  # rows of a head stand before its empty ones
        *counts, packed = torch.cat([mask.sum(-1).view(-1), packed.view(1)]).tolist()
        wasted = 1 - sum(counts) / max(mask.numel(), 1)
        return counts if packed and wasted > self.waste else None

    def select(self, index: Tensor, listed: Callable[[], list[int]]) -> None:
        super().select(index, listed)
        if self.flat is not None:
            self.flat = self.flat.select(listed())


class FlatRows(NamedTuple):
    """Rows of all samples and key/value heads, those of a head together.

    As part of a rectangle, the rows of each head stand at its beginning, in order.

    Attributes:
        keys, values: ``[T, D]``, the rows of sample 0 and head 0, then those of head 1, and so on.
        slots: ``[T]`` int32, the slot of each row.
        offsets: ``[B * Hk + 1]`` int64, where each head's rows begin.
        bounds: the same on the host.
        heads: key/value heads ``Hk``.
        width: rows of the longest head, or more: columns that the rectangle has for them.
    """

    keys: Tensor
    values: Tensor
    slots: Tensor
    offsets: Tensor
    bounds: tuple[int, ...]
    heads: int
    width: int

    @property
    def rows(self) -> int:
        """``T``, of all heads."""
        return self.bounds[-1]

    @property
    def samples(self) -> int:
        """``B``."""
        return (len(self.bounds) - 1) // self.heads

    def select(self, index: list[int]) -> FlatRows:
        """The rows of other samples: ``index`` of the old ones."""
        if index == list(range(self.samples)):
            return self
        h, bounds = self.heads, self.bounds
        counts = [bounds[i * h + j + 1] - bounds[i * h + j] for i in index for j in range(h)]

        def take(x: Tensor) -> Tensor:
            return torch.cat([x[bounds[i * h] : bounds[(i + 1) * h]] for i in index])

        rows = take(self.keys), take(self.values), take(self.slots)
        return FlatRows(*rows, *_offsets(counts, self.keys.device), h, self.width)

    def rectangle(self, rows: Tensor, later: Tensor | None) -> Tensor:
        """Keys, values or slots as ``[B, Hk, width + t, ...]``: what every operator takes, made for the moment.

        Args:
            rows: one of the tensors of ``T`` rows.
            later: ``[B, Hk, t, ...]`` rows that came later, or None.
        """
        column = torch.arange(self.width, device=rows.device)
        starts, lengths = self.offsets[:-1, None], self.offsets.diff()[:, None]
        # Empty rows repeat the last one of their head, so that nobody's infinities are in another's sums.
        source = starts + torch.minimum(column, (lengths - 1).clamp(min=0))
        shape = (self.samples, self.heads, self.width, *rows.shape[1:])
        source = source.clamp(max=max(self.rows - 1, 0)).view(-1)
        old = rows.index_select(0, source).view(shape) if self.rows else rows.new_zeros(shape)
        if rows.ndim == 1:
            old.masked_fill_((column >= lengths).view(shape), SENTINEL)
        return old if later is None else torch.cat([old, later], 2)


def flatten(
    flat: FlatRows | None,
    keys: Tensor | None,
    values: Tensor | None,
    slots: Tensor,
    index: Tensor,
    counts: list[int],
    meant: Tensor,
) -> FlatRows:
    """Some of the rows of a layer, laid flat, in one copy.

    Args:
        flat: its rows as they are, where they lie flat already.
        keys, values: ``[B, Hk, t, D]``, all of its rows, or those that came after ``flat``; None: none.
        slots: ``[B, Hk, K]`` int32, of the rows ``index``.
        index: ``[B, Hk, K]`` int64, rows of the rectangle.
        counts: of each sample and head, how many of these are meant.
        meant: ``[B, Hk, K]`` bool, which; those at the beginning of each head.
    """
    _, heads, k = index.shape
    chosen = meant.reshape(-1).nonzero().view(-1)
    pair, row = chosen // k, index.reshape(-1).index_select(0, chosen)
    both = (
        _taken(keys, None if flat is None else flat.keys, flat, pair, row),
        _taken(values, None if flat is None else flat.values, flat, pair, row),
    )
    new = slots.reshape(-1).index_select(0, chosen)
    return FlatRows(*both, new, *_offsets(counts, index.device), heads, max(counts))


def _taken(x: Tensor | None, old: Tensor | None, flat: FlatRows | None, pair: Tensor, row: Tensor) -> Tensor:
    later = None if x is None else x.reshape(-1, x.shape[-1])
    if old is None or flat is None:
        assert x is not None  # rows are in one place or the other
        assert later is not None
        return later.index_select(0, pair * x.shape[2] + row)
    if x is None or later is None:
        return old.index_select(0, flat.offsets[pair] + row)
    place = pair * x.shape[2] + row - flat.width
    if flat.rows == 0:
        return later.index_select(0, place)
    new = row >= flat.width
    out = old.index_select(0, torch.where(new, 0, flat.offsets[pair] + row))
    at = new.nonzero().view(-1)
    return out.index_copy_(0, at, later.index_select(0, place[at]))


def _offsets(counts: list[int], device: torch.device) -> tuple[Tensor, tuple[int, ...]]:
    bounds = (0, *itertools.accumulate(counts))
    return torch.tensor(bounds, device=device), bounds


def attend_to_both(
    query: Tensor,
    flat: FlatRows,
    keys: Tensor,
    values: Tensor,
    later_mask: Tensor | None,
    scaling: float | None,
    softcap: float | None,
) -> Tensor:
    """One query over flat rows and the rectangle of the rows that came later.

    Args:
        query: ``[B, H, 1, D]``.
        flat: all of its rows are real, and lie behind the query.
        keys, values: ``[B, Hk, t, D]`` rows that came later, at least one.
        later_mask: ``[B, t]`` bool, False on padding, or None.
        scaling, softcap: of the logits.

    Returns:
        ``[B, H, 1, D]``: the two attentions, put together by their log-sum-exp.
    """
    query, held_keys, held_values, keys, values = of_one_type(query, flat.keys, flat.values, keys, values)
    old = decode_attention_flat(query, held_keys, held_values, flat.offsets, scale=scaling, softcap=softcap)
    new = decode_attention(query, keys, values, key_mask=later_mask, scale=scaling, softcap=softcap)
    share = torch.sigmoid(old.lse - new.lse)
    if later_mask is not None:
        share = share.nan_to_num(0.0)  # a query that sees nothing at all
    return torch.lerp(new.output.to(share.dtype), old.output.to(share.dtype), share[..., None, None]).to(query.dtype)
