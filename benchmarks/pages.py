"""docs/methods/comparison.md, made from the CSV files of ``all_methods.py``: nothing on it is typed by hand.

python -m benchmarks encoder/comparison            # writes the page
python -m benchmarks encoder/comparison --check    # exit status 1 if the committed page is another one
"""

from __future__ import annotations

import argparse
import csv
import sys
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "methods" / "comparison.md"
RESULTS = ROOT / "benchmarks" / "results"
MODELS = {
    "embedded": "The embedded model",
    "dinov2": "DINOv2 ViT-S/14",
}
PLAIN = ("tome", "downsample")
BASELINES = ("random", "random_prune", "downsample")
Row = dict[str, str]


def rows_of(path: Path) -> list[Row]:
    """Rows of a CSV file; none where it does not exist."""
    if not path.is_file():
        return []
    with path.open(newline="", encoding="utf8") as f:
        return list(csv.DictReader(f))


def number(row: Row, column: str) -> float | None:
    """A cell as a number, None where it is empty."""
    text = row.get(column, "")
    return float(text) if text else None


def at(points: Sequence[tuple[float, float]], x: float) -> float | None:
    """The value at ``x`` on the line through measured points, None outside of them (nothing is extrapolated)."""
    found = sorted(points)
    for (x0, y0), (x1, y1) in pairwise(found):
        if x0 <= x <= x1:
            return y0 if x1 == x0 else y0 + (y1 - y0) * (x - x0) / (x1 - x0)
    return None


