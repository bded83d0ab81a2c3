"""A text as a figure: tokens on lines of one width, shaded, and below it a map of layers by tokens."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from tokred.analysis.viz import canvas

if TYPE_CHECKING:
    from tokred.analysis.viz.cached import CacheDrawing

COLUMNS = 78  # characters of a line
MARK = "#0a7d74"
POINTS = 6.2  # of the text
WIDE, HIGH = 0.0527, 0.128  # inches of a character and of a line, at that size


def lines_of(pieces: Sequence[str], columns: int = COLUMNS) -> list[list[tuple[int, int, str]]]:
    """Lines of ``(token, column, text)``: broken where the text breaks, and before a token that would not fit."""
    lines: list[list[tuple[int, int, str]]] = [[]]
    at = 0
    for token, piece in enumerate(pieces):
        for i, part in enumerate(piece.replace("\t", "    ").split("\n")):
            part = "".join(c if c.isprintable() else "·" for c in part)  # fonts have nothing for the rest
            if i:
                lines.append([])
                at = 0
            while part:
                room = columns - at
                if len(part) > room and at:
                    lines.append([])
                    at, part = 0, part.lstrip(" ")
                    continue
                lines[-1].append((token, at, part[:room]))
                at, part = at + len(part[:room]), part[room:]
    return lines


def draw_cache(drawing: CacheDrawing) -> Any:
    """The figure of :meth:`tokred.analysis.viz.cached.CacheDrawing.figure`."""
    lines = lines_of(drawing.pieces)
    text, low = HIGH * (len(lines) + 1), 0.55 + 0.05 * drawing.depth
    foot = 0.75
    size = ((WIDE * COLUMNS + 0.35) * len(drawing.runs), text + low + foot + 0.5)
    figure, axes = canvas.subplots(
        2, len(drawing.runs), figsize=size, squeeze=False, layout="constrained",
        gridspec_kw={"height_ratios": [text, low + foot]},
    )  # fmt: skip
    for run, (above, below) in zip(drawing.runs, axes.T, strict=True):
        share = run.share()
        _write(above, lines, share)
        kept = int(run.held[0].sum())
        rows = sum(run.heads) * run.held[0].shape[1]
        above.set_title(f"{run.label}: {kept:,} of {rows:,} rows after the prompt", fontsize=8, loc="left")
        heat = run.held[0].float() / run.held[0].new_tensor(run.heads).float()[:, None]
        below.imshow(
            heat.numpy(), aspect="auto", cmap=_colours(), vmin=0, vmax=1, interpolation="nearest",
            extent=(0.5, heat.shape[1] + 0.5, heat.shape[0] + 0.5, 0.5),
        )  # fmt: skip
        below.tick_params(labelsize=6)
        below.set_ylabel("layer", fontsize=7)
        said = textwrap.shorten(run.answer, 4 * COLUMNS, placeholder=" …")
        answer = textwrap.fill(f"answer: {said}", round(0.93 * COLUMNS)).replace("$", r"\$")
        below.set_xlabel(f"token of the prompt\n{answer}", fontsize=7, loc="left")
    plain = textwrap.shorten(drawing.answer, 3 * COLUMNS, placeholder=" …").replace("$", r"\$")
    head = f"{drawing.family}, unpatched: {plain}"
    figure.suptitle(textwrap.fill(head, round(1.05 * COLUMNS * len(drawing.runs))), fontsize=7, x=0.01, ha="left")
    return figure


def _colours() -> Any:
    from matplotlib.colors import LinearSegmentedColormap

    return LinearSegmentedColormap.from_list("held", ["#ffffff", MARK])


def _write(axis: Any, lines: Sequence[Sequence[tuple[int, int, str]]], share: Tensor) -> None:
    """Tokens with a ground that is the stronger, the more heads hold them."""
    from matplotlib.patches import Rectangle

    axis.set_xlim(0, COLUMNS)
    axis.set_ylim(len(lines), 0)
    axis.axis("off")
    for row, line in enumerate(lines):
        for token, column, text in line:
            part = float(share[token])
            grey = 0.66 * (1 - part) ** 2
            depth = 0.08 + 0.42 * part if part else 0.0
            axis.add_patch(Rectangle((column, row + 0.04), len(text), 0.92, color=MARK, alpha=depth, lw=0))
            axis.text(
                column, row + 0.5, text.replace("$", r"\$"), family="monospace", fontsize=POINTS, va="center",
                color=(grey, grey, grey),
            )  # fmt: skip
