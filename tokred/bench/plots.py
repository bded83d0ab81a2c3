"""Plots of wide frames (:func:`tokred.bench.results.wide`): a line a method, with the intervals of its points."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from tokred.analysis.viz.canvas import COLOURS, MARKERS, check, grid, save, subplots

if TYPE_CHECKING:
    import pandas as pd

    from tokred.bench.standing import Units

__all__ = ["COLOURS", "MARKERS", "Panel", "benchmark", "check", "grid", "lines", "pareto", "save", "subplots"]

BASE = "unpatched"
NAMES = {
    "tome": "ToMe",
    "pitome": "PiToMe",
    "evit": "EViT",
    "random": "random merging",
    "random_prune": "random pruning",
    "kth": "k-th merging",
    "downsample": "down-sampling",
    "random_visual": "random visual tokens",
    "uniform_visual": "uniform visual tokens",
    "downsample_visual": "down-sampling of visual tokens",
    "random_evict": "random eviction",
    "random_latent_prune": "random pruning",
    "streaming_llm": "window of the newest",
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
    "dynamicvit": "DynamicViT",
    "spatten": "SpAtten",
    "ltp": "LTP",
    "cropr": "Cropr",
    "dtem": "DTEM",
    "diffrate": "DiffRate",
    "avit": "A-ViT",
    "skipvit": "SkipViT",
    "bavit": "BAViT",
    "dovit": "DoViT",
    "pixelprune": "PixelPrune",
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
# Where the text beside a point stands, so that those of neighbouring lines do not cover one another.
SLOTS = ((5, 5, "left"), (5, -10, "left"), (-5, -10, "right"), (-5, 5, "right"))


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
    figure, axes = subplots(1, len(measures), figsize=(6.6 * len(measures), 4.6), squeeze=False, layout="constrained")
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
        _star(axis, float(base[x].iloc[0]), scale * float(base[measure].iloc[0]))
    for i, name in enumerate(names):
        rows = arms[arms["method"] == name].sort_values("gmacs", ascending=False)
        if len(rows):
            notes = "setting" if i == 0 else ""
            _curve(axis, rows, x, measure, look(i), NAMES.get(name, name), times=scale, notes=notes)
    _dress(axis, LABELS.get(x, x), LABELS.get(measure, measure))


class Look(NamedTuple):
    """How a line is drawn."""

    colour: str
    marker: str
    style: str
    size: float = 6
    open: bool = False
    slot: int = 0  # of :data:`SLOTS`


def look(i: int) -> Look:
    """That of the i-th line: beyond eight, colours come again with other markers and broken lines."""
    turn, colour = divmod(i, len(COLOURS))
    return Look(COLOURS[colour], MARKERS[(i + 3 * turn) % len(MARKERS)], ("-", "--", ":", "-.")[turn % 4])


def _curve(
    axis: Any,
    rows: pd.DataFrame,
    x: str,
    y: str,
    drawn: Look,
    name: str,
    *,
    times: float = 1.0,
    spread: str = "",
    notes: str = "",
) -> None:
    """One line with the intervals of both coordinates, where they are known, and texts beside its points.

    Args:
        axis: to draw on.
        rows: its points, in their order.
        x, y: columns.
        drawn: its look; without a marker it has no intervals.
        name: in the legend.
        times: what values of ``y`` are multiplied by.
        spread: the column whose ends are the interval of ``y``; empty: the difference on the same images, which tells
            more than the measure itself, or else ``y``.
        notes: a column of texts.
    """
    xs, ys = rows[x].to_numpy(), times * rows[y].to_numpy()
    face = "white" if drawn.open else drawn.colour
    axis.plot(xs, ys, color=drawn.colour, linestyle=drawn.style, marker=drawn.marker, markersize=drawn.size,
              markerfacecolor=face, linewidth=1.5, label=name, zorder=3)  # fmt: skip
    spread = spread or (f"{y}_difference" if f"{y}_difference_low" in rows else y)
    for column, by, which in ((x, 1.0, "xerr"), (spread, times, "yerr")):
        if drawn.marker and f"{column}_low" in rows and rows[f"{column}_low"].notna().any():
            middle = rows[column].to_numpy()
            ends = [middle - rows[f"{column}_low"].to_numpy(), rows[f"{column}_high"].to_numpy() - middle]
            spans = [(by * end).clip(min=0) for end in ends]
            axis.errorbar(xs, ys, fmt="none", ecolor=drawn.colour, elinewidth=1, alpha=0.45, zorder=2, **{which: spans})
    for px, py, said in zip(xs, ys, rows[notes] if notes else (), strict=False):
        *put, side = SLOTS[drawn.slot]
        axis.annotate(
            str(said), (px, py), textcoords="offset points", xytext=put, ha=side, fontsize=7, color=drawn.colour
        )


def _star(axis: Any, x: float, y: float) -> None:
    """The unpatched model, with lines through it."""
    axis.axvline(x, color="#999999", linewidth=0.8, linestyle=":")
    axis.axhline(y, color="#999999", linewidth=0.8, linestyle=":")
    axis.plot(x, y, "*", color="black", markersize=15, label=BASE, zorder=5, linestyle="none")


def _dress(axis: Any, x: str, y: str) -> None:
    axis.set(xlabel=x, ylabel=y)
    axis.grid(color="#dddddd", linewidth=0.6)
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)
    axis.margins(0.07)


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
    figure, axes = subplots(1, len(panels), figsize=(2.2 + 5.8 * len(panels), 4.8), squeeze=False, layout="constrained")
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
        if panel.x and len(rows):
            drawn = look(i)._replace(size=4) if marks else look(i)._replace(marker="")
            rows = rows.sort_values(panel.order or panel.x)
            _curve(axis, rows, panel.x, panel.y, drawn, name, times=panel.times, notes=panel.notes)
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


def benchmark(
    frame: pd.DataFrame,
    units: Units,
    title: str,
    joined: Sequence[tuple[Any, Any]] = (),
    *,
    base: str = BASE,
    word: str = "work",
) -> Any:
    """A benchmark's rows: quality against speed-up, and against work where it is known; up and right is better.

    Args:
        frame: of :meth:`~tokred.bench.table.Benchmark.to_pandas`.
        units: of the metric.
        title: above everything.
        joined: pairs of rows of equal work, which thin lines join.
        base: method of the unpatched model's row.
        word: what there is less of: work, or bytes.

    Returns:
        A matplotlib figure.
    """
    times = 100.0 if units.percent else 1.0
    frame = _drawable(frame, units, base)
    dense, arms = frame[frame["method"] == base], frame[frame["method"] != base]
    columns = [("speedup", "times as fast as the unpatched model")]
    if arms["saved"].notna().any():
        columns.append(("saved", f"{word} saved (%)"))
    figure, axes = subplots(
        1, len(columns), figsize=(2.2 + 3.9 * len(columns), 4.6), squeeze=False, layout="constrained", sharey=True
    )
    names = list(dict.fromkeys(arms["method"]))
    plain = [n for n in names if bool(arms.loc[arms["method"] == n, "baseline"].all())]
    own = [n for n in names if n not in plain]
    for axis, (x, xlabel) in zip(axes[0], columns, strict=True):
        for i, (a, b) in enumerate(joined):
            ends = [r["speedup"] if x == "speedup" else 100 * (1 - r["work"]) for r in (a, b)]
            said = "_" if i else f"to random, equal {word}"
            axis.plot(
                ends, [times * r["quality"] for r in (a, b)], color="#bbbbbb", linewidth=0.8, zorder=1, label=said
            )
        for name in (*own, *plain):
            rows = arms[(arms["method"] == name) & arms[x].notna()].sort_values(x)
            if len(rows):
                # Texts beside points would cover one another in both panels: one is enough.
                notes = "setting" if name in own and x == "speedup" else ""
                drawn = look(own.index(name)) if name in own else _grey(plain.index(name))
                drawn = drawn._replace(slot=own.index(name) % len(SLOTS) if name in own else 0)
                _curve(axis, rows, x, "quality", drawn, NAMES.get(name, name), times=times, spread="drawn", notes=notes)
        if len(dense):
            _star(axis, 1.0 if x == "speedup" else 0.0, times * float(dense["quality"].iloc[0]))
        _dress(axis, f"{xlabel} \u2192", "")
        # By the points: quartiles of a disturbed machine may lie far out, and would press everything together.
        inner = [*arms[x].dropna(), 1.0 if x == "speedup" else 0.0]
        margin = 0.08 * (max(inner) - min(inner)) or 0.1
        axis.set_xlim(min(inner) - margin, max(inner) + 1.5 * margin)
    direction = "" if units.sign > 0 else ", lower is better"
    axes[0][0].set_ylabel(f"{units.metric}{' (%)' if units.percent else ''}{direction} \u2191")
    if units.sign < 0:
        axes[0][0].invert_yaxis()
    handles = dict(zip(*reversed(axes[0][0].get_legend_handles_labels()), strict=True))
    figure.legend(handles.values(), handles.keys(), frameon=False, fontsize=8, loc="outside right center")
    figure.suptitle(title, fontsize=11, x=0.01, ha="left")
    note = "bars: 95 % interval of the difference to the unpatched model on the same samples; quartiles of the speed"
    figure.supxlabel(note, fontsize=7.5, color="#555555", x=0.01, ha="left")
    _legible(figure, axes[0][0])
    return figure


def _legible(figure: Any, axis: Any) -> None:
    """Of texts that would cover one another, the later ones (of stronger settings, and of later methods) stay."""
    figure.draw_without_rendering()
    kept: list[Any] = []
    for text in reversed(list(axis.texts)):
        box = text.get_window_extent()
        if any(box.overlaps(other) for other in kept):
            text.remove()
        else:
            kept.append(box)


def _drawable(frame: pd.DataFrame, units: Units, base: str) -> pd.DataFrame:
    """Measured rows as numbers, with the share of work that is ``saved``, and ``drawn``, the quality with its ends."""
    frame = frame[frame["quality"].notna()]
    numbers = [n for n in frame if str(n).split("_")[0] in ("quality", "speedup", "difference")]
    frame = frame.astype(dict.fromkeys(numbers, float))
    dense = frame.loc[frame["method"] == base, "quality"]
    level = float(dense.iloc[0]) if len(dense) else float("nan")
    ends = {}
    for name in ("low", "high"):
        end = frame[f"difference_{name}"]
        # Around the row's own value: on a fixed base, whose own chance both share.
        at = level * (1 + end) if units.ratio else level + end
        ends[f"drawn_{name}"] = at.where(frame["method"] != base)
    return frame.assign(saved=100 * (1 - frame["work"].astype(float)), drawn=frame["quality"], **ends)


def _grey(i: int) -> Look:
    """Of methods that choose nothing: greys with open markers, apart from any colour."""
    return Look(("#555555", "#888888", "#aaaaaa")[i % 3], "xsov"[i % 4], (":", "--", "-.")[i % 3], 6, open=True)
