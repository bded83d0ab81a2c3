"""Shared by all tests: ``benchmarks`` can be imported wherever pytest is started, and torch keeps to one thread."""

from __future__ import annotations

import contextlib
import gc
import importlib.util
import os
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
COLLECTED = pytest.StashKey[list[pytest.Item]]()


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Note all tests before those of markers that are left out go."""
    config.stash[COLLECTED] = list(items)


def pytest_collection_finish() -> None:
    """Take what all tests share out of the garbage collector's sight.

    Half a million objects of the host libraries make each full collection, which whoever measures asks for before every
    row, take a quarter of a second.
    """
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def collected(pytestconfig: pytest.Config) -> list[pytest.Item]:
    """All tests of this run, those that a marker leaves out included."""
    return pytestconfig.stash[COLLECTED]


def _register_benchmarks() -> None:
    """Import ``benchmarks`` by its place.

    The root is not put on ``sys.path``, and taken off where ``python -m pytest`` has put it: its folder ``kernels``
    would pass for the package of that name that host libraries look for.
    """
    sys.path[:] = [p for p in sys.path if Path(p or ".").resolve() != ROOT]
    folder = ROOT / "benchmarks"
    spec = importlib.util.spec_from_file_location(
        "benchmarks", folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    if "benchmarks" in sys.modules or spec is None or spec.loader is None:
        return
    module = importlib.util.module_from_spec(spec)
    sys.modules["benchmarks"] = module
    spec.loader.exec_module(module)


_register_benchmarks()
# The same examples at every run, so that a change fails for what it did. HYPOTHESIS_PROFILE=explore looks for new ones.
with contextlib.suppress(ImportError):
    from hypothesis import settings

    settings.register_profile("same", derandomize=True)
    settings.register_profile("explore", derandomize=False)
    settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "same"))
# Tensors in tests are small, and test processes may run side by side.
torch.set_num_threads(1)
