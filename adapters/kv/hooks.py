"""Hooks on the decoder, its attention modules and, for budgets that read it, the residual stream.

All are objects, so that a patched model copies and pickles.
"""

from __future__ import annotations

import threading
import weakref
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokred.adapters.contract import (
    attention_of,
    cache_name,
    cache_of,
    set_attention,
    terms,
    with_cache,
    words,
)
from tokred.adapters.contract.calls import makes_cache
from tokred.adapters.host import State
from tokred.adapters.kv.again import oversee
from tokred.adapters.kv.attention import PREFIX, SEAT, Seat, register
from tokred.adapters.kv.cache import LayerRows, TokCache, adopt, layer_of, make_cache, rows_of
from tokred.adapters.kv.front import Front
from tokred.adapters.kv.given import check_chunk, check_length, check_samples, count_new, padding_in
from tokred.adapters.kv.latents import read
from tokred.adapters.kv.layer import TokLayer
from tokred.adapters.kv.masks import MaskSpec
from tokred.adapters.kv.repeat import repeat
from tokred.adapters.kv.reuse.joined import Joined
from tokred.adapters.kv.reuse.shared import check_mask
from tokred.adapters.kv.rope import LayerRope
from tokred.adapters.passes import check_not_mapped
from tokred.adapters.swap import Hook, Undo, host_class
from tokred.adapters.swap import argument_names as argument_names
from tokred.core.learned import Learned
from tokred.kv.policy import CachePolicy

# The residual stream at the entry of the decoder layer that is running, by thread.
_local = threading.local()


class _Running(threading.local):
    """State of the forward that runs, one in each thread: several may use one model.

    Attributes:
        lessons: modules of the layers of a forward in training.
        shared: what layers leave for each other.
    """

    def __init__(self) -> None:
        self.lessons: list[Learned] = []
        self.shared: dict[str, Any] = {}


class CacheSettings(State, Undo):
    """Settings that the hooks of one patched model share.

    Args:
        policy: what happens to the rows of a cache.
        config: of the decoder.
        compressed: layers whose rows the policy acts on.
        implementation: the attention that the model had.
    """

    stage = "cache"
    crosses = False  # whether rows are those of an encoder

    def __init__(self, policy: CachePolicy, config: Any, compressed: tuple[int, ...], implementation: str) -> None:
        self.policy = policy
        self.config = config
        self.compressed = compressed
        self.implementation = implementation
        self._running = _Running()
        self._forget()

    def _forget(self, left: tuple[LayerRows, ...] = ()) -> None:
        self._left = left  # of the cache that ran last, when it went
        self._latest: weakref.ref[TokCache] | None = None
        self._layers = 0  # identity of its list of layers, which is kept until the cache has gone
        self._watched: weakref.WeakSet[TokCache] = weakref.WeakSet()

    def __getstate__(self) -> dict[str, Any]:
        """The settings without the cache, and with a record of its rows instead."""
        named = ("policy", "config", "compressed", "implementation", "module")
        return {**{name: getattr(self, name) for name in named}, "left": self.last}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Register the attention function again, which another process does not know yet."""
        self._running = _Running()
        self._forget(state.pop("left"))
        self.__dict__.update(state)
        register(self.implementation)

    @property
    def last(self) -> tuple[LayerRows, ...]:
        """Rows and bytes of each layer of the cache that ran last, now or when it went."""
        cache = None if self._latest is None else self._latest()
        return self._left if cache is None else cache.layer_rows()

    def ran(self, cache: TokCache) -> None:
        """Note which cache ran last. Counting its bytes after every token would take longer than a token should."""
        if self._latest is not None and self._latest() is cache:
            return
        if cache not in self._watched:
            self._watched.add(cache)
            weakref.finalize(cache, self._gone, words.LAYERS.need(cache)).atexit = False
        self._latest, self._layers = weakref.ref(cache), id(words.LAYERS.need(cache))

    @property
    def shared(self) -> dict[str, Any]:
        """Values that layers leave for each other in the forward that runs in this thread."""
        return self._running.shared

    def begin(self) -> None:
        """Begin a forward: one in training leaves losses."""
        self._running.lessons, self._running.shared = [], {}
        training = self.module is not None and self.module.training
        self.losses = {} if training else None

    def learn(self) -> Learned:
        """The policy's module for one layer, which may leave terms of a loss there."""
        made = Learned(self.module, shared=self.shared)
        if self.losses is not None:
            self._running.lessons.append(made)
        return made

    def collect(self) -> None:
        """End a forward: add the terms of all layers up."""
        for name, term in ((n, t) for one in self._running.lessons for n, t in one.losses.items()):
            assert self.losses is not None  # or nothing would have been noted
            self.losses[name] = self.losses[name] + term if name in self.losses else term
        self._running.lessons, self._running.shared = [], {}

    def _gone(self, layers: list[Any]) -> None:
        if id(layers) == self._layers:
            self._left = rows_of(layers)

    def cache(self, layout: str = "auto") -> TokCache:
        """An empty cache that holds its rows as ``layout`` says."""
        return make_cache(self.shape, self.policy, self.compressed, layout)

    def planned(self, layout: str, prompt: int | None, steps: int | None) -> Any:
        """An empty cache that knows what is to come, see :func:`tokred.kv_cache`."""
        cache = self.cache(layout)
        cache.engine.prompt, cache.engine.steps = prompt, steps
        return cache

    @property
    def shape(self) -> Any:
        """The decoder's configuration, which says what layers a cache has, or their number."""
        return self.config

    @property
    def method(self) -> CachePolicy:
        return self.policy

    @property
    def in_force(self) -> bool:
        return attention_of(self.config).startswith(PREFIX)

    def undo(self) -> None:
        """Give the model its own attention back, unless the user has chosen another meanwhile."""
        if self.in_force:
            set_attention(self.config, self.implementation)

    def ours(self, cache: Any) -> TokCache | None:
        """The part of a forward's cache that the policy acts on; None where it acts on none."""
        return cache if isinstance(cache, TokCache) else None

    def adopt(self, cache: Any) -> TokCache:
        """The caller's cache, made ours; raises as :func:`tokred.adapters.kv.cache.adopt`."""
        return adopt(cache, self.shape, self.policy, self.compressed)


