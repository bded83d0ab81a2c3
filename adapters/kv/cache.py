"""``TokCache``: a cache of transformers whose full-attention layers belong to a policy."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from tokred.adapters.contract import host_object, members, terms, words
from tokred.adapters.kv.layer import TokLayer
from tokred.errors import BypassedError, TokenStateError
from tokred.kv.engine import Engine
from tokred.kv.policy import CachePolicy
from tokred.kv.stores import Flat, Rectangle, Store

Cache: Any = host_object("any cache")
DynamicCache: Any = host_object("cache of rows that grow")

layers_of = words.LAYERS.need


class LayerRows(NamedTuple):
    """One layer of a cache: slots seen, rows held, and bytes; ``dense_bytes`` is what all slots would take.

    Rows are those of the longest head, or where no empty rows are held the mean over heads and samples, rounded up.
    ``away_bytes`` are those of ``bytes`` that are kept in host memory, away from the device where the layer runs.
    """

    layer: int
    seen: int
    rows: int
    bytes: int
    dense_bytes: int
    away_bytes: int = 0


class Snapshot(NamedTuple):
    """State of a cache, as :meth:`TokCache.snapshot` gave it: of its layers, and of what decides about them."""

    layers: tuple[dict[str, Any], ...]
    session: dict[str, Any]


@members.under_each_name
class TokCache(DynamicCache):  # type: ignore[misc]
    """A dynamic cache with a policy; sliding-window layers are transformers' own.

    Made by ``tokred.kv_cache(model)`` or by the patched model itself. It can be cropped, reordered and repeated like
    any other; in addition it can be set back to an earlier state without a copy.
    """

    engine: Engine

    def snapshot(self) -> Snapshot:
        """The present state. Rows cost no memory until the cache moves on: tensors are shared; states are copied."""
        return Snapshot(states_of(layers_of(self)), self.engine.state())

    def restore(self, snapshot: Snapshot) -> None:
        """Set the cache back to an earlier state of itself; the snapshot can be used again.

        Raises:
            ValueError: the snapshot is of a cache with another number of layers.
        """
        if len(snapshot.layers) != len(layers_of(self)):
            raise ValueError(f"the snapshot has {len(snapshot.layers)} layers, the cache has {len(layers_of(self))}")
        self.restore_layers(snapshot)
        self.engine.load(snapshot.session)

    def restore_layers(self, snapshot: Snapshot) -> None:
        """Set the layers back to a snapshot, and let the engine go on."""
        set_states(layers_of(self), snapshot.layers)

    def crop(self, tokens_to_remove: int) -> None:
        """Take back the newest ``-tokens_to_remove`` tokens, of all layers or of none.

        Raises:
            ValueError: they, or what they pushed out, cannot be taken back.
        """
        count = int(tokens_to_remove)  # older transformers hand over a tensor
        if count < 0:
            for layer in self._ours:
                layer.check_crop(-count)
        if not any(map(_states, layers_of(self))):
            super().crop(count)
            return
        # States know whether they can go back, and some only when they are asked to.
        lost = [i for i, layer in enumerate(layers_of(self)) if _states(layer) and not members.CROPS.need(layer)]
        if count < 0 and lost:
            raise ValueError(
                f"cannot crop: the state of layer {lost[0]} holds all tokens as one; take cache.snapshot() before, and "
                "cache.restore() it"
            )
        before = self.snapshot()
        try:
            super().crop(count)
        except RuntimeError as error:
            self.restore(before)
            raise ValueError(f"cannot crop: {error}") from error

    def begin(self) -> None:
        """Begin a forward.

        Raises:
            TokenStateError: the one before broke off between two layers.
        """
        layers = self._ours
        if len({layer.seen + layer.clock.behind for layer in layers}) > 1:
            raise TokenStateError(
                "the layers of the cache have seen different numbers of tokens: a forward broke off. Restore a "
                "snapshot, or start from an empty cache"
            )
        for layer in layers:
            layer.armed = layer.waiting = False
        self.engine.begin()

    def account(self, samples: int, config: Any) -> None:
        """Under a hard limit, before a forward of ``samples`` samples: write down what is held."""
        ledger = self.engine.ledger
        if ledger is None:
            return
        ours = {layer.index: -(-layer.nbytes // samples) for layer in self._ours}
        others = [layer for layer in layers_of(self) if not isinstance(layer, TokLayer)]
        ledger.open(ours, sum(_rows(0, layer).bytes for layer in others) // samples)
        ledger.queries = int(words.HEADS.need(config))
        # Windows keep one row less than their size, as a view of rows that they came with.
        ledger.windows = tuple(int(words.WINDOW.part(layer, 1)) - 1 for layer in others)

    def finish(self) -> None:
        """End a forward: decide about the layers that had to wait for the others.

        Raises:
            BypassedError: an attention took no part, so that the policy was not asked.
        """
        for i, layer in enumerate(layers_of(self)):
            if isinstance(layer, TokLayer) and (layer.armed or layer.waiting):
                raise BypassedError(
                    f"the attention of layer {i} ran without the policy: if the model's attention implementation has "
                    "been switched since, call tokred.apply again"
                )
            if isinstance(layer, TokLayer):
                layer.lent = None
        self.engine.finish()

    def reset(self) -> None:
        """Empty the cache and start the engine anew, for another prompt."""
        super().reset()
        self.engine.reset()

    def watch(self) -> None:
        """Every forward from now on is a frame of a stream, and so a turn, also one of which a single token stays."""
        self.engine.frames = True
        for layer in self._ours:
            layer.shelf.frames = True

    def ask(self) -> None:
        """Every forward from now on is of a question and its answer, until an earlier state is restored."""
        self.engine.frames = False
        for layer in self._ours:
            layer.shelf.ask()

    def layer_rows(self) -> tuple[LayerRows, ...]:
        """Slots, rows and bytes of every layer."""
        return rows_of(layers_of(self))

    def holds(self) -> tuple[Tensor, ...]:
        """``[B, Hk, seen]`` bool of every layer, on the CPU: the slots that each head holds a row of. For looking at:
        it waits for the device."""
        return holds_of(layers_of(self))

    @property
    def _ours(self) -> list[TokLayer]:
        """Layers that the policy acts on."""
        return [layer for layer in layers_of(self) if isinstance(layer, TokLayer)]

    @property
    def nbytes(self) -> int:
        """Bytes that all layers hold."""
        return sum(row.bytes for row in self.layer_rows())

    @property
    def peak_bytes(self) -> int | None:
        """Most bytes of one sample so far, at any layer of any forward; None without a hard limit."""
        return None if self.engine.ledger is None else self.engine.ledger.peak


def layer_of(cache: Any, index: int) -> TokLayer | None:
    """The layer ``index`` of a cache; None where no policy acts on it."""
    layer = layers_of(cache)[index] if isinstance(cache, TokCache) else None
    return layer if isinstance(layer, TokLayer) else None


def holds_of(layers: list[Any]) -> tuple[Tensor, ...]:
    """``[B, Hk, seen]`` bool of each layer of any cache: see :meth:`TokCache.holds`; empty without rows."""
    return tuple(map(_holds, layers))


def rows_of(layers: list[Any]) -> tuple[LayerRows, ...]:
    """Slots, rows and bytes of the layers of a cache."""
    return tuple(_rows(i, layer) for i, layer in enumerate(layers))


def states_of(layers: list[Any]) -> tuple[dict[str, Any], ...]:
    """The present state of each layer of any cache, for :func:`set_states`; rows are shared, states copied."""
    return tuple(layer.snapshot() if isinstance(layer, TokLayer) else _own(layer.__dict__) for layer in layers)


def set_states(layers: list[Any], states: tuple[dict[str, Any], ...]) -> None:
    """Set the layers of a cache back to what :func:`states_of` told of them."""
    for layer, state in zip(layers, states, strict=True):
        if isinstance(layer, TokLayer):
            layer.restore(state)
        else:
            layer.__dict__.clear()
            layer.__dict__.update(_own(state))


def _states(layer: Any) -> list[Tensor]:
    """States that a layer keeps instead of rows: transformers numbers them."""
    if isinstance(layer, TokLayer):
        return []
    numbered = [x for value in vars(layer).values() if isinstance(value, dict) for x in value.values()]
    return [x for x in numbered if isinstance(x, Tensor)]


def _own(state: dict[str, Any]) -> dict[str, Any]:
    """A layer's attributes, with copies of states that transformers writes into in place: those that it numbers."""
    return {
        name: {i: x.clone() if isinstance(x, Tensor) else x for i, x in value.items()}
        if isinstance(value, dict)
        else value
        for name, value in state.items()
    }


