"""docs/hosts.md says what really happens: it is made by building, patching and running every family.

To write it anew: ``TOKRED_WRITE_TABLES=1 pytest tests/encoder/test_host_table.py``.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

pytest.importorskip("timm")
pytest.importorskip("transformers")
pytest.importorskip("open_clip")
pytest.importorskip("diffusers")

from tests.encoder.host_table import ROWS, Row, render, versions

PAGE = Path(__file__).resolve().parents[2] / "docs" / "hosts.md"


@pytest.fixture(scope="module")
def rows() -> dict[str, list[Row]]:
    return {}


@pytest.mark.parametrize("library", ROWS)
def test_every_family_works_or_says_why_not(library, rows):
    rows[library] = list(ROWS[library]())
    assert any(not row.refused for row in rows[library])
    assert all(len(row.refused) > 10 for row in rows[library] if row.refused)


def test_the_committed_page_is_the_generated_one(rows):
    if set(rows) != set(ROWS):
        pytest.skip("needs the rows of all libraries: run the whole file")
    page = render([row for library in ROWS for row in rows[library]])
    if os.environ.get("TOKRED_WRITE_TABLES"):
        PAGE.write_text(page)
    committed = PAGE.read_text()
    if versions() not in committed:
        pytest.skip(f"the page was made with other versions than these: {versions()}")
    assert committed == page, (
        "docs/hosts.md is out of date: run this file with TOKRED_WRITE_TABLES=1 and commit the page"
    )
