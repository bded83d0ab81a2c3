"""Budgets, one file each: how many rows each layer and head keeps."""

from __future__ import annotations

from tokred.kv.budgets.adaptive import Adaptive
from tokred.kv.budgets.curves import Curves
from tokred.kv.budgets.everywhere import Global
from tokred.kv.budgets.generated import Generated
from tokred.kv.budgets.growing import Growing
from tokred.kv.budgets.layered import Layered
from tokred.kv.budgets.preference import Preference
from tokred.kv.budgets.pyramid import Pyramid
from tokred.kv.budgets.split import Split
from tokred.kv.budgets.squeeze import Squeeze
from tokred.kv.budgets.threshold import Threshold
from tokred.kv.budgets.uniform import Uniform
from tokred.kv.budgets.water import Water

__all__ = [
    "Adaptive",
    "Curves",
    "Generated",
    "Global",
    "Growing",
    "Layered",
    "Preference",
    "Pyramid",
    "Split",
    "Squeeze",
    "Threshold",
    "Uniform",
    "Water",
]
