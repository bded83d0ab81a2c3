"""docs/methods/hosts.md says what really happens: every method on every family, or why not.

To write it anew: ``TOKRED_WRITE_TABLES=1 pytest -m hosts tests/encoder/test_method_table.py``.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

pytest.importorskip("timm")
pytest.importorskip("transformers")
pytest.importorskip("open_clip")

from tests.encoder.host_table import versions
from tests.encoder.method_table import SETTINGS, Cell, cells, families, render, said, wanted
from tests.kinds import OPEN_CLIP, TIMM, TRANSFORMERS

PAGE = Path(__file__).resolve().parents[2] / "docs" / "methods" / "hosts.md"


KINDS = {"timm": TIMM, "transformers": TRANSFORMERS, "open_clip": OPEN_CLIP}


@pytest.fixture(scope="module", params=["kinds", pytest.param("all", marks=pytest.mark.hosts)])
def found(request: pytest.FixtureRequest) -> list[Cell]:
    chosen = KINDS if request.param == "kinds" else None
    return [cell for family in families(chosen) for cell in cells(*family)]


def test_every_pair_runs_or_is_refused_for_a_reason(found):
    assert {c.method for c in found} == set(SETTINGS)
    assert sum(not c.missing for c in found) > len(found) // 2
    assert all("needs " in c.missing for c in found if c.missing)


def test_the_committed_page_is_the_generated_one(found):
    every = {c.family for c in found} > {family for kinds in KINDS.values() for family in kinds}
    page = render(found)
    if every and os.environ.get("TOKRED_WRITE_TABLES"):
        PAGE.write_text(page)
    committed = PAGE.read_text()
    if versions() not in committed:
        pytest.skip(f"the page was made with other versions than these: {versions()}")
    if not every:
        assert wanted(found).items() <= said(committed).items()
        return
    assert committed == page, (
        "docs/methods/hosts.md is out of date: run TOKRED_WRITE_TABLES=1 pytest -m hosts, this file; commit the page"
    )
