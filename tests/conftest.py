"""Shared by all tests: makes the repository's ``benchmarks`` importable from wherever pytest is started."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path


def _register_benchmarks() -> None:
    """Import ``benchmarks`` by its place.

    The root is not put on ``sys.path``: its folder ``kernels`` would pass for the package of that name that host
    libraries look for.
    """
    folder = Path(__file__).resolve().parents[1] / "benchmarks"
    spec = importlib.util.spec_from_file_location(
        "benchmarks", folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    if "benchmarks" in sys.modules or spec is None or spec.loader is None:
        return
    module = importlib.util.module_from_spec(spec)
    sys.modules["benchmarks"] = module
    spec.loader.exec_module(module)


_register_benchmarks()
