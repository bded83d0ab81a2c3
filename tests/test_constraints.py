"""Floors, pins and what was tested agree, and the pins cover whatever README's commands install, on any platform."""

from __future__ import annotations

import itertools
import json
import os
import re
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path
from types import ModuleType

import pytest

pytest.importorskip("packaging")

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from tokred.core import environment

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf8"))
EXTRAS = PROJECT["project"]["optional-dependencies"]
TESTED = json.loads((ROOT / "tokred" / "core" / "tested.json").read_text("utf8"))["libraries"]
LINES = [s for s in (ROOT / "constraints.txt").read_text("utf8").splitlines() if s and not s.startswith("#")]
PINS = {canonicalize_name(r.name): r for r in map(Requirement, LINES)}
SYSTEMS = [
    ("linux", "Linux", "x86_64", "posix"),
    ("linux", "Linux", "aarch64", "posix"),
    ("darwin", "Darwin", "arm64", "posix"),
    ("win32", "Windows", "AMD64", "nt"),
]
PLACES = [
    {
        "python_version": f"3.{minor}", "python_full_version": f"3.{minor}.0", "sys_platform": sys_platform,
        "platform_system": system, "platform_machine": machine, "os_name": name, "implementation_name": "cpython",
        "platform_python_implementation": "CPython", "extra": "",
    }
    for minor, (sys_platform, system, machine, name) in itertools.product((11, 12, 13, 14), SYSTEMS)
]  # fmt: skip


