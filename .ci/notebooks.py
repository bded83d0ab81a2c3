"""Notebooks as pages of the documentation: a hook of mkdocs, which makes Markdown of them when the site is built.

Cells of text stay as they are, so that their links are checked like those of every page; code is highlighted as
elsewhere; outputs are the committed ones. The notebook itself can be downloaded from its page.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

ENDING = ".ipynb"
# In a folder of the repository a link leads to the notebook, on the site to its page.
LINK = re.compile(r"\]\(([^)\s#]+)\.ipynb(#[^)]*)?\)")


def page(path: Path) -> str:
    """The Markdown of a notebook.

    Args:
        path: of the notebook, with its outputs.
    """
    cells = json.loads(path.read_text("utf8"))["cells"]
    title, *rest = [text for cell in cells for text in _cell(cell)]
    note = f"[Download this notebook]({path.name}) and run it: it needs `pip install 'tokred[all]'`, and no network."
    return "\n\n".join([title, note, *rest]) + "\n"


def _cell(cell: dict[str, Any]) -> list[str]:
    source = "".join(cell["source"])
    if cell["cell_type"] == "markdown":
        # The first cell's heading stands above the note on where the notebook is.
        heading, newline, below = source.partition("\n")
        return [heading, below.strip()] if heading.startswith("# ") and newline else [source]
    return [f"```python\n{source}\n```", *(text for output in cell["outputs"] for text in _output(output))]


def _output(output: dict[str, Any]) -> list[str]:
    """The richest form of an output that a page can show."""
    if output["output_type"] == "stream":
        return [f"```text\n{''.join(output['text']).rstrip()}\n```"]
    data = {kind: "".join(value) for kind, value in output["data"].items() if kind != "application/json"}
    if "text/html" in data:
        # An empty line would end the block of HTML.
        return ['<div class="output">' + re.sub(r"\n\s*\n", "\n", data["text/html"]) + "</div>"]
    if "image/png" in data:
        return [f'<p class="output"><img alt="" src="data:image/png;base64,{data["image/png"].strip()}"></p>']
    return [f"```text\n{data['text/plain']}\n```"]


def on_files(files: Any, config: Any) -> Any:
    """Hook of mkdocs: a page beside each notebook."""
    from mkdocs.structure.files import File

    for file in list(files):
        if file.src_uri.endswith(ENDING):
            name = file.src_uri.removesuffix(ENDING) + ".md"
            files.append(File.generated(config, name, content=page(Path(file.abs_src_path))))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Hook of mkdocs: links to notebooks lead to their pages, except from these themselves."""
    return LINK.sub(lambda found: _led(found, page), markdown)


def _led(found: re.Match[str], page: Any) -> str:
    own = page.file.src_uri.rpartition("/")[2] == f"{found[1]}.md"
    return found[0] if own else f"]({found[1]}.md{found[2] or ''})"
