"""How fast a setting will be: a model of time that is fitted to a few measured forwards, and corrected by more.

The share of the unpatched model's time is a sum of parts, none of which can be negative: a fixed one, one in proportion
to the tokens that enter the blocks, one to their squares (attention), one to those that leave (the MLP); and for each
method its own work, by the blocks in which it acts and by the pairs that it compares there.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any, NamedTuple

import torch

from tokred import adapters
from tokred.bench.feeds.batches import tensors
from tokred.bench.read import samples
from tokred.core.method import Method
from tokred.tuning.engine import Engine, cut
from tokred.tuning.goal import Goal
from tokred.tuning.space import Base, Plan, spaced

RIDGE = 3e-3  # weight of what is assumed before anything is measured
# What is assumed: of a forward of blocks a tenth is fixed, and the rest goes by tokens. Of a cache nearly all is fixed.
SUPPOSED = {"block": (0.1, 0.4, 0.1, 0.4), "cache": (0.9, 0.1)}
OWN_WORK = {"block": (0.05, 0.02), "cache": (0.02,)}


def supposed(stage: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """The parts that are assumed, and those of a method's own work; of stages that are not listed those of blocks."""
    known = stage if stage in SUPPOSED else "block"
    return SUPPOSED[known], OWN_WORK[known]


Timed = Callable[[str, Sequence[Method]], list[float]]


class Seen(NamedTuple):
    """One measured setting: its base, what it costs by count, and the share of the unpatched model's time."""

    base: str
    parts: tuple[float, ...]
    own: tuple[float, ...]
    ratio: float


