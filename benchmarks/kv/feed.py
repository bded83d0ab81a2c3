"""How the benchmarks of caches feed policies: prompts that are read once, layers that are filled by hand, and the work
of a policy, to be timed or watched.

Policies decide after a layer's attention, from its queries, keys and values, and never change what the prompt's own
forward computes. So the model reads the prompt densely once, and every policy then gets exactly the tensors that it
would have got: a benchmark of twenty policies at four budgets pays for one prefill instead of eighty. ``tests/kv``
compares with prompts that were really read under the policy.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import tokred
from tokred import kv
from tokred.adapters.kv import hooks
from tokred.adapters.kv.layer import TokLayer
from tokred.adapters.kv.repeat import repeat
from tokred.bench.timing import entering
from tokred.core.learned import Learned
from tokred.kv.engine import Engine
from tokred.kv.policy import CachePolicy
from tokred.kv.repeat import Probe
from tokred.methods.kv.expected_attention import NOTES

# All that a policy does stands in the first three; the others are parts of it.
WORK: tuple[tuple[Any, str, str], ...] = (
    (Engine, "observe", "policy"),
    (Engine, "finish", "policy"),
    (hooks, "repeat", "policy"),
    (CachePolicy, "shrink", "select"),
    (TokLayer, "apply", "evict"),
)


class Layer(NamedTuple):
    """What a layer had: ``q`` ``[B, H, N, D]``, ``k`` and ``v`` ``[B, Hk, N, D]``; and more of its site, such as
    ``hidden`` ``[B, N, C]``, what its attention was given."""

    q: Tensor
    k: Tensor
    v: Tensor
    scale: float | None
    projection: Callable[[], Tensor] | None
    rope: Any
    hidden: Tensor | None = None


class _Recorder(Engine):
    """Writes down instead of deciding."""

    def __init__(self, policy: Any, depth: int) -> None:
        super().__init__(policy, depth)
        self.layers: list[Layer] = []
        self.padding: kv.Padding | None = None

    def observe(self, layer: Any, site: kv.CacheSite, before: int) -> None:
        self.padding = site.padding
        self.layers.append(Layer(site.q, site.k, site.v, site.scale, site._projection, site._rope, site.hidden))


class _Overheard:
    """Rows that a layer with a window takes in, of which it will keep the newest.

    Args:
        layer: an empty one; it does as before.
    """

    def __init__(self, layer: Any) -> None:
        self.parts: list[tuple[Tensor, Tensor]] = []
        own = layer.update

        def update(keys: Tensor, values: Tensor, *args: Any, **kwargs: Any) -> Any:
            self.parts.append((keys, values))
            return own(keys, values, *args, **kwargs)

        layer.update = update

    @property
    def rows(self) -> tuple[Tensor, Tensor]:
        """Keys and values ``[B, Hk, N, D]``."""
        keys, values = zip(*self.parts, strict=True)
        return torch.cat(keys, 2), torch.cat(values, 2)


class _Once:
    """A score that is computed once for all budgets and each set of weights; for all else it is the score itself."""

    def __init__(self, score: kv.Score, store: dict[Any, Any]) -> None:
        self._score, self._store = score, store

    def __getattr__(self, name: str) -> Any:
        return getattr(self._score, name)

    def observe(self, site: kv.CacheSite) -> None:
        if site.q.shape[2] != site.k.shape[2]:  # the end of a prompt in two parts
            self._score.observe(site)
            return
        score, factor = self._score, 1.0
        if isinstance(score, kv.ColumnSum) and score.decay == 1 and score.group == "mean":
            # The same sum for all; the mean over a group of heads is a share of it.
            score, factor = kv.ColumnSum(), site.heads / site.q.shape[1]
        key = ("rows", score, site.learned.module, site.layer)
        if key not in self._store:
            score.observe(site)
            self._store[key] = dict(site.rows), {n: x for n, x in site.notes.items() if n in NOTES}
        rows, notes = self._store[key]
        site.rows.update({name: state * factor for name, state in rows.items()})
        site.notes.update(notes)

    def __call__(self, site: kv.CacheSite) -> Tensor:
        key = ("score", self._score, site.learned.module, site.layer)
        if key not in self._store:
            self._store[key] = self._score(site)
        return self._store[key]


class Prompt:
    """A prompt, read.

    Args:
        decoder: the module inside the model whose forward takes the cache.
        given: its arguments, ids and mask.
        layers: of the model that attend to everything.
        windows: keys and values ``[B, Hk, N, D]`` of the others, which hold the newest, in the order of the model.
        padding: of the batch.
        streams: how far each layer's attention turned the residual stream, over the whole text.

    Attributes:
        length: slots.
    """

    def __init__(
        self,
        decoder: Any,
        given: dict[str, Any],
        layers: list[Layer],
        padding: kv.Padding | None,
        streams: dict[int, Any],
        windows: Sequence[tuple[Tensor, Tensor]] = (),
    ) -> None:
        self.decoder, self.given = decoder, given
        self.layers, self.padding, self.streams, self.windows = layers, padding, streams, windows
        self.length = layers[0].k.shape[2]
        self._stores: dict[int, dict[Any, Any]] = {}

    def fill(self, cache: Any, count: int | None = None, rest: int = 0, module: nn.Module | None = None) -> Any:
        """Let an empty cache of a patched model be as if it had read the first ``count`` tokens; returns it.

        Args:
            cache: of ``tokred.kv_cache(model)``.
            count: tokens; None: all.
            rest: so many more follow and belong to the prompt. What scores have added up over the first ``count`` is
                computed once, whatever follows.
            module: that the policy has learned, where it has one.
        """
        n = self.length if count is None else count
        engine = cache.engine
        engine.streams = dict(self.streams) if "stream" in engine.parts.budget.reads else {}
        cache.begin()
        engine.prompt = n + rest
        parts = [(0, n + rest)]
        if rest and engine.parts.score.accumulates:
            parts = [(0, n), (n, n + rest)]
        for start, end in parts:
            store = self._stores.setdefault(end, {})
            engine.parts = engine.policy.parts._replace(score=_Once(engine.policy.parts.score, store))
            padding = None if self.padding is None else self.padding.until(end)
            ours = [layer for layer in cache.layers if isinstance(layer, TokLayer)]
            others = [layer for layer in cache.layers if not isinstance(layer, TokLayer)]
            for layer, (k, v) in zip(others, self.windows, strict=True):
                layer.update(k[:, :, start:end], v[:, :, start:end])
            for i, (layer, seen) in enumerate(zip(ours, self.layers, strict=True)):
                layer.append(seen.k[:, :, start:end], seen.v[:, :, start:end])
                watches = engine.watches(layer.clock, end)
                site = None
                if watches or layer.store.reads:
                    site = self._site(i, start, end, seen, padding, layer, engine, module)
                if watches:
                    engine.observe(layer, site, start)
                else:  # rows that all stay take their lasting form
                    layer.settle(site)
            if engine.waiting is not None:
                self._repeat(cache, engine, end, store)
        cache.finish()
        engine.parts = engine.policy.parts
        return cache

    def _repeat(self, cache: Any, engine: Engine, n: int, store: dict[Any, Any]) -> None:
        """Feed the context once more, for scores that need it; once for all budgets of a store, whose rows it reads."""
        key = ("probe", engine.policy.parts.score, engine.policy.parts.store)
        if key in store:
            engine.judged(store[key])
            return
        judged = engine.judged

        def keep(probe: Any) -> None:
            store[key] = probe
            judged(probe)

        engine.judged = keep  # type: ignore[method-assign]
        repeat(self.decoder, {name: x[:, :n] for name, x in self.given.items()}, cache)
        del engine.judged

    def forget(self) -> None:
        """Free the scores that were kept for other budgets."""
        self._stores.clear()

    def _site(
        self,
        index: int,
        start: int,
        n: int,
        seen: Layer,
        padding: Any,
        layer: Any,
        engine: Engine,
        module: nn.Module | None,
    ) -> kv.CacheSite:
        return kv.CacheSite(
            q=seen.q[:, :, start:n],
            k=layer.keys,
            v=layer.values,
            seen=n,
            padding=padding,
            alpha=engine.policy.parts.fate.alpha,
            scale=seen.scale,
            rows=layer.rows,
            notes=layer.notes,
            projection=seen.projection,
            rope=None if seen.rope is None else seen.rope.part(n - start, start),
            hidden=None if seen.hidden is None else seen.hidden[:, start:n],
            learned=Learned(module),
            layer=index,
            depth=len(self.layers),
        )


@torch.inference_mode()
def read(model: Any, ids: Tensor, mask: Tensor | None = None, *, logits: int = 1) -> tuple[Prompt, Tensor]:
    """Read ``ids`` ``[B, N]`` densely.

    Args:
        model: a decoder of transformers whose layers attend to everything or to a window; unpatched before and after.
        mask: ``[B, N]``, zeros on padding, which stands on the left.
        logits: of how many last tokens.

    Returns:
        The prompt, and the logits ``[B, logits, V]``.
    """
    policy = tokred.make("squeezeattention", budget=0.5)  # it makes the adapter measure the stream
    with tokred.applied(model, policy):
        cache = tokred.kv_cache(model)
        ours = [layer for layer in cache.layers if isinstance(layer, TokLayer)]
        engine = _Recorder(policy, len(ours))
        cache.engine = engine
        for layer in ours:
            layer.engine = engine
        windows = [_Overheard(layer) for layer in cache.layers if not isinstance(layer, TokLayer)]
        given = {} if mask is None else {"attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0)}
        out = model(ids, past_key_values=cache, logits_to_keep=logits, **given).logits
    kept = [one.rows for one in windows]
    return Prompt(model.model, {"input_ids": ids, **given}, engine.layers, engine.padding, engine.streams, kept), out


@contextlib.contextmanager
def watched(enter: Callable[[str], AbstractContextManager[object]]) -> Iterator[None]:
    """While this lasts, ``enter(part)`` is entered around what policies do, by the parts of :data:`WORK`."""
    with contextlib.ExitStack() as stack:
        for owner, name, part in WORK:
            stack.enter_context(entering(owner, name, lambda part=part: enter(part)))  # type: ignore[misc]
        yield


def held_bytes(cache: Any) -> int:
    """What a cache holds, ours or transformers' own."""
    if hasattr(cache, "nbytes"):
        return int(cache.nbytes)
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)