class EnterDecoder(Hook):
    """Before the decoder's forward: it gets a cache where it would have made one, and bad calls are refused."""

    def __init__(self, settings: CacheSettings, names: tuple[str, ...], front: Front | None = None) -> None:
        self.settings = settings
        self.names = names  # of the forward's arguments
        self.front = front  # moves the first rows; None: they stay

    def __call__(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        given = {**dict(zip(self.names, args, strict=False)), **kwargs}
        cache = cache_of(given)
        if isinstance(cache, Joined):  # rows that the policy is shown later
            return args, kwargs
        self.settings.begin()
        if cache is None and not makes_cache(module, given, self.settings.config):
            if self.settings.losses is not None:
                raise ValueError(
                    "the policy's network is in training, and learns from the cache: call the model with "
                    "use_cache=True, and without gradient checkpointing"
                )
            return args, kwargs
        check_not_mapped()
        check_samples(given)
        mask = padding_in(words.ATTENTION_MASK.of(given))
        ours: TokCache = self.settings.cache() if cache is None else self.settings.adopt(cache)
        if isinstance(words.ATTENTION_MASK.of(given), Tensor):  # the model's own are as long as its cache says
            check_length(mask, given, ours)
        check_mask(ours, mask)
        check_chunk(given, ours.engine.parts.when.chunk)
        ours.begin()
        if self.front is not None:
            self.front.follow(ours)
        ours.account(count_new(given)[0], self.settings.config)
        oversee(self.settings, module, given, ours)
        kept = words.KEPT_LOGITS.of(given)
        if isinstance(kept, int) and words.KEPT_LOGITS.among(self.names):
            words.KEPT_LOGITS.put(given, _newest_alone(kept, self.settings.implementation))
        return (), with_cache(given, cache_name(host_class(module).forward), ours)


class LeaveDecoder(Hook):
    """After the decoder's forward: what could not be decided layer by layer, and the record for ``report``."""

    def __init__(self, settings: CacheSettings) -> None:
        self.settings = settings

    def __call__(self, module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        cache = self.settings.ours(cache_of(kwargs))
        if cache is not None:
            with torch.no_grad():
                repeat(module, kwargs, cache)
                cache.finish()
            self.settings.collect()
            self.settings.ran(cache)


class EnterAttention(Hook):
    """Before an attention's forward: the attention function is told which layer of the cache is this module's.

    Args:
        settings: of the model.
        index: the module's layer.
        projection: name of the output projection, or None.
        embedding: the decoder's rotary embedding, where it can be handed over.
        layer_type: what the embedding takes besides positions, or None.
        lends: whether other layers attend to this one's rows.
        latents: whether rows are latents.
    """

    def __init__(
        self,
        settings: CacheSettings,
        index: int,
        projection: str | None,
        embedding: nn.Module | None,
        layer_type: str | None,
        lends: bool = False,
        latents: bool = False,
    ) -> None:
        self.settings = settings
        self.lends = lends
        self.latents = latents
        self.layer_type = layer_type
        self.index = index
        self.projection = projection
        self.embedding = embedding
        self._sunk: bool | None = None  # whether the module has sinks of its own, once that has been asked

    def __call__(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        layer = layer_of(cache_of(kwargs), self.index)
        if layer is None:
            seat = Seat(None, self.settings.implementation, 0, None, None)
            return args, {**kwargs, SEAT: seat}
        layer.armed = True
        layer.lent = [] if self.lends else None
        layer.view, engine = read if self.latents else None, layer.engine
        if not self.latents and not layer.store.reads:
            # What is not looked at now is not looked at in this forward either: a step pays for no more than it needs.
            rests = not engine.watches(layer.clock, layer.seen)
            if rests or (engine.queue is not None and layer.clock.lengths and _one_token(kwargs)):
                return args, {**kwargs, SEAT: self._resting(layer, module, rests)}
        rope, tables = None, words.TABLES.of(kwargs)
        if self.embedding is not None and tables is not None:
            rope = LayerRope(self.embedding, self.layer_type, tables)
        hidden = args[0] if args else words.STATES.of(kwargs)
        learned = self.settings.learn()
        name, depth = self.settings.implementation, len(self.settings.compressed)
        seat = Seat(layer, name, depth, self.projection, rope, hidden, learned, latents=self.latents)
        return args, {**kwargs, SEAT: seat}

    def _resting(self, layer: TokLayer, module: nn.Module, rests: bool) -> Seat:
        """A seat at a step for which no more than the layer is needed."""
        name, depth = self.settings.implementation, len(self.settings.compressed)
        if self._sunk is None:
            self._sunk = words.SINKS.part(module) is not None
        light = not self.lends and (rests or not self._sunk)
        return Seat(layer, name, depth, self.projection, None, rests=rests, light=light)


class EnterReader(Hook):
    """Before the attention of a layer that has no rows of its own: it is told whose it attends to.

    Args:
        settings: of the model.
        owner: the layer that has the rows.
    """

    def __init__(self, settings: CacheSettings, owner: int) -> None:
        self.settings = settings
        self.owner = owner

    def __call__(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        rows = layer_of(cache_of(kwargs), self.owner)
        seat = Seat(rows, self.settings.implementation, 0, None, None, borrows=rows is not None)
        return args, {**kwargs, SEAT: seat}


class EnterLayer(Hook):
    """Before a decoder layer: hold its input, for the norm before the MLP to compare with."""

    def __init__(self, index: int) -> None:
        self.index = index

    def __call__(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        layer = layer_of(cache_of(kwargs), self.index)
        _local.stream = None
        if layer is None:
            return
        x = args[0] if args else words.STATES.at(kwargs)
        if layer.engine.wants_stream(layer.clock, x.shape[1] > 1):
            _local.stream = (layer, x, words.ATTENTION_MASK.of(kwargs))


class EnterNorm(Hook):
    """Before the norm that follows the attention's residual: how far the stream has turned.

    Source: Wang et al., SqueezeAttention, ICLR 2025, section 3: cosine of each token before and after.
    """

    def __call__(self, module: nn.Module, args: Any) -> None:
        found = getattr(_local, "stream", None)
        _local.stream = None
        if found is None:
            return
        held: tuple[TokLayer, Tensor, MaskSpec] = found
        layer, before, spec = held
        with torch.no_grad():
            engine, key = layer.engine, layer.index
            turned = F.cosine_similarity(before.float(), args[0].float(), dim=-1, eps=1e-8)  # [B, N]
            padding = spec.padding(layer.seen)
            real = torch.ones_like(turned) if padding is None else padding.mask[:, -turned.shape[1] :].float()
            total, count = (turned * real).sum(1), real.sum(1)
            if key in engine.streams:
                total, count = total + engine.streams[key][0], count + engine.streams[key][1]
            engine.streams[key] = (total, count)


def _one_token(kwargs: dict[str, Any]) -> bool:
    """True for a forward of one token that sees all rows, as far as its mask is known."""
    spec = words.ATTENTION_MASK.of(kwargs)
    return isinstance(spec, MaskSpec) and spec.light


def _newest_alone(kept: int, implementation: str) -> int:
    """Newest tokens that layers without rows of their own are given; 0: all.

    A model decides by the name of its attention, which is another one here: kernels that look back on their own are
    asked for one query or for all.
    """
    alone = kept == 1 and implementation in terms.FUSED_KERNEL.names
    return kept if alone or implementation in terms.WRITTEN_OUT.names else 0
