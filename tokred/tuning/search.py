"""The search: shapes that have done well elsewhere, shapes by a sampler, and then moves from the best one.

All shapes are brought to the same predicted speed (or the same bytes), so that only what they lose is compared. The
constant schedules are always among them.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

from tokred.core.schedules import kept
from tokred.tuning.engine import Judged
from tokred.tuning.goal import Goal
from tokred.tuning.judge import Judge, Trial, lost
from tokred.tuning.layers import groups, restored, shared
from tokred.tuning.samplers import Chance, Learned
from tokred.tuning.space import SHARES, Base, Plan, setting_of
from tokred.tuning.speed import Clock

DRAWN = 0.45  # of the trials that are left after the known shapes, drawn by the sampler; the rest are moves


class Spent(Exception):
    """No trial is left."""


class Search:
    """Tries plans at a level of speed (or of bytes).

    Args:
        judge: runs them.
        clock: predicts speeds.
        bases: what may be used.
        goal: of the user.
        trials: settings to try at most.
        sampler: draws shapes.
        seed: of the order of moves.
        tell: is told of each trial.

    Attributes:
        tried: all settings, by their label.
        level: that plans are brought to.
        best: the complete trial of the level that loses least.
        stopped: True if the user broke off.
    """

    def __init__(
        self,
        judge: Judge,
        clock: Clock,
        bases: Sequence[Base],
        goal: Goal,
        trials: int,
        sampler: Chance | Learned,
        seed: int = 0,
        tell: Callable[[Trial, int], None] = lambda trial, count: None,
    ) -> None:
        self.judge, self.clock, self.bases, self.goal, self.trials = judge, clock, list(bases), goal, trials
        self.sampler, self.tell = sampler, tell
        self._rng = random.Random(seed)
        self.tried: dict[str, Trial] = {}
        self.level = 1.0
        self.best: Trial | None = None
        self.stopped = False
        self._here: list[str] = []
        self._asked = 0.0  # trials' worth of samples that layers were asked on

    @property
    def used(self) -> int:
        """Trials, and what the questions to single layers came to."""
        return len(self.tried) + round(self._asked)

    # ------------------------------------------------------------------ one setting

    def step(self, plan: Plan, level: float) -> int | None:
        """The mildest step of a plan that reaches a level; None where none does."""
        if self.goal.kind == "memory":
            return SHARES - max(1, kept(SHARES, self.goal.value))
        return self.clock.step(plan, level)

    def made(self, plan: Plan, step: int) -> Trial | None:
        """The trial of a setting, known or new; None where the shape does not fit the method or the model."""
        try:
            method = plan.at(step)
            if plan.base.kind != "cache":
                method.check(plan.base.depth)
        except (TypeError, ValueError):
            return None
        label = f"{plan.base.name} {setting_of(method)}".strip()
        known = self.tried.get(label)
        if known is not None:
            return known
        if self.used >= self.trials:
            raise Spent
        speed = 1.0 if self.goal.kind == "memory" else self.clock.speed(plan, step)
        return Trial(plan, step, method, label, speed)

    def attempt(self, plan: Plan, *, race: bool = True) -> Trial | None:
        """Try a plan at the level; the better one of it and the best is the best from then on."""
        try:
            step = self.step(plan, self.level)
            if step is None:
                plan, step = self._bent(plan)
        except (TypeError, ValueError):  # the shape does not fit the method or the model
            return None
        trial = None if step is None else self.made(plan, step)
        if trial is None:
            return None
        self.run(trial, race=race)
        self._here.append(trial.label)
        if trial.complete and (self.best is None or trial.loss < self.best.loss):
            self.best = trial
        return trial

    def _bent(self, plan: Plan) -> tuple[Plan, int | None]:
        """The least change to a plan that is too slow at every step, after which it is not."""
        for other in plan.earlier():
            step = self.step(other, self.level)
            if step is not None:
                return other, step
        return plan, None

    def run(self, trial: Trial, *, race: bool = False) -> Trial:
        """Judge a trial, unless that has been done."""
        new = trial.label not in self.tried
        self.tried[trial.label] = trial
        if not trial.complete:
            if race:
                self.judge.race(trial, self.best)
            else:
                self.judge.complete(trial)
        if new:
            self.tell(trial, len(self.tried))
        return trial

    @property
    def here(self) -> list[Trial]:
        """Complete trials at the present level."""
        return [self.tried[label] for label in dict.fromkeys(self._here) if self.tried[label].complete]

    # ------------------------------------------------------------------ the search

    def go(self) -> None:
        """Search until the trials are used up, nothing near the best is better, or the user breaks off."""
        try:
            if self.goal.kind == "loss":
                self._by_loss()
            else:
                self.level = self.goal.value if self.goal.kind == "speedup" else 1.0
                self._at_level(self.trials)
        except Spent:
            pass
        except KeyboardInterrupt:
            if self.best is None:
                raise
            self.stopped = True

    def _at_level(self, until: int, first: Plan | None = None) -> None:
        """All of the search at one level, as long as fewer than ``until`` settings were tried."""
        self.best, self._here = None, []
        for base in self.bases:
            self.attempt(base.constant, race=False)
        if first is not None:
            self.attempt(first)
        for base in self.bases:
            for plan in base.known():
                if self.used < until:
                    self.attempt(plan)
        self._by_layers(until)
        shaped = [base for base in self.bases if any(True for _ in base.known())]
        drawn = self.used + round(DRAWN * max(0, until - self.used))
        misses = 0
        while shaped and self.used < drawn and misses < 50:
            before = len(self.tried)
            self._draw(shaped)
            misses = 0 if len(self.tried) > before else misses + 1
        self._climb(until)

    def _by_layers(self, until: int) -> None:
        """Ask each layer of a cache what it gains by more rows, and try the shapes that follow.

        At most a third of the trials that are left go into the questions; where that is too little for single layers,
        neighbours are asked together.
        """
        best, pieces = self.best, self.judge.engine.pieces
        if best is None or best.plan.base.kind != "cache" or dict(best.plan.options).get("heads") == "global":
            return
        few = max(1, len(pieces) // 4)
        asked = groups(best.plan.base.depth, (until - self.used) * len(pieces) // (3 * few))
        if len(asked) < 2:
            return
        gains = [0.0] * best.plan.base.depth
        before = _mean(best.judged[:few])
        for layers in asked:
            plan, step = restored(best.plan, best.step, layers)
            method = plan.at(step)
            label = f"{plan.base.name} {setting_of(method)}".strip()
            after = _mean([self.judge.piece(label, method, "tune", i) for i in range(few)])
            self._asked += few / len(pieces)
            for i in layers:
                gains[i] = (before - after) / len(layers)
        for plan in shared(best.plan, gains):
            if self.used < until:
                self.attempt(plan)

    def _draw(self, bases: Sequence[Base]) -> None:
        dice = self.sampler.ask()
        name = dice.choice("method", tuple(base.text for base in bases))
        trial = self.attempt(next(base for base in bases if base.text == name).draw(dice))
        # A trial that was given up tells a loss too, of fewer samples.
        self.sampler.tell(float("inf") if trial is None else trial.loss)

    def _climb(self, until: int) -> None:
        """Moves from the best plan, and from there on, until none helps."""
        while self.best is not None:
            start = self.best
            moves = list(start.plan.moves(start.step))
            self._rng.shuffle(moves)
            for plan in moves:
                if self.used >= until:
                    return
                self.attempt(plan)
                if self.best is not start:
                    break
            else:
                return

    def _by_loss(self) -> None:
        """Raise the level as far as the loss allows, in turns with searches at it."""
        levels = [(self._fastest(base.constant), base.constant) for base in self.bases]
        self.level, plan = max(levels, key=lambda x: x[0])
        for share in (0.5, 1.0):
            self._at_level(max(len(self.tried) + len(self.bases), round(share * self.trials)), plan)
            if self.best is None:
                return
            plan = self.best.plan
            self.level = max(self.level, self._fastest(plan))
        self.best, self._here = None, []
        for one in (plan, *(base.constant for base in self.bases)):
            self.attempt(one, race=False)

    def _fastest(self, plan: Plan) -> float:
        """The highest speed at which a plan loses no more than it may; 1 where it always does."""
        low, high, base = 0, plan.steps, self.judge.base("tune")
        found = 1.0
        while high - low > max(1, plan.steps // 64):
            middle = (low + high) // 2
            trial = self.made(plan, middle)
            if trial is not None and lost(self.run(trial).judged, base, self.judge.engine.score) <= self.goal.value:
                low, found = middle, max(found, self.clock.speed(plan, middle))
            else:
                high = middle
        return found


def _mean(judged: Sequence[Judged]) -> float:
    """Mean of the guide over some pieces."""
    found = [value for piece in judged for value in piece.guide]
    return sum(found) / len(found)
