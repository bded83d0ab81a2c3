"""Files that type checkers and editors read of ``tokred``: its own names, the classes of all methods, and their names.

    python .ci/stub.py            # writes tokred/__init__.pyi and tokred/core/names.py
    python .ci/stub.py --check    # fails where one is out of date

``tokred`` finds its methods by the table in ``tokred/methods/__init__.py`` when they are first used, which no type
checker can follow. Nothing is imported here: both files are read.
"""

from __future__ import annotations

import ast
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "tokred"
STUB = PACKAGE / "__init__.pyi"
NAMES = PACKAGE / "core" / "names.py"
LINE = 120


def _assigned(tree: ast.Module, name: str) -> ast.expr:
    """The value of a module's first assignment to ``name``."""
    for node in tree.body:
        if isinstance(node, ast.Assign) and any(isinstance(t, ast.Name) and t.id == name for t in node.targets):
            return node.value
    raise LookupError(f"nothing is assigned to {name}")


def _imports(tree: ast.Module) -> dict[str, str]:
    """The module that each public name is imported from."""
    return {
        alias.asname or alias.name: node.module
        for node in tree.body
        if isinstance(node, ast.ImportFrom) and node.module
        for alias in node.names
        if not (alias.asname or alias.name).startswith("_") and node.module != "__future__"
    }


def _order(name: str) -> tuple[int, list[tuple[bool, int, str]]]:
    """The place of a name among others: constants, classes, the rest, and numbers by value, as ruff sorts them."""
    kind = 0 if name.isupper() and len(name) > 1 else 1 if name[:1].isupper() else 2
    return kind, [(not p.isdigit(), int(p) if p.isdigit() else 0, p) for p in re.findall(r"\d+|\D+", name)]


def text() -> str:
    """The stub as it has to be."""
    tree = ast.parse((PACKAGE / "__init__.py").read_text("utf-8"))
    own: list[str] = ast.literal_eval(_assigned(tree, "__all__"))
    lazy: dict[str, str] = ast.literal_eval(_assigned(tree, "_LAZY"))
    table = ast.parse((PACKAGE / "methods" / "__init__.py").read_text("utf-8"))
    targets: dict[str, str] = ast.literal_eval(_assigned(table, "TARGETS"))
    classes = {target.partition(":")[2]: target.partition(":")[0] for target in targets.values()}

    found = {name: module for name, module in _imports(tree).items() if name in own} | classes
    for name, target in lazy.items():
        module, _, attribute = target.partition(":")
        found[name] = module if attribute else module.rpartition(".")[0]
    found["methods"] = "tokred"
    by_module: dict[str, list[str]] = {}
    for name, module in found.items():
        by_module.setdefault(module, []).append(name)
    lines = ['"""The names of ``tokred`` with their types: written by .ci/stub.py, and not by hand."""', ""]
    for module in sorted(by_module):
        names = sorted(by_module[module], key=_order)
        line = f"from {module} import {', '.join(names)}"
        if len(line) > LINE:
            line = "\n".join([f"from {module} import (", *(f"    {n}," for n in names), ")"])
        lines.append(line)
    public = sorted({*own, *lazy, *classes}, key=_order)
    lines += ["", "__version__: str", "", "__all__ = [", *(f'    "{name}",' for name in public), "]", ""]
    return "\n".join(lines)


def names() -> str:
    """The literal type of the methods' names as it has to be."""
    table = ast.parse((PACKAGE / "methods" / "__init__.py").read_text("utf-8"))
    targets: dict[str, str] = ast.literal_eval(_assigned(table, "TARGETS"))
    return "\n".join(
        [
            '"""``MethodName``: tokred\'s own methods, for completion: written by .ci/stub.py, not by hand."""',
            "",
            "from typing import Literal",
            "",
            "MethodName = Literal[",
            *(f'    "{name}",' for name in sorted(targets)),
            "]",
            "",
        ]
    )


if __name__ == "__main__":
    for path, wanted in ((STUB, text()), (NAMES, names())):
        if "--check" not in sys.argv[1:]:
            path.write_text(wanted, "utf-8")
        elif not path.exists() or path.read_text("utf-8") != wanted:
            sys.exit(f"{path} is out of date: run python .ci/stub.py")
