"""docs/methods/comparison.md, made from the scenarios ``methods`` and ``overhead``: nothing on it is typed by hand."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise

from benchmarks.pages.markdown import (
    ROOT,
    Record,
    Results,
    Value,
    beside,
    between,
    code,
    percent,
    ranked,
    source,
    table,
)

PAGE = ROOT / "docs" / "methods" / "comparison.md"
MODELS = {
    "embedded": "The embedded model",
    "dinov2": "DINOv2 ViT-S/14",
}
PLAIN = ("tome", "downsample")
RANDOM = "random"
QUALITY = ("top1", "cosine", "cosine_lowest", "saliency_mae", "saliency_correlation", "saliency_iou")
WORDS = {"cosine": "feature cosine", "saliency_mae": "error of the saliency map"}
Points = list[tuple[float, float]]


def at(points: Sequence[tuple[float, float]], x: float) -> float | None:
    """The value at ``x`` on the line through measured points, None outside of them (nothing is extrapolated)."""
    found = sorted(points)
    for (x0, y0), (x1, y1) in pairwise(found):
        if x0 <= x <= x1:
            return y0 if x1 == x0 else y0 + (y1 - y0) * (x - x0) / (x1 - x0)
    return None


def measured(rows: Sequence[Record]) -> str:
    """All rows as measured."""
    has_map = any("saliency_mae" in r for r in rows)
    header = ["method", "setting", "tokens", "GMACs", "top-1", "to unpatched (95 % interval)", "cosine"]
    header += ["saliency MAE"] if has_map else []
    header += ["im/s", "speed-up (quartiles)", "MiB"]
    lines = []
    for r in rows:
        cells = [f"`{r['method']}`" if r["method"] != "unpatched" else "unpatched", r["setting"], str(r["tokens_out"])]
        cells += [f"{r['gmacs']:.3f}", percent(r["top1"]), between(r, "top1_difference", "{:+.1f}", 100)]
        cells += [f"{r['cosine']:.4f}"]
        cells += [f"{r['saliency_mae']:.4f}"] if has_map else []
        cells += [f"{r['images_per_second']:.1f}", between(r, "speedup"), f"{r['forward_mib']:.0f}"]
        lines.append(cells)
    return table(header, lines)


def quality_name(rows: Sequence[Record]) -> tuple[str, bool]:
    """The measure that methods are compared by, and whether higher is better."""
    return ("saliency_mae", False) if any("saliency_mae" in r for r in rows) else ("cosine", True)


def curves(rows: Sequence[Record], x: str, y: str) -> dict[str, Points]:
    """Points of every method, the unpatched model included in each."""
    base, found = rows[0], dict[str, Points]()
    for r in rows[1:]:
        if r.get(x) is not None and r.get(y) is not None:
            found.setdefault(r["method"], []).append((r[x], r[y]))
    start = (base.get(x) or 0.0, base.get(y) or 0.0)
    return {name: [start, *points] for name, points in found.items()}


def read_off(rows: Sequence[Record], mark: float, measure: str) -> dict[str, Value]:
    """Of every method the measure at a speed-up, between the values on the lines through the quartiles of its speeds.

    Two methods of the same quality that were timed at other speeds are so level with one another.
    """
    found = {}
    ends = [curves(rows, f"speedup{end}", measure) for end in ("_low", "_high")]
    for name, points in curves(rows, "speedup", measure).items():
        middle = at(points, mark)
        if middle is None:
            continue
        near = [middle]
        for end in ends:
            if name in end:
                here = sorted(end[name])
                # Where the slow or the fast line ends before the mark, its last point is the farthest that is known.
                beyond = here[-1][1] if mark > here[-1][0] else here[0][1]
                near.append(beyond if (v := at(here, mark)) is None else v)
        found[name] = Value(middle, min(near), max(near))
    return found


def matched(rows: Sequence[Record], x: str, marks: Sequence[float], measure: str, form: str = "{:.4f}") -> str:
    """A measure of every method at equal ``x``, between the measured points."""
    lines = []
    for name, points in curves(rows, x, measure).items():
        values = [at(points, mark) for mark in marks]
        lines.append([f"`{name}`", "", *("-" if v is None else form.format(v) for v in values)])
    label = {"speedup": "speed-up {:.2f}", "gmacs_share": "{:.0%} of the GMACs"}[x]
    return table(["method", "", *(label.format(m) for m in marks)], lines)


def winners(rows: Sequence[Record], marks: Sequence[float]) -> list[str]:
    """Who is best at each speed, who is level with it, and where plain baselines and a random choice stand."""
    measure, higher = quality_name(rows)
    lines = []
    for mark in marks:
        values = read_off(rows, mark, measure)
        if len(values) < 2:
            continue
        best, level = ranked(values, higher)
        text = f"- At {mark:.2f} times the unpatched speed, by {WORDS[measure]}: "
        text += "best is" if not level else f"the {'highest' if higher else 'lowest'} figure is that of"
        text += f" `{best}` ({_text(values[best])})" + (f", level with it are {code(level)}" if level else "")
        for plain in PLAIN:
            if plain in values and plain != best:
                text += f"; `{plain}` has {_text(values[plain])}"
        lines.append(text + "." + _random(values, higher))
    return lines


def _text(found: Value) -> str:
    return f"{found.value:.4f}, {found.low:.4f} to {found.high:.4f}"


def _random(values: Mapping[str, Value], higher: bool) -> str:
    if RANDOM not in values:
        return ""
    where = beside(values, RANDOM, higher)
    parts = [f"{word} it are {code(names)}" for word, names in where.items() if names]
    return f" Random merging has {values[RANDOM].value:.4f}: {'; '.join(parts)}."


def one_point(rows: Sequence[Record]) -> str:
    """Where ToMe has lost one point of top-1, and which others are level with it at as many multiply-adds."""
    tome = curves(rows, "gmacs_share", "top1_difference").get("tome", [])
    for (x0, y0), (x1, y1) in pairwise(sorted(tome, reverse=True)):
        if y1 <= -0.01 < y0:
            share = x0 + (x1 - x0) * (-0.01 - y0) / (y1 - y0)
            values = _losses(rows, share)
            where = beside(values, "tome")
            text = "; ".join(f"{word} it are {code(names)}" for word, names in where.items() if names)
            return (
                f"ToMe has lost one point of top-1 at {share:.0%} of the multiply-adds. By the 95 % intervals {text}."
            )
    lowest = min((y for _, y in tome), default=0.0)
    return f"ToMe loses no full point of top-1 at any setting measured here ({percent(lowest, True)} at most)."


def _losses(rows: Sequence[Record], share: float) -> dict[str, Value]:
    ends = [curves(rows, "gmacs_share", f"top1_difference{end}") for end in ("", "_low", "_high")]
    found = {}
    for name in ends[0]:
        middle, low, high = (at(end.get(name, []), share) for end in ends)
        if middle is not None:
            found[name] = Value(middle, low, high)
    return found


def same_as_tome(rows: Sequence[Record]) -> str:
    """Which methods have ToMe's quality to the last digit at each of their settings."""
    of = {r["setting"]: [r.get(m) for m in QUALITY] for r in rows if r["method"] == "tome"}
    found: dict[str, list[bool]] = {}
    for r in rows[1:]:
        if r["method"] != "tome" and r["setting"] in of:
            found.setdefault(r["method"], []).append([r.get(m) for m in QUALITY] == of[r["setting"]])
    same = [name for name, each in found.items() if all(each) and len(each) == len(of)]
    if not same:
        return ""
    return (
        f"Every figure of quality of {code(same)} is that of `tome`: how far apart the two stand in a table by time is "
        "noise of the clock."
    )