def _rows(index: int, layer: Any) -> LayerRows:
    if isinstance(layer, TokLayer):
        return LayerRows(index, layer.seen, layer.held, layer.nbytes, layer.dense_bytes, layer.away_bytes)
    states = sum(x.nbytes for x in _states(layer))
    if states:
        return LayerRows(index, 0, 0, states, states)
    keys: Tensor | None = words.KEYS.part(layer)
    values: Tensor | None = words.VALUES.part(layer)
    if keys is None or values is None or keys.numel() == 0:
        return LayerRows(index, 0, 0, 0, 0)
    held = keys.nbytes + values.nbytes
    return LayerRows(index, int(members.LENGTH.need(layer)()), keys.shape[2], held, held)


def _holds(layer: Any) -> Tensor:
    keys: Tensor | None = words.KEYS.part(layer)
    if keys is None or keys.numel() == 0:
        return torch.zeros(0, 0, 0, dtype=torch.bool)
    b, heads, rows = keys.shape[:3]
    seen = layer.seen if isinstance(layer, TokLayer) else int(members.LENGTH.need(layer)())
    slots = layer.positions if isinstance(layer, TokLayer) else None
    if slots is None:  # a window's rows are the newest ones, and elsewhere all are there
        return (torch.arange(seen) >= seen - rows).expand(b, heads, -1)
    # Empty rows have a slot that no token has; they go to a column that is cut off.
    slots = slots.cpu().long()
    there = torch.zeros(b, heads, seen + 1, dtype=torch.bool)
    return there.scatter(2, torch.where((slots < 0) | (slots >= seen), seen, slots), True)[..., :seen]


