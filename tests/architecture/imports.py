"""The import graph of the package, read from its sources: every import counts, also those inside functions."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
# Where the folders at the top of the repository install.
FOLDERS = {"tokred": "tokred", "kernels": "tokred.kernels", "adapters": "tokred.adapters"}


class Import(NamedTuple):
    """One import statement.

    Attributes:
        line: where it stands.
        module: that is imported, as far as it is one of ours.
        typing: whether it stands under ``if TYPE_CHECKING``.
    """

    line: int
    module: str
    typing: bool


def sources() -> dict[str, Path]:
    """Every module of the package, by its import name; packages by theirs."""
    found = {}
    for top, name in FOLDERS.items():
        for path in sorted((ROOT / top).rglob("*.py")):
            parts = [name, *path.relative_to(ROOT / top).with_suffix("").parts]
            if parts[-1] == "__init__":
                parts.pop()
            found[".".join(parts)] = path
    return found


def imports(path: Path, known: dict[str, Path]) -> Iterator[Import]:
    """The imports of our own modules in a file."""
    tree = ast.parse(path.read_text("utf8"))
    typing = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module is not None:
            whole = [f"{node.module}.{alias.name}" for alias in node.names]
            # `from package import module` imports the module, `from module import name` the module itself.
            names = [name if name in known else node.module for name in whole]
        else:
            continue
        for name in dict.fromkeys(names):
            if name in known:
                yield Import(node.lineno, name, id(node) in typing)


def graph(typing: bool = False) -> dict[str, set[str]]:
    """Module -> the modules that it imports; with or without those for types alone."""
    known = sources()
    return {
        name: {i.module for i in imports(path, known) if (typing or not i.typing) and i.module != name}
        for name, path in known.items()
    }


def circles(edges: dict[str, set[str]]) -> list[list[str]]:
    """The groups of modules that reach each other (strongly connected components of two or more), sorted."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(node: str) -> None:
        index[node] = low[node] = len(index)
        stack.append(node)
        for other in sorted(edges.get(node, ())):
            if other not in index:
                visit(other)
                low[node] = min(low[node], low[other])
            elif other in stack:
                low[node] = min(low[node], index[other])
        if low[node] == index[node]:
            group = []
            while True:
                group.append(stack.pop())
                if group[-1] == node:
                    break
            if len(group) > 1:
                found.append(sorted(group))

    for node in sorted(edges):
        if node not in index:
            visit(node)
    return sorted(found)
