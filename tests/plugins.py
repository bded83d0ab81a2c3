"""Packages of others that add methods: written into a scratch folder, declared as installed packages declare them."""

from __future__ import annotations

import importlib.metadata
import sys
from collections.abc import Iterator
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest

import tokred
from tokred.core.registry import methods


class Plugins:
    """Modules in a folder, and the entry points that name their methods.

    Attributes:
        folder: on the import path.
        entries: what is declared.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.entries: list[EntryPoint] = []

    def add(self, name: str, module: str, source: str, attribute: str = "Plugin") -> None:
        """Write a module, and declare the method in it."""
        (self.folder / f"{module}.py").write_text(source, "utf-8")
        self.entries.append(EntryPoint(name, f"{module}:{attribute}", "tokred.methods"))
        methods._discovered = False  # as if it had been installed before tokred was asked for anything


@pytest.fixture
def plugins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Plugins]:
    """No plug-in yet, and a registry that has not looked for any."""
    made = Plugins(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    others = importlib.metadata.entry_points
    monkeypatch.setattr(
        "importlib.metadata.entry_points",
        lambda **given: made.entries if given.get("group") == "tokred.methods" else others(**given),
    )
    fresh = {"_targets": dict(tokred.methods.TARGETS), "_discovered": False, "_plugins": {}, "_refused": {}}
    for name, value in fresh.items():
        monkeypatch.setattr(methods, name, value)
    yield made
    for name, module in tuple(sys.modules.items()):
        if str(getattr(module, "__file__", None)).startswith(str(tmp_path)):
            del sys.modules[name]
