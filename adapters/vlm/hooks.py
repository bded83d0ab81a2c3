"""Hooks on a model with vision, its language model and the decoder layers. All are objects, so that patched models copy
and pickle; what they note about a forward in flight is kept by thread."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from tokred.adapters.contract import cache_argument, cache_of, members, terms, with_cache, words
from tokred.adapters.contract.calls import makes_cache
from tokred.adapters.host import State
from tokred.adapters.kv.reuse.layers import plain_cache
from tokred.adapters.passes import check_not_mapped
from tokred.adapters.swap import Hook, host_class
from tokred.adapters.vlm.calibration import calibrate
from tokred.adapters.vlm.decoder_attention import LayerCount
from tokred.adapters.vlm.families import Facts
from tokred.adapters.vlm.forward import Forward
from tokred.adapters.vlm.generate import PROMPT, refuse
from tokred.adapters.vlm.records import fill
from tokred.adapters.vlm.taps import Call, CoreRun, LanguageRun, in_flight
from tokred.adapters.vlm.tokens.recorded import track_of
from tokred.core.place import PlacedMethod
from tokred.errors import BypassedError

if TYPE_CHECKING:
    from transformers import Cache, PreTrainedConfig


class VisualSettings(State):
    """Settings that the hooks of one patched model share, and what they report.

    Args:
        facts: of the family.
        config: of the language model.
        depth: decoder layers.
        visual: whether the model has images; a language model alone has none.
        states: whether some of the decoder layers keep a state instead of rows.

    Attributes:
        outer, inner: the methods of ``projector`` and ``layer``.
        core: the model with vision, if there is one.
        projector, layers: the projector, and the list of decoder layers.
        chosen: decoder layers before which the method of ``layer`` may act; None: all.
        last: tokens at every layer's input in the last prefill, of a prompt of ``before``.
        watched: called with every forward of more than one token when it is over, by who draws it; None: nobody does.
    """

    def __init__(
        self, family: str, facts: Facts, config: PreTrainedConfig, depth: int, visual: bool, states: bool
    ) -> None:
        self.family = family
        self.facts = facts
        self.config = config
        self.depth = depth
        self.visual = visual
        self.outer: PlacedMethod | None = None
        self.inner: PlacedMethod | None = None
        self.chosen: frozenset[int] | None = None
        self.core: nn.Module | None = None
        self.states = states
        self.projector: nn.Module | None = None
        self.layers: nn.Module | None = None
        self.last: tuple[LayerCount, ...] = ()
        self.before = 0
        self.watched: Callable[[Forward], None] | None = None

    @property
    def methods(self) -> list[PlacedMethod]:
        """Methods that act before or inside the language model, in this order."""
        return [m for m in (self.outer, self.inner) if m is not None]

    @property
    def by_visual(self) -> bool:
        """True where the method of ``layer`` acts on visual tokens alone."""
        return bool(getattr(self.inner, "visual", True))

    @property
    def repack(self) -> bool:
        """True where positions are counted anew after a method of ``projector``."""
        return getattr(self.outer, "positions", "keep") == "repack"

    @property
    def project(self) -> Callable[[Tensor], Tensor] | None:
        """The projector, where it acts on tokens one by one."""
        return self.projector if self.facts.tokenwise else None

    @property
    def window(self) -> int | None:
        """How many tokens sliding layers look back, the own one included; None where all layers see all."""
        return next((w for w in map(self.window_of, range(self.depth)) if w is not None), None)

    def window_of(self, layer: int) -> int | None:
        """Window of one layer: how many tokens it looks back, the own one included; None where it sees all."""
        kinds = words.KINDS.part(self.config)
        if kinds is not None and kinds[layer] not in terms.SLIDING.names:
            return None
        window: int | None = words.WINDOW.part(self.config)
        return window

    def active(self, layer: int) -> bool:
        """True where the user lets the method act before this layer."""
        return self.chosen is None or layer in self.chosen


class EnterCore(Hook):
    """Hook before the forward of the model with vision: its arguments wait for the hook of the language model."""

    def __init__(self, settings: VisualSettings, names: tuple[str, ...]) -> None:
        self.settings = settings
        self.names = names

    def __call__(
        self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[()], dict[str, Any]] | None:
        given = {**dict(zip(self.names, args, strict=False)), **kwargs}
        call = Call(mask=_padding(words.ATTENTION_MASK.of(given)))
        ids, embeds = words.INPUT_IDS.of(given), words.EMBEDS.of(given)
        if ids is None and embeds is None:
            return None
        check_not_mapped()
        in_flight.core = CoreRun(module, call, given, self.settings, in_flight.core)
        if not self.settings.facts.outer_masks:
            return None
        tokens: Tensor = embeds if ids is None else ids
        shape = tokens.shape
        # These hosts make their masks here, before the language model, for as many rows as the cache tells: the rows
        # that layer 0 really holds.
        call.physical = held_mask(cache_of(given), call.mask, shape)
        new = held_types(cache_of(given), given, shape, self.settings.facts.causal_type)
        if call.physical is not None:
            words.ATTENTION_MASK.put(new, call.physical, self.names)
        return ((), {**given, **new}) if new else None


class LeaveCore(Hook):
    """Hook after that forward, whatever happened: images that the methods were not told of are no silent matter."""

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        run = in_flight.core
        if run is None or run.module is not module:
            return
        in_flight.core = run.before
        call, settings = run.call, run.settings
        if output is not None and (call.towers or call.records) and not call.modalities:
            name, family = settings.methods[0].name, settings.family
            why = "its feature getters" if call.entered else "its language model"
            raise BypassedError(
                f"{name!r} did not run: {family} saw images, but {why} ran without the patch (a wrapper or another "
                "class has taken its place): wrap or change the model first, and call tokred.apply on it then"
            )


class EnterLanguage(Hook):
    """Hook before the language model's forward: tokens leave, with their positions and masks."""

    def __init__(self, settings: VisualSettings, names: tuple[str, ...]) -> None:
        self.settings = settings
        self.names = names

    def __call__(
        self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[()], dict[str, Any]] | None:
        settings = self.settings
        given = {**dict(zip(self.names, args, strict=False)), **kwargs}
        run = in_flight.core
        source = dict(given)
        # The language model may be called alone, or inside a model with vision that another patch holds.
        if run is None or run.settings is not settings:
            call = Call(mask=_padding(words.ATTENTION_MASK.of(given)))
        else:
            call, source = run.call, run.given
        if words.EMBEDS.of(given) is None:
            if words.INPUT_IDS.of(given) is None:
                return None
            words.EMBEDS.put(given, members.EMBED.need(module)()(words.INPUT_IDS.of(given)), self.names)
        words.INPUT_IDS.pop(given)
        # The language model would make its cache inside, behind this hook, which has to hang the record on it.
        cache = cache_of(given)
        name = cache_argument(host_class(module).forward)
        if cache is None and name is not None and makes_cache(module, given, settings.config):
            cache = plain_cache(settings.config)
            given = with_cache(given, name, cache)
        refuse(cache)
        if call.end is None:
            call.end = getattr(cache, PROMPT, None)
        if settings.core is not None:
            fill(settings, settings.core, call, source)
            ids = words.INPUT_IDS.of(source)
            if settings.facts.sound and ids is not None:
                call.sound = ids == words.SOUND_TOKEN.need(words.CONFIG.need(settings.core))
        call.entered = True
        # Wrappers that spread a model over devices move arguments behind this hook.
        device = words.EMBEDS.at(given).device
        call.move(device)
        given = {k: _moved(v, device) for k, v in given.items()}
        # What is put in below is put under the names that are here.
        for word in (words.ATTENTION_MASK, words.POSITIONS):
            if word.among(self.names):
                given.setdefault(word.key(given, self.names), None)
        forward = Forward(settings, call, given)
        new = forward.prepare(given)
        calibrate(forward, module, new)
        in_flight.language = LanguageRun(module, forward, settings.layers, in_flight.language)
        return (), new


