"""Rows of heads of different lengths, one after the other: memory is what is held, not heads times the longest."""

from __future__ import annotations

import itertools
from typing import NamedTuple

import torch
from torch import Tensor

from tokred.kernels.decode_attention import SENTINEL, decode_attention, decode_attention_flat

LAYOUTS = ("auto", "rectangle", "flat")
# "auto" lays heads flat where a rectangle would hold more than this share of empty rows.
WASTE = 0.15


class Flat(NamedTuple):
    """The rows of all samples and key/value heads.

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

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """All that memory is held for."""
        return self.keys, self.values, self.slots, self.offsets

    def select(self, index: list[int]) -> Flat:
        """The rows of other samples: ``index`` of the old ones."""
        if index == list(range(self.samples)):
            return self
        h, bounds = self.heads, self.bounds
        counts = [bounds[i * h + j + 1] - bounds[i * h + j] for i in index for j in range(h)]

        def take(x: Tensor) -> Tensor:
            return torch.cat([x[bounds[i * h] : bounds[(i + 1) * h]] for i in index])

        rows = take(self.keys), take(self.values), take(self.slots)
        return Flat(*rows, *_offsets(counts, self.keys.device), h, self.width)

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
    flat: Flat | None,
    keys: Tensor | None,
    values: Tensor | None,
    slots: Tensor,
    index: Tensor,
    counts: list[int],
    meant: Tensor,
) -> Flat:
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
    return Flat(*both, new, *_offsets(counts, index.device), heads, max(counts))


def _taken(x: Tensor | None, old: Tensor | None, flat: Flat | None, pair: Tensor, row: Tensor) -> Tensor:
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
    flat: Flat,
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
    old = decode_attention_flat(query, flat.keys, flat.values, flat.offsets, scale=scaling, softcap=softcap)
    new = decode_attention(query, keys, values, key_mask=later_mask, scale=scaling, softcap=softcap)
    share = torch.sigmoid(old.lse - new.lse)
    if later_mask is not None:
        share = share.nan_to_num(0.0)  # a query that sees nothing at all
    return torch.lerp(new.output.to(share.dtype), old.output.to(share.dtype), share[..., None, None]).to(query.dtype)
