"""The whole site, built strictly, in a real browser at the width of a desk and of a telephone."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.docs import browser
from tests.docs.test_docs import ROOT

PLANTED = """<!doctype html><title>planted</title>
<div class="md-content__inner" style="width: 300px">
  <table><tbody><tr><td style="min-width: 350px">wide</td></tr></tbody></table>
  <pre><code style="display: block">{line}</code></pre>
  <img src="gone.png" alt="gone"> <a href="nowhere/">a page</a> <a href="#lost">an anchor</a>
</div>
<script>console.error("said aloud")</script>"""


@pytest.fixture(autouse=True)
def installed() -> None:
    """A browser, and what drives it."""
    pytest.importorskip("playwright.sync_api")
    if browser.chromium() is None:
        pytest.skip("no chromium is installed")


@pytest.mark.hosts
@pytest.mark.slow
def test_what_is_wrong_is_seen(tmp_path: Path) -> None:
    (tmp_path / "index.html").write_text(PLANTED.format(line="x" * 300), "utf-8")
    wrong = "\n".join(browser.look(tmp_path)[0])
    for width in browser.WIDTHS:
        for what in ("TABLE without a scroll bar", "CODE without a scroll bar", "no picture: gone.png", "said aloud"):
            assert f"home at {width}: {what}" in wrong
    assert "home at 400: the page is" in wrong
    assert "no page nowhere/" in wrong
    assert "no anchor #lost" in wrong


@pytest.mark.hosts
@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_every_page_in_a_browser(tmp_path: Path) -> None:
    """No table or code is cut, no link is dead, no picture is missing, and the console stays silent."""
    pytest.importorskip("mkdocs")
    site = tmp_path / "site"
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(site)]
    # Signatures are broken into lines by the ruff that is installed beside mkdocs.
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=900)
    assert done.returncode == 0, done.stderr[-4000:]
    wrong, scrolled = browser.look(site)
    assert wrong == []
    assert scrolled == [], "code of these pages needs a scroll bar at 1,400 pixels"
