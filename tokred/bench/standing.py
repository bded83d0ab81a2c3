"""Who is better: differences of two rows on the same samples, with intervals, and what they say in words."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tokred.bench.arms import BASE
from tokred.bench.intervals import Estimate, paired
from tokred.bench.ready import READY
from tokred.bench.results import NORMAL
from tokred.bench.scoring import Tally

NEAR = 0.05  # shares of work, or of bytes, that are called equal
UNPAIRED = "values of single samples were not kept, so that the two count as measured on different samples"

Row = dict[str, Any]


def label(row: Mapping[str, Any]) -> str:
    """Method and setting of a row."""
    return f"{row['method']} {row['setting']}".strip()


@dataclass(frozen=True)
class Units:
    """How values of a metric, and their differences, are shown.

    Attributes:
        metric: its name.
        better: the direction that is good.
    """

    metric: str
    better: str

    @property
    def percent(self) -> bool:
        """True of shares, which are shown in per cent, and their differences in points."""
        return self.metric in READY and READY[self.metric].unit == "share"

    @property
    def ratio(self) -> bool:
        """True where differences are ratios, minus one, and shown in per cent."""
        return self.metric == "perplexity"

    @property
    def sign(self) -> int:
        """1 where higher values are better, else -1."""
        return -1 if self.better == "lower" else 1

    def value(self, value: float) -> str:
        return f"{100 * value:.1f}" if self.percent else f"{value:.4g}"

    def differences(self, *values: float) -> list[str]:
        return [f"{100 * v:+.1f}" if self.percent or self.ratio else f"{v:+.2g}" for v in values]

    @property
    def unit(self) -> str:
        """Behind a difference: points, per cent, or the metric's own."""
        if self.percent:
            return " points"
        own = READY[self.metric].unit if self.metric in READY else ""
        return " %" if self.ratio else f" {own}" if own == "dB" else ""

    def between(self, found: Estimate) -> str:
        """``+1.2 [0.3, 2.1]``; without its interval where none is known."""
        value, *ends = self.differences(*(v for v in found if v is not None))
        return f"{value} [{', '.join(end.removeprefix('+') for end in ends)}]" if ends else value


@dataclass(frozen=True)
class Comparison:
    """Two rows on the same samples.

    Attributes:
        a, b: their labels.
        difference: a's quality minus b's, with its 95 % interval; of perplexities their ratio, minus one.
        samples: how many were compared.
        paired: whether sample by sample; else the interval is too wide or, in bad luck, too narrow.
        units: of the metric.
        note: why it is not paired; else empty.
    """

    a: str
    b: str
    difference: Estimate
    samples: int | None
    paired: bool
    units: Units
    note: str = ""

    @property
    def gain(self) -> float:
        """How much better a is, in the metric's units; negative where it is worse."""
        return self.units.sign * self.difference.value

    @property
    def error(self) -> float | None:
        """Standard error of the gain, from its interval; None where there is none."""
        half = self.difference.half
        return None if half is None else half / NORMAL

    @property
    def better(self) -> str | None:
        """The label of the row that is better; None where chance may order them."""
        sign = self.units.sign * self.difference.sign
        return None if not sign else self.a if sign > 0 else self.b

    def __str__(self) -> str:
        shown = f"{self.units.between(self.difference)}{self.units.unit}"
        word = {None: "not distinguishable from", self.a: "better than", self.b: "worse than"}[self.better]
        if self.a == self.b:
            word = "the same as"
        on = "" if self.samples is None else f" on {self.samples} samples"
        note = f" ({self.note})" if self.note else ""
        return f"{self.a} is {word} {self.b}: {self.units.metric} {shown}{on}{note}"


def compare(a: Row, b: Row, samples: Mapping[str, Tally], units: Units) -> Comparison:
    """Two measured rows, sample by sample where their samples were kept."""
    one, two = samples.get(label(a)), samples.get(label(b))
    names = (label(a), label(b))
    if one is not None and two is not None:
        alike = one.weights == two.weights and one.groups == two.groups
        if alike:
            found = paired(one.values, two.values, one.weights, one.keys)
            found = found.map(math.expm1) if one.log else found
            return Comparison(*names, found, len(one.values), True, units)
    note = UNPAIRED if one is None or two is None else "the two were not measured on the same samples"
    return Comparison(*names, _unpaired(a, b, units), a["samples"], False, units, note)


