"""Plots of wide frames (:func:`tokred.bench.results.wide`): a line a method, with the intervals of its points."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tokred.analysis.viz.canvas import COLOURS, MARKERS, grid, pyplot, save

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["COLOURS", "MARKERS", "Panel", "grid", "lines", "pareto", "pyplot", "save"]

BASE = "unpatched"
NAMES = {
    "tome": "ToMe",
    "pitome": "PiToMe",
    "evit": "EViT",
    "random": "random merging",
    "random_prune": "random pruning",
    "kth": "k-th merging",
    "downsample": "down-sampling",
    "ppt": "PPT",
    "ats": "ATS",
    "tofu": "ToFu",
    "zero_tprune": "Zero-TPrune",
    "vomix": "VoMix",
    "tokentm": "TokenTM pruning",
    "saint": "SAINT",
    "vtm": "VTM",
    "tinychart": "TinyChart",
    "algm": "ALGM",
}
LABELS = {
    "top1": "top-1 accuracy (%)",
    "cosine": "feature cosine to the unpatched model",
    "saliency_mae": "saliency map: mean absolute error (lower is better)",
    "images_per_second": "images per second",
    "gmacs": "GMACs per image",
    "peak_mib": "peak memory (MiB)",
    "forward_mib": "memory of a forward (MiB)",
}


def pareto(
    frame: pd.DataFrame,
    measures: tuple[str, ...] = ("top1",),
    *,
    x: str = "images_per_second",
    title: str = "",
    note: str = "",
) -> Any:
    """Quality against speed: a panel a measure, a line a method, the unpatched model as a star.

    Args:
        frame: one row an arm; rows without the measure are left out.
        measures: columns for the vertical axes.
        x: column for the horizontal axis. Intervals of both are drawn where they are known; of top-1 that of the
            difference to the unpatched model, which saw the same images.
        title: above everything.
        note: below everything, small.

    Returns:
        A matplotlib figure.
    """
    plt = pyplot()
    figure, axes = plt.subplots(
        1, len(measures), figsize=(6.6 * len(measures), 4.6), squeeze=False, layout="constrained"
    )
    for axis, measure in zip(axes[0], measures, strict=True):
        _panel(axis, frame, x, measure)
    many = frame["method"].nunique() > 9
    if many:
        figure.legend(*axes[0][0].get_legend_handles_labels(), frameon=False, fontsize=9, loc="outside right center")
    else:
        axes[0][0].legend(frameon=False, fontsize=9, loc="best")
    if title:
        figure.suptitle(title, fontsize=12, x=0.01, ha="left")
    if note:
        lines = textwrap.fill(note, round(17 * figure.get_figwidth()))
        figure.supxlabel(lines, fontsize=7.5, color="#555555", x=0.01, ha="left")
    return figure


def _panel(axis: Any, frame: pd.DataFrame, x: str, measure: str) -> None:
    scale = 100 if measure == "top1" else 1
    base = frame[(frame["method"] == BASE) & frame[measure].notna()]
    arms = frame[(frame["method"] != BASE) & frame[measure].notna()]
    names = list(dict.fromkeys(frame.loc[frame["method"] != BASE, "method"]))
    if len(base):
        bx, by = float(base[x].iloc[0]), scale * float(base[measure].iloc[0])
        axis.axvline(bx, color="#999999", linewidth=0.8, linestyle=":")
        axis.axhline(by, color="#999999", linewidth=0.8, linestyle=":")
        axis.plot(bx, by, "*", color="black", markersize=15, label="unpatched", zorder=5, linestyle="none")
    for i, name in enumerate(names):
        rows = arms[arms["method"] == name].sort_values("gmacs", ascending=False)
        if len(rows):
            _line(axis, rows, x, measure, scale, i, NAMES.get(name, name))
    axis.set_xlabel(LABELS.get(x, x))
    axis.set_ylabel(LABELS.get(measure, measure))
    axis.grid(color="#dddddd", linewidth=0.6)
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)
    axis.margins(0.07)


def _line(axis: Any, rows: pd.DataFrame, x: str, measure: str, scale: float, i: int, name: str) -> None:
    turn = i // len(COLOURS)  # beyond eight methods, colours come again with other markers and broken lines
    colour, marker = COLOURS[i % len(COLOURS)], MARKERS[(i + 3 * turn) % len(MARKERS)]
    style = ("-", "--", ":", "-.")[turn % 4]
    xs, ys = rows[x].to_numpy(), scale * rows[measure].to_numpy()
    axis.plot(xs, ys, marker=marker, markersize=6, linewidth=1.6, color=colour, linestyle=style, label=name, zorder=3)
    _bars(axis, rows, x, measure, scale, colour)
    if i == 0:
        for px, py, text in zip(xs, ys, rows["setting"], strict=True):
            axis.annotate(text, (px, py), textcoords="offset points", xytext=(5, 6), fontsize=8, color=colour)


def _bars(axis: Any, rows: pd.DataFrame, x: str, y: str, scale: float, colour: str) -> None:
    """The intervals of both coordinates, where they are known."""
    xs, ys = rows[x].to_numpy(), scale * rows[y].to_numpy()
    paired = f"{y}_difference"
    for name, by, which in ((x, 1.0, "xerr"), (paired if f"{paired}_low" in rows else y, scale, "yerr")):
        if f"{name}_low" in rows and rows[f"{name}_low"].notna().any():
            middle = rows[name].to_numpy()
            ends = [middle - rows[f"{name}_low"].to_numpy(), rows[f"{name}_high"].to_numpy() - middle]
            spans = [(by * end).clip(min=0) for end in ends]
            axis.errorbar(xs, ys, fmt="none", ecolor=colour, elinewidth=1, alpha=0.45, zorder=2, **{which: spans})


@dataclass(frozen=True)
class Panel:
    """One pair of axes of :func:`lines`.

    Attributes:
        x, y: columns; without ``x``, methods are bars.
        xlabel, ylabel, title: texts; empty ones are the columns.
        xscale, yscale: as matplotlib names them.
        ticks: of the horizontal axis, with their texts.
        times: what values of ``y`` are multiplied by.
        level: a value that a horizontal line marks, and its name.
        ylim: ends of the vertical axis.
        notes: a column whose texts stand beside the points.
        order: the column by which the points of a line follow one another; empty: ``x``.
    """

    x: str
    y: str
    xlabel: str = ""
    ylabel: str = ""
    title: str = ""
    xscale: str = "linear"
    yscale: str = "linear"
    ticks: tuple[Sequence[float], Sequence[str]] | None = None
    times: float = 1.0
    level: tuple[float, str] | None = None
    ylim: tuple[float, float] | None = None
    notes: str = ""
    order: str = ""


def lines(
    frame: pd.DataFrame, panels: Sequence[Panel], *, by: str = "method", title: str = "", marks: bool = True
) -> Any:
    """A panel a pair of columns, a line a method.

    Args:
        frame: one row an arm; those without a panel's columns are left out of it.
        panels: see :class:`Panel`.
        by: the column that tells lines apart.
        title: above everything.
        marks: a marker at every point; without, curves of many.

    Returns:
        A matplotlib figure.
    """
    figure, axes = pyplot().subplots(
        1, len(panels), figsize=(2.2 + 5.8 * len(panels), 4.8), squeeze=False, layout="constrained"
    )
    names = [n for n in dict.fromkeys(frame[by]) if n != BASE]
    for axis, panel in zip(axes[0], panels, strict=True):
        _draw(axis, frame, panel, by, names, marks)
    handles = {label: h for axis in axes[0] for h, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    if handles:
        figure.legend(handles.values(), handles.keys(), frameon=False, fontsize=7, loc="outside right center")
    if title:
        figure.suptitle(title, fontsize=9)
    return figure


def _draw(axis: Any, frame: pd.DataFrame, panel: Panel, by: str, names: Sequence[str], marks: bool) -> None:
    there = frame[frame[panel.y].notna() & (frame[by] != BASE)]
    if not panel.x:
        order = there.sort_values(panel.y)
        axis.barh(order[by], panel.times * order[panel.y], color=COLOURS[0])
    for i, name in enumerate(names):
        rows = there[there[by] == name]
        if not panel.x or not len(rows):
            continue
        rows = rows.sort_values(panel.order or panel.x)
        turn, colour = divmod(i, len(COLOURS))
        style = ("-", "--", ":", "-.")[turn % 4]
        marker = MARKERS[(turn + colour) % len(MARKERS)] if marks else ""
        axis.plot(rows[panel.x], panel.times * rows[panel.y], color=COLOURS[colour], linestyle=style, marker=marker,
                  lw=1.1, ms=4, label=name)  # fmt: skip
        if marks:
            _bars(axis, rows, panel.x, panel.y, panel.times, COLOURS[colour])
        for x, y, text in zip(rows[panel.x], rows[panel.y], rows[panel.notes] if panel.notes else (), strict=False):
            axis.annotate(str(text), (x, panel.times * y), fontsize=6, xytext=(3, 3), textcoords="offset points")
    if panel.level is not None:
        draw = axis.axhline if panel.x else axis.axvline
        draw(panel.times * panel.level[0], color="black", linewidth=1, label=panel.level[1])
    axis.set(xlabel=panel.xlabel or panel.x, ylabel=panel.ylabel or panel.y, title=panel.title)
    if panel.x:
        axis.set(xscale=panel.xscale, yscale=panel.yscale)
    if panel.ylim is not None:
        axis.set(ylim=panel.ylim)
    if panel.ticks is not None:
        axis.set_xticks(*panel.ticks)
        axis.minorticks_off()
    axis.spines[["top", "right"]].set_visible(False)
