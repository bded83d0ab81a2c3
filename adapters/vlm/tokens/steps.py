"""Decoding under a method that chooses which visual rows of the caches a generated token attends to."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokred.adapters.contract import words
from tokred.adapters.vlm.columns import Group, Track, extended, left_pack
from tokred.adapters.vlm.decoder_attention import Input, heads_of
from tokred.adapters.vlm.masks import MaskMaker
from tokred.adapters.vlm.tokens.evict import taken
from tokred.kernels.dispatch import autocast_on
from tokred.vlm.decoding import StepMethod, StepSite

if TYPE_CHECKING:
    from tokred.adapters.vlm.forward import Forward


class Chosen(NamedTuple):
    """Visual rows of a cache, of which generated tokens choose.

    Attributes:
        visual: ``(B, P)`` bool, of the first rows that layers hold; later ones are text.
        counts: of each sample.
        last: what the last token gave to them, and which it attended to; None: none has chosen.
    """

    visual: Tensor
    counts: tuple[int, ...]
    last: tuple[Tensor, Tensor] | None = None

    def pick(self, index: Tensor) -> Chosen:
        """Rows of other samples."""
        index = index.to(self.visual.device)
        last = None if self.last is None else (self.last[0].index_select(0, index), self.last[1].index_select(0, index))
        return Chosen(self.visual.index_select(0, index), tuple(self.counts[i] for i in index.tolist()), last)

    def wide(self, width: int) -> Chosen:
        """Of so many rows, of which those that came since are text; fewer where a cache was cropped."""
        visual = _wide(self.visual, width)
        counts = self.counts if width >= self.visual.shape[1] else tuple(visual.sum(1).tolist())
        last = None if self.last is None else (_wide(self.last[0], width), _wide(self.last[1], width))
        return Chosen(visual, counts, last)

    def cut(self, count: int) -> Chosen:
        """Without the newest ``count`` rows, after which the next token chooses anew."""
        visual = self.visual[:, : self.visual.shape[1] - count]
        return Chosen(visual, tuple(visual.sum(1).tolist()))


def seen(forward: Forward) -> Chosen | None:
    """The visual rows after a forward that brought some, those of earlier ones among them; None: nothing is chosen."""
    track, visual = forward.track, forward.visual
    # Where rows have been freed for good, layers hold different ones, and nothing is chosen any more.
    if visual is None or (track is not None and any(g.first > 0 for g in track.groups)):
        return None
    before = torch.zeros(forward.batch, forward.past_columns, dtype=torch.bool, device=visual.device)
    if track is not None and track.chosen is not None:
        before = _wide(track.chosen.visual, forward.past_columns)
    both = torch.cat([before, visual], 1)
    return Chosen(both, tuple(both.sum(1).tolist()))


def decoding_of(forward: Forward) -> Decoding | None:
    """The choice of rows, where this is one generated token of each sample, and the method makes one."""
    method, track = forward.settings.inner, forward.track
    if not isinstance(method, StepMethod) or track is None or track.chosen is None or forward.embeds.shape[1] > 1:
        return None
    return Decoding(forward, method, track.chosen)


class Decoding:
    """One generated token of every sample.

    Args:
        forward: of it.
        method: that chooses.
        chosen: what is known of the cache.

    Raises:
        ValueError: a policy of the cache holds other rows than those that the prompt brought.
    """

    def __init__(self, forward: Forward, method: StepMethod, chosen: Chosen) -> None:
        self.forward = forward
        self.method = method
        self.width = forward.past_columns + 1
        self.chosen = chosen.wide(self.width)
        self._before: Input | None = None
        self._maker: MaskMaker | None = None
        self._hidden: Tensor | None = None
        if hasattr(forward.cache, "engine"):
            raise ValueError(
                f"{method.name!r} chooses among all rows of the prompt, of which a policy of the cache evicts some: "
                "take one of the two"
            )

    def enter(self, layer: int, module: nn.Module, x: Tensor, given: dict[str, Any]) -> None:
        """Choose before the method's layer, and hide the other rows from it and those behind it."""
        forward, real = self.forward, self.forward.mask
        if layer == self.method.layer - 1:
            cast, tables = autocast_on(x.device), words.TABLES.of(given)
            self._before = Input(module, x.detach(), tables, forward.cache, forward.past_columns, real, cast)
        if layer == self.method.layer:
            self._choose()
        if layer < self.method.layer or self._hidden is None:
            return
        if self._maker is None:
            columns = torch.arange(self.width, device=x.device).expand(forward.batch, -1)
            valid = ~self._hidden if real is None else real & ~self._hidden
            self._maker = MaskMaker(forward.settings.config, None, columns, valid, self.width)
        stock = words.ATTENTION_MASK.of(given)
        words.ATTENTION_MASK.put(given, self._maker(stock, x, forward.cache, layer, None))

    def _choose(self) -> None:
        given, known = self._before, self.chosen
        assert given is not None  # the layer before has run
        attention = heads_of(given, ran=True)
        found = attention.columns(rows=slice(attention.count - 1, attention.count)).mean(1)
        if found.shape[1] != self.width:
            raise ValueError(
                f"{self.method.name!r} reads what a token gives to all rows of the cache, which this kind of cache "
                "does not hand out: leave cache_implementation out"
            )
        received = found.masked_fill(~known.visual, 0.0)
        stays, handed = self.method.rows(StepSite(received, known.visual, known.counts, known.last))
        self._hidden = known.visual & ~stays
        self.chosen = known._replace(last=(received, handed))

    def left(self) -> Track:
        """The record of the cache after this token."""
        forward, track = self.forward, self.forward.track
        assert track is not None  # which told what there is
        if not self.method.evict or self._hidden is None:
            return replace(track, chosen=self.chosen)
        keep, outer, cache = ~self._hidden, track.outer, forward.cache
        packed = left_pack(keep, tuple(keep.sum(1).tolist()))
        for layer in words.LAYERS.need(cache)[self.method.layer :]:
            taken(layer, packed.columns)
        real = torch.ones_like(keep) if forward.mask is None else forward.mask
        valid = real.gather(1, packed.columns) & packed.valid
        ragged = packed.ragged or forward.mask is not None
        groups = [Group(self.method.layer, packed.columns, valid, ragged, self.width)]
        if outer is not None:
            one = torch.zeros(forward.batch, 1, dtype=torch.long, device=valid.device)
            groups.insert(0, extended(outer, 0, forward.past, one, 1, real, forward.mask is not None))
        # Nothing more is chosen: what is left is all that later tokens find.
        return Track(forward.past + 1, groups, track.behind, track.calibration)


def _wide(rows: Tensor, width: int) -> Tensor:
    """``(B, width)``: rows that came since are no visual ones."""
    return F.pad(rows, (0, width - rows.shape[1]))
