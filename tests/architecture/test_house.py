"""The plan of the house: imports point down only, wings stand side by side, rooms stay small enough to be read."""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest

import tokred
from tests.architecture.imports import ROOT, circles, graph, imports, sources
from tokred.core.moved import MOVED

# The floors, from the ground. Whatever imports tokred's face as a user does stands above it.
FLOORS: dict[str, int] = {
    "tokred.kernels": 0,
    "tokred.errors": 0,
    "tokred.core": 1,
    "tokred.encoder": 2,
    "tokred.diffusion": 2,
    "tokred.vlm": 2,
    "tokred.kv": 2,
    "tokred.learn": 3,
    "tokred.learn.training": 10,  # trains models as users do; what is below has the terms of a loss alone
    "tokred.methods": 4,
    "tokred.adapters": 5,
    "tokred.patch": 6,
    "tokred.settings": 7,
    "tokred.api": 7,
    "tokred.analysis": 8,
    "tokred": 9,
    "tokred.bench": 10,
    "tokred.eval": 10,
    "tokred.tuning": 10,
    "tokred.doctor": 10,
    "tokred.cli": 11,
    "tokred.__main__": 12,
}
WINGS = ("encoder", "diffusion", "vlm", "kv", "moe")
LONGEST = 400


def floor(module: str) -> int:
    """The floor of a module: that of the longest part of its name that has one."""
    parts = module.split(".")
    for count in range(len(parts), 1, -1):
        found = FLOORS.get(".".join(parts[:count]))
        if found is not None:
            return found
    assert module == "tokred", f"{module} stands on no floor: give its room one"
    return FLOORS["tokred"]


def wing(module: str) -> str | None:
    """The wing of a module, or None."""
    return next((part for part in module.split(".") if part in WINGS), None)


def test_imports_point_down() -> None:
    """Also inside functions, and for types alone."""
    known = sources()
    up = [
        f"{name}:{i.line} imports {i.module}"
        for name, path in known.items()
        for i in imports(path, known)
        if floor(i.module) > floor(name)
    ]
    assert not up


def test_no_circle() -> None:
    """Also inside functions; imports for types alone do not run, and may point sideways."""
    assert circles(graph()) == []


def test_circles_and_upward_imports_would_be_seen() -> None:
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}, "e": set()}) == [["a", "b", "c"]]
    assert floor("tokred.kernels.rows") < floor("tokred.core.site") < floor("tokred.methods.kv.snapkv")
    assert floor("tokred.methods") < floor("tokred.adapters.contract") < floor("tokred.cli.main")


# Imports from one wing to another. A language model with eyes is a tower, a decoder and its cache, so that adapters of
# that wing stand on those of two others; the rest are methods made of methods.
ACROSS = {
    ("tokred.adapters.vlm", "tokred.adapters.encoder"),
    ("tokred.adapters.vlm", "tokred.adapters.kv"),
    ("tokred.methods.vlm.fastkv", "tokred.kv"),
    ("tokred.methods.vlm.fastkv", "tokred.methods.kv"),
    ("tokred.methods.vlm.saint_vlm", "tokred.encoder.metric"),
    ("tokred.methods.vlm.saint_vlm", "tokred.methods.encoder.saint"),
    ("tokred.methods.vlm.pixelprune_visual", "tokred.methods.encoder.pixelprune"),
    ("tokred.adapters.vlm.sites", "tokred.encoder.motion"),
    ("tokred.methods.vlm.visual_baselines", "tokred.methods.encoder.downsample"),
}


def test_wings_stand_side_by_side() -> None:
    known = sources()
    found = {
        (name, i.module)
        for name, path in known.items()
        for i in imports(path, known)
        if wing(name)
        and wing(i.module)
        and wing(name) != wing(i.module)
        and not name.startswith("tokred.adapters.tiny")
    }
    allowed = {(a, b) for a, b in found for x, y in ACROSS if a.startswith(x) and b.startswith(y)}
    assert found <= allowed
    unused = {(x, y) for x, y in ACROSS if not any(a.startswith(x) and b.startswith(y) for a, b in found)}
    assert not unused, "no longer needed"


def test_few_rooms() -> None:
    """What a newcomer sees first."""
    rooms = {name.split(".")[1] for name in sources() if name != "tokred"}
    assert len(rooms) <= 20
    assert len(list((ROOT / "tokred").glob("*.py"))) <= 6
    assert len(list((ROOT / "adapters" / "vlm").glob("*.py"))) <= 15


