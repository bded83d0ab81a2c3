"""The reference has every public name, and what is written from the code is as fresh as the code."""

from __future__ import annotations

import functools
import importlib
import re
import runpy
from typing import Any

import pytest

from tests.docs.test_docs import ROOT

FOLDER = ROOT / "docs" / "reference"
DIRECTIVE = re.compile(r"^::: (?P<path>[\w.]+)\n(?:    options:(?P<options>(?:.*\n)(?:      .*\n)*))?", re.MULTILINE)
ANCHOR = re.compile(r"\{ #(?P<path>tokred[\w.]*) \}")
PACKAGES = ("tokred", "tokred.eval", "tokred.kv", "tokred.learn", "tokred.viz", "tokred.tuning", "tokred.settings")


def resolved(path: str) -> Any:
    """The object of a dotted path."""
    names = path.split(".")
    for cut in range(len(names), 0, -1):
        try:
            found = importlib.import_module(".".join(names[:cut]))
        except ModuleNotFoundError:
            continue
        return functools.reduce(getattr, names[cut:], found)
    raise ModuleNotFoundError(path)


@functools.cache
def documented() -> dict[str, Any]:
    """Every path that a page of the reference has an entry of, with its object."""
    paths: set[str] = set()
    for page in FOLDER.rglob("*.md"):
        text = page.read_text("utf-8")
        paths |= {found["path"] for found in ANCHOR.finditer(text)}
        for found in DIRECTIVE.finditer(text):
            path, options = found["path"], found["options"] or ""
            members = re.search(r"members: \[([^\]]*)\]", options)
            if members:
                paths |= {f"{path}.{name.strip()}" for name in members[1].split(",")}
            elif "show_root_heading: false" not in options:
                paths.add(path)
            elif "members: false" not in options:  # all of a module
                module = resolved(path)
                own = (n for n, v in vars(module).items() if getattr(v, "__module__", None) == module.__name__)
                paths |= {f"{path}.{name}" for name in own if not name.startswith("_")}
    return {path: resolved(path) for path in paths}


@pytest.mark.parametrize("package", PACKAGES)
def test_every_public_name_has_an_entry(package: str) -> None:
    module = importlib.import_module(package) if package != "tokred.viz" else resolved(package)
    there = documented()
    objects = {id(value) for value in there.values()}
    names = [f"{package}.{name}" for name in module.__all__]
    assert [n for n in names if n not in there and id(resolved(n)) not in objects] == []


def test_what_a_user_calls_stands_under_the_name_it_is_called_by() -> None:
    import tokred

    # Kinds of methods and parts stand with their module; an entry under another name has another anchor.
    there = documented()
    assert [n for n in tokred.__all__ if f"tokred.{n}" not in there and f"tokred.errors.{n}" not in there] == []


def test_each_name_has_one_entry() -> None:
    pages = "\n".join(page.read_text("utf-8") for page in FOLDER.rglob("*.md"))
    anchors = [found["path"] for found in ANCHOR.finditer(pages)]
    whole = [f["path"] for f in DIRECTIVE.finditer(pages) if "show_root_heading: false" not in (f["options"] or "")]
    assert sorted({*anchors, *whole}) == sorted([*anchors, *whole])


def test_what_is_written_from_the_code_is_fresh() -> None:
    pytest.importorskip("typer")
    script = runpy.run_path(str(ROOT / ".ci" / "reference.py"))
    for path, wanted in script["pages"]().items():
        assert path.read_text("utf-8") == wanted, "run python .ci/reference.py"


def test_every_command_and_option_stands_on_the_page() -> None:
    typer = pytest.importorskip("typer")
    from tokred.cli.main import app

    text = (FOLDER / "command-line.md").read_text("utf-8")
    commands = {"tokred": typer.main.get_command(app)}
    while commands:
        name, command = commands.popitem()
        part = text.partition(f"\n## {name}\n")[2].partition("\n## ")[0]
        assert part, f"{name} has no section"
        for option in command.params:
            if not getattr(option, "hidden", False) and option.param_type_name == "option":
                assert all(f"`{spelled}`" in part for spelled in (*option.opts, *option.secondary_opts)), option.name
        commands |= {f"{name} {inside}": one for inside, one in getattr(command, "commands", {}).items()}


def test_signatures_can_be_broken_into_lines() -> None:
    import tomllib

    extras = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["optional-dependencies"]
    assert any(requirement.startswith(("ruff", "black")) for requirement in extras["docs"])