def against_random(rows: Sequence[Record]) -> str:
    """Whether any method beats random merging in top-1 at an equal share of the multiply-adds."""
    better = []
    for share in (0.75, 0.6, 0.45):
        values = _losses(rows, share)
        if RANDOM in values:
            better += [f"`{n}` at {share:.0%}" for n in beside(values, RANDOM)["better than"]]
    if not better:
        return "By the 95 % intervals of top-1 no method beats random merging at 75, 60 or 45 % of the multiply-adds."
    return f"By the 95 % intervals of top-1 these beat random merging at equal multiply-adds: {', '.join(better)}."


def overhead(rows: Sequence[Record]) -> str:
    """What each method's own work takes."""
    base = next((r["own_work"] for r in rows if r["method"] == "tome"), None)
    lines = []
    for r in sorted(rows, key=lambda r: r["own_work"]):
        over = None if base is None else r["own_work"] - base
        cells = [f"`{r['method']}`", r["setting"], f"{r['gmacs_share']:.2f}", percent(r["own_work"])]
        cells += [f"{percent(r['own_work_low'])} to {percent(r['own_work_high'])}"]
        cells += [percent(over, True), f"{r['speedup']:.2f}"]
        lines.append(cells)
    return table(
        ["method", "setting", "share of the GMACs", "own work, % of the forward", "quartiles", "over ToMe", "speed-up"],
        lines,
    )


