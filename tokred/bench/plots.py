"""Plots of measured frames: quality against speed, one line a method."""

from __future__ import annotations

import textwrap
from typing import TYPE_CHECKING, Any

from tokred.analysis.viz.canvas import COLOURS, MARKERS, grid, pyplot, save

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["COLOURS", "MARKERS", "grid", "pareto", "pyplot", "save", "thin"]

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


def thin(i: int) -> dict[str, Any]:
    """How the ``i``-th of many lines is drawn: beyond eight, colours come again with other markers."""
    turn, colour = divmod(i, len(COLOURS))
    return {"color": COLOURS[colour], "marker": MARKERS[turn % len(MARKERS)], "lw": 1, "ms": 4}


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
        frame: one row an arm, as the demo and the benchmark write them; rows without the measure are left out.
        measures: columns for the vertical axes.
        x: column for the horizontal axis; its quartiles ``<x>_q25`` and ``<x>_q75`` are drawn where they are there, and
            the standard errors ``<measure>_error``.
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
    low, high = f"{x}_q25", f"{x}_q75"
    if low in rows and high in rows:
        spans = [(xs - rows[low].to_numpy()).clip(min=0), (rows[high].to_numpy() - xs).clip(min=0)]
        axis.errorbar(xs, ys, xerr=spans, fmt="none", ecolor=colour, elinewidth=1, alpha=0.45, zorder=2)
    if f"{measure}_error" in rows:
        error = scale * rows[f"{measure}_error"].to_numpy()
        axis.errorbar(xs, ys, yerr=error, fmt="none", ecolor=colour, elinewidth=1, alpha=0.45, zorder=2)
    if i == 0:
        for px, py, text in zip(xs, ys, rows["setting"], strict=True):
            axis.annotate(text, (px, py), textcoords="offset points", xytext=(5, 6), fontsize=8, color=colour)
