"""Caches of many samples that begin with one prefix, which is held once and attended to once."""

from __future__ import annotations

import copy
import functools
from typing import Any

from torch import Tensor

from tokred.adapters.contract import members, words
from tokred.adapters.kv.cache import TokCache, layers_of
from tokred.adapters.kv.layer import TokLayer
from tokred.errors import TokenStateError, UnsupportedModelError
from tokred.kv.stores.shared import SharedShelf
from tokred.kv.stores.store import Shelf


class SharedLayer(TokLayer):
    """A layer whose first rows are those of another one of a single sample.

    Args:
        source: it; its rows are referred to, and no longer change.
        engine: of the new cache.
    """

    def __init__(self, source: TokLayer, engine: Any) -> None:
        super().__init__(engine, source.index, source.store, SharedShelf(_frozen(source.shelf), source.seen))
        state = source.snapshot()
        # Whatever is cropped goes no further than the prefix.
        known = {name: value for name, value in state.items() if name != "shelf"}
        super().restore({**known, "settled": source.seen, "shelf": self.shelf.snapshot()})
        self.prefix = source.seen
        self._begun = self.snapshot()

    def check_crop(self, count: int) -> None:
        if count and self.seen - count < self.prefix:
            raise ValueError(f"cannot crop to {self.seen - count} tokens: {self.prefix} are a prefix that is shared")
        super().check_crop(count)

    def reset(self) -> None:
        """Back to the prefix alone."""
        self.restore(self._begun)

    def begins(self, mask: Tensor, windows: bool) -> None:
        """Refuse padding that would hide a part of the prefix, before the first own tokens.

        Args:
            mask: ``[B, L]``, zero on padding.
            windows: whether other layers have windows.

        Raises:
            ValueError: slots of the prefix are hidden, or windows would end before they should.
        """
        if self.seen != self.prefix:
            return
        if not bool(mask[:, : self.prefix].all()):
            raise ValueError(
                f"attention_mask hides some of the {self.prefix} tokens of the shared prefix: pad each sample behind "
                "the prefix, in front of its own tokens"
            )
        if windows and not bool(mask.all()):
            raise ValueError(
                "the model's windows count padding as tokens, and here it stands between the shared prefix and what "
                "follows: give samples of one length"
            )


def _frozen(shelf: Shelf) -> Shelf:
    """A shelf of the same rows, which what happens to the first one does not change."""
    other: Shelf = copy.copy(shelf)
    other.restore(shelf.snapshot())
    return other


@functools.cache
def _widening(cls: type) -> type:
    """A class of layers with a window whose rows, of one sample, become those of as many as come."""

    def update(self: Any, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        samples = key_states.shape[0]
        for word in (words.KEYS, words.VALUES):
            held = word.need(self)
            if held.shape[0] == 1 < samples:
                word.set(self, held.expand(samples, *held.shape[1:]))
        return members.UPDATE.need(super(made, self))(key_states, value_states, *args, **kwargs)

    made = members.under_each_name(type(cls.__name__, (cls,), {members.UPDATE.name: update}))
    return made


def shared(cache: TokCache, made: TokCache) -> TokCache:
    """Let an empty cache begin with the rows of another one, of one sample.

    Args:
        cache: that holds the prefix.
        made: for any number of samples.

    Raises:
        ValueError: the prefix is of several samples, or is none; or its rows stand for several tokens each.
        UnsupportedModelError: layers keep a state of all tokens, or rows that the policy does not act on.
    """
    old, new = layers_of(cache), layers_of(made)
    seen = int(members.LENGTH.need(cache)())
    if seen == 0:
        raise ValueError("the prefix holds no tokens")
    for i, layer in enumerate(old):
        keys = None if isinstance(layer, TokLayer) else words.KEYS.part(layer)
        if not isinstance(layer, TokLayer) and (keys is None or not members.SLIDES.part(layer, False)):
            raise UnsupportedModelError(
                f"layer {i} ({type(layer).__name__}) cannot share a prefix: the policy does not act on it, and it has "
                "no window"
            )
        samples = layer.shelf.samples if keys is None else keys.shape[0]
        if samples != 1:
            raise ValueError(f"a prefix is of one sample, this cache holds {samples}")
        if isinstance(layer, TokLayer):
            if layer.weights is not None:
                raise ValueError("rows of this prefix stand for several tokens each, which is not supported: take a "
                                 "policy that merges none")  # fmt: skip
            if layer.rows or layer.notes:
                raise TokenStateError("the policy is not done with the prefix: give it to the model as a whole")
            new[i] = SharedLayer(layer, made.engine)
        else:
            new[i] = copy.copy(layer)
            cls: type = type(layer)
            new[i].__class__ = _widening(cls)
    made.engine.load(cache.engine.state())
    return made


def holds_prefix(cache: TokCache) -> bool:
    """True for a cache whose first rows belong to others too."""
    return any(isinstance(layer, SharedLayer) for layer in layers_of(cache))


def check_mask(cache: TokCache, mask: Any) -> None:
    """Refuse padding in front of a shared prefix; caches without one are not looked at."""
    layers = layers_of(cache)
    first = next((layer for layer in layers if isinstance(layer, SharedLayer)), None)
    if first is not None and isinstance(mask, Tensor):
        first.begins(mask, any(not isinstance(layer, TokLayer) for layer in layers))
