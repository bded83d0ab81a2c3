"""A prompt that is read once and given to the caches of many policies.

Policies decide after a layer's attention, from its queries, keys and values, and never change what the prompt's own
forward computes. So the model reads the prompt densely once, and every policy then gets exactly the tensors that it
would have got: a benchmark of twenty policies at four budgets pays for one prefill instead of eighty. ``tests/kv``
compares with prompts that were really read under the policy.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

import tokred
from tokred import kv
from tokred.kv.session import Session


class Layer(NamedTuple):
    """What a layer had: ``q`` ``[B, H, N, D]``, ``k`` and ``v`` ``[B, Hk, N, D]``; and more of its site."""

    q: Tensor
    k: Tensor
    v: Tensor
    scale: float | None
    projection: Callable[[], Tensor] | None
    rope: Any


class _Recorder(Session):
    """Writes down instead of deciding."""

    def __init__(self, policy: Any, depth: int) -> None:
        super().__init__(policy, depth)
        self.layers: list[Layer] = []
        self.padding: kv.Padding | None = None

    def observe(self, layer: Any, site: kv.CacheSite, before: int) -> None:
        self.padding = site.padding
        self.layers.append(Layer(site.q, site.k, site.v, site.scale, site._projection, site._rope))


class _Once:
    """A score that is computed once for all budgets; for everything else it is the score itself."""

    def __init__(self, score: kv.Score, store: dict[Any, Any]) -> None:
        self._score, self._store = score, store

    def __getattr__(self, name: str) -> Any:
        return getattr(self._score, name)

    def observe(self, site: kv.CacheSite) -> None:
        key = ("rows", self._score, site.layer)
        if key not in self._store:
            self._score.observe(site)
            self._store[key] = dict(site.rows)
        site.rows.update(self._store[key])

    def __call__(self, site: kv.CacheSite) -> Tensor:
        key = ("score", self._score, site.layer)
        if key not in self._store:
            self._store[key] = self._score(site)
        return self._store[key]


class Prompt:
    """A prompt, read.

    Args:
        layers: of the model.
        padding: of the batch.
        streams: how far each layer's attention turned the residual stream, over the whole text.

    Attributes:
        length: slots.
    """

    def __init__(self, layers: list[Layer], padding: kv.Padding | None, streams: dict[int, Any]) -> None:
        self.layers, self.padding, self.streams = layers, padding, streams
        self.length = layers[0].k.shape[2]
        self._stores: dict[int, dict[Any, Any]] = {}

    def fill(self, cache: Any, count: int | None = None) -> Any:
        """Let an empty cache of a patched model be as if it had read the first ``count`` tokens; returns it."""
        n = self.length if count is None else count
        session, store = cache.session, self._stores.setdefault(n, {})
        padding = None if self.padding is None else self.padding.until(n)
        session.parts = session.parts._replace(score=_Once(session.parts.score, store))
        session.streams = dict(self.streams) if "stream" in session.parts.budget.reads else {}
        cache.begin()
        for i, (layer, seen) in enumerate(zip(cache.layers, self.layers, strict=True)):
            layer.append(seen.k[:, :, :n], seen.v[:, :, :n])
            if not session.watches(layer.clock, n):
                continue
            session.observe(layer, self._site(i, n, seen, padding, layer, session), 0)
        cache.finish()
        session.parts = session.policy.parts
        return cache

    def forget(self) -> None:
        """Free the scores that were kept for other budgets."""
        self._stores.clear()

    def _site(
        self, index: int, n: int, seen: Layer, padding: kv.Padding | None, layer: Any, session: Session
    ) -> kv.CacheSite:
        return kv.CacheSite(
            q=seen.q[:, :, :n],
            k=layer.keys,
            v=layer.values,
            seen=n,
            padding=padding,
            alpha=session.policy.parts.fate.alpha,
            scale=seen.scale,
            rows=layer.rows,
            notes=layer.notes,
            projection=seen.projection,
            rope=None if seen.rope is None else seen.rope.part(n),
            layer=index,
            depth=len(self.layers),
        )


@torch.inference_mode()
def read(model: Any, ids: Tensor, mask: Tensor | None = None, *, logits: int = 1) -> tuple[Prompt, Tensor]:
    """Read ``ids`` ``[B, N]`` densely.

    Args:
        model: a decoder of transformers whose layers all attend to everything; unpatched before and after.
        mask: ``[B, N]``, zeros on padding, which stands on the left.
        logits: of how many last tokens.

    Returns:
        The prompt, and the logits ``[B, logits, V]``.
    """
    policy = tokred.make("squeezeattention", budget=0.5)  # it makes the adapter measure the stream
    with tokred.applied(model, policy):
        cache = tokred.kv_cache(model)
        session = _Recorder(policy, len(cache.layers))
        cache.session = session
        for layer in cache.layers:
            layer.session = session
        given = {} if mask is None else {"attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0)}
        out = model(ids, past_key_values=cache, logits_to_keep=logits, **given).logits
    return Prompt(session.layers, session.padding, session.streams), out
