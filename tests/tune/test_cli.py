"""``tokred tune``: one goal, a table, files; bad input in one line."""

from __future__ import annotations

import json

import pytest

pytest.importorskip("typer")
pytest.importorskip("timm")

from typer.testing import CliRunner

import tokred
from tests.tune.planted import clock  # noqa: F401 - a fixture
from tokred.cli.main import app
from tokred.tuning import Tuned

pytestmark = pytest.mark.usefixtures("clock")


def run(*arguments: str, code: int = 0):
    result = CliRunner().invoke(app, ["tune", *arguments])
    assert result.exit_code == code, (result.output, result.exception)
    return result


def test_a_search(tmp_path):
    quick = ["--speedup", "1.3", "-m", "tome", "--trials", "6", "--samples", "16", "--count", "32", "--rounds", "3"]
    found = run(*quick, "--out", str(tmp_path), "--json", "--batch", "8")
    document = json.loads(found.stdout)
    folder = tmp_path / "tune-embedded"
    assert document["goal"] == {"kind": "speedup", "value": 1.3}
    assert document["setting"] == Tuned.load(folder).setting
    assert tokred.load(folder) == tokred.from_dict(document["method"])
    text = run(*quick, "--out", str(tmp_path), "--batch", "8").output
    assert "best constant" in text
    assert "tuned.json" in text


@pytest.mark.hosts
def test_a_search_outlives_its_picture(tmp_path, monkeypatch):
    def broken(*_):
        raise ValueError("nothing to draw on")

    monkeypatch.setattr(Tuned, "plot", broken)
    quick = ["--speedup", "1.3", "-m", "tome", "--trials", "4", "--samples", "16", "--count", "32", "--rounds", "3"]
    found = run(*quick, "--out", str(tmp_path), "--batch", "8", code=1)
    assert "best constant" in found.output
    assert (tmp_path / "tune-embedded" / "tuned.json").exists()


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ((), "give one goal"),
        (("--speedup", "2", "--loss", "0.1"), "got speedup and loss"),
        (("--speedup", "1.2", "-m", "tome r=4"), "leave it out"),
        (("no_such_model", "--speedup", "2"), "no_such_model"),
        (("--memory", "0.5"), "share of a cache's bytes"),
        (("--speedup", "2", "--search", "all"), "search"),
    ],
)
def test_bad_input(tmp_path, arguments, text):
    assert text in run(*arguments, "--out", str(tmp_path), "--count", "32", code=2).output