def page(found: Results) -> str:
    """The whole page."""
    out = [
        "# All methods side by side",
        "Made from the scenarios `methods` and `overhead` of `benchmarks/results/encoder.csv` by `python -m benchmarks "
        "pages`; measured by `python -m benchmarks encoder/methods --threads 2`, DINOv2 with `--probe 150 --rounds 7`. "
        "Every row is paired with the unpatched model in the same run. "
        "Values at equal speed or equal multiply-adds are read off the lines between measured points; a dash means "
        "that no measured points lie on both sides. Two methods are called level where each lies within the other's "
        "interval: at equal speed between the lines through the quartiles of the measured speeds.",
    ]
    for model, title in MODELS.items():
        rows = found.records("encoder", "methods", model=model)
        if not rows:
            continue
        measure, _ = quality_name(rows)
        speeds = sorted(r["speedup"] for r in rows[1:])
        marks = sorted({round(speeds[int(len(speeds) * q)], 2) for q in (0.25, 0.5, 0.75)}) if speeds else []
        base = rows[0]
        kind = str(base["answered_by"]).replace("-", " ")
        where = source(base, f"batch {base['batch']}", f"{base['speedup_count']} rounds")
        out += [f"## {title}", f"{where} Top-1 by {kind} on {base['top1_count']} images of {base['data']}; "
                f"cosine on {base['cosine_count']} of {base['photos']}."]  # fmt: skip
        out += [f"![quality against speed](../img/methods_{model}.png)"]
        claims = [one_point(rows), against_random(rows), same_as_tome(rows)]
        out += ["### Who wins where", "\n".join([*winners(rows, marks), *(f"- {c}" for c in claims if c)])]
        out += [f"### At equal measured time ({measure})", matched(rows, "speedup", marks, measure)]
        out += ["### At equal multiply-adds (top-1, to the unpatched model)"]
        out += [matched(rows, "gmacs_share", (0.75, 0.6, 0.45), "top1_difference", "{:+.1%}")]
        out += ["### As measured", measured(rows)]
    rows = found.records("encoder", "overhead")
    if rows:
        out += ["## What a method's own work costs"]
        where = source(rows[0], f"batch {rows[0]['batch']}", f"{rows[0]['speedup_count']} rounds")
        out += [f"{rows[0]['model']}, {rows[0]['weights']} weights, 224 pixels. {where} Own work is deciding and "
                "merging, timed inside the forward."]  # fmt: skip
        out += [overhead(rows)]
        slow = [f"`{r['method']}`" for r in rows if r["own_work"] > 0.1]
        out += [f"More than a tenth of the forward goes to the method's own work in {', '.join(slow)}."] if slow else []
    return "\n\n".join(out) + "\n"
