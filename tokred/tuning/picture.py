"""The picture of a search: quality against speed, and the schedule that was chosen."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokred.analysis.viz.canvas import check, save, subplots
from tokred.core.folders import check_file
from tokred.core.schedules import PerLayer

if TYPE_CHECKING:
    from tokred.tuning.result import Tuned


def schedule_of(method: Any) -> tuple[str, list[float]] | None:
    """The amounts of a schedule by layer, with a name; None where the method has no list of them."""
    if isinstance(getattr(method, "r", None), PerLayer):
        return "tokens removed", list(method.r.values)
    budget = getattr(method, "budget", None)
    weights = getattr(budget, "weights", None) or getattr(getattr(budget, "layers", None), "weights", None)
    if weights is None:
        return None
    mean = sum(weights) / len(weights)
    return "rows kept, of the mean", [w / mean for w in weights]


def draw(tuned: Tuned, path: Path) -> Path:
    """Draw and save; returns the path."""
    check("Tuned.plot", "tune")
    scheduled = schedule_of(tuned.method)
    figure, axes = subplots(1, 2 if scheduled else 1, figsize=(10 if scheduled else 5.5, 4), layout="constrained")
    left = axes[0] if scheduled else axes
    times = 100.0 if tuned.metric in ("top1", "top5", "agreement") else 1.0
    styles = {"chosen": ("o", "C0"), "constant": ("s", "C1"), "random": ("x", "0.5"), "unpatched": ("D", "0.2")}
    for row in tuned.rows:
        marker, colour = styles[row["role"]]
        quality = times * row["quality"]
        low, high = (quality if row[k] is None else times * row[k] for k in ("low", "high"))
        # Rounding may leave a value a bit outside of its interval.
        spread = [[max(0.0, quality - low)], [max(0.0, high - quality)]]
        label = f"{row['role']}: {row['method']}" if row["role"] != "unpatched" else "unpatched"
        left.errorbar(row["speedup"], quality, yerr=spread, fmt=marker, color=colour, label=label, capsize=2, zorder=3)
    for role, colour in (("searched", "C0"), ("constant", "C1")):
        own = {"searched": "chosen"}.get(role, role)
        line = [r for r in [*tuned.front, *tuned.rows] if r["role"] in (role, own, "unpatched")]
        line.sort(key=lambda r: r["speedup"])
        left.plot([r["speedup"] for r in line], [times * r["quality"] for r in line], color=colour, alpha=0.5, lw=1)
    left.set_xlabel("times as fast as the unpatched model")
    left.set_ylabel(f"{tuned.metric} (%)" if times > 1 else f"{tuned.metric} ({tuned.better} is better)")
    left.set_title(f"{tuned.model}: {tuned.metric}, held-out samples", fontsize=9)
    left.legend(fontsize=8)
    if scheduled:
        name, amounts = scheduled
        axes[1].bar(range(len(amounts)), amounts, color="C0")
        axes[1].set_xlabel("layer")
        axes[1].set_ylabel(name)
        axes[1].set_title("the schedule that was chosen", fontsize=9)
    check_file(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    return save(figure, path)
