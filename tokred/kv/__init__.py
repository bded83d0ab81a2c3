"""KV-cache policies: a score, a budget, a fate, a time and a store, each chosen by itself. No host is known here.

    tokred.KVPolicy(score="window", budget=Adaptive(0.25), fate=Evict(), when=When(turns=True), store="half")

The published methods are presets of such choices, one file each in ``tokred.methods.kv``, with the scores that they
brought; scores are names of this package too, imported when they are first used.
"""

from __future__ import annotations

from typing import Any

from tokred.core.registry import parts as _parts
from tokred.kv.budgets import (
    Adaptive,
    Curves,
    Generated,
    Global,
    Growing,
    Layered,
    Preference,
    Pyramid,
    Split,
    Squeeze,
    Threshold,
    Uniform,
    Water,
)
from tokred.kv.fates import Evict, Merge
from tokred.kv.fitting import Fit
from tokred.kv.parts import Budget, Fate, Part, Score, When
from tokred.kv.policy import CachePolicy, Parts
from tokred.kv.preset import KVPreset, Preset
from tokred.kv.site import CacheSite, Padding
from tokred.kv.stores import (
    KIVI,
    Flat,
    Grouped,
    Half,
    MiKV,
    Mustafar,
    NSNQuant,
    Offloaded,
    Oscar,
    Rectangle,
    ShadowKV,
    Store,
    Tight,
    TokenButler,
    TokenSelect,
    Turbo,
    Zones,
)

__all__ = [
    "KIVI",
    "Adaptive",
    "Budget",
    "CachePolicy",
    "CacheSite",
    "ColumnSum",
    "Critical",
    "Curves",
    "Dispersion",
    "Evict",
    "Expected",
    "Fate",
    "Fit",
    "Flat",
    "Foretold",
    "Generated",
    "Global",
    "Grouped",
    "Growing",
    "Gumbel",
    "Half",
    "Judges",
    "KVPreset",
    "KeyDifference",
    "KeyNorm",
    "LagRelative",
    "LastQuery",
    "Layered",
    "Matched",
    "Merge",
    "MiKV",
    "Mustafar",
    "NSNQuant",
    "Observed",
    "Offloaded",
    "Oscar",
    "Padding",
    "Part",
    "Parts",
    "Preference",
    "Preset",
    "Pyramid",
    "Random",
    "Recency",
    "Reconstruction",
    "Rectangle",
    "Redundancy",
    "Score",
    "ShadowKV",
    "Split",
    "Squeeze",
    "Store",
    "Threshold",
    "Tight",
    "TokenButler",
    "TokenSelect",
    "Trigonometric",
    "Turbo",
    "Uniform",
    "Water",
    "When",
    "Window",
    "WindowSum",
    "Zones",
]


def __getattr__(name: str) -> Any:
    # Methods stand a floor above: they are reached through the registry, by the name of their class.
    registered = _parts.names_by_class().get(name)
    if registered is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return _parts.get(registered)
