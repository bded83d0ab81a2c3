"""The decoder layers of a model whose tokens leave: what is done before each, and the list that hands them out so.

Hooks on the layers themselves would run inside a compiled layer, and again when a checkpoint runs a layer again; a list
runs outside of both.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from tokred.adapters.contract import words
from tokred.adapters.vlm.columns import Group, Packed, extended, gather_columns, last_real, pack_slots
from tokred.adapters.vlm.decoder_attention import Input, LayerCount, Step, heads_of, norm_behind_attention, values_of
from tokred.adapters.vlm.masks import MaskMaker
from tokred.adapters.vlm.taps import in_flight
from tokred.adapters.vlm.tokens.pictures import gathered_rows, images_in, moments_of, places_of
from tokred.adapters.vlm.tokens.steps import decoding_of
from tokred.core.attention import Attention
from tokred.core.place import Place
from tokred.core.reduction import Reduction
from tokred.kernels.dispatch import autocast_on
from tokred.vlm.in_llm import LayerSite, Prompt

if TYPE_CHECKING:
    from tokred.adapters.kv.layer import TokLayer
    from tokred.adapters.vlm.forward import Forward


class LayerList:
    """Settings of an exchanged list of decoder layers; there are none, but the list is known by them."""


class Through:
    """A decoder layer, called with fewer tokens.

    Args:
        inner: what is to be done in this forward.
        index: of the layer.
        layer: itself.
    """

    def __init__(self, inner: Inner, index: int, layer: nn.Module) -> None:
        self._inner = inner
        self._index = index
        self._layer = layer

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        args, kwargs = self._inner.enter(self._index, self._layer, args, kwargs)
        with self._inner.tapped(self._layer):
            return self._layer(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._layer, name)


def body(host: type[nn.Module]) -> dict[str, Callable[..., Any]]:
    """Methods of the list's subclass."""

    def handed(self: nn.ModuleList) -> list[Through | nn.Module]:
        layers: list[nn.Module] = list(self._modules.values())
        run = in_flight.language
        # The list may be walked while another model's forward is under way, or by whoever looks at the layers.
        if run is None or run.forward.inner is None or run.layers is not self:
            return [*layers]
        return [Through(run.forward.inner, i, layer) for i, layer in enumerate(layers)]

    def __iter__(self: nn.ModuleList) -> Iterator[Through | nn.Module]:
        return iter(handed(self))

    def __getitem__(self: nn.ModuleList, index: int | slice) -> Any:
        if not isinstance(index, slice):
            return host.__getitem__(self, index)  # type: ignore[index]
        found = handed(self)[index]
        # torch hands out a new list for a slice; that of layers in flight is a plain one, since they are no modules.
        return found if any(isinstance(one, Through) for one in found) else nn.ModuleList(found)  # type: ignore[arg-type]

    return {"__iter__": __iter__, "__getitem__": __getitem__}


