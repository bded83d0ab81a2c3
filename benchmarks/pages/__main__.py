"""Make the tables, claims and plots of the documentation from ``benchmarks/results``: nothing of them is typed by hand.

    python -m benchmarks pages              # comparison.md, and the marked parts of other pages
    python -m benchmarks pages --check      # exit status 1 if the committed ones are others
    python -m benchmarks pages --plots      # the plots in docs/img as well

A marked part stands between ``<!-- results: NAME -->`` and ``<!-- end of NAME -->``; ``benchmarks/pages/tables.py`` has
the function of each.
"""

from __future__ import annotations

import argparse
import sys

from benchmarks.pages import comparison, markdown, plots, tables


def main() -> int:
    """Write or check; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="do not write; fail where a committed page differs")
    parser.add_argument("--plots", action="store_true", help="draw the plots as well")
    given = parser.parse_args()
    found = markdown.Results()
    pages = {comparison.PAGE: comparison.page(found)}
    for page, parts in tables.PAGES.items():
        pages[page] = markdown.filled(page.read_text("utf8"), parts, found)
    changed = [path for path, text in pages.items() if not path.is_file() or path.read_text("utf8") != text]
    if given.check:
        print(*(f"{path} is another one" for path in changed), sep="\n", end="")
        return 1 if changed else 0
    for path in changed:
        path.write_text(pages[path], encoding="utf8")
        print(f"written to {path}")
    if given.plots:
        print(*plots.draw(found, markdown.ROOT / "docs" / "img"), sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
