"""``Drawing``: what became of tokens, recorded once, and shown as a page with sliders, as a figure or as a file."""

from __future__ import annotations

import html
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, TypeVar

from tokred.analysis.viz import pages

FOLDER = Path(__file__).parent / "templates"
FIGURES = (".png", ".pdf", ".svg")
T = TypeVar("T")


def evenly(some: Sequence[T], most: int) -> list[T]:
    """At most so many of some things, evenly spaced, the first and the last among them.

    Args:
        some: the things in order.
        most: at least 1.
    """
    few = min(len(some), most)
    return [some[round(i * (len(some) - 1) / max(1, few - 1))] for i in range(few)]


class Axis(NamedTuple):
    """One slider of a page.

    Attributes:
        name: of it.
        labels: of its places.
        start: the place that it shows first.
    """

    name: str
    labels: tuple[str, ...]
    start: int = 0


class Page(NamedTuple):
    """The parts of a page, apart from what all pages have in common.

    Attributes:
        intro: paragraphs, plain text.
        axes: the sliders, the most important one first; at least one, and two at most.
        controls: HTML below the intro.
        body: HTML below the sliders.
        data: for the script, without the axes.
        script: name of the script that draws: ``"text"`` or ``"map"``.
    """

    intro: Sequence[str]
    axes: Sequence[Axis]
    controls: str
    body: str
    data: dict[str, Any]
    script: str


class Drawing(ABC):
    """The fate of tokens, as one forward or generation of each method left them.

    Attributes:
        heading: title of the page where none is given.
    """

    heading: ClassVar[str] = "What became of every token"

    @abstractmethod
    def page(self) -> Page:
        """The parts of its page."""

    @abstractmethod
    def figure(self) -> Any:
        """A matplotlib figure for print, of the places that tell most.

        Raises:
            ImportError: matplotlib is not installed.
        """

    def html(self, title: str | None = None) -> str:
        """One page as text, which needs nothing else, not even a network; every name in it is escaped."""
        page = self.page()
        axes = [{"name": a.name, "labels": list(a.labels), "start": a.start} for a in page.axes]
        parts = {
            "title": html.escape(self.heading if title is None else title),
            "style": (FOLDER / "style.css").read_text("utf8"),
            "intro": "\n".join(f"<p>{html.escape(text)}</p>" for text in page.intro),
            "controls": page.controls,
            "sliders": "\n".join(_slider(i, axis) for i, axis in enumerate(page.axes)),
            "body": page.body,
            "data": pages.as_json({"axes": axes, **page.data}),
            "script": "".join((FOLDER / f"{name}.js").read_text("utf8") for name in ("shell", page.script)),
        }
        return pages.PLACE.sub(lambda found: parts[found[1]], (FOLDER / "shell.html").read_text("utf8"))

    def save(self, path: Path | str, *, title: str | None = None, dpi: int = 160) -> Path:
        """Write the page (``.html``) or the figure (``.png``, ``.pdf``, ``.svg``); returns the path.

        Args:
            path: of the file; its ending says which.
            title: of the page.
            dpi: of a figure's pixels.

        Raises:
            ValueError: the ending is none of these.
            ImportError: a figure is asked for, and matplotlib is not installed.
            OSError: the file cannot be written.
        """
        path = Path(path)
        if path.suffix == ".html":
            path.write_text(self.html(title), encoding="utf-8", newline="\n")
        elif path.suffix in FIGURES:
            self.figure().savefig(path, dpi=dpi, facecolor="white")
        else:
            raise ValueError(f"path must end in .html, {', '.join(FIGURES)}, got {str(path)!r}")
        return path

    def _repr_html_(self) -> str:
        """The page in a frame, for notebooks."""
        return (
            f'<iframe srcdoc="{html.escape(self.html())}" width="100%" height="720" style="border: 0" '
            f'title="{html.escape(self.heading)}"></iframe>'
        )


def _slider(i: int, axis: Axis) -> str:
    """A slider with its button; one that has a single place is there for its label alone."""
    last = len(axis.labels) - 1
    off = " disabled" if last == 0 else ""
    return f"""<p class="slider"><label for="axis-{i}">{html.escape(axis.name)}</label>
<button type="button" class="play" id="play-{i}" aria-label="Play or stop: {html.escape(axis.name)}"{off}>Play</button>
<input type="range" id="axis-{i}" min="0" max="{last}" value="{axis.start}" step="1" autocomplete="off"{off}>
<span class="where" id="where-{i}">{html.escape(axis.labels[axis.start])}</span></p>"""


def answered(before: str | None, after: str | None) -> str:
    """HTML of a method's answer beside the unpatched model's; empty where there is none."""
    if after is None:
        return ""
    same = ' <span class="same">(as without a patch)</span>' if after == before else ""
    return f'<p class="answer"><b>Answer</b> {html.escape(after)}{same}</p>'


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Numbers that can be unfolded, for those who do not see what is drawn."""
    top = "".join(f'<th scope="col">{html.escape(head)}</th>' for head in heads)
    body = "\n".join(
        f'<tr><th scope="row">{html.escape(row[0])}</th>'
        + "".join(f"<td>{html.escape(cell)}</td>" for cell in row[1:])
        + "</tr>"
        for row in rows
    )
    return f"""<details><summary>Numbers</summary>
<div class="wide"><table>
<thead><tr>{top}</tr></thead>
<tbody>
{body}
</tbody></table></div></details>"""
