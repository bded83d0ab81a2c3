"""The engine of a benchmark: all rows of one model on the same data, each beside the unpatched model."""

from __future__ import annotations

import time
import warnings
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from tokred import adapters
from tokred.bench import feeds, results, timing
from tokred.bench.arms import BASE
from tokred.bench.costs import Costs
from tokred.bench.entries import Cost, Entry
from tokred.bench.feeds import Batches, Feed, Unreadable, fingerprint
from tokred.bench.outputs import Generated
from tokred.bench.parts import PARTS, Parts, roles
from tokred.bench.progress import telling
from tokred.bench.rivals import of_equal_work
from tokred.bench.scoring import Scorer, Tally, estimate
from tokred.core.method import Method
from tokred.errors import NothingRemovedWarning, UnsupportedModelError

SCENARIO = "benchmark"
TURN = 0.02  # share of its forwards that patching and unpatching may take
GROUP = 16  # batches that an arm runs at most before it is the other's turn


class Engine:
    """One benchmark: what all rows share.

    Args:
        model: unpatched, in evaluation mode, on ``device``: a module, a pipeline, or a callable that holds modules.
        stages: of the methods, those that the model offers.
        score: the metric.
        feed: how the model runs on a batch.
        batches: the data.
        device: where it is measured.
        rounds: times that a pair is at least timed.
        seed: of the order.
        name: of the model.
        path: of the table that rows are written to, or None.

    Attributes:
        spent: seconds of runs of the model that were ``"timed"`` and ``"untimed"``.
    """

    def __init__(
        self,
        model: Any,
        stages: Sequence[str],
        score: Scorer,
        feed: Feed,
        batches: Batches,
        device: torch.device,
        rounds: int,
        seed: int,
        name: str,
        path: Path | None,
    ) -> None:
        self.model, self.score, self.feed, self.batches = model, score, feed, batches
        self.device, self.seed, self.name, self.path = device, seed, name, path
        self.target: Any = feeds.target(model, stages)
        self.rounds = max(rounds, batches.count)
        self.spent = {"timed": 0.0, "untimed": 0.0}
        self.costs = Costs(self.target, feed, self._untimed)
        self.parts = Parts(device)
        self.roles = roles(model, self.target, feed.name)
        held = [x for one in feeds.modules(model) for x in (*one.parameters(), *one.buffers())]
        dtype = next((x.dtype for x in held if x.is_floating_point()), torch.float32)
        self.where = results.here(device, dtype)
        # Rows of other weights, data or runs, under the same name, are no rows of this table.
        self.head = {"scenario": SCENARIO, "model": name, "scored_by": score.name}
        self.head["case"] = fingerprint([f"{fingerprint(held)} {batches.prints} {feed.name} {feed.settings}"])
        self.there = {} if path is None else self._there(path)

    def _there(self, path: Path) -> dict[tuple[str, str], dict[str, Any]]:
        """Records of earlier runs of the same benchmark, by method and setting."""
        known = self.head | {name: self.where[name] for name in ("device", "threads", "dtype")}
        found = results.records(results.read(path), SCENARIO)
        mine = [r for r in found if all(str(r.get(k)) == str(v) for k, v in known.items()) and "speedup" in r]
        return {(r["method"], r["setting"]): r for r in mine}

    def rows(self, wanted: Sequence[Entry], baselines: bool, progress: bool) -> list[dict[str, Any]]:
        """All rows, the unpatched model's first."""
        base = Entry(BASE, "")
        try:
            output = self._untimed()
        except Exception as error:
            error.add_note("tokred: this is the unpatched model on the first batch of data")
            raise
        output = self.feed.finish(self.model, output, self.batches.first)
        self.score(output, self.batches.first, output)  # a metric that does not fit is found before any row
        with telling(progress, self.score) as (total, tell):
            costs: list[tuple[Entry, Cost]] = []
            refused: dict[str, str] = {}
            for one in wanted:
                try:
                    costs.append((one, self.costs.of(one)))
                except Exception as error:
                    refused[one.label] = reason(error)
            more = self.rivals(costs) if baselines else []
            total(1 + len(wanted) + len(more))
            known = {one.label: cost for one, cost in costs}
            found = [tell(base, self.record(base, self.costs.unpatched([*known.values()])))]
            for one in (*wanted, *more):
                found.append(tell(one, self._tried(one, known.get(one.label), refused.get(one.label))))
        return found

    def rivals(self, costs: Sequence[tuple[Entry, Cost]]) -> list[Entry]:
        """Baselines of equal work for rows whose costs are known."""
        try:
            pictures = adapters.find(self.target, "projector") is not None
        except UnsupportedModelError:
            pictures = False

        def probe(methods: Sequence[Method]) -> Cost:
            return self.costs.of(Entry("rival", "", tuple(methods)))

        return of_equal_work(costs, probe, pictures)

    def _untimed(self, probe: bool = False) -> Any:
        """A run of the model as it is now on the first batch; of a probe there is no output."""
        start = time.perf_counter()
        with torch.inference_mode():
            output = (self.feed.probe if probe else self.feed.run)(self.model, self.batches.first)
        timing.synchronise(self.device)
        self.spent["untimed"] += time.perf_counter() - start
        return output

    def _tried(self, one: Entry, cost: Cost | None, why: str | None) -> dict[str, Any]:
        """The record of a row; where the method cannot run, ``{"reason": ...}``."""
        if why is None:
            try:
                return self.record(one, self.costs.of(one) if cost is None else cost)
            except Unreadable:
                raise
            except Exception as error:
                why = reason(error)
        return {"reason": why}

    def record(self, one: Entry, cost: Cost) -> dict[str, Any]:
        """The record of a row, read from the table or measured and written to it."""
        found = self.there.get((one.name, one.setting))
        if found is not None:
            return found
        record = {**self.head, "method": one.name, "setting": one.setting, **cost, **self._measured(one), **self.where}
        if self.path is not None:
            results.write(self.path, [record], overwrite=True)
        return record

    def _measured(self, one: Entry) -> dict[str, Any]:
        """Quality, times and peak memory of a row, beside the unpatched model."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", NothingRemovedWarning)  # it was said when the cost was taken
            pair = _Pair(self, one)
            seconds = pair.run()
            with one.applied(self.target):
                memory = timing.peak_memory(self._untimed, self.device)
        self.spent["timed"] += sum(map(sum, seconds))
        record = {**pair.tally.record(self.score), **memory.record(), "rounds": self.rounds}
        if pair.lengths:
            mean = estimate(pair.lengths, [1.0] * len(pair.lengths))
            ends = {"generated": mean.value, "generated_low": mean.low, "generated_high": mean.high}
            record |= {name: value for name, value in ends.items() if value is not None}
        for part in PARTS:
            record |= results.spread(f"{part}_seconds", [found[part] for found in pair.parts if part in found])
        record |= results.spread("seconds", seconds[-1])
        return record | results.spread("speedup", timing.ratios(seconds)[-1])


class _Pair:
    """A row and the unpatched model on all batches.

    Args:
        engine: of the benchmark.
        one: the row; without methods it is measured alone.

    Attributes:
        tally: values of the samples.
        lengths: tokens of each answer that the row generated.
        parts: seconds of the parts of each of the row's runs.
    """

    def __init__(self, engine: Engine, one: Entry) -> None:
        self.engine, self.tally, self.methods = engine, Tally(), one.methods
        self.arms = [Entry(BASE, ""), one] if one.methods else [one]
        self.lengths: list[float] = []
        self.parts: list[dict[str, float]] = []
        self.outputs: dict[int, dict[int, Any]] = {}
        self.window: dict[int, Any] = {}

    def run(self) -> list[list[float]]:
        """Seconds of each arm in each round; everything else is left in the attributes."""
        engine = self.engine
        engine.batches.restart()
        turns, runs = zip(*(self._warm(arm) for arm in self.arms), strict=True)
        # Arms take turns after so many batches that patching takes little of the time.
        group = min(GROUP, max(1, int(sum(turns) / (TURN * sum(runs)))), engine.batches.together)
        with engine.parts.watching(engine.roles, self.methods):
            return timing.paired(
                [partial(arm.applied, engine.target) for arm in self.arms],
                self._run,
                engine.rounds,
                device=engine.device,
                warmup=0,
                seed=engine.seed,
                collect=self._collect,
                group=group,
                ready=self._ready,
            )

    def _warm(self, arm: Entry) -> tuple[float, float]:
        """Seconds of patching and unpatching, and of a run that warms up."""
        start = time.perf_counter()
        with arm.applied(self.engine.target):
            middle = time.perf_counter()
            self.engine._untimed()
            end = time.perf_counter()
        return time.perf_counter() - end + middle - start, end - middle

    def _ready(self, arm: int, i: int) -> None:
        """Have a batch at hand."""
        if i not in self.window:
            self.engine.batches.seek(i)
            self.window[i] = self.engine.batches.batch

    def _run(self, i: int) -> tuple[Any, Any]:
        self.engine.parts.begin()
        output = self.engine.feed.run(self.engine.model, self.window[i])
        return output, self.engine.parts.end()

    def _collect(self, arm: int, i: int, result: tuple[Any, Any]) -> None:
        """Keep what a run gave; score it when both arms have seen the batch."""
        engine, last = self.engine, len(self.arms) - 1
        output, marks = result
        if arm == last:
            self.parts.append(engine.parts.seconds(marks))
        new = i < engine.batches.count  # else one that came round again, to be timed
        seen = self.outputs.setdefault(i, {})
        seen[arm] = engine.feed.finish(engine.model, output, self.window[i]) if new else None
        if len(seen) < len(self.arms):
            return
        batch = self.window.pop(i)
        dense, mine = self.outputs.pop(i)[0], seen[last]
        if not new:
            return
        values, weights = engine.score(mine, batch, dense)
        base = engine.score(dense, batch, dense)[0]
        if len(values) != len(base):
            raise ValueError(f"metric returned {len(values)} values, and {len(base)} for the unpatched model")
        self.tally.values += values
        self.tally.base += base
        self.tally.weights += weights
        if isinstance(mine, Generated):
            self.lengths += map(float, mine.lengths)


def reason(error: Exception) -> str:
    """The text of an error in one line."""
    return " ".join(str(error).split()) or type(error).__name__
