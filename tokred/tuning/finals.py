"""The finals: the best shapes, the best constant schedule and a random choice, timed beside each other and held out.

Predicted speeds choose what is tried; measured ones decide. A finalist that is not as fast as it should be is made so,
and timed again.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from tokred.bench.intervals import estimate
from tokred.bench.read import samples
from tokred.bench.timing import Spread, ratios, spread
from tokred.core.method import Method
from tokred.tuning.engine import cut
from tokred.tuning.goal import Goal
from tokred.tuning.judge import Trial, blended, difference
from tokred.tuning.search import Search, Spent
from tokred.tuning.space import SHARES, Base

TOLERANCE = 0.015  # of a speed: so near two settings are equally fast
ATTEMPTS = 3  # at making finalists as fast as they should be
FINALISTS = 3
NEAR = 0.05  # a constant schedule that is at most so much faster than was asked for sets the speed for the others
FAR = 0.1  # beyond so much the chosen shape is not brought to its speed either: that would remove too much for the goal
LEVEL = (-0.005, 0.02)  # how much faster than the constant setting a chosen one may be measured: from level upwards
REFITS = 5


@dataclass
class Finalist:
    """One setting of the finals.

    Attributes:
        role: ``"searched"``, ``"constant"`` or ``"random"``.
        trial: the setting.
        speed: measured, as a multiple of the unpatched model's.
        seconds: of each round, and of the unpatched model in the same.
        memory: share of the bytes of the cache; None where there is none.
    """

    role: str
    trial: Trial
    speed: Spread = field(default_factory=lambda: Spread(1.0, 1.0, 1.0))
    seconds: tuple[float, ...] = ()
    memory: float | None = None


class Finals:
    """Measures what a search found.

    Args:
        search: that is over.
        random: the base of a random choice; None: there is none.
        rounds: of timing.
    """

    def __init__(self, search: Search, random: Base | None, rounds: int) -> None:
        self.search, self.rounds, self._random = search, rounds, random
        self.engine = search.judge.engine

    def entrants(self) -> list[Finalist]:
        """The settings that are measured: the best constant one first.

        Raises:
            ValueError: no constant setting could be run.
        """
        found = self.search.here
        constant = [t for t in found if t.plan.constant]
        shaped = [t for t in found if not t.plan.constant]
        base = self.search.judge.base("tune")
        scores = dict(zip((t.label for t in found), blended(found, base, self.engine.score), strict=True))
        constant.sort(key=lambda t: scores[t.label])
        shaped.sort(key=lambda t: scores[t.label])
        chosen = [Finalist("constant", t) for t in constant[:1]]
        chosen += [Finalist("searched", t) for t in shaped[:FINALISTS]]
        if self._random is not None:
            trial = self._at(self._random.constant, self.search.level)
            if trial is not None:
                chosen.append(Finalist("random", trial))
        return chosen

    def _at(self, plan: Any, level: float) -> Trial | None:
        """The judged trial of a plan at a level; it does not count among those of the search."""
        step = self.search.step(plan, level)
        return self._made(plan, plan.steps if step is None else step)

    def _made(self, plan: Any, step: int) -> Trial | None:
        """The judged trial of a plan at a step; it does not count among those of the search."""
        limit, self.search.trials = self.search.trials, 10**9
        try:
            trial = self.search.made(plan, step)
            return None if trial is None else self.search.run(trial)
        except Spent:  # pragma: no cover - there is no limit
            return None
        finally:
            self.search.trials = limit

    def measure(self, entrants: list[Finalist]) -> float:
        """Time all, and bring them to one speed (or below the goal's bytes); returns that speed."""
        needed = self.search.level
        if self.search.goal.kind == "memory":
            for one in entrants:
                self._shrink(one)
        for attempt in range(ATTEMPTS):
            self._time(entrants, seed=attempt)
            if self.search.goal.kind == "memory":
                break
            first = entrants[0]
            if first.role == "constant" and needed < first.speed.median <= needed * (1 + NEAR):
                needed = first.speed.median
            changed = False
            for one in entrants:
                self.search.clock.correct(one.trial.plan, one.trial.step, one.speed.median)
                off = one.speed.median / needed - 1
                low = -TOLERANCE / 3 if one.role == "searched" else -TOLERANCE
                if low <= off <= TOLERANCE or attempt + 1 == ATTEMPTS:
                    continue
                trial = self._at(one.trial.plan, needed)
                if trial is not None and trial.label != one.trial.label:
                    one.trial, changed = trial, True
            if not changed:
                break
        return needed

    def _shrink(self, one: Finalist) -> None:
        """Make a policy's share smaller until the bytes that are really held are those of the goal.

        Rows that were read since, and indices of rows by head, take bytes that a share does not count. A run that holds
        far more than its share has rows that no policy governs, and is left as it is.
        """
        wanted = self.search.goal.value
        for _ in range(ATTEMPTS):
            held = self.memory(one.trial.method)
            if not wanted * (1 + TOLERANCE) < held <= wanted * (1 + FAR):
                return
            share = 1 - one.trial.step / SHARES
            trial = self._made(one.trial.plan, SHARES - max(1, int(share * wanted / held * SHARES)))
            if trial is None or trial.label == one.trial.label:
                return
            one.trial = trial

    def level(self, best: Finalist, entrants: Sequence[Finalist]) -> None:
        """Bring the chosen shape to the speed that the constant setting is measured at, and time both together.

        One amount for all layers goes in coarse steps, and a shape in fine ones: it is the shape that gives way. What
        the table says of the two is then said at equal time, and no choice looks good for being slower.

        Args:
            best: its trial is replaced.
            entrants: all; the constant setting is the first of them, and those that the table shows are timed.
        """
        rival = entrants[0]
        if rival.role != "constant" or best is rival or self.search.goal.kind != "speedup":
            return
        shown = [one for one in entrants if one is best or one is rival or one.role == "random"]
        if rival.speed.median > self.search.level * (1 + FAR):
            return
        tries: list[tuple[float, list[Finalist]]] = []
        for attempt in range(REFITS):
            self._time(shown, seed=50 + attempt)
            beside = spread([a / b for a, b in zip(rival.seconds, best.seconds, strict=True)]).median
            tries.append((beside - 1, [replace(one) for one in shown]))
            if LEVEL[0] <= beside - 1 <= LEVEL[1]:
                break
            self.search.clock.correct(best.trial.plan, best.trial.step, beside * rival.speed.median)
            trial = self._at(best.trial.plan, rival.speed.median)
            if trial is None or trial.label in {one.trial.label for _, found in tries for one in found}:
                break
            best.trial = trial
        # The nearest of those that are not slower; where all are, the fastest.
        off = min((o for o, _ in tries if o >= LEVEL[0]), default=max(o for o, _ in tries))
        for one, found in zip(shown, next(found for o, found in tries if o == off), strict=True):
            one.trial, one.speed, one.seconds, one.memory = found.trial, found.speed, found.seconds, found.memory

    def _time(self, entrants: Sequence[Finalist], seed: int) -> None:
        methods: list[Method] = [one.trial.method for one in entrants]
        seconds = self.engine.times(methods, self.rounds, seed=seed)
        for one, mine, faster in zip(entrants, seconds[1:], ratios(seconds)[1:], strict=True):
            one.seconds, one.speed = tuple(mine), spread(faster)
            if self.engine.stage == "cache":
                one.memory = self.memory(one.trial.method)

    def memory(self, method: Method) -> float:
        """The share of the bytes that a full cache would have."""
        few = cut(self.engine.timed, range(min(2, samples(self.engine.timed))))
        report = self.engine.report(method, few)
        return float(report.bytes / report.dense_bytes)

    def winner(self, entrants: Sequence[Finalist], needed: float) -> Finalist:
        """The one that loses least of those that are fast (or small) enough; else the nearest."""
        goal, base = self.search.goal, self.search.judge.base("tune")
        running = [one for one in entrants if one.role != "random"]
        trials = [one.trial for one in running]
        others = [t for t in self.search.here if t.label not in {x.label for x in trials}]
        scores = blended([*trials, *others], base, self.engine.score)[: len(trials)]
        fit = [i for i, one in enumerate(running) if fits(one, goal, needed)]
        if not fit:
            if goal.kind == "memory":  # where a run adds rows of its own, none is small enough, and all are as large
                least = min(one.memory or 1.0 for one in running)
                fit = [i for i, one in enumerate(running) if (one.memory or 1.0) <= least * (1 + TOLERANCE)]
                return running[min(fit, key=lambda i: scores[i])]
            return max(running, key=lambda one: one.speed.median)
        return running[min(fit, key=lambda i: scores[i])]

    # ------------------------------------------------------------------ rows

    def row(self, role: str, one: Finalist, rival: Finalist | None) -> dict[str, Any]:
        """A row of the held-out table, beside the unpatched model and the best constant schedule."""
        judge, score = self.search.judge, self.engine.score
        held, dense = judge.held(one.trial.label, one.trial.method), judge.base("held")
        found = {**self._quality(held, dense), "role": role, "method": one.trial.plan.base.name}
        found["setting"] = one.trial.label.partition(" ")[2]
        found |= {"speedup": one.speed.median, "speedup_low": one.speed.low, "speedup_high": one.speed.high}
        found |= {"memory": one.memory, "predicted": one.trial.speed}
        if rival is not None and rival is not one:
            other = judge.held(rival.trial.label, rival.trial.method)
            gain = difference(held, other, score, judge.groups("held"))
            found |= dict(zip(("gain", "gain_low", "gain_high"), gain, strict=True))
            beside = spread([a / b for a, b in zip(rival.seconds, one.seconds, strict=True)])
            found |= {"beside": beside.median, "beside_low": beside.low, "beside_high": beside.high}
        return found

    def unpatched(self) -> dict[str, Any]:
        """The row of the model as it is."""
        dense = self.search.judge.base("held")
        found = {**self._quality(dense, dense), "role": "unpatched", "method": "unpatched", "setting": ""}
        return found | {"speedup": 1.0, "speedup_low": 1.0, "speedup_high": 1.0}

    def _quality(self, held: Any, dense: Any) -> dict[str, Any]:
        score, groups = self.engine.score, self.search.judge.groups("held")
        values, weights = ([v for piece in held for v in piece[i]] for i in (1, 2))
        quality = estimate(values, weights, groups)
        found = difference(held, dense, score, groups)
        shown = [None if v is None else math.exp(v) if score.log else v for v in quality]
        return {
            **dict(zip(("quality", "low", "high"), shown, strict=True)),
            **dict(zip(("difference", "difference_low", "difference_high"), found, strict=True)),
            "samples": len(values),
        }

    def front(self, best: Finalist, rival: Finalist, levels: Sequence[float]) -> list[dict[str, Any]]:
        """Rows of the chosen shape and of the constant one at other speeds, timed together."""
        pairs: list[Finalist] = []
        for level in levels:
            for role, one in (("searched", best), ("constant", rival)):
                if role == "constant" and rival is best:
                    continue
                trial = self._at(one.trial.plan, level)
                if trial is not None and trial.label not in {p.trial.label for p in pairs}:
                    pairs.append(Finalist(role, trial))
        if not pairs:
            return []
        self._time(pairs, seed=99)
        return [self.row(one.role, one, None) for one in pairs]


def fits(one: Finalist, goal: Goal, needed: float) -> bool:
    """True if a finalist is as fast, or as small, as it has to be."""
    if goal.kind == "memory":
        return one.memory is not None and one.memory <= goal.value * (1 + TOLERANCE)
    return one.speed.median >= needed * (1 - TOLERANCE)


def pareto(rows: Sequence[dict[str, Any]], better: str) -> list[dict[str, Any]]:
    """The rows that no other beats in speed and in quality, the slowest first."""
    sign = 1 if better == "higher" else -1
    kept: list[dict[str, Any]] = []
    for row in sorted(rows, key=lambda r: (-r["speedup"], -sign * r["quality"])):
        if not kept or sign * row["quality"] > sign * kept[-1]["quality"]:
            kept.append(row)
    return kept[::-1]
