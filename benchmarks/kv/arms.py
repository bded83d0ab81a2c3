"""The policies of the cache benchmarks at a budget, and what is measured of a cache."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import tokred
from tokred import kv
from tokred.core.registry import methods

BUDGETS = (0.5, 0.25, 0.125, 0.05)

# Settings of small windows: a twentieth of a prompt of 1,024 tokens has to hold them.
POLICIES: dict[str, Callable[[float], Any]] = {
    "streaming_llm": lambda b: tokred.make("streaming_llm", budget=b),
    "h2o": lambda b: tokred.make("h2o", budget=b),
    "tova": lambda b: tokred.make("tova", budget=b),
    "keyformer": lambda b: tokred.make("keyformer", budget=b),
    "zeromerge": lambda b: tokred.make("zeromerge", budget=b),
    "snapkv": lambda b: tokred.make("snapkv", budget=b, window=32),
    "pyramidkv": lambda b: tokred.make("pyramidkv", budget=b, window=32),
    "adakv": lambda b: tokred.make("adakv", budget=b, score=kv.Window(32)),
    "criticalkv": lambda b: tokred.make("criticalkv", budget=b, score=kv.Window(32)),
    "cake": lambda b: tokred.make("cake", budget=b),
    "squeezeattention": lambda b: tokred.make("squeezeattention", budget=b),
    "observed_attention": lambda b: tokred.make("observed_attention", budget=b),
    "expected_attention": lambda b: tokred.make("expected_attention", budget=b),
    "kvzip": lambda b: tokred.make("kvzip", budget=b),
    "knorm": lambda b: tokred.make("knorm", budget=b),
    "keydiff": lambda b: tokred.make("keydiff", budget=b, turns=False),
    "lagkv": lambda b: tokred.make("lagkv", budget=b, lag=64),
    # From kv_search.py. Merged rows carry weights, so fewer rows make up the bytes of the others.
    "composed": lambda b: tokred.KVPolicy(score=kv.Reconstruction(), budget=kv.Global(0.93 * b), fate=kv.Merge()),
    "random_evict": lambda b: tokred.make("random_evict", budget=b, sinks=4, recent=32),
}
# Presets that have a budget and no settings above: with their defaults. "kv" is what "composed" is made by.
POLICIES |= {
    name: lambda b, name=name: tokred.make(name, budget=b)
    for name, cls in methods.of("cache").items()
    if name not in {*POLICIES, "kv"} and "budget" in (cls.nothing or {})
}


class Arm(NamedTuple):
    """A policy at a budget; the unpatched model where there is none."""

    name: str
    budget: float
    policy: Any

    @property
    def stepwise(self) -> bool:
        """Whether rows go while tokens are generated."""
        return self.policy is not None and bool(self.policy.parts.when.every)


def arms(names: list[str], budgets: list[float]) -> list[Arm]:
    """The unpatched model, and every policy at every budget."""
    return [Arm("none", 1.0, None), *(Arm(n, b, POLICIES[n](b)) for n in names for b in budgets)]


def held_bytes(cache: Any) -> int:
    """What a cache holds, ours or transformers' own."""
    if hasattr(cache, "nbytes"):
        return int(cache.nbytes)
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