class Inner:
    """The layers of one forward.

    Args:
        forward: of the model.
    """

    def __init__(self, forward: Forward) -> None:
        self.forward = forward
        self.settings = forward.settings
        self.width = forward.embeds.shape[1]
        self._steps: dict[int, Step] = {}
        self._makers: dict[tuple[int, int], MaskMaker] = {}
        self._before: Input | None = None
        self._entered: Tensor | None = None
        self._normed: list[Tensor] = []
        self._rows = forward.rows if forward.packed is None else gathered_rows(forward.rows, forward.packed.columns)
        self.ends: tuple[bool, ...] = ()
        self.aligned = True
        self.start = self._start()
        self.decoding = decoding_of(forward)
        self.entered = False

    def _start(self) -> Step | None:
        """The tokens at layer 0, where this forward is one that a method of ``layer`` acts on; None otherwise."""
        forward, method = self.forward, self.settings.inner
        # A decode step has nothing to lose: its one token is the prompt's last.
        if method is None or forward.embeds.shape[1] < 2:
            return None
        visual = forward.visual
        # Methods of text judge by the whole prompt, of which a later turn is only a piece.
        if not self.settings.by_visual and forward.past > 0:
            return None
        if visual is None:
            if self.settings.by_visual:
                return None
            visual = torch.zeros(forward.embeds.shape[:2], dtype=torch.bool, device=forward.device)
        valid = torch.ones_like(visual) if forward.packed is None else forward.packed.valid
        real = (self.width,) * forward.batch if forward.packed is None else forward.packed.counts
        if forward.packed is None:
            padding = forward.real()
            if padding is not None:
                valid, real = padding, tuple(padding.sum(1).tolist())
        # Three facts in one tensor: each would wait for the device.
        end = self.width - (forward.length - forward.end)
        last = last_real(valid, end)
        found = torch.stack([(visual & valid).sum(1), (visual & valid).gather(1, last).squeeze(1), last.squeeze(1)])
        *both, at = found.tolist()
        counts, self.ends = tuple(both[0]), tuple(map(bool, both[1]))
        self.aligned = all(i == end - 1 for i in at)
        columns = torch.arange(self.width, device=forward.device).expand(forward.batch, -1)
        return Step(columns, valid, visual & valid, real, counts)

    # ------------------------------------------------------------------ what layers call

    def enter(
        self, layer: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments of a decoder layer, with the tokens that are left."""
        self.entered = True
        given = dict(kwargs)
        x = args[0] if args else words.STATES.pop(given)
        rest = args[1:]
        stock = words.ATTENTION_MASK.of(given)
        if self.start is not None:
            x = self._reduce(layer, module, x, given)
        step = self.at(layer)
        old = None if self.forward.track is None else self.forward.track.inner(layer)
        if step is not self.start or old is not None:
            if step is not None and step is not self.start:
                words.TABLES.put(given, step.move(words.TABLES.of(given), 1))
                words.POSITIONS.put(given, step.move(words.POSITIONS.of(given), -1))
            window = self.settings.window_of(layer)
            words.ATTENTION_MASK.put(given, self._maker(layer)(stock, x, self.forward.cache, layer, window))
        if self.decoding is not None:
            self.decoding.enter(layer, module, x, given)
        if self.start is not None:
            assert step is not None  # at least the start
            self.forward.counts[layer] = LayerCount(x.shape[1], step.real, step.counts)
            self._watch(layer, module, x, given)
        return (x, *rest), given

    def steps(self) -> list[int]:
        """Layers at which tokens left."""
        return sorted(self._steps)

    def last(self) -> Step | None:
        """The tokens that the last layer ran on, where they are fewer than those of layer 0."""
        return self._steps[max(self._steps)] if self._steps else None

    def group(self, first: int) -> Group:
        """The group of the layers from ``first`` on, after this forward."""
        forward, step = self.forward, self.at(first)
        old = None if forward.track is None else forward.track.inner(first)
        columns = torch.arange(self.width, device=forward.device).expand(forward.batch, -1)
        if step is not None:
            columns = step.columns
        valid = self._valid(first, step)
        ragged = valid is not None
        if valid is None:
            past = forward.past_columns - (0 if old is None else old.dropped)
            valid = torch.ones(forward.batch, past + columns.shape[1], dtype=torch.bool, device=forward.device)
        return extended(old, first, forward.past_columns, columns, self.width, valid, ragged)

    # ------------------------------------------------------------------ masks

    def at(self, layer: int) -> Step | None:
        """The tokens that a layer runs on; None where this forward is none to act on, and nothing has left."""
        found = [first for first in self._steps if first <= layer]
        return self._steps[max(found)] if found else self.start

    def _valid(self, layer: int, step: Step | None) -> Tensor | None:
        """``(B, P + M)`` bool: real rows of this layer where it runs on ``step``; None: all."""
        # Rows of earlier forwards (``before``): those the cache tells of, then all that came since. Columns of this
        # one (``now``): those of the step, else all of layer 0's. None: all real, for which no mask is made.
        forward = self.forward
        old = None if forward.track is None else forward.track.inner(layer)
        mask: Tensor | None = forward.mask
        now = None if mask is None else mask[:, forward.past_columns :]
        if step is not None and step is not self.start:
            now = step.valid if step.ragged else None
        if old is None:
            before = None if mask is None else mask[:, : forward.past_columns]
            rows = forward.past_columns
        else:
            rows = forward.past_columns - old.dropped
            before = None
            if old.ragged or mask is not None:
                tail = forward.past_columns - old.width
                later = torch.ones(forward.batch, tail, dtype=torch.bool, device=forward.device)
                if mask is not None:
                    later = mask[:, old.width : forward.past_columns]
                before = torch.cat([old.valid, later], 1)
        if before is None and now is None:
            return None
        count = self.width if step is None else step.columns.shape[1]
        if before is None:
            before = torch.ones(forward.batch, rows, dtype=torch.bool, device=forward.device)
        if now is None:
            now = torch.ones(forward.batch, count, dtype=torch.bool, device=forward.device)
        return torch.cat([before, now], 1)

    def _maker(self, layer: int) -> MaskMaker:
        forward, step = self.forward, self.at(layer)
        # Layers since the same step, with the same columns of earlier forwards, share their masks.
        key = max((f for f in self._steps if f <= layer), default=0)
        old = None if forward.track is None else forward.track.inner(layer)
        name = (key, -1 if old is None else old.first)
        if name not in self._makers:
            past = forward.past_columns
            device, b = forward.device, forward.batch
            if old is None:
                before = torch.arange(past, device=device).expand(b, -1)
            else:
                before = torch.cat([old.columns, torch.arange(old.width, past, device=device).expand(b, -1)], 1)
            rows = None if step is None or step is self.start else step.columns
            now = torch.arange(self.width, device=device).expand(b, -1) if rows is None else rows
            columns = torch.cat([before, now + past], 1)
            valid = self._valid(layer, step)
            self._makers[name] = MaskMaker(
                self.settings.config,
                rows,
                columns,
                valid,
                past + self.width,
                forward.places if forward.slides else None,
                self.settings.facts.outer_masks,
            )
        return self._makers[name]

    # ------------------------------------------------------------------ reducing

    def _reduce(self, layer: int, module: nn.Module, x: Tensor, given: dict[str, Any]) -> Tensor:
        method, before = self.settings.inner, self.at(layer - 1)
        assert before is not None  # this forward is one to act on
        assert method is not None  # as above
        n = max(before.counts) if self.settings.by_visual else max(before.real)
        if layer == 0 or n == 0 or not self.settings.active(layer):
            return x
        if not method.acts(n, Place(layer, self.settings.depth)):
            return x
        with torch.no_grad():
            site = self._site(layer, module, x, given, before)
            step = method.reduce(site)
        self._rows = site.rows
        if step.trivial:
            return x
        packed, order = pack_slots(step, before.valid if before.ragged else None, before.real)
        self._lag(layer, x.shape[1] - packed.columns.shape[1])
        self._steps[layer] = self._left(packed, before)
        self._rows = gathered_rows(site.rows, packed.columns)
        return _taken(step, x, order)

    def _lag(self, layer: int, count: int) -> None:
        """Tell layers under a policy of the cache that ``count`` tokens before their rows have left in between.

        Such a layer numbers rows by what comes to it, and would take the next token for an earlier one.
        """
        for held in words.LAYERS.part(self.forward.cache, [])[layer:]:
            if hasattr(held, "clock"):
                ours: TokLayer = held
                ours.clock.behind += count

    def _left(self, packed: Packed, before: Step) -> Step:
        visual = before.visual.gather(1, packed.columns) & packed.valid
        counts = tuple(visual.sum(1).tolist()) if self.forward.visual is not None else before.counts
        return Step(before.columns.gather(1, packed.columns), packed.valid, visual, packed.counts, counts)

    def _site(self, layer: int, module: nn.Module, x: Tensor, given: dict[str, Any], before: Step) -> LayerSite:
        forward = self.forward
        past = 0
        if forward.cache is not None:
            old = None if forward.track is None else forward.track.inner(layer)
            past = forward.past_columns - (0 if old is None else old.dropped)
        tables = words.TABLES.of(given)
        if before is not self.start:
            tables = before.move(tables, 1)
        mask = self._valid(layer, before)
        own = Input(module, x.detach(), tables, forward.cache, past, mask, autocast_on(x.device))
        start = self.start
        assert start is not None  # see _reduce
        positions = before.columns if forward.packed is None else forward.packed.columns.gather(1, before.columns)
        return LayerSite(
            x=x.detach(),
            v=lambda: values_of(own),
            visual=before.visual,
            mask=before.valid if before.ragged else None,
            counts=before.counts,
            initial=start.counts,
            real=before.real,
            image=None if forward.visual is None else lambda: images_in(forward).gather(1, positions),
            moment=None if forward.visual is None else lambda: gather_columns(moments_of(forward), positions),
            image_initial=None if forward.visual is None else self._image_counts,
            place=lambda: self._place(positions),
            ends=self.ends,
            aligned=self.aligned,
            end=self._end(before),
            prompt=lambda: self._prompt(before),
            stream=None if self._entered is None else (self._entered, self._normed[-1]),
            own=lambda: heads_of(own, ran=False),
            before=None if self._before is None else self._ran(self._before),
            positions=positions,
            rows=dict(self._rows),
            layer=layer,
            depth=self.settings.depth,
        )

    def _place(self, positions: Tensor) -> Tensor | None:
        place: Tensor | None = places_of(self.forward)
        return None if place is None else gather_columns(place, positions)

    def _image_counts(self, i: int) -> tuple[int, ...]:
        """Visual tokens of image ``i`` of each sample at layer 0."""
        forward, start = self.forward, self.start
        assert start is not None  # asked for by a method that acts
        image = images_in(forward)
        image = image if forward.packed is None else image.gather(1, forward.packed.columns)
        return tuple((start.visual & (image == i)).sum(1).tolist())

    def _prompt(self, before: Step) -> Prompt:
        """Embeddings as they entered layer 0."""
        start = self.start
        assert start is not None  # asked for by a method that acts
        columns = torch.arange(self.width, device=start.visual.device)
        text = start.valid & ~start.visual & (columns < self._end(start))
        return Prompt(self.forward.embeds.detach(), start.visual, text, before.columns)

    @contextlib.contextmanager
    def tapped(self, module: nn.Module) -> Iterator[None]:
        """While a layer runs, note what leaves the norm behind its attention, where the method reads that."""
        if self._entered is None:
            yield
            return
        self._normed = []
        handle = norm_behind_attention(module).register_forward_hook(self._note)
        try:
            yield
        finally:
            handle.remove()

    def _note(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        self._normed.append(output.detach())

    def _ran(self, given: Input) -> Callable[[], Attention]:
        return lambda: heads_of(given, ran=True)

    def _end(self, before: Step) -> int:
        """Columns before the drafts of assisted decoding, which are the newest ones, and of which none has left."""
        return int(before.columns.shape[1] - (self.forward.length - self.forward.end))

    def _watch(self, layer: int, module: nn.Module, x: Tensor, given: dict[str, Any]) -> None:
        """Keep the input of this layer, where the method that acts before the next one reads its queries and keys."""
        method, step = self.settings.inner, self.at(layer)
        assert step is not None  # this forward is one to act on
        self._before = self._entered = None
        assert method is not None  # as above
        if not method.reads & {"rows_before", "stream"} or layer + 1 >= self.settings.depth:
            return
        n = max(step.counts) if self.settings.by_visual else max(step.real)
        if n and self.settings.active(layer + 1) and method.acts(n, Place(layer + 1, self.settings.depth)):
            forward = self.forward
            old = None if forward.track is None else forward.track.inner(layer)
            past = forward.past_columns - (0 if old is None else old.dropped)
            tables = words.TABLES.of(given)
            self._entered = x.detach() if "stream" in method.reads else None
            cast = autocast_on(x.device)
            self._before = Input(module, x.detach(), tables, forward.cache, past, self._valid(layer, step), cast)


def _taken(step: Reduction, x: Tensor, order: Tensor) -> Tensor:
    """The slots' values, right-aligned."""
    return gather_columns(step.gather(x) if step.mode == "keep" else step.merge(x), order)
