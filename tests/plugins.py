"""Packages of others that add methods: written into a scratch folder, declared as installed packages declare them."""

from __future__ import annotations

import importlib.metadata
import sys
from collections.abc import Iterator
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest

import tokred
from tokred.core.registry import methods, parts


class Plugins:
    """Modules in a folder, and the entry points that name their methods.

    Attributes:
        folder: on the import path.
        entries: what is declared.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.entries: list[EntryPoint] = []

    def add(
        self, name: str, module: str, source: str, attribute: str = "Plugin", group: str = "tokred.methods"
    ) -> None:
        """Write a module, and declare the method, or with the group ``tokred.parts`` the part of policies, in it."""
        (self.folder / f"{module}.py").write_text(source, "utf-8")
        self.entries.append(EntryPoint(name, f"{module}:{attribute}", group))
        # As if it had been installed before tokred was asked for anything.
        methods._discovered = parts._discovered = False


@pytest.fixture
def plugins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Plugins]:
    """No plug-in yet, and a registry that has not looked for any."""
    made = Plugins(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    others = importlib.metadata.entry_points
    monkeypatch.setattr(
        "importlib.metadata.entry_points",
        lambda **given: (
            [entry for entry in made.entries if entry.group == given["group"]]
            if given.get("group") in ("tokred.methods", "tokred.parts")
            else others(**given)
        ),
    )
    own = {methods: tokred.methods.TARGETS, parts: tokred.methods.SCORES | tokred.methods.PARTS}
    for registry, targets in own.items():
        fresh = {"_targets": dict(targets), "_discovered": False, "_plugins": {}, "_refused": {}}
        for name, value in fresh.items():
            monkeypatch.setattr(registry, name, value)
    yield made
    for name, module in tuple(sys.modules.items()):
        if str(getattr(module, "__file__", None)).startswith(str(tmp_path)):
            del sys.modules[name]
