"""The site in a real browser: every page at two widths, and what is wrong with it.

    python -m tests.docs.browser SITE [PICTURES]     # a built site; screenshots go into the folder PICTURES

Needs playwright and a chromium on the path.
"""

from __future__ import annotations

import contextlib
import functools
import http.server
import shutil
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urldefrag, urljoin

WIDTHS = {1400: 1000, 400: 800}

# Of one page: everything that is wrong with its layout at the width that it is shown at, and its links and anchors.
LOOK = """
() => {
  const wrong = [], column = document.querySelector(".md-content__inner").getBoundingClientRect();
  const text = node => (node.innerText || node.alt || node.tagName).trim().replace(/\\s+/g, " ").slice(0, 50);
  const page = document.documentElement;
  if (page.scrollWidth > page.clientWidth + 1) wrong.push(`the page is ${page.scrollWidth} wide`);
  const scrolls = node => {
    for (let up = node; up && !up.classList.contains("md-content__inner"); up = up.parentElement) {
      const style = getComputedStyle(up), box = up.getBoundingClientRect();
      if (!["auto", "scroll"].includes(style.overflowX) || style.scrollbarWidth === "none") continue;
      if (box.right <= column.right + 25 && box.left >= column.left - 25) return up;
    }
    return null;
  };
  for (const node of document.querySelectorAll(".md-content__inner table, .md-content__inner pre > code")) {
    if (node.closest(".highlighttable table table, .linenos")) continue;
    const box = node.getBoundingClientRect(), table = node.tagName === "TABLE";
    const wide = table ? box.width > column.width + 1 : node.scrollWidth > node.clientWidth + 1;
    if (!wide) continue;
    const by = scrolls(node);
    if (!by) wrong.push(`${node.tagName} without a scroll bar of its own: ${text(node)}`);
    else if (table) {
      const cell = node.querySelector("tbody td");
      if (cell && getComputedStyle(cell).position !== "sticky") wrong.push(`the first column goes: ${text(node)}`);
    }
  }
  for (const node of document.querySelectorAll(".md-content__inner img")) {
    if (!node.complete || node.naturalWidth === 0) wrong.push(`no picture: ${node.getAttribute("src")}`);
    // Pictures that a notebook printed have no words of their own.
    if (!node.alt && !node.src.startsWith("data:")) wrong.push(`a picture without words: ${node.getAttribute("src")}`);
    if (node.getBoundingClientRect().right > column.right + 1) wrong.push(`a picture beyond its column: ${node.src}`);
  }
  const code = [...document.querySelectorAll(".md-content__inner pre > code")]
    .filter(node => node.scrollWidth > node.clientWidth + 1)
    .map(node => node.innerText.split("\\n").sort((a, b) => b.length - a.length)[0]);
  const links = [...document.querySelectorAll("a[href]")].map(node => node.href);
  const anchors = [...document.querySelectorAll("[id], a[name]")].map(node => node.id || node.name);
  return {wrong, code, links, anchors};
}
"""


def chromium() -> str | None:
    """Path of an installed browser."""
    return next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


class Quiet(http.server.SimpleHTTPRequestHandler):
    """A server of files that writes nothing to the terminal."""

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing."""


@contextlib.contextmanager
def served(site: Path) -> Iterator[str]:
    """The address of a site's folder, while the context lasts."""
    handler = functools.partial(Quiet, directory=str(site))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield f"http://127.0.0.1:{server.server_port}/"
        finally:
            server.shutdown()


def pages(site: Path) -> list[str]:
    """Addresses of all pages, from the site's root."""
    found = (p.relative_to(site).as_posix().removesuffix("index.html") for p in site.rglob("*.html"))
    return sorted(page for page in found if not page.endswith("404.html"))


def heard(said: list[str], message: Any) -> None:
    """Note an error of the console."""
    if message.type == "error":
        said.append(message.text)


def name_of(page: str) -> str:
    """The file name of a page's screenshot."""
    return page.strip("/").replace("/", ".") or "home"


def dead(base: str, seen: dict[str, dict[str, Any]], site: Path) -> Iterator[str]:
    """Links of all pages that lead to no file, or to no anchor of a page."""
    anchors = {page: set(found["anchors"]) for page, found in seen.items()}
    for page, found in seen.items():
        for link in sorted(set(found["links"])):
            target, fragment = urldefrag(urljoin(base + page, link))
            if not target.startswith(base):
                continue
            path = unquote(target[len(base) :])
            if path not in anchors and not (site / path).is_file():
                yield f"{page}: no page {path}"
            elif fragment and path in anchors and unquote(fragment) not in anchors[path]:
                yield f"{page}: no anchor {path}#{fragment}"


def look(site: Path, pictures: Path | None = None, only: str = "") -> tuple[list[str], list[str]]:
    """Visit every page at every width.

    Args:
        site: the folder of a built site.
        pictures: a folder for screenshots of the whole pages; None: take none.
        only: pages whose address has this in it; links are checked where it is empty.

    Returns:
        What is wrong, and the longest lines of code that need a scroll bar at the larger width.
    """
    from playwright.sync_api import sync_playwright

    wrong: list[str] = []
    code: list[str] = []
    seen: dict[str, dict[str, Any]] = {}
    with served(site) as base, sync_playwright() as play:
        browser = play.chromium.launch(executable_path=chromium(), args=["--no-sandbox"])
        for width, height in WIDTHS.items():
            view = browser.new_page(viewport={"width": width, "height": height})
            console: list[str] = []
            view.on("console", functools.partial(heard, console))
            view.on("pageerror", lambda error, said=console: said.append(str(error)))
            for page in (p for p in pages(site) if only in p):
                here = f"{page or 'home'} at {width}"
                view.goto(base + page, wait_until="load")
                found = view.evaluate(LOOK)
                wrong += [f"{here}: {one}" for one in (*found["wrong"], *console)]
                console.clear()
                seen[page] = found
                if width == max(WIDTHS) and not page.startswith(("reference/", "notebooks/")):
                    code += [f"{page}: {line}" for line in found["code"]]
                if pictures is not None:
                    pictures.mkdir(parents=True, exist_ok=True)
                    view.screenshot(path=pictures / f"{name_of(page)}.{width}.png", full_page=True)
        browser.close()
        if not only:
            wrong += dead(base, seen, site)
    return wrong, code


if __name__ == "__main__":
    where = Path(sys.argv[2]) if len(sys.argv) > 2 else None
    bad, scrolled = look(Path(sys.argv[1]), where, sys.argv[3] if len(sys.argv) > 3 else "")
    print(*bad, f"{len(bad)} wrong", *scrolled, f"{len(scrolled)} blocks of code with a scroll bar", sep="\n")
