"""Encoder-decoders: rows of the encoder's tokens leave the cache of the decoder's cross-attention.

The decoder's own cache stays as it is; see :mod:`tokred.adapters.kv.across` for when the others leave.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from tokred.adapters.contract import cache_name, cache_of, host_object, with_cache, words
from tokred.adapters.contract.calls import makes_cache
from tokred.adapters.kv.cache import TokCache, layer_of
from tokred.adapters.kv.hooks import CacheSettings
from tokred.adapters.kv.layer import TokLayer
from tokred.adapters.kv.seat import SEAT, Seat
from tokred.adapters.swap import Hook, host_class


class CrossSettings(CacheSettings):
    """Settings of a model whose cross-attention loses rows.

    Args:
        policy, config, compressed, implementation: as :class:`CacheSettings` has them.
        depth: layers of the decoder.
    """

    crosses = True

    def __init__(self, policy: Any, config: Any, compressed: tuple[int, ...], implementation: str, depth: int) -> None:
        super().__init__(policy, config, compressed, implementation)
        self.depth = depth

    def __getstate__(self) -> dict[str, Any]:
        """The settings without the cache."""
        return {**super().__getstate__(), "depth": self.depth}

    @property
    def shape(self) -> int:
        """Layers of a cache; configurations of encoder-decoders tell of those of the encoder."""
        return self.depth

    def cache(self, layout: str = "auto") -> Any:
        """An empty cache of both kinds, of which that of the cross-attention holds its rows as ``layout`` says."""
        return host_object("cache of both")(host_object("cache of rows that grow")(), super().cache(layout))

    def ours(self, cache: Any) -> TokCache | None:
        """The cache of the cross-attention; None where the policy does not act on it."""
        return super().ours(words.CROSS_CACHE.part(cache))

    def planned(self, layout: str, prompt: int | None, steps: int | None) -> Any:
        """An empty cache that knows what is to come.

        Raises:
            ValueError: the length of the prompt is given, which is the encoder's and known when its rows come.
        """
        if prompt is not None:
            raise ValueError(f"prompt is {prompt}, but the rows of an encoder come at once: leave it out")
        cache = self.cache(layout)
        crossing: TokCache = words.CROSS_CACHE.need(cache)
        crossing.engine.steps = steps
        return cache


class EnterDecoder(Hook):
    """Before the decoder's forward: it gets a cache where it would have made one, whose cross-attention is ours."""

    def __init__(self, settings: CrossSettings, names: tuple[str, ...]) -> None:
        self.settings = settings
        self.names = names  # of the forward's arguments

    def __call__(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        given = {**dict(zip(self.names, args, strict=False)), **kwargs}
        cache = cache_of(given)
        self.settings.begin()
        if cache is None:
            if not makes_cache(module, given, self.settings.config):
                return args, kwargs
            cache = self.settings.cache()
        cross = words.CROSS_CACHE.part(cache)
        if cross is None:
            raise TypeError(
                f"rows of an encoder cannot be evicted from a {type(cache).__name__}: give an EncoderDecoderCache, "
                "or none at all (then the model makes its own)"
            )
        ours = self.settings.adopt(cross)
        ours.begin()
        self._check_asking(words.ATTENTION_MASK.of(given), ours)
        return (), with_cache(given, cache_name(host_class(module).forward), cache)

    def _check_asking(self, mask: Any, cache: TokCache) -> None:
        """Refuse padding among queries that vote: it would decide what is left of the encoder.

        Raises:
            ValueError: there is some.
        """
        waits = any(isinstance(x, TokLayer) and x.clock.prompt < 0 for x in words.LAYERS.need(cache))
        if waits and not cache.engine.idle and isinstance(mask, Tensor) and not bool(mask.all()):
            raise ValueError(
                "the mask of the decoder's tokens hides some, and a policy that judges the encoder's rows would hear "
                "them: give the decoder prompts of one length"
            )


class EnterCross(Hook):
    """Before a cross-attention's forward: the attention function is told which layer of the cache is this module's.

    Args:
        settings: of the model.
        index: the module's layer.
        projection: name of the output projection, or None.
    """

    def __init__(self, settings: CrossSettings, index: int, projection: str | None) -> None:
        self.settings = settings
        self.index = index
        self.projection = projection

    def __call__(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        rows = layer_of(self.settings.ours(cache_of(kwargs)), self.index)
        if rows is not None:
            rows.armed = not rows.width  # the encoder's rows are added once
        depth = len(self.settings.compressed)
        learned = self.settings.learn()
        seat = Seat(rows, self.settings.implementation, depth, self.projection, None, learned=learned, crosses=True)
        return args, {**kwargs, SEAT: seat}
