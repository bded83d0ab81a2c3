"""The page of the plan names files and functions that exist."""

from __future__ import annotations

import ast
import re

from tests.architecture.imports import ROOT

PAGE = (ROOT / "docs" / "architecture.md").read_text("utf8")
TOPS = ("tokred", "adapters", "kernels", "tests", "benchmarks", "docs")
NAMED = sorted({word for word in re.findall(r"`([^`\s]+)`", PAGE) if word.startswith(tuple(f"{top}/" for top in TOPS))})


def defined(body: list[ast.stmt]) -> dict[str, ast.stmt]:
    """The classes, functions and values that a module or a class defines itself, by name."""
    found: dict[str, ast.stmt] = {}
    for node in body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found[node.name] = node
        elif isinstance(node, ast.Assign):
            found.update({target.id: node for target in node.targets if isinstance(target, ast.Name)})
        elif isinstance(node, ast.If):  # such as a class that needs an installed host
            found.update(defined(node.body))
    return found


def exists(named: str) -> bool:
    """True if ``path``, ``path::name`` or ``path::Class.method`` is there."""
    file, _, name = named.partition("::")
    path = ROOT / file
    if not name:
        return path.is_dir() if file.endswith("/") else path.is_file()
    if not path.is_file():
        return False
    body = ast.parse(path.read_text("utf8")).body
    for part in name.split("."):
        node = defined(body).get(part)
        if node is None:
            return False
        body = getattr(node, "body", [])
    return True


def test_files_and_functions_on_the_page_exist() -> None:
    missing = [named for named in NAMED if not exists(named)]
    assert not missing


def test_a_wrong_name_would_be_seen() -> None:
    assert len(NAMED) > 60
    assert exists("tokred/core/reduction.py::Reduction.merge")
    assert not exists("tokred/core/reduction.py::Reduction.no_such_method")
    assert not exists("tokred/core/no_such_file.py")
    assert not exists("tokred/no_such_room/")


def test_every_room_is_on_the_page() -> None:
    rooms = [p for top in ("tokred", "adapters") for p in (ROOT / top).iterdir() if (p / "__init__.py").is_file()]
    missing = [name for p in rooms if f"`{(name := p.relative_to(ROOT).as_posix())}/`" not in PAGE]
    assert not missing
