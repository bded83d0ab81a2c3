"""Notebooks as pages of the documentation: a hook of mkdocs, which makes Markdown of them when the site is built.

Cells of text stay as they are, so that their links are checked like those of every page; code is highlighted as
elsewhere; outputs are the committed ones. The notebook itself can be downloaded from its page.
"""

from __future__ import annotations

import base64
import json
import re
import textwrap
from pathlib import Path
from typing import Any

ENDING = ".ipynb"
# In a folder of the repository a link leads to the notebook, on the site to its page.
LINK = re.compile(r"\]\(([^)\s#]+)\.ipynb(#[^)]*)?\)")
WIDTH = 96  # characters of a printed line; a kernel's own page folds longer ones as well
# Tables and pictures need the room that a list of headings would take.
HEAD = "---\nhide: [toc]\n---\n\n"


def page(path: Path) -> tuple[str, dict[str, bytes]]:
    """The Markdown of a notebook, and its pictures by the names of their files.

    Args:
        path: of the notebook, with its outputs.
    """
    pictures: dict[str, bytes] = {}
    cells = json.loads(path.read_text("utf8"))["cells"]
    title, *rest = [text for cell in cells for text in _cell(cell, path.stem, pictures)]
    note = f"[Download this notebook]({path.name}) and run it: it needs `pip install 'tokred[all]'`, and no network."
    return HEAD + "\n\n".join([title, note, *rest]) + "\n", pictures


def _cell(cell: dict[str, Any], name: str, pictures: dict[str, bytes]) -> list[str]:
    source = "".join(cell["source"])
    if cell["cell_type"] == "markdown":
        # The first cell's heading stands above the note on where the notebook is.
        heading, newline, below = source.partition("\n")
        return [heading, below.strip()] if heading.startswith("# ") and newline else [source]
    shown = [_output(output, name, pictures) for output in cell["outputs"]]
    return [f"```python\n{source}\n```", *shown]


def _output(output: dict[str, Any], name: str, pictures: dict[str, bytes]) -> str:
    """The richest form of an output that a page can show."""
    if output["output_type"] == "stream":
        return _printed("".join(output["text"]))
    data = {kind: "".join(value) for kind, value in output["data"].items() if kind.startswith(("text/", "image/"))}
    if "text/html" in data:
        # An empty line would end the block of HTML.
        return "<div>" + re.sub(r"\n\s*\n", "\n", data["text/html"]) + "</div>"
    if "image/png" in data:
        file = f"{name}-{len(pictures) + 1}.png"
        pictures[file] = base64.b64decode(data["image/png"])
        return f"[![the picture that this cell draws]({file})]({file})"
    return _printed(data["text/plain"])


def _printed(text: str) -> str:
    lines = [folded for line in text.rstrip().splitlines() for folded in textwrap.wrap(line, WIDTH) or [""]]
    short = "\n".join(lines) if max(map(len, text.splitlines()), default=0) > WIDTH else text.rstrip()
    return f"```text\n{short}\n```"


def on_files(files: Any, config: Any) -> Any:
    """Hook of mkdocs: a page beside each notebook, and its pictures."""
    from mkdocs.structure.files import File

    for file in list(files):
        if file.src_uri.endswith(ENDING):
            name, folder = file.src_uri.removesuffix(ENDING) + ".md", file.src_uri.rpartition("/")[0]
            text, pictures = page(Path(file.abs_src_path))
            files.append(File.generated(config, name, content=text))
            for picture, content in pictures.items():
                files.append(File.generated(config, f"{folder}/{picture}", content=content))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Hook of mkdocs: links to notebooks lead to their pages, except from these themselves."""
    return LINK.sub(lambda found: _led(found, page), markdown)


def _led(found: re.Match[str], page: Any) -> str:
    own = page.file.src_uri.rpartition("/")[2] == f"{found[1]}.md"
    return found[0] if own else f"]({found[1]}.md{found[2] or ''})"
