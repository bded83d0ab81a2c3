"""Scores, one file each: how much each row of a cache matters."""

from __future__ import annotations

from tokred.kv.scores.column_sum import ColumnSum, Observed
from tokred.kv.scores.critical import Critical
from tokred.kv.scores.expected import Expected
from tokred.kv.scores.gumbel import Gumbel
from tokred.kv.scores.key_difference import KeyDifference
from tokred.kv.scores.key_norm import KeyNorm
from tokred.kv.scores.lag_relative import LagRelative
from tokred.kv.scores.last_query import LastQuery
from tokred.kv.scores.random import Random
from tokred.kv.scores.recency import Recency
from tokred.kv.scores.reconstruction import Reconstruction
from tokred.kv.scores.spread import Dispersion
from tokred.kv.scores.window import Judges, Window

__all__ = [
    "ColumnSum",
    "Critical",
    "Dispersion",
    "Expected",
    "Gumbel",
    "Judges",
    "KeyDifference",
    "KeyNorm",
    "LagRelative",
    "LastQuery",
    "Observed",
    "Random",
    "Recency",
    "Reconstruction",
    "Window",
]