def test_no_file_is_long() -> None:
    files = [p for top in ("tokred", "adapters", "kernels", "benchmarks") for p in (ROOT / top).rglob("*.py")]
    long = {str(p.relative_to(ROOT)): n for p in files if (n := len(p.read_text("utf8").splitlines())) > LONGEST}
    assert not long


def test_methods_and_adapters_do_not_know_each_other() -> None:
    known = sources()
    for name, path in known.items():
        for i in imports(path, known):
            assert not (name.startswith("tokred.methods") and i.module.startswith("tokred.adapters")), name
            assert not (name.startswith("tokred.adapters") and i.module.startswith("tokred.methods")), name


def functions(path: Path) -> Iterator[tuple[ast.FunctionDef | ast.AsyncFunctionDef, list[str]]]:
    """The functions of a file with their lines."""
    text = path.read_text("utf8")
    lines = text.splitlines()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node, lines[node.lineno - 1 : node.end_lineno]


def test_long_functions_of_adapters_say_why() -> None:
    silent = []
    for path in sorted((ROOT / "adapters").rglob("*.py")):
        if "tiny" in path.parts:
            continue
        for node, lines in functions(path):
            if len(lines) > 25 and not any("#" in line for line in lines):
                silent.append(f"{path.relative_to(ROOT)}:{node.lineno} {node.name}")
    assert not silent


def docstrings(path: Path) -> Iterator[tuple[int, str]]:
    """The docstrings of a file and where they stand."""
    for node in ast.walk(ast.parse(path.read_text("utf8"))):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef | ast.Module):
            text = ast.get_docstring(node)
            if text:
                yield getattr(node, "lineno", 1), text


def test_docstrings_name_their_subject() -> None:
    found = []
    for top in ("tokred", "adapters", "kernels"):
        for path in sorted((ROOT / top).rglob("*.py")):
            for line, text in docstrings(path):
                if text.split()[0] in ("What", "Whether", "As", "Always.") or text.startswith(
                    ("The same of", "See the")
                ):
                    found.append(f"{path.relative_to(ROOT)}:{line} {text.splitlines()[0][:60]}")
    assert not found


def test_old_import_paths_still_work() -> None:
    for old, new in MOVED.items():
        with pytest.warns(tokred.MovedWarning, match=new[0]):
            module = (
                importlib.reload(importlib.import_module(old)) if old in sys.modules else importlib.import_module(old)
            )
        for target in new:
            there = importlib.import_module(target)
            names = [n for n in vars(there) if not n.startswith("_")]
            assert all(hasattr(module, n) for n in names)
        assert not hasattr(module, "no_such_name")


def test_a_wing_has_the_name_that_a_method_had() -> None:
    with pytest.warns(tokred.MovedWarning, match="tokred.methods.kv.kv"):
        from tokred.methods.kv import KVPolicy
    assert KVPolicy is tokred.KVPolicy


def test_no_source_uses_an_old_path() -> None:
    for top in ("tokred", "adapters", "kernels", "tests", "benchmarks"):
        for path in (ROOT / top).rglob("*.py"):
            if path.name == "moved.py":
                continue
            text = path.read_text("utf8")
            if not any(name in text for name in MOVED):  # most files need not be parsed
                continue
            for node in ast.walk(ast.parse(text)):
                if isinstance(node, ast.ImportFrom):
                    assert node.module not in MOVED, f"{path}:{node.lineno}"
                elif isinstance(node, ast.Import):
                    assert not {a.name for a in node.names} & MOVED.keys(), f"{path}:{node.lineno}"


def test_methods_was_a_function() -> None:
    with pytest.warns(tokred.MovedWarning, match="list_methods"):
        assert tokred.methods() == tokred.list_methods()


def test_names_resolve_without_an_import() -> None:
    """``tokred.viz`` and the like are imported when they are first used."""
    code = "import tokred; tokred.viz.paint; tokred.bench.timing; tokred.kv.Window; import tokred.methods.encoder.tome"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_list_methods_filters() -> None:
    from tokred.adapters.tiny import timm

    everything = tokred.list_methods()
    assert everything == sorted(everything)
    assert tokred.list_methods("tome*") == [n for n in everything if n.startswith("tome")]
    assert "keymerge" in tokred.list_methods("Merge")
    assert set(tokred.list_methods(stage="cache")) <= set(everything) - {"tome"}
    with pytest.raises(ValueError, match="stage is 'blocks'; allowed are"):
        tokred.list_methods(stage="blocks")  # type: ignore[arg-type]
    model = timm.build("vit")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        runs = tokred.list_methods(stage="block", model=model)
    assert "tome" in runs
    assert "snapkv" not in tokred.list_methods(model=model)
