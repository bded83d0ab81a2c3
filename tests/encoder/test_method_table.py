"""docs/methods/hosts.md says what really happens: every method on every family, or why not.

To write it anew: ``TOKRED_WRITE_TABLES=1 pytest tests/encoder/test_method_table.py``.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

pytest.importorskip("timm")
pytest.importorskip("transformers")
pytest.importorskip("open_clip")

from tests.encoder.host_table import versions
from tests.encoder.method_table import SETTINGS, Cell, cells, families, render

PAGE = Path(__file__).resolve().parents[2] / "docs" / "methods" / "hosts.md"


@pytest.fixture(scope="module")
def found() -> list[Cell]:
    return [cell for family in families() for cell in cells(*family)]


def test_every_pair_runs_or_is_refused_for_a_reason(found):
    assert {c.method for c in found} == set(SETTINGS)
    assert sum(not c.missing for c in found) > len(found) // 2
    assert all("needs " in c.missing for c in found if c.missing)


def test_the_committed_page_is_the_generated_one(found):
    page = render(found)
    if os.environ.get("TOKRED_WRITE_TABLES"):
        PAGE.write_text(page)
    committed = PAGE.read_text()
    if versions() not in committed:
        pytest.skip(f"the page was made with other versions than these: {versions()}")
    assert committed == page, (
        "docs/methods/hosts.md is out of date: run this file with TOKRED_WRITE_TABLES=1 and commit the page"
    )
