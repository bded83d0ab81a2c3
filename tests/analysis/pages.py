"""What every page of :mod:`tokred.analysis.viz` has to be: valid, by itself, labelled, and sound in a browser."""

from __future__ import annotations

import html
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.test_viz_page import Page

NASTY = "</script><img src=x onerror=\"alert('1')\">&amp;{{data}}\u2028 $x_y$"
BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


def sound(text: str) -> Page:
    """The page, parsed: every element closed, every id unique, nothing from outside, everything labelled."""
    page = Page(text)
    assert text.startswith("<!DOCTYPE html>")
    outside = re.sub(r'(?s)<script type="application/json".*?</script>', "", text)
    assert not re.search(r"https?:|@import|\burl\(|\bfetch\(|XMLHttpRequest", outside)
    ids = [attributes["id"] for _, attributes, _ in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    for tag, attributes, _ in page.elements:
        for key in ("src", "href"):
            assert (attributes.get(key) or "data:").startswith("data:"), (tag, attributes)
        for key in ("for", "aria-labelledby", "aria-describedby"):
            assert set((attributes.get(key) or "").split()) <= set(ids), (tag, attributes)
    assert len(page.all("script")) == 2
    assert page.all("html")[0][0]["lang"] == "en"
    return page


def ran(path: Path, script: str, width: int = 1000) -> list[str]:
    """The page in a browser: ``script`` runs behind the page's own, with ``said(text)`` and ``press(element, key)``.

    Returns:
        What it said, line by line.
    """
    if BROWSER is None:
        pytest.skip("no browser is installed")
    helpers = """
window.addEventListener("error", function (event) { said("error: " + event.message); });
const lines = [];
function said(text) { lines.push(String(text)); document.title = lines.join("\\n"); }
function press(element, key, more) {
  const given = Object.assign({ key: key, bubbles: true, cancelable: true }, more);
  element.dispatchEvent(new KeyboardEvent("keydown", given));
}
function told(selector) { return document.querySelector(selector).textContent; }
"""
    text = path.read_text("utf-8")
    other = path.with_name(f"{path.stem}-driven.html")
    driven = text.replace("<script>\n", f"<script>{helpers}</script>\n<script>\n", 1)
    behind = f"<script>window.addEventListener('load', function () {{{script}}});</script></body>"
    driven = driven.replace("</body>", behind)
    other.write_text(driven, "utf-8")
    command = [
        BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run",
        f"--user-data-dir={path.parent / 'browser'}", f"--window-size={width},900", "--dump-dom", other.as_uri(),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    (title,) = re.findall(r"(?s)<title>(.*?)</title>", done.stdout)
    return html.unescape(title).split("\n")