# Layouts that a caller can ask for, besides "auto": rows as they come, with empty ones or without.
_LAYOUTS: dict[str, Store] = {"rectangle": Rectangle(), "flat": Flat(0.0)}


def make_cache(config: Any, policy: CachePolicy, compressed: tuple[int, ...], layout: str = "auto") -> TokCache:
    """An empty cache for a model.

    Args:
        config: of the decoder, or how many layers that keep rows it has.
        policy: what happens to its rows.
        compressed: the layers that the policy acts on.
        layout: how rows lie: ``"auto"``, as the policy's store says; ``"rectangle"``, with empty rows where heads or
            samples hold different numbers; ``"flat"``, without.

    Raises:
        ValueError: there is no such layout, or the policy's store has a form of its own.
    """
    allowed = ("auto", *_LAYOUTS)
    if layout not in allowed:
        raise ValueError(f"layout is {layout!r}; allowed are {', '.join(map(repr, allowed))}")
    store = policy.parts.store
    if layout != "auto" and not isinstance(store, Flat | Rectangle):
        raise ValueError(
            f"layout is {layout!r}, but the policy's store {store.name!r} has a form of its own: leave it out"
        )
    # Configurations of encoder-decoders tell a cache of the encoder's layers, so its layers may be counted instead.
    cache = TokCache()
    words.LAYERS.set(cache, _empty(config))
    members.LAYER_CLASS.set(cache, None)
    _take_over(cache, policy, compressed, _LAYOUTS.get(layout, store))
    return cache