def table(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A Markdown table; every column but the first two is aligned to the right."""
    rule = ["---", "---", *["---:"] * (len(header) - 2)]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [header, rule, *lines])


def percent(value: float | None, sign: bool = False) -> str:
    """A share in percent, or a dash."""
    if value is None:
        return "-"
    return f"{100 * value:+.1f}" if sign else f"{100 * value:.1f}"


def measured(rows: Sequence[Row]) -> str:
    """All rows as measured."""
    has_map = any(r.get("saliency_mae") for r in rows)
    header = ["method", "setting", "tokens", "GMACs", "top-1", "to unpatched", "± (s.e.)", "cosine"]
    header += ["saliency MAE"] if has_map else []
    header += ["im/s", "speed-up", "quartiles", "MiB"]
    lines = []
    for r in rows:
        cells = [f"`{r['method']}`" if r["method"] != "unpatched" else "unpatched", r["setting"], r["tokens_out"]]
        cells += [f"{float(r['gmacs']):.3f}", percent(number(r, "top1")), percent(number(r, "top1_difference"), True)]
        cells += [percent(number(r, "top1_error")), f"{float(r['cosine']):.4f}"]
        cells += [f"{float(r['saliency_mae']):.4f}" if r.get("saliency_mae") else "-"] if has_map else []
        cells += [f"{float(r['images_per_second']):.1f}", f"{float(r['speedup']):.2f}"]
        cells += [f"{float(r['speedup_q25']):.2f} to {float(r['speedup_q75']):.2f}", f"{float(r['forward_mib']):.0f}"]
        lines.append(cells)
    return table(header, lines)


def quality_name(rows: Sequence[Row]) -> tuple[str, bool]:
    """The measure that methods are compared by, and whether higher is better."""
    return ("saliency_mae", False) if any(r.get("saliency_mae") for r in rows) else ("cosine", True)


def curves(rows: Sequence[Row], x: str, y: str) -> dict[str, list[tuple[float, float]]]:
    """Points of every method, the unpatched model included in each."""
    base = rows[0]
    found: dict[str, list[tuple[float, float]]] = {}
    for r in rows[1:]:
        value, across = number(r, y), number(r, x)
        if value is not None and across is not None:
            found.setdefault(r["method"], []).append((across, value))
    start = (number(base, x) or 0.0, number(base, y) or 0.0)
    return {name: [start, *points] for name, points in found.items()}


def matched(rows: Sequence[Row], x: str, marks: Sequence[float], measure: str, form: str = "{:.4f}") -> str:
    """A measure of every method at equal ``x``, between the measured points."""
    lines = []
    for name, points in curves(rows, x, measure).items():
        values = [at(points, mark) for mark in marks]
        lines.append([f"`{name}`", "", *("-" if v is None else form.format(v) for v in values)])
    label = {"speedup": "speed-up {:.2f}", "gmacs_share": "{:.0%} of the GMACs"}[x]
    return table(["method", "", *(label.format(m) for m in marks)], lines)


def winners(rows: Sequence[Row], marks: Sequence[float]) -> list[str]:
    """Who is best at each speed, and where a plain baseline is as good: said plainly."""
    measure, higher = quality_name(rows)
    found = curves(rows, "speedup", measure)
    word = {"cosine": "feature cosine", "saliency_mae": "error of the saliency map"}[measure]
    lines = []
    for mark in marks:
        values = {name: v for name, points in found.items() if (v := at(points, mark)) is not None}
        if len(values) < 2:
            continue
        order = sorted(values, key=lambda n: values[n], reverse=higher)
        text = f"- At {mark:.2f} times the unpatched speed, by {word}: best is `{order[0]}` ({values[order[0]]:.4f})"
        for plain in PLAIN:
            if plain in values and plain != order[0]:
                behind = [n for n in order if order.index(n) > order.index(plain) and n not in BASELINES]
                text += f"; `{plain}` has {values[plain]:.4f}"
                if behind:
                    text += " and beats " + ", ".join(f"`{n}`" for n in behind)
        lines.append(text + ".")
    return lines


def one_point(rows: Sequence[Row]) -> str:
    """Where ToMe has lost one point of top-1, and what the others lose with as many multiply-adds."""
    tome = curves(rows, "gmacs_share", "top1_difference").get("tome", [])
    ordered = sorted(tome, reverse=True)
    for (x0, y0), (x1, y1) in pairwise(ordered):
        if y1 <= -0.01 < y0:
            share = x0 + (x1 - x0) * (-0.01 - y0) / (y1 - y0)
            losses = {
                name: v
                for name, points in curves(rows, "gmacs_share", "top1_difference").items()
                if (v := at(points, share)) is not None and name != "tome"
            }
            best = sorted(losses, key=lambda n: losses[n], reverse=True)[:3]
            text = ", ".join(f"`{n}` {percent(losses[n], True)}" for n in best)
            return f"ToMe has lost one point of top-1 at {share:.0%} of the multiply-adds; the best there are {text}."
    lowest = min((y for _, y in tome), default=0.0)
    return f"ToMe loses no full point of top-1 at any setting measured here ({percent(lowest, True)} at most)."


def overhead(rows: Sequence[Row]) -> str:
    """What each method's own work takes."""
    base = next((number(r, "own_work") for r in rows if r["method"] == "tome"), None)
    lines = []
    for r in sorted(rows, key=lambda r: float(r["own_work"])):
        over = None if base is None else float(r["own_work"]) - base
        cells = [f"`{r['method']}`", r["setting"], f"{float(r['gmacs_share']):.2f}", percent(number(r, "own_work"))]
        cells += [f"{percent(number(r, 'own_work_q25'))} to {percent(number(r, 'own_work_q75'))}"]
        cells += [percent(over, True), f"{float(r['speedup']):.2f}"]
        lines.append(cells)
    return table(
        ["method", "setting", "share of the GMACs", "own work, % of the forward", "quartiles", "over ToMe", "speed-up"],
        lines,
    )


def source(row: Row) -> str:
    """Where figures come from, as one line."""
    return (
        f"{row['device']}, {row['threads']} threads, batch {row['batch']}, {row['dtype']}, {row['rounds']} rounds; "
        f"torch {row['torch']}, tokred {row['tokred']} at {row['commit'] or 'an uncommitted state'}, {row['date']}."
    )


def page(results: Path = RESULTS) -> str:
    """The whole page."""
    out = [
        "# All methods side by side",
        "Made from `benchmarks/results/methods_*.csv` by `benchmarks/encoder/comparison.py`; measured by "
        "`python -m benchmarks encoder/all_methods --threads 2`. "
        "Every row is paired with the unpatched model in the same run. "
        "Values at equal speed or equal multiply-adds are read off the lines between measured points; a dash means "
        "that no measured points lie on both sides.",
    ]
    for model, title in MODELS.items():
        rows = rows_of(results / f"methods_{model}.csv")
        if not rows:
            continue
        measure, _ = quality_name(rows)
        speeds = sorted(float(r["speedup"]) for r in rows[1:])
        marks = sorted({round(speeds[int(len(speeds) * q)], 2) for q in (0.25, 0.5, 0.75)}) if speeds else []
        base = rows[0]
        out += [f"## {title}", f"{source(base)} Top-1 by {base['top1_by']} on {base['top1_images']} images of "
                f"{base['top1_data']}; cosine on {base['cosine_images']} of {base['cosine_data']}."]  # fmt: skip
        out += [f"![quality against speed](../img/methods_{model}.png)"]
        out += ["### Who wins where", "\n".join([*winners(rows, marks), f"- {one_point(rows)}"])]
        out += [f"### At equal measured time ({measure})", matched(rows, "speedup", marks, measure)]
        out += ["### At equal multiply-adds (top-1, to the unpatched model)"]
        out += [matched(rows, "gmacs_share", (0.75, 0.6, 0.45), "top1_difference", "{:+.1%}")]
        out += ["### As measured", measured(rows)]
    rows = rows_of(results / "methods_overhead.csv")
    if rows:
        out += ["## What a method's own work costs"]
        out += [
            f"{rows[0]['model']}, 224 pixels. {source(rows[0])} Own work is deciding and merging, timed inside the "
            "forward."
        ]
        out += [overhead(rows)]
        slow = [f"`{r['method']}`" for r in rows if float(r["own_work"]) > 0.1]
        out += [f"More than a tenth of the forward goes to the method's own work in {', '.join(slow)}."] if slow else []
    return "\n\n".join(out) + "\n"


def main() -> int:
    """Write or check the page; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="do not write; fail where the committed page differs")
    args = parser.parse_args()
    text = page()
    if args.check:
        return 0 if PAGE.is_file() and PAGE.read_text() == text else 1
    PAGE.write_text(text)
    print(f"written to {PAGE}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
