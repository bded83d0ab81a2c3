"""Import tokred from this checkout, installed or not.

An installed tokred takes ``tokred.kernels`` and ``tokred.adapters`` from folders at the top of the repository
(``package-dir`` in ``pyproject.toml``). For scripts that run where only torch and triton are installed, this does the
same with a finder, and takes precedence over a tokred that is installed: a benchmark measures the checkout.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = {
    "tokred": ROOT / "tokred",
    "tokred.kernels": ROOT / "kernels",
    "tokred.adapters": ROOT / "adapters",
    "benchmarks": ROOT / "benchmarks",
}


class _Finder:
    """Knows the packages in ``FOLDERS``; what lies inside them is found as usual."""

    @staticmethod
    def find_spec(name: str, path: Sequence[str] | None = None, target: ModuleType | None = None) -> ModuleSpec | None:
        folder = FOLDERS.get(name)
        if folder is None:
            return None
        return importlib.util.spec_from_file_location(
            name, folder / "__init__.py", submodule_search_locations=[str(folder)]
        )


def use_checkout() -> None:
    """Make ``tokred`` and ``benchmarks`` importable from this checkout, in this process.

    Raises:
        RuntimeError: tokred was imported from elsewhere before.
    """
    loaded = sys.modules.get("tokred")
    if loaded is not None and Path(loaded.__file__ or "").resolve().parent != FOLDERS["tokred"]:
        raise RuntimeError(f"tokred was already imported from {loaded.__file__}, not from {ROOT}")
    if _Finder not in sys.meta_path:
        sys.meta_path.insert(0, _Finder)  # type: ignore[arg-type]