class LeaveLanguage(Hook):
    """Hook after the language model's forward: the cache is told what left."""

    def __init__(self, settings: VisualSettings) -> None:
        self.settings = settings

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        run = in_flight.language
        if run is None or run.module is not module:
            return
        forward = run.forward
        in_flight.language = run.before
        if output is None:
            return  # it broke off
        forward.finish(forward.cache)
        if in_flight.labels is not None:
            in_flight.done = forward
        if forward.length > 1 and not torch.compiler.is_compiling():
            self.settings.last = forward.tokens()
            self.settings.before = forward.length
            if self.settings.watched is not None:
                self.settings.watched(forward)


def held_mask(cache: Cache | None, mask: Tensor | None, shape: torch.Size) -> Tensor | None:
    """``(B, rows)``: the padding mask of the rows that layer 0 holds and those that come; None where nothing left
    before, or nothing is hidden.

    Args:
        cache: of the forward.
        mask: ``(B, all)`` the caller's, or None.
        shape: ``(B, L, ...)`` of what comes.
    """
    track = track_of(cache)
    outer = None if track is None else track.outer
    if cache is None or track is None or outer is None or (mask is None and not outer.ragged):
        return None
    if mask is None:
        count = int(members.LENGTH.need(cache)()) + shape[1] - track.covered
        later = torch.ones(shape[0], count, dtype=torch.bool, device=outer.valid.device)
    else:
        later = mask[:, track.covered :].bool()
    return torch.cat([outer.valid, later], 1).to(torch.long if mask is None else mask.dtype)


def held_types(cache: Cache | None, given: dict[str, Any], shape: torch.Size, causal: int) -> dict[str, Any]:
    """Token types ``(B, rows)``, of the dtype given, for the rows that layer 0 holds and those that come.

    Hosts count them from the first token of the conversation on, also where there are fewer (``generate`` hands on
    those of the new tokens), and take what is behind the last of them for causal: so does this.

    Args:
        cache: of the forward.
        given: arguments of the forward by name, with ``token_type_ids`` ``(B, some)`` or without.
        shape: ``(B, L, ...)`` of what comes.
        causal: the type of tokens that see only what came before them.
    """
    track = track_of(cache)
    outer = None if track is None else track.outer
    types = words.TYPES.of(given)
    if cache is None or track is None or outer is None or types is None:
        return {}
    behind = int(members.LENGTH.need(cache)()) + shape[1] - types.shape[1]
    if behind > 0:
        types = torch.nn.functional.pad(types, (0, behind), value=causal)
    return {words.TYPES.key(given): torch.cat([types.gather(1, outer.columns), types[:, track.covered :]], 1)}


def _moved(value: Any, device: torch.device) -> Any:
    """Masks and positions, moved to where the tokens are."""
    if isinstance(value, dict):
        return {k: _moved(v, device) for k, v in value.items()}
    return value.to(device) if isinstance(value, Tensor) else value


def _padding(mask: object) -> Tensor | None:
    return mask if isinstance(mask, Tensor) and mask.ndim == 2 else None
