"""One forward of a model patched before or inside its language model: what leaves where, what later layers get."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tokred.adapters.contract import cache_of, members, terms, words
from tokred.adapters.vlm.columns import Group, Packed, Track, extended, gather_columns, last_real, left_pack
from tokred.adapters.vlm.decoder_attention import LayerCount
from tokred.adapters.vlm.decoder_layers import Inner
from tokred.adapters.vlm.masks import PAIRS, MaskMaker, gather_any_mask, slid
from tokred.adapters.vlm.sites import (
    Context,
    Left,
    check_tower,
    grouped,
    leave,
    places,
    shown,
    site_of,
    with_last,
    without_newlines,
)
from tokred.adapters.vlm.taps import Call
from tokred.adapters.vlm.tokens.evict import evened
from tokred.adapters.vlm.tokens.recorded import physical_length, set_track, track_of
from tokred.adapters.vlm.tokens.sound import with_sound
from tokred.adapters.vlm.tokens.steps import Decoding, seen
from tokred.core.place import Place, PlacedMethod
from tokred.errors import BypassedError, TokenStateError

if TYPE_CHECKING:
    from transformers import Cache

    from tokred.adapters.kv.cache import TokCache
    from tokred.adapters.vlm.calibration import Rows
    from tokred.adapters.vlm.hooks import VisualSettings
    from tokred.adapters.vlm.masks import Masks


class Forward:
    """A forward of the language model: its tokens, those that are left, and what the cache knew before it.

    Args:
        settings: of the patched model.
        call: what the outer hook saw.
        given: arguments of the language model, by name.
    """

    def __init__(self, settings: VisualSettings, call: Call, given: dict[str, Any]) -> None:
        self.settings = settings
        self.call = call
        self.cache = cache_of(given)
        self.track: Track | None = track_of(self.cache)
        self.past = 0 if self.cache is None else int(members.LENGTH.need(self.cache)())
        self.past_columns = 0 if self.cache is None else physical_length(self.cache)
        self.embeds: Tensor = words.EMBEDS.at(given)
        self.length = self.embeds.shape[1]
        self.packed: Packed | None = None
        self.inner: Inner | None = None
        self.visual: Tensor | None = None
        self.behind: Tensor | None = None
        self.counts: dict[int, LayerCount] = {}
        self.sizes: Tensor | None = None  # (B, L) float32, tokens that visual ones stand for; None: nothing has left
        self.calibration: Rows | None = None
        self.positions: Tensor | None = None  # (B, M) int64, where tokens have left a language model that takes none
        self.rows: dict[str, Tensor] = {}  # (B, L) each, state that a method of the projector has left; -1 elsewhere

    @property
    def device(self) -> torch.device:
        """Where the tokens are."""
        return self.embeds.device

    @property
    def batch(self) -> int:
        """Samples."""
        return self.embeds.shape[0]

    # ------------------------------------------------------------------ before the language model

    def prepare(self, given: dict[str, Any]) -> dict[str, Any]:
        """The language model's arguments, with fewer tokens where a method of ``projector`` says so."""
        settings, new = self.settings, dict(given)
        if settings.inner is None and self._has_inner():
            raise TokenStateError(
                "tokens left this prompt between decoder layers, but no method acts there (any more): apply "
                "that method as well, or give the model a cache of its own"
            )
        if self.call.modalities:
            self.visual = torch.stack([m.visual for m in self.call.modalities]).any(0)
            if settings.outer is not None:
                self._prune(settings.outer, new)
        if self.packed is None:
            self._pass(new)
        if self.slides and not self.settings.repack and (self.packed is not None or self._outer() is not None):
            words.ATTENTION_MASK.put(new, slid(self, new))
        if settings.inner is not None:
            self.inner = Inner(self)
        return new

    def _has_inner(self) -> bool:
        return any(g.first > 0 for g in self.track.groups) if self.track is not None else False

    @property
    def slides(self) -> bool:
        """True where a window of sliding layers is shorter than the conversation, so that it matters what it counts."""
        window = self.settings.window
        return window is not None and self.past + self.length > window

    def _outer(self) -> Group | None:
        return None if self.track is None else self.track.outer

    def places(self) -> Tensor:
        """``(B, past_columns + columns)`` int64: tokens of the conversation, or of what is left, by row of layer 0."""
        outer, width = self._outer(), self.embeds.shape[1]
        if self.settings.repack:
            return torch.arange(self.past_columns + width, device=self.device).expand(self.batch, -1)
        begin = 0 if outer is None else outer.width
        parts = [torch.arange(begin, self.past, device=self.device).expand(self.batch, -1)]
        if outer is not None:
            parts.insert(0, outer.columns)
        now = torch.arange(self.length, device=self.device).expand(self.batch, -1)
        parts.append(self.past + (now if self.packed is None else self.packed.columns))
        return torch.cat(parts, 1)

    def _held(self) -> Tensor:
        """``(B, past_columns)`` bool: real rows among those that layer 0 holds."""
        given = self.call.physical
        if given is None and self._outer() is None:
            given = self.call.mask
        if given is None:
            return torch.ones(self.batch, self.past_columns, dtype=torch.bool, device=self.device)
        return given[:, : self.past_columns].bool()

    def real(self) -> Tensor | None:
        """``(B, L)`` bool: the tokens of this forward that are no padding; None where all are."""
        mask = self.call.mask
        if mask is None or mask.ndim != 2:
            return None
        return mask[:, self.past : self.past + self.length].bool()

    @property
    def end(self) -> int:
        """Columns of this forward that belong to the prompt."""
        end = self.call.end
        return int(self.length if end is None or end <= self.past else min(self.length, end - self.past))

    def _prune(self, method: PlacedMethod, new: dict[str, Any]) -> None:
        real, visual = self.real(), self.visual
        assert visual is not None  # there are placeholders
        text = ~visual
        if real is not None:
            text = text & real
        if self.end < self.length:
            text = text & (torch.arange(self.length, device=self.device) < self.end)
        left = self._left(method, Context(self.embeds, text, self.settings.project, method.reads))
        if left.gone is None:
            if left.embeds is not self.embeds:
                self.embeds = left.embeds
                words.EMBEDS.put(new, self.embeds)
            return
        self.sizes = left.sizes
        keep = ~left.gone
        if real is None:
            counts = tuple(self.length - n for n in left.dropped)
        else:
            keep = keep & real
            counts = tuple(keep.sum(1).tolist())
        packed = left_pack(keep, counts)
        if packed.ragged and self.past > 0 and self.settings.states:
            raise ValueError(
                f"{self.settings.family} has layers that keep a state, which filler would change: in later turns "
                f"{method.name!r} has to leave as many tokens of every sample (here {', '.join(map(str, counts))})"
            )
        self.packed = packed
        # A policy of the cache counts the prompt in rows that come to it.
        if hasattr(self.cache, "engine"):
            ours: TokCache = self.cache
            if ours.engine.prompt is not None:
                ours.engine.prompt -= self.length - packed.columns.shape[1]
        self.embeds = gather_columns(left.embeds, packed.columns)
        words.EMBEDS.put(new, self.embeds)
        self.visual = visual.gather(1, packed.columns) & packed.valid
        self._shorten(new, packed, visual)

    def _left(self, method: PlacedMethod, context: Context) -> Left:
        visual = self.visual if "calibration" in method.reads else None
        left = Left(None, self.embeds, (0,) * self.batch, None if visual is None else visual.float())
        if "sound" in method.reads:
            left = with_sound(self, method, left)
            return left if left.gone is None else with_last(left, self._last(context.text))
        for modality in self.call.modalities:
            columns = modality.visual.nonzero()[:, 1]
            for group in grouped(places(modality)):
                first = torch.tensor([p.first for p in group], device=self.device).unsqueeze(1)
                offsets = group[0].part.where.offsets(self.device)
                where = columns[first + offsets]
                site = site_of(group, where, context)
                n = site.shape[1]
                if method.acts(n, Place(0, 1)):
                    check_tower(method, group[0].part)
                    with torch.no_grad():
                        step = method.reduce(site)
                    left = leave(left, group, where, site, step, getattr(method, "space", "x"))
                    self._note(site.rows, [p.sample for p in group], where)
            if left.gone is not None:
                left = without_newlines(left, shown(modality), columns)
        return left if left.gone is None else with_last(left, self._last(context.text))

    def _note(self, rows: dict[str, Tensor], group: list[int], where: Tensor) -> None:
        """Keep the state ``(G, N)`` that a method has left for each token of some samples, in columns ``where``."""
        samples = torch.tensor(group, device=self.device).unsqueeze(1)
        for name, state in rows.items():
            known = self.rows.get(name)
            if known is None:
                known = torch.full((self.batch, self.length), -1, dtype=state.dtype, device=self.device)
            self.rows[name] = known.index_put((samples, where), state)

    def _last(self, text: Tensor) -> Tensor:
        """``(B, 1)`` int64: the prompt's last token, visual or not."""
        assert self.visual is not None  # there are placeholders
        return last_real(self.visual | text, self.end)

    def _shorten(self, new: dict[str, Any], packed: Packed, visual: Tensor) -> None:
        """Positions, masks and whatever else has a column for every token."""
        positions = words.POSITIONS.of(new)
        if positions is None:
            positions = torch.arange(self.past, self.past + self.length, device=self.device).unsqueeze(0)
        if self.settings.repack:
            behind, first = self._behind(), 0 if self.past == 0 else positions[:, :1]
            start = first if behind is None else first - behind.unsqueeze(1)
            ids = start + (packed.valid.long().cumsum(1) - 1).clamp(min=0)
            words.POSITIONS.put(new, ids)
            self.behind = positions[:, -1] - ids[:, -1]
        else:
            words.POSITIONS.put(new, gather_columns(positions, packed.columns, -1))
        mask = words.ATTENTION_MASK.of(new)
        # PaliGemma and Gemma 3 make masks for pairs of tokens outside the language model, since images see all of
        # themselves; generation makes them by kind of layer. Elsewhere the language model makes its own, from padding.
        if mask is not None and not (isinstance(mask, Tensor) and mask.ndim == 2):
            before = self._held()
            words.ATTENTION_MASK.put(new, self._made(gather_any_mask(mask, packed, before, self.length), packed))
            told = self.past > 0 and (self.call.physical is not None or self.call.mask is not None)
            self.mask = torch.cat([before, packed.valid], 1) if packed.ragged or told else None
        else:
            self._pad(new, packed.valid, packed.ragged)
        # Qwen 3 VL adds features of its tower after early layers, a row for each visual token that is there.
        flat = words.DEEP_PLACES.of(new)
        if flat is not None:
            kept = torch.zeros_like(visual).scatter(1, packed.columns, packed.valid)
            words.DEEP_FEATURES.put(new, [plane[kept[flat]] for plane in words.DEEP_FEATURES.at(new)])
            words.DEEP_PLACES.put(new, flat.gather(1, packed.columns) & packed.valid)

    def _made(self, mask: Masks, packed: Packed) -> Masks:
        """Masks that were left out since all was causal, where filler has to be hidden now."""
        if not isinstance(mask, dict) or not packed.ragged:
            return mask
        everything = torch.arange(self.embeds.shape[1], device=self.device).expand(self.batch, -1)
        maker = MaskMaker(self.settings.config, None, everything, packed.valid, -1)
        window = self.settings.window
        return {
            kind: maker(None, self.embeds, None, 0, window if terms.WINDOWED in kind else None) if one is None else one
            for kind, one in mask.items()
        }

    def _behind(self) -> Tensor | None:
        return None if self.track is None else self.track.behind

    # ------------------------------------------------------------------ masks of layer 0

    mask: Tensor | None = None  # (B, past_columns + columns) bool: real rows of layer 0; None: all

    def _pad(self, new: dict[str, Any], valid: Tensor | None, ragged: bool) -> None:
        """The padding mask of all of layer 0's rows: those of earlier turns, then ``valid``."""
        track, given = self.track, self.call.mask
        count = self.embeds.shape[1]
        outer = None if track is None else track.outer
        if given is None and not ragged and (outer is None or not outer.ragged):
            self.mask = None
            words.ATTENTION_MASK.put(new, None if valid is None or not ragged else valid)
            if valid is not None and self.cache is None:
                # Without a cache, gaps in the positions would be read as several packed sequences.
                words.ATTENTION_MASK.put(new, valid)
            return
        # Three stretches: rows that earlier turns have left, of which the caller's mask says nothing; those that came
        # since; and this forward's.
        parts = []
        covered = 0
        if outer is not None and track is not None:
            parts.append(outer.valid)
            covered = track.covered
        if given is None:
            between = torch.ones(self.batch, self.past - covered, dtype=torch.bool, device=self.device)
        else:
            between = given[:, covered : self.past].bool()
        parts.append(between)
        if valid is None:
            if given is None:
                valid = torch.ones(self.batch, count, dtype=torch.bool, device=self.device)
            else:
                valid = given[:, self.past : self.past + count].bool()
        parts.append(valid)
        self.mask = torch.cat(parts, 1)
        words.ATTENTION_MASK.put(new, self.mask if given is None else self.mask.to(given.dtype))

    def _pass(self, new: dict[str, Any]) -> None:
        """A forward whose tokens all reach layer 0: only what earlier turns dropped matters."""
        track, mask = self.track, words.ATTENTION_MASK.of(new)
        outer = None if track is None else track.outer
        if outer is None or self.settings.facts.outer_masks:
            given = self.call.mask if self.call.physical is None else self.call.physical
            if given is not None and given.ndim == 2:
                self.mask = given.bool()
        elif mask is None or (isinstance(mask, Tensor) and mask.ndim == 2):
            self._pad(new, None, False)
        else:
            raise ValueError(PAIRS)
        behind = self._behind()
        if behind is not None:
            positions = words.POSITIONS.of(new)
            if positions is None:
                positions = torch.arange(self.past, self.past + self.length, device=self.device).unsqueeze(0)
            words.POSITIONS.put(new, positions - behind.unsqueeze(1))

    # ------------------------------------------------------------------ after the language model

    def finish(self, cache: Cache | None) -> None:
        """Write down in the cache what left."""
        inner = None if self.inner is None else self.inner.steps()
        if self.inner is not None and not self.inner.entered:
            raise BypassedError(
                f"{self.settings.methods[-1].name!r} did not run: the decoder layers of {self.settings.family} ran "
                "without the patch (their list was exchanged or wrapped): call tokred.apply again"
            )
        if cache is None:
            return
        steps: Decoding | None = None if self.inner is None else self.inner.decoding
        if steps is not None:
            set_track(cache, steps.left())
            return
        chosen = seen(self) if getattr(self.settings.inner, "decodes", False) else None
        if self.packed is None and not inner and chosen is None:
            return
        old = self.track
        groups: list[Group] = []
        firsts = {g.first for g in old.groups} if old is not None else set()
        width = self.embeds.shape[1]
        everything = torch.arange(width, device=self.device).expand(self.batch, -1)
        if self.packed is not None or 0 in firsts:
            columns = everything if self.packed is None else self.packed.columns
            valid = self.mask
            if valid is None:
                valid = torch.ones(self.batch, self.past_columns + width, dtype=torch.bool, device=self.device)
            outer = None if old is None else old.outer
            ragged = self.mask is not None
            groups.append(extended(outer, 0, self.past, columns, self.length, valid, ragged))
        for first in sorted((firsts | set(inner or ())) - {0}):
            assert self.inner is not None  # an inner group needs it
            groups.append(self.inner.group(first))
        if inner and getattr(self.settings.inner, "evicts", False):
            groups = evened(cache, groups)
        behind = self._behind() if self.behind is None else self.behind
        set_track(cache, Track(self.past + self.length, groups, behind, self.calibration, chosen))

    def tokens(self) -> tuple[LayerCount, ...]:
        """Tokens at the input of every layer (waits for the device)."""
        b = self.batch
        if self.counts:
            return tuple(self.counts[i] for i in sorted(self.counts))
        columns, padding = self.embeds.shape[1], self.real()
        real = (columns,) * b if padding is None else tuple(padding.sum(1).tolist())
        visual = (0,) * b if self.visual is None else tuple(self.visual.sum(1).tolist())
        if self.packed is not None:
            real = self.packed.counts
        return tuple(LayerCount(columns, real, visual) for _ in range(self.settings.depth))

    def loss_columns(self) -> Tensor | None:
        """``(B, M)`` which of this forward's tokens the last layer's rows are; None: all of them."""
        columns = None if self.packed is None else self.packed.columns
        last = None if self.inner is None else self.inner.last()
        if last is None:
            return columns
        return last.columns if columns is None else columns.gather(1, last.columns)

    def loss_valid(self) -> Tensor | None:
        """``(B, M)`` bool, False on filler."""
        last = None if self.inner is None else self.inner.last()
        if last is not None:
            return last.valid
        return None if self.packed is None else self.packed.valid
