"""Measuring: models, data, arms, times, results and plots; the demo.

The modules are imported when they are first used: ``tokred.bench.timing`` needs no import of its own.
"""

from __future__ import annotations

import importlib
import pkgutil
from typing import Any

_MODULES = {module.name for module in pkgutil.iter_modules(__path__)}


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