class Clock:
    """Predicts speeds.

    Args:
        engine: whose model is timed.
        timed: gives, under a name by which they may be remembered, the share of the unpatched model's time that some
            methods take.
    """

    def __init__(self, engine: Engine, timed: Timed) -> None:
        self.engine, self._timed = engine, timed
        self._seen: list[Seen] = []
        self._common: list[float] = list(supposed(engine.stage)[0])
        self._own: dict[str, list[float]] = {}
        self._corrections: dict[tuple[Base, object, object], float] = {}
        self._counts: dict[str, bool] = {}
        self._predicted: dict[tuple[Plan, int], float] = {}

    # ------------------------------------------------------------------ counting

    def parts(self, plan: Plan, step: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Parts of the time as shares of the unpatched model's: those of every method, and its own work."""
        if self.engine.stage == "cache":
            return (1.0, 1 - step / (plan.steps + 1)), (1.0,)
        method = plan.at(step)
        if not self._counts.get(plan.base.text, self.engine.stage == "block"):
            kept = 1 - step / (plan.steps + 1)
            return (1.0, kept, kept * kept, kept), (1.0, kept * kept)
        layers = self._layers(method)
        n, depth = layers[0][0], len(layers)
        acting = [before for before, after in layers if after != before]
        enter = sum(before for before, _ in layers) / (n * depth)
        squares = sum(before**2 for before, _ in layers) / (n * n * depth)
        leave = sum(after for _, after in layers) / (n * depth)
        pairs = sum(before**2 for before in acting) / (n * n * depth)
        return (1.0, enter, squares, leave), (len(acting) / depth, pairs)

    @cached_property
    def _host(self) -> Any:
        return adapters.find(self.engine.target).choose("auto")

    def _layers(self, method: Method) -> list[tuple[int, int]]:
        """Tokens that enter and leave each block, counted without a forward."""
        self._host.check(method)
        return [(before, after) for before, after, _ in self._host.plan(method, self.shape)]

    @cached_property
    def shape(self) -> tuple[int, ...]:
        """The shape of the batch that is timed."""
        return tuple(next(tensors(self.engine.timed)).shape)

    def _counted(self, plan: Plan, step: int) -> bool:
        """True if the tokens that are counted beforehand are those of a real forward."""
        try:
            layers = self._layers(plan.at(step))
        except Exception:  # an input that no shape tells the tokens of
            return False
        few = cut(self.engine.timed, range(min(2, samples(self.engine.timed))))
        real = self.engine.report(plan.at(step), few).layers
        return [after for _, after in layers] == [round(x.tokens_out) for x in real]

    # ------------------------------------------------------------------ measuring

    def calibrate(self, base: Base, goal: Goal) -> None:
        """Measure a handful of settings of a base, and fit.

        Args:
            base: the method.
            goal: of the search; where it is in bytes no speed has to be predicted, and the base is only tried.

        Raises:
            Exception: whatever the model refuses the base by.
        """
        constant = base.constant
        if goal.kind == "memory":
            self.engine.report(constant.at(constant.steps // 2), self.engine.timed)
            return
        if self.engine.stage == "block":
            self._counts[base.text] = self._counted(constant, max(1, constant.steps // 4))
        plans = [(constant, share) for share in (0.1, 0.25, 0.5)]
        if base.kind == "listed" and base.depth > 3:
            d = base.depth
            plans += [
                (spaced(base, 0, d, d, -1.0), 0.6),
                (spaced(base, d // 4, d, 3, 0.0), 0.6),
                (spaced(base, 0, 2, 2, 0.0), 0.7),
            ]
        chosen = [(plan, max(1, round(share * plan.steps))) for plan, share in plans]
        ratios = self._timed(base.text, [plan.at(step) for plan, step in chosen])
        for (plan, step), ratio in zip(chosen, ratios, strict=True):
            self._seen.append(Seen(base.text, *self.parts(plan, step), ratio))
        self.fit()

    def fit(self) -> None:
        """Find the parts that explain what was measured: least squares without negative ones."""
        names = sorted({seen.base for seen in self._seen})
        common, own = supposed(self.engine.stage)
        width = len(common) + len(names) * len(own)
        rows, wanted = [], []
        for seen in self._seen:
            row = [0.0] * width
            row[: len(common)] = seen.parts
            at = len(common) + names.index(seen.base) * len(own)
            row[at : at + len(own)] = seen.own
            # Relative errors count: a fast setting's time should be as near as a slow one's.
            rows.append([v / seen.ratio for v in row])
            wanted.append(1.0)
        rows.append([1.0] * len(common) + [0.0] * (width - len(common)))  # the unpatched model itself
        wanted.append(1.0)
        found = nonnegative(rows, wanted, [*common, *own * len(names)], RIDGE)
        self._common = found[: len(common)]
        for i, name in enumerate(names):
            at = len(common) + i * len(own)
            self._own[name] = found[at : at + len(own)]
        self._predicted.clear()

    def correct(self, plan: Plan, step: int, speed: float) -> None:
        """A plan's speed was measured: predictions for the same shape are shifted to it."""
        key = (plan.base, plan.weights, plan.options)
        self._predicted.clear()
        self._corrections[key] = self._corrections.get(key, 1.0) * speed / self.speed(plan, step)
        self._predicted.clear()

    # ------------------------------------------------------------------ predicting

    def speed(self, plan: Plan, step: int) -> float:
        """How many times as fast as the unpatched model."""
        known = self._predicted.get((plan, step))
        if known is None:
            parts, own = self.parts(plan, step)
            mine = self._own.get(plan.base.text, supposed(self.engine.stage)[1])
            ratio = sum(a * b for a, b in zip(parts, self._common, strict=True))
            ratio += sum(a * b for a, b in zip(own, mine, strict=True))
            factor = self._corrections.get((plan.base, plan.weights, plan.options), 1.0)
            known = self._predicted[plan, step] = factor / max(ratio, 1e-3)
        return known

    def step(self, plan: Plan, speed: float) -> int | None:
        """The mildest step that is so fast; None where none is."""
        low, high = 0, plan.steps
        if self.speed(plan, high) < speed:
            return None
        while high - low > 1:
            middle = (low + high) // 2
            if self.speed(plan, middle) >= speed:
                high = middle
            else:
                low = middle
        return high


def nonnegative(
    rows: Sequence[Sequence[float]], wanted: Sequence[float], supposed: Sequence[float], ridge: float
) -> list[float]:
    """Least squares without negative coefficients, which are drawn towards ``supposed`` with the weight ``ridge``."""
    a = torch.tensor(rows, dtype=torch.float64)
    b = torch.tensor(wanted, dtype=torch.float64)
    start = torch.tensor(supposed, dtype=torch.float64)
    gram = a.T @ a + ridge * torch.eye(len(start), dtype=torch.float64)
    right = a.T @ b + ridge * start
    x = start.clone()
    for _ in range(2000):
        before = x.clone()
        for i in range(len(x)):
            # Exact in one coordinate; the sum over all is convex, so that sweeps end at its one minimum.
            x[i] = ((right[i] - gram[i] @ x + gram[i, i] * x[i]) / gram[i, i]).clamp(min=0.0)
        if float((x - before).abs().max()) < 1e-9:
            break
    return [float(v) for v in x]


def ratio(seconds: Sequence[Sequence[float]], arm: int) -> float:
    """The median share of the first arm's time, round by round."""
    return statistics.median(a / b for a, b in zip(seconds[arm], seconds[0], strict=True))
