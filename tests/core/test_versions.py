"""Versions that were tested, and the warning for others."""

from __future__ import annotations

import json
import warnings

import pytest

import tokred
from tokred.core import environment, versions
from tokred.core.versions import Bounds, check_tested, release, standing


@pytest.fixture(autouse=True)
def anew(monkeypatch):
    """No library has been warned of, and one of two versions is known."""
    check_tested.cache_clear()
    monkeypatch.setattr(versions, "tested", lambda: {"timm": Bounds("1.0.20", "1.0.31")})
    yield
    check_tested.cache_clear()


def pretend(monkeypatch, version):
    monkeypatch.setattr(environment, "version", lambda package: version)


def said(*libraries: str) -> list[str]:
    """Warnings of the category that are given when these are checked, in order."""
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        for library in libraries:
            check_tested(library)
    assert all(issubclass(one.category, tokred.UntestedVersionWarning) for one in found)
    return [str(one.message) for one in found]


@pytest.mark.parametrize(
    ("text", "numbers"),
    [
        ("5.17", (5, 17, 0)),
        ("2.14.1+cpu", (2, 14, 1)),
        ("5.25.0.dev0", (5, 25, 0)),
        ("0.43.0rc1", (0, 43, 0)),
        ("v1.2.3.post4", (1, 2, 3)),
        ("3", (3, 0, 0)),
        ("", (0, 0, 0)),
        ("unknown", (0, 0, 0)),
    ],
)
def test_numbers_of_a_version(text, numbers):
    assert release(text) == numbers


@pytest.mark.parametrize(
    ("installed", "expected"),
    [
        ("", "missing"),
        ("0.9.16", "older"),
        ("1.0.19", "older"),
        ("1.0.20", "tested"),
        ("1.0.31+cu130", "tested"),
        ("1.0.31.post1", "tested"),
        ("1.0.100", "newer"),
        ("1.1.0", "newer"),
        ("2.0", "newer"),
    ],
)
def test_standing(installed, expected):
    assert standing("timm", installed) == expected


def test_libraries_that_nothing_is_known_of():
    assert standing("numpy", "2.4.6") == "unknown"


@pytest.mark.parametrize(
    ("installed", "words"),
    [
        ("1.2.0", "timm 1.2.0 is newer than 1.0.31, the newest version"),
        ("1.0.9", "timm 1.0.9 is older than 1.0.20, the oldest version"),
    ],
)
def test_other_versions_warn_once_with_both_and_what_to_do(monkeypatch, installed, words):
    pretend(monkeypatch, installed)
    found = said("timm", "timm")
    (one,) = found
    assert words in one
    assert "`tokred doctor`" in one


@pytest.mark.parametrize("installed", ["1.0.20", "1.0.25", "1.0.31", ""])
def test_tested_and_missing_ones_do_not(monkeypatch, installed):
    pretend(monkeypatch, installed)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_tested("timm")
        check_tested("numpy")


def test_each_library_warns_for_itself(monkeypatch):
    known = {"timm": Bounds("1.0", "1.1"), "open_clip": Bounds("3.0", "3.1")}
    monkeypatch.setattr(versions, "tested", lambda: known)
    seen = {"timm": "9.0", "open_clip_torch": "8.0"}
    monkeypatch.setattr(environment, "version", lambda package: seen[package])
    assert [text.split()[:2] for text in said("timm", "open_clip")] == [["timm", "9.0"], ["open_clip", "8.0"]]


def test_the_warning_can_be_silenced_by_its_category_or_as_all_of_ours(monkeypatch):
    assert issubclass(tokred.UntestedVersionWarning, tokred.TokredWarning)
    assert issubclass(tokred.TokredWarning, UserWarning)
    pretend(monkeypatch, "9.0")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.simplefilter("ignore", tokred.TokredWarning)
        check_tested("timm")


def test_the_data_of_the_package_is_read(monkeypatch):
    monkeypatch.undo()
    versions.tested.cache_clear()
    data = json.loads((versions.resources.files("tokred.core") / "tested.json").read_text("utf8"))["libraries"]
    assert {name: row._asdict() for name, row in versions.tested().items()} == data
