"""Sentences about a choice: where it removes, what that gains over the constant schedule, and by how much
more than chance."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

from tokred.core.method import Method
from tokred.tuning.goal import Goal
from tokred.tuning.picture import schedule_of

EQUAL = 0.02  # speeds that differ by less are called equal
Row = dict[str, Any]


def shape(method: Method) -> str:
    """Where a schedule does most; empty for a method without a list of amounts."""
    found = schedule_of(method)
    if found is None:
        return ""
    name, amounts = found
    if name != "tokens removed":
        first, second, third = (f"{v:.0%}" for v in _thirds(amounts))
        return (
            f"Of the rows that stay, the first third of the layers holds {first}, the second {second}, the last {third}"
        )
    acting = [i for i, v in enumerate(amounts) if v]
    blocks = ", ".join(map(str, acting))
    most = f"in all {len(amounts)} blocks" if len(acting) == len(amounts) else f"in blocks {blocks} of {len(amounts)}"
    return f"It removes {sum(amounts):g} tokens {most}, {_shares(_thirds(amounts))} of the depth"


def _thirds(amounts: list[float]) -> list[float]:
    n, total = len(amounts), sum(amounts)
    ends = [round(n * i / 3) for i in range(4)]
    return [sum(amounts[a:b]) / total for a, b in pairwise(ends)]


def _shares(thirds: list[float]) -> str:
    first, second, third = (f"{v:.0%}" for v in thirds)
    return f"{first} in the first third, {second} in the second and {third} in the last"


def amount(value: float, metric: str) -> str:
    """A difference of the metric as it is said."""
    if metric in ("top1", "top5", "agreement"):
        return f"{100 * abs(value):.2f} points"
    if metric == "perplexity":
        return f"{100 * abs(value):.2f} %"
    return f"{abs(value):.3g}"


def against(chosen: Row, rival: Row | None, word: str, metric: str, better: str, name: str) -> str:
    """A sentence on the chosen row beside another one: better or worse, beyond chance or not.

    Args:
        chosen, rival: rows; the gain of the chosen one is over this rival.
        word: ``"time"`` or ``"bytes"``.
        metric, better: the metric and its good direction.
        name: of the rival.
    """
    if rival is None or chosen.get("gain") is None:
        return ""
    setting = f"{rival['method']} {rival['setting']}".strip()
    beside = chosen["beside"]
    at = f"At {beside:.2f}x its speed"
    if word == "bytes":
        at = f"At {chosen['memory']:.1%} of the bytes against {rival['memory']:.1%}"
    elif abs(beside - 1) <= EQUAL:
        at = f"At equal measured time ({beside:.2f}x)"
    gain, low, high = (chosen[k] for k in ("gain", "gain_low", "gain_high"))
    sign = -1 if better == "lower" else 1
    count = chosen["samples"]
    if low is None or high is None:
        return (
            f"{at} it differs from {name}, {setting}, by {amount(gain, metric)}; one sample tells no chance from skill."
        )
    worst, best = sorted((sign * low, sign * high))
    if worst > 0:
        verdict = f"it is better than {name}, {setting}, by {amount(gain, metric)}, which is beyond chance"
    elif best < 0:
        verdict = f"it is worse than {name}, {setting}, by {amount(gain, metric)}, which is beyond chance"
    elif sign * gain >= 0:
        verdict = f"it is better than {name}, {setting}, by {amount(gain, metric)}, which chance explains as well"
    else:
        verdict = f"it is worse than {name}, {setting}, by {amount(gain, metric)}, which chance explains as well"
    return f"{at} {verdict} ({metric}, {count} held-out samples)."


def reached(goal: Goal, chosen: Row, met: bool, metric: str) -> str:
    """A sentence that says if the goal is reached on the samples that were held out."""
    if goal.kind == "speedup":
        found = f"{chosen['speedup']:.2f}x [{chosen['speedup_low']:.2f}, {chosen['speedup_high']:.2f}]"
    elif goal.kind == "memory":
        found = f"{chosen['memory']:.1%} of the bytes"
    else:
        found = f"a difference of {amount(chosen['difference'], metric)} at {chosen['speedup']:.2f}x"
    if met:
        return f"The goal, {goal}, is met: {found}."
    return f"Nothing that was tried meets the goal, {goal}: this is the nearest, with {found}."