def script() -> ModuleType:
    """``.ci/versions.py``, which is no module of a package."""
    import importlib.util

    spec = importlib.util.spec_from_file_location("ci_versions", ROOT / ".ci" / "versions.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def direct(*names: str) -> list[Requirement]:
    """What the base and these extras ask for, and the extras that they name."""
    found, todo, seen = [], list(PROJECT["project"]["dependencies"]), set()
    for name in names:
        todo += EXTRAS[name]
    while todo:
        one = Requirement(todo.pop())
        if one.name != "tokred":
            found.append(one)
            continue
        for extra in one.extras - seen:
            seen.add(extra)
            todo += EXTRAS[extra]
    return found


def version(pin: Requirement) -> Version:
    (only,) = pin.specifier
    assert only.operator == "=="
    return Version(only.version)


def test_every_line_is_one_exact_and_public_version():
    assert len(PINS) == len(LINES)
    for pin in PINS.values():
        assert version(pin).local is None, f"{pin} exists on one builder's index alone"
        assert pin.url is None


def test_direct_requirements_of_every_extra_are_pinned_where_their_floor_allows():
    for one in direct(*EXTRAS):
        pin = PINS.get(canonicalize_name(one.name))
        assert pin is not None, f"{one.name} is not in constraints.txt: run .ci/refresh"
        assert one.specifier.contains(version(pin)), f"{pin} is below the floor of pyproject.toml, {one}"


def test_the_build_takes_the_setuptools_that_was_tried():
    (build,) = map(Requirement, PROJECT["build-system"]["requires"])
    assert build.name == "setuptools"
    assert build.specifier.contains(version(PINS["setuptools"]))
    # Constraints do not reach the environment that pip builds in.
    assert any(s.operator == "<" for s in build.specifier)


def test_other_builds_of_torch_can_bring_their_own_cuda():
    assert not [name for name in PINS if name.startswith(("nvidia", "cuda"))]
    assert "tokred" not in PINS


@pytest.mark.parametrize(
    "place", PLACES, ids=lambda p: f"{p['sys_platform']}-{p['platform_machine']}-{p['python_version']}"
)
def test_whatever_is_installed_is_pinned(place):
    """All the way down, as the installed packages declare it, on this platform and on others."""
    pinned = next(iter(PINS["transformers"].specifier)).version if "transformers" in PINS else ""
    if metadata.version("transformers") != pinned:
        pytest.skip("other versions are installed than those that are pinned")
    todo, done = [(r, frozenset({""})) for r in direct("dev", "bench")], set()
    while todo:
        one, extras = todo.pop()
        name = canonicalize_name(one.name)
        if one.marker is not None and not any(one.marker.evaluate({**place, "extra": e}) for e in extras):
            continue
        if name.startswith(("nvidia", "cuda")) or (name, frozenset(one.extras)) in done:
            continue
        done.add((name, frozenset(one.extras)))
        assert name in PINS, f"{name} is not in constraints.txt: run .ci/refresh"
        try:
            below = metadata.requires(name) or []
        except metadata.PackageNotFoundError:
            continue  # of an extra that is not installed here
        todo += [(Requirement(text), frozenset({"", *one.extras})) for text in below]


def test_pins_of_newer_pythons_say_so():
    """A pin that the oldest Python cannot have must not hold there."""
    oldest = Requirement(f"python{PROJECT['project']['requires-python']}").specifier
    assert oldest.contains("3.11.0")
    for name, pin in PINS.items():
        try:
            about = metadata.metadata(name)
        except metadata.PackageNotFoundError:
            continue
        if metadata.version(name) != str(version(pin)) or not about.get("Requires-Python"):
            continue
        runs = Requirement(f"python{about['Requires-Python']}").specifier.contains("3.11.0")
        holds = pin.marker is None or pin.marker.evaluate({"python_full_version": "3.11.0", "python_version": "3.11"})
        assert runs or not holds, f"{pin} is for Python {about['Requires-Python']}"


def test_tested_versions_are_the_floors_and_the_pins():
    floors = {canonicalize_name(r.name): r for r in direct(*EXTRAS)}
    assert set(TESTED) == {"torch", *environment.LIBRARIES}
    for library, row in TESTED.items():
        package = canonicalize_name(environment.package(library))
        assert str(floors[package].specifier) == f">={row['floor']}", f"{library}: run .ci/refresh"
        assert str(version(PINS[package])) == row["newest"], f"{library}: run .ci/refresh"
        assert Version(row["floor"]) <= Version(row["newest"])


def test_the_script_knows_the_same_libraries():
    made = script()
    assert set(made.LIBRARIES) == set(TESTED)
    assert {name: made.PACKAGES.get(name, name) for name in made.LIBRARIES if name != "torch"} == environment.LIBRARIES


def test_floors_are_those_of_pyproject():
    done = subprocess.run(
        [sys.executable, str(ROOT / ".ci" / "versions.py"), "floors"], capture_output=True, text=True, check=True
    )
    found = {canonicalize_name(r.name): str(r.specifier) for r in map(Requirement, done.stdout.splitlines())}
    assert found == {canonicalize_name(environment.package(n)): f"=={row['floor']}" for n, row in TESTED.items()}


def test_what_is_written_is_what_is_installed(monkeypatch, tmp_path):
    made = script()
    (tmp_path / "pyproject.toml").write_text((ROOT / "pyproject.toml").read_text("utf8"), "utf8")
    monkeypatch.setattr(made, "ROOT", tmp_path)
    for name, path in (("CONSTRAINTS", "constraints.txt"), ("TESTED", "tested.json")):
        monkeypatch.setattr(made, name, tmp_path / path)
    if any(not environment.version(environment.package(name)) for name in ("torch", *environment.LIBRARIES)):
        pytest.skip("not all libraries are installed")
    made.pin()
    lines = (tmp_path / "constraints.txt").read_text("utf8").splitlines()
    pins = {canonicalize_name(r.name): r for r in map(Requirement, (s for s in lines if not s.startswith("#")))}
    assert str(version(pins["pytest"])) == metadata.version("pytest")
    assert str(version(pins["torch"])) == metadata.version("torch").partition("+")[0]
    rows = json.loads((tmp_path / "tested.json").read_text("utf8"))["libraries"]
    assert rows["timm"] == {"floor": TESTED["timm"]["floor"], "newest": metadata.version("timm")}
    assert list(rows) == list(TESTED)


def test_outcome_of_the_canary(tmp_path):
    good, bad = tmp_path / "kv.xml", tmp_path / "vlm.xml"
    good.write_text('<testsuites><testsuite tests="9" failures="2" errors="1" skipped="3"/></testsuites>')
    bad.write_text("")
    lines = [line.split() for line in script().outcome([str(good), str(bad), str(tmp_path / "gone.xml")])]
    assert ["kv", "3", "3", "3"] in lines
    assert ["vlm", "did", "not", "run"] in lines
    assert ["gone", "did", "not", "run"] in lines
    assert ["transformers", TESTED["transformers"]["floor"], environment.version("transformers") or "-"] in lines


@pytest.mark.parametrize("name", ["refresh", "floors", "canary", "run"])
def test_scripts_are_sound(name):
    path = ROOT / ".ci" / name
    subprocess.run(["bash", "-n", str(path)], check=True, timeout=60)
    assert os.access(path, os.X_OK)


def test_readme_installs_what_was_tested():
    text = (ROOT / "README.md").read_text("utf8")
    commands = re.findall(r"^python3 -m venv .*$", text, re.MULTILINE)
    assert len(commands) == 2
    assert all(" install -c constraints.txt -e " in command for command in commands)