def compressed(policy: Any, sites: Sequence[kv.CacheSite], make: type[TokLayer] = TokLayer) -> list[TokLayer]:
    """Layers that have taken in a prompt and been compressed, without a model.

    The context is not repeated for KVzip, whose number of rows does not depend on the scores: a window's stand in.

    Args:
        policy: of the cache.
        sites: of every layer, what its attention had.
        make: the class of the layers.
    """
    engine, held = Engine(policy, len(sites)), []
    engine.begin()
    for site in sites:
        layer = make(engine, site.layer)
        layer.append(site.k, site.v)
        site.rows, site.notes = layer.rows, layer.notes
        engine.observe(layer, site, 0)
        held.append(layer)
    if engine.repeats is not None:
        probe = Probe(engine.repeats, sites[0].k.shape[2])
        probe.best = {site.layer: kv.Window()(site) for site in sites}
        engine.judged(probe)
    engine.finish()
    return held


def read_in_parts(model: Any, ids: Tensor, chunk: int | None = None, first: int | None = None) -> Any:
    """The cache of a patched model that has read a prompt.

    Args:
        model: patched.
        ids: ``[B, N]``.
        chunk: tokens of a forward; None: all at once.
        first: tokens of a first forward, before the rest.
    """
    cache = tokred.kv_cache(model)
    parts = [ids] if chunk is None else list(ids.split(chunk, 1))
    if first is not None:
        parts = [ids[:, :first], ids[:, first:]]
    for part in parts:
        model(part, past_key_values=cache, logits_to_keep=1)
    return cache
