"""Why the cache of a language model cannot lose rows: what its layers keep instead of keys and values."""

from __future__ import annotations

import inspect
import sys
from typing import Any

from torch import nn

from tokred.adapters.contract import STATE_NAMES, cache_argument, host_object, terms, words
from tokred.adapters.swap import host_class

# Layers whose rows are tokens; a policy acts on those of the first kind.
ROWS = terms.kinds(terms.FULL, terms.SLIDING, terms.CHUNKED)
# Layers that keep a state of one size, however many tokens come, and nothing of each; they stay as they are.
STATES = terms.kinds(terms.CONVOLUTION, terms.RECURRENT)
# Two kinds of tokred's own: layers that share a cache, and those without attention, which caches call by one name.
SHARED, _BARE = "shared", "bare"
LOSES = "a cache that loses rows"
_BESIDE = "keep a recurrent state beside keys and values"
_DOES = {
    terms.CONVOLUTION: "keep a convolution state instead of keys and values",
    terms.RECURRENT: "keep a recurrent state instead of keys and values",
    terms.HYBRID: _BESIDE,
    terms.HYBRID_SLIDING: _BESIDE,
    terms.INDEXED: "keep an index beside keys and values, which chooses what they attend to",
    terms.ONE_KEY: "keep one key for many tokens",
    terms.ONE_KEY_AND_INDEX: "keep one key for several tokens, and an index of them",
}
_KEPT = {
    **{name: does for word, does in _DOES.items() for name in word.names},
    SHARED: "attend to the keys and values of an earlier layer",
    _BARE: "have no attention",
}
_SHOWN = 12


def layer_kinds(text: Any) -> list[str]:
    """The kind of cache that each layer of a decoder keeps, in the words of transformers' caches."""
    kinds = list(host_object("kinds of layers")(text)[0])
    blocks = words.OLDER_KINDS.part(text)
    if words.KINDS.part(text) is None and blocks:
        # Older configurations have words of their own, which caches do not ask for.
        kinds = [terms.RECURRENT.name if b in _RECURRENT else k for b, k in zip(blocks, kinds, strict=False)]
    modes = words.SHARING.part(text)
    kinds = [_bare_or_shared(k, i, modes) for i, k in enumerate(kinds)]
    # Older releases leave layers that share off the end.
    return kinds + [SHARED] * (words.DEPTH.need(text) - len(kinds))


_RECURRENT = terms.kinds(terms.OLDER_RECURRENT, terms.RECURRENT)


def _bare_or_shared(kind: str, layer: int, modes: Any) -> str:
    if kind not in terms.DUMMY.names:
        return kind
    return SHARED if modes is not None and modes[layer] in terms.REUSED.names else _BARE


def odd_layers(kinds: list[str], beside: bool = False) -> str:
    """A sentence on layers that keep something else than rows of tokens; empty where there are none.

    Args:
        kinds: of all layers.
        beside: whether layers with a state of their own, with nothing, or with the rows of another layer are welcome
            where others keep rows.
    """
    fine = (*ROWS, *STATES, SHARED, _BARE) if beside and not set(ROWS).isdisjoint(kinds) else ROWS
    listed: dict[str, list[int]] = {}
    for i, kind in enumerate(kinds):
        if kind not in fine:
            does = _KEPT.get(kind, f"are of the kind {kind!r}, whose cache is no rows of tokens")
            listed.setdefault(does, []).append(i)
    return ", and ".join(_sentence(layers, does) for does, layers in listed.items())


_ONE = {"keep": "keeps", "attend": "attends", "have": "has", "are": "is"}


def _sentence(layers: list[int], does: str) -> str:
    verb, _, rest = does.partition(" ")
    return f"{_named(layers)} {_ONE[verb] if len(layers) == 1 else verb} {rest}"


def _named(layers: list[int]) -> str:
    shown = ",".join(map(str, layers[:_SHOWN]))
    more = f",... ({len(layers)} in all)" if len(layers) > _SHOWN else ""
    return f"layers {shown}{more}" if len(layers) > 1 else f"layer {shown}"


def own_cache(model: nn.Module) -> str:
    """Why no cache of tokred's takes the place of a model's; empty where it takes any."""
    home = sys.modules[host_class(model).__module__]
    base: Any = host_object("any cache")
    for name, kind in vars(home).items():
        if isinstance(kind, type) and issubclass(kind, base) and kind.__module__ == home.__name__:
            return f"it keeps what its layers remember in a cache of a class of its own, {name}"
    return ""


def without_cache(model: nn.Module) -> str:
    """Why a language model has no cache of keys and values at all; empty where it has one, or is none."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as names

    cls = host_class(model)
    known = {name for value in names.values() for name in (value if isinstance(value, tuple | list) else (value,))}
    if cls.__name__ not in known or cache_argument(cls.forward) is not None:
        return ""
    arguments = inspect.signature(cls.forward).parameters
    state = next((name for name in STATE_NAMES if name in arguments), None)
    if state is None:
        return "its forward takes no cache, and reads all tokens anew at every step"
    if state == "mems":
        return f"it keeps hidden states ({state!r}) instead of keys and values"
    return f"its layers keep a recurrent state ({state!r}) instead of keys and values"
