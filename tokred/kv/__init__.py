"""KV-cache policies: a score, a budget, a fate and a time, each chosen by itself. No host is known here.

    tokred.KVPolicy(score="window", budget=Adaptive(0.25), fate=Evict(), when=When(turns=True))

The published methods are presets of such choices, one file each in ``tokred.methods``.
"""

from __future__ import annotations

from tokred.kv.budgets import Adaptive, Global, Growing, Preference, Pyramid, Split, Squeeze, Uniform
from tokred.kv.fates import Evict, Merge
from tokred.kv.parts import Budget, Fate, Part, Score, When
from tokred.kv.policy import CachePolicy, Parts
from tokred.kv.scores import (
    ColumnSum,
    Critical,
    Dispersion,
    Expected,
    Gumbel,
    Judges,
    KeyDifference,
    KeyNorm,
    LagRelative,
    LastQuery,
    Observed,
    Random,
    Recency,
    Reconstruction,
    Window,
)
from tokred.kv.site import CacheSite, Padding

__all__ = [
    "Adaptive",
    "Budget",
    "CachePolicy",
    "CacheSite",
    "ColumnSum",
    "Critical",
    "Dispersion",
    "Evict",
    "Expected",
    "Fate",
    "Global",
    "Growing",
    "Gumbel",
    "Judges",
    "KeyDifference",
    "KeyNorm",
    "LagRelative",
    "LastQuery",
    "Merge",
    "Observed",
    "Padding",
    "Part",
    "Parts",
    "Preference",
    "Pyramid",
    "Random",
    "Recency",
    "Reconstruction",
    "Score",
    "Split",
    "Squeeze",
    "Uniform",
    "When",
    "Window",
]