def _unpaired(a: Row, b: Row, units: Units) -> Estimate:
    """The difference of two differences to the unpatched model, as if the samples were not the same."""
    ends = ("difference", "difference_low", "difference_high")
    found = [Estimate(*(row[name] for name in ends)) for row in (a, b)]
    found = [one.map(math.log1p) for one in found] if units.ratio else found
    value = found[0].value - found[1].value
    halves = [one.half for one in found]
    if any(half is None for half in halves):
        whole = Estimate(value, None, None)
    else:
        half = math.hypot(*(half for half in halves if half is not None))
        whole = Estimate(value, value - half, value + half)
    return whole.map(math.expm1) if units.ratio else whole


def places(row: Row) -> set[str]:
    """Where a row saves work: tokens that leave before a language model or inside it are the same tokens."""
    return {"projector" if stage == "layer" else stage for stage in (row.get("stage") or "").split("+")}


def rival(row: Row, rows: Sequence[Row], units: Units) -> Row | None:
    """The best random choice at the same work; None for rows that are one themselves, or where there is none."""
    if row["baseline"] or row["work"] is None or row["method"] == BASE:
        return None
    near = [
        r
        for r in rows
        if all(part.startswith("random") for part in r["method"].split("+"))
        and r["work"] is not None
        and places(r) == places(row)
        and abs(r["work"] - row["work"]) <= NEAR
    ]
    return max(near, key=lambda r: units.sign * r["difference"], default=None)


def against_random(rows: Sequence[Row], samples: Mapping[str, Tally], units: Units, word: str) -> str:
    """A sentence that says whether any method beats a random choice at equal ``word`` (work, or bytes)."""
    pairs = [(row, other) for row in rows if (other := rival(row, rows, units)) is not None]
    if not pairs:
        return f"No method was measured beside a random choice at equal {word}: nothing says that choosing helps."
    # Each of several comparisons may be won by chance: the bar is so high that any is won in one of forty.
    bar = statistics.NormalDist().inv_cdf(1 - 0.025 / len(pairs))
    known = [(c, c.error) for a, b in pairs if (c := compare(a, b, samples, units)).error is not None]
    if not known:
        return f"One sample tells no chance from skill: whether a method beats random at equal {word} is open."
    won = [(c, error) for c, error in known if error is not None and c.gain > bar * error]
    lost = [c for c, error in known if error is not None and c.gain < -bar * error]
    if won:
        best = max(won, key=lambda x: x[0].gain / (x[1] or 1e-12))[0]
        more = f", as do {len(won) - 1} more" if len(won) > 1 else ""
        gained = f"{units.differences(best.gain)[0].removeprefix('+')}{units.unit}"
        text = f"{best.a} beats {best.b} at equal {word}, by {gained}{more}"
    else:
        text = f"No method beats a random choice at equal {word} beyond chance"
    if lost:
        text += f"; {', '.join(c.a for c in lost)} {'is' if len(lost) == 1 else 'are'} worse than random"
    loose = [c for c, _ in known if not c.paired]
    note = "" if not loose else f"; {UNPAIRED}" if len(loose) == len(known) else f"; of {len(loose)} {UNPAIRED}"
    return f"{text} ({units.metric}, {len(known)} compared on {known[0][0].samples} samples{note})."


def best_in_words(row: Row, fit: Sequence[Row], loss: float, samples: Mapping[str, Tally], units: Units) -> str:
    """Why a row is the fastest that loses at most ``loss``, and whether chance may have put it before the next one.

    Args:
        row: the best one.
        fit: all that qualify, the unpatched model's row among them.
        loss: as the user gave it.
        samples: values of single samples.
        units: of the metric.
    """
    most = f"{units.differences(loss)[0].removeprefix('+')}{units.unit}"
    if row["method"] == BASE and len(fit) == 1:
        return f"No method is sure to lose at most {most} of {units.metric}: the unpatched model stays."
    others = sorted((r for r in fit if r is not row), key=lambda r: -r["speedup"])
    # Behind a method the next method tells more than the unpatched model, to which every row has its difference.
    following = next((r for r in others if r["method"] != BASE), others[0])
    text = f"{label(row)} ({row['speedup']:.2f}x) is the fastest of {len(fit)} that lose at most {most} of "
    text += f"{units.metric}; the next is {label(following)} ({following['speedup']:.2f}x)"
    if _level(row, following):
        text += ", and their quartiles overlap: the clock does not tell them apart"
    if BASE not in (following["method"], row["method"]):
        text += f". {compare(row, following, samples, units)}"
    return f"{text}."


def _level(a: Row, b: Row) -> bool:
    """True if the quartiles of two speed-ups overlap; what has no quartiles is its value."""
    (low, high), (low_b, high_b) = (
        tuple(r["speedup"] if r.get(name) is None else r[name] for name in ("speedup_low", "speedup_high"))
        for r in (a, b)
    )
    return bool(low <= high_b and low_b <= high)