def _empty(config: Any) -> list[Any]:
    """Layers of a cache of transformers' own, see :func:`make_cache`."""
    if not isinstance(config, int):
        return words.LAYERS.need(DynamicCache(**{words.CONFIG.name: config}))  # type: ignore[no-any-return]
    kind = members.LAYER_CLASS.need(DynamicCache())
    return [kind() for _ in range(config)]


def layout_of(cache: TokCache) -> str:
    """The layout that :func:`make_cache` was asked for."""
    store = next((layer.store for layer in layers_of(cache) if isinstance(layer, TokLayer)), None)
    own = cache.engine.parts.store
    return next((name for name, one in _LAYOUTS.items() if one == store != own), "auto")


def adopt(cache: Any, config: Any, policy: CachePolicy, compressed: tuple[int, ...]) -> TokCache:
    """Make the caller's cache one of ours, in place.

    Raises:
        TypeError: it is of a kind that the policy's store does not replace.
        ValueError: it belongs to another policy, or holds tokens that the policy has not seen.
    """
    if isinstance(cache, TokCache):
        if cache.engine.policy != policy:
            raise ValueError(
                f"the cache belongs to {cache.engine.policy!r}, the model is patched with {policy!r}; "
                "give it an empty one"
            )
        return cache
    store = policy.parts.store
    if _does(cache) not in store.replaces:
        kind = type(cache).__name__ if isinstance(cache, Cache) else repr(type(cache).__name__)
        more = " that offloads its layers" if words.OFFLOADS.part(cache, False) else ""
        raise TypeError(
            f"rows cannot be evicted from a {kind}{more}: a policy whose store is {store.name!r} works on a "
            f"DynamicCache{_others(store)}, or on none at all (then the model makes its own){_instead(cache)}"
        )
    seen = members.LENGTH.need(cache)()
    if seen > 0:
        raise ValueError(
            f"the cache holds {seen} tokens that {policy.name or 'the policy'} has not seen: start from an empty one"
        )
    words.LAYERS.set(cache, _empty(config))
    members.LAYER_CLASS.set(cache, None)
    words.OFFLOADS.set(cache, False)  # the store does what it was asked for
    cache.__class__ = TokCache
    _take_over(cache, policy, compressed, store)
    return cache  # type: ignore[no-any-return]


def _does(cache: Any) -> str:
    """The kind of a caller's cache, in the words of :attr:`tokred.kv.stores.Store.replaces`; empty where none fits."""
    if type(cache) is DynamicCache:
        return "offloaded" if words.OFFLOADS.need(cache) else "plain"
    # Its layers are quantised ones by their class alone.
    return "quantised" if type(cache).__name__ in terms.QUANTISED.names else ""


def _others(store: Store) -> str:
    """Kinds of caches beside the plain one, for a message."""
    found = sorted(store.replaces - {"plain"})
    return "".join(f" (or one that is {kind})" for kind in found)


def _instead(cache: Any) -> str:
    """The way to hold rows as a caller's cache does, for a message."""
    does = _does(cache)
    return {
        "quantised": "; to hold rows in few bits give the policy a store such as store='kivi'",
        "offloaded": "; to hold rows in host memory give the policy store='offloaded'",
    }.get(does, "")


def _take_over(cache: TokCache, policy: CachePolicy, compressed: tuple[int, ...], store: Store) -> None:
    if policy.parts.when.chunk and policy.parts.budget.headwise:
        store = policy.parts.store.tight()  # under a hard limit nobody counts on empty rows, whatever the layout
    engine, layers = Engine(policy, len(compressed)), layers_of(cache)
    cache.engine = engine
    shelves = store.shelves(len(compressed))
    for index, layer in enumerate(compressed):
        layers[layer] = TokLayer(engine, index, store, shelves[index])
