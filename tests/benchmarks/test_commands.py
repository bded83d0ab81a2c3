"""Commands that are printed run: every benchmark says its options, has those that pages use, and runs when quick."""

from __future__ import annotations

import re
import runpy
import sys
from pathlib import Path

import pytest

pytest.importorskip("timm")
pytest.importorskip("transformers")
pytest.importorskip("diffusers")
pytest.importorskip("pandas")
pytest.importorskip("matplotlib")

from benchmarks.__main__ import listed
from tokred.bench import results

ROOT = Path(__file__).resolve().parents[2]
PAGES = [*(ROOT / "docs").rglob("*.md"), ROOT / "README.md", ROOT / "CONTRIBUTING.md"]
SOURCES = [p for p in (ROOT / "benchmarks").rglob("*.py") if "zoo" not in p.parts]
COMMAND = re.compile(r"python -m benchmarks ([a-z_]+(?:/[a-z_]+)?)\b([^`\n]*)")

pytestmark = pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")


def start(name: str, *given: str, monkeypatch: pytest.MonkeyPatch) -> int:
    """Run a benchmark in this process; returns its exit status."""
    monkeypatch.setattr(sys, "argv", [f"benchmarks {name}", *given])
    module = f"benchmarks.{name.replace('/', '.')}"
    try:
        runpy.run_module(f"{module}.__main__" if name == "pages" else module, run_name="__main__")
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


@pytest.mark.parametrize("name", listed())
def test_help(name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert start(name, "--help", monkeypatch=monkeypatch) == 0
    printed = capsys.readouterr().out
    known = set(re.findall(r"--[a-z][a-z-]*", printed.partition("options:")[2]))
    for path in (*PAGES, *SOURCES):
        for command, options in COMMAND.findall(path.read_text(encoding="utf8")):
            if command == name:
                unknown = {*re.findall(r"--[a-z][a-z-]*", options)} - known
                assert not unknown, f"{path}: {name} has no {unknown}"


def test_pages_name_what_there_is() -> None:
    named = {(path, name) for path in (*PAGES, *SOURCES) for name, _ in COMMAND.findall(path.read_text("utf8"))}
    there = {*listed(), "NAME"}
    assert not [(str(path), name) for path, name in named if name not in there]
    rows = re.findall(r"^\| `([a-z_]+/[a-z_]+)` \|", (ROOT / "docs" / "benchmarks.md").read_text("utf8"), re.M)
    assert {*rows} >= {name for name in there if "/" in name}


def test_pages_cite_tables_that_there_are() -> None:
    for path in PAGES:
        for cited in re.findall(r"benchmarks/results/([\w*.-]+)", path.read_text("utf8")):
            assert (ROOT / "benchmarks" / "results" / cited.rstrip(".")).exists(), f"{path}: {cited}"


QUICK = {
    "encoder/vit_speed": (),
    "kv/decode": ("--model", "smollm2-135m"),
    "kv/limit": ("--policies", "snapkv,cake"),
    "kv/memory": (),
}


@pytest.mark.filterwarnings("ignore::tokred.NothingRemovedWarning")
@pytest.mark.parametrize("name", QUICK)
def test_quick(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "table.csv"
    assert start(name, "--quick", *QUICK[name], "--out", str(out), monkeypatch=monkeypatch) == 0
    table = results.read(out)
    assert {row.scenario for row in table} == {name.partition("/")[2]}
    assert all(row.device and row.versions and row.date and row.dtype and row.method for row in table)
    if name == "kv/limit":
        refused = [row.method for row in table if row.metric == "refused"]
        assert refused == ["cake"]
        limits = [r for r in results.records(table) if "most_bytes" in r]
        assert all(r["most_bytes"] <= int(r["setting"].split("limit=")[1].split()[0]) for r in limits)


@pytest.mark.hosts
@pytest.mark.slow
def test_quick_methods(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "table.csv"
    assert start("encoder/methods", "--quick", "--out", str(out), monkeypatch=monkeypatch) == 0
    found = results.records(results.read(out), "methods")
    assert {r["method"] for r in found} == {"unpatched", "downsample", "evit"}
    assert all(0 <= r["top1_low"] <= r["top1"] <= r["top1_high"] <= 1 for r in found)
    # Made again, they go beside the first ones, and over them only on request.
    again = ("encoder/methods", "--quick", "--out", str(out))
    assert start(*again, monkeypatch=monkeypatch) == 0
    assert {p.name for p in tmp_path.iterdir()} == {"table.csv", "table-2.csv"}
    assert start(*again, "--overwrite", monkeypatch=monkeypatch) == 0
    assert {p.name for p in tmp_path.iterdir()} == {"table.csv", "table-2.csv"}
    assert len(results.records(results.read(out))) == len(found)
