"""The whole site, built strictly, in a real browser at the width of a desk and of a telephone."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.docs import browser
from tests.docs.test_docs import ROOT


@pytest.mark.hosts
@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_every_page_in_a_browser(tmp_path: Path) -> None:
    """No table or code is cut, no link is dead, no picture is missing, and the console stays silent."""
    pytest.importorskip("playwright.sync_api")
    pytest.importorskip("mkdocs")
    if browser.chromium() is None:
        pytest.skip("no chromium is installed")
    site = tmp_path / "site"
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(site)]
    # Signatures are broken into lines by the ruff that is installed beside mkdocs.
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=900)
    assert done.returncode == 0, done.stderr[-4000:]
    wrong, scrolled = browser.look(site)
    assert wrong == []
    assert scrolled == [], "code of these pages needs a scroll bar at 1,400 pixels"
