"""The engine of a benchmark: all rows of one model on the same data, each beside the unpatched model."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from tokred import adapters
from tokred.bench import feeds, results, samples, timing
from tokred.bench.arms import BASE
from tokred.bench.costs import Costs
from tokred.bench.entries import Cost, Entry
from tokred.bench.feeds import Batches, Feed, Unreadable, fingerprint
from tokred.bench.intervals import estimate
from tokred.bench.pair import Pair
from tokred.bench.parts import PARTS, Parts, roles
from tokred.bench.progress import telling
from tokred.bench.rivals import of_equal_work
from tokred.bench.scoring import Scorer, Tally
from tokred.core.method import Method
from tokred.errors import NothingRemovedWarning, UnsupportedModelError

SCENARIO = "benchmark"


class Todo(NamedTuple):
    """A row that is to be measured.

    Attributes:
        entry: the row.
        cost: what it keeps; None: not known yet.
        why: a reason for which it cannot be measured.
    """

    entry: Entry
    cost: Cost | None = None
    why: str | None = None


class Engine:
    """One benchmark: what all rows share.

    Args:
        model: unpatched, in evaluation mode, on ``device``: a module, a pipeline, or a callable that holds modules.
        stage: of the methods, where the model offers it; of several, with ``+`` between.
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
        stage: str,
        score: Scorer,
        feed: Feed,
        batches: Batches,
        device: torch.device,
        rounds: int,
        seed: int,
        name: str,
        path: Path | None,
    ) -> None:
        self.model, self.stage, self.score, self.feed, self.batches = model, stage, score, feed, batches
        self.device, self.seed, self.name, self.path = device, seed, name, path
        self.target: Any = feeds.target(model, stage.split("+"))
        self.rounds = max(rounds, batches.count)
        self.spent = {"timed": 0.0, "untimed": 0.0}
        self.costs = Costs(self.target, feed, self.probe)
        self.parts = Parts(device)
        self.roles = roles(model, self.target, feed.name)
        held = [x for one in feeds.modules(model) for x in (*one.parameters(), *one.buffers())]
        dtype = next((x.dtype for x in held if x.is_floating_point()), torch.float32)
        self.where = self._where(dtype)
        # Rows of other weights, data or runs, under the same name, are no rows of this table.
        self.head = {"scenario": SCENARIO, "model": name, "scored_by": score.name}
        self.head["case"] = fingerprint([f"{fingerprint(held)} {batches.prints} {feed.name} {feed.settings}"])
        self.known = self.head | {name: self.where[name] for name in ("device", "threads", "dtype")}
        self.there = {} if path is None else self._there(path)
        self.samples: dict[str, Tally] = {}
        self.stored = {} if path is None else samples.read(samples.beside(path), self.known)
        self.against = ""

    def _where(self, dtype: torch.dtype) -> dict[str, Any]:
        """Where rows are measured, as records tell it."""
        return results.here(self.device, dtype)

    @property
    def first(self) -> bool:
        """True in the process that tells of progress."""
        return True

    def _there(self, path: Path) -> dict[tuple[str, str], dict[str, Any]]:
        """Records of earlier runs of the same benchmark, by method and setting."""
        known = self.known
        found = results.records(results.read(path), SCENARIO)
        mine = [r for r in found if all(str(r.get(k)) == str(v) for k, v in known.items()) and "speedup" in r]
        return {(r["method"], r["setting"]): r for r in mine}

    def rows(self, wanted: Sequence[Entry], baselines: bool, progress: bool) -> list[dict[str, Any]]:
        """All rows, the unpatched model's first."""
        base = Entry(BASE, "")
        try:
            output = self.untimed()
        except Exception as error:
            error.add_note("tokred: this is the unpatched model on the first batch of data")
            raise
        output = self.feed.finish(self.model, output, self.batches.first)
        self.score(output, self.batches.first, output)  # a metric that does not fit is found before any row
        self.against = self.score.against(self.batches.first)
        with telling(progress and self.first, self.score) as (total, tell):
            costs: list[tuple[Entry, Cost]] = []
            refused: dict[str, str] = {}
            for one in wanted:
                try:
                    costs.append((one, self.cost(one)))
                except Exception as error:
                    refused[one.label] = reason(error)
            more = self.rivals(costs) if baselines else []
            total(1 + len(wanted) + len(more))
            known = {one.label: cost for one, cost in costs}
            todo = [Todo(base, self.costs.unpatched([*known.values()]))]
            todo += [Todo(one, known.get(one.label), refused.get(one.label)) for one in (*wanted, *more)]
            found = {one.label: tell(one, record) for one, record in self.each(todo)}
        return [found[item.entry.label] for item in todo]

    def rivals(self, costs: Sequence[tuple[Entry, Cost]]) -> list[Entry]:
        """Baselines of equal work for rows whose costs are known."""
        try:
            pictures = adapters.find(self.target, "projector") is not None
        except UnsupportedModelError:
            pictures = False

        def probe(methods: Sequence[Method]) -> Cost:
            return self.cost(Entry("rival", "", tuple(methods)), single=True)

        return of_equal_work(costs, probe, pictures)

    def untimed(self) -> Any:
        """The output of the model as it is now on the first batch."""
        return self._counted(lambda: self.feed.run(self.model, self.batches.first))

    def probe(self, single: bool = False) -> int:
        """Run the model as it is now as little as a report needs, and return the number of samples that it was given.

        Args:
            single: on the first sample of the first batch, where it can be cut out.
        """
        batch = self.feed.one(self.batches.first) if single else self.batches.first
        return int(self._counted(lambda: self.feed.probe(self.model, batch)))

    def _counted(self, run: Callable[[], Any]) -> Any:
        start = time.perf_counter()
        with torch.inference_mode():
            output = run()
        timing.synchronise(self.device)
        self.spent["untimed"] += time.perf_counter() - start
        return output

    def each(self, todo: Sequence[Todo]) -> Iterator[tuple[Entry, dict[str, Any]]]:
        """Rows with their records, as they are finished."""
        for item in todo:
            yield item.entry, self.tried(item)

    def tried(self, item: Todo) -> dict[str, Any]:
        """The record of a row; where the method cannot run, ``{"reason": ...}``.

        Raises:
            Unreadable: the data is at fault.
            Exception: the unpatched model's own row failed.
        """
        one, cost, why = item
        if why is None:
            try:
                return self.record(one, self.cost(one) if cost is None else cost)
            except Unreadable:
                raise
            except Exception as error:
                if not one.methods:
                    raise
                why = reason(error)
        return {"reason": why}

    def has(self, one: Entry) -> bool:
        """True if an earlier run has measured the row."""
        return (one.name, one.setting) in self.there

    def record(self, one: Entry, cost: Cost) -> dict[str, Any]:
        """The record of a row, read from the table or measured and written to it."""
        found = self.there.get((one.name, one.setting))
        if found is not None:
            if (one.name, one.setting) in self.stored:
                self.samples[one.label] = self.stored[one.name, one.setting]
            return found
        record = {**self.head, "method": one.name, "setting": one.setting, **cost, **self.measured(one), **self.where}
        self.write(one, record)
        return record

    def write(self, one: Entry, record: dict[str, Any]) -> None:
        """Add a row to the table, its samples first."""
        if self.path is not None:
            head = {**self.known, "method": one.name, "setting": one.setting}
            samples.write(samples.beside(self.path), head, self.samples[one.label])
            results.write(self.path, [record], overwrite=True)

    def cost(self, one: Entry, single: bool = False) -> Cost:
        """The tokens, work or bytes that a row's methods keep of the first batch, by their report.

        Args:
            one: the row.
            single: the first sample is enough.

        Raises:
            Exception: whatever the method, or the model with it, refuses by.
        """
        return self.costs.of(one, single)

    def measured(self, one: Entry) -> dict[str, Any]:
        """Quality, times and peak memory of a row, beside the unpatched model."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", NothingRemovedWarning)  # it was said when the cost was taken
            pair = Pair(self, one)
            seconds, memory = pair.run()
        self.spent["timed"] += sum(map(sum, seconds))
        tally, seconds, memory, pair.lengths = self.pooled(pair.tally, seconds, memory, pair.lengths)
        self.samples[one.label] = tally
        record = {**tally.record(self.score), **memory.record(), "rounds": self.rounds}
        if pair.lengths:
            mean = estimate(pair.lengths, [1.0] * len(pair.lengths))
            ends = {"generated": mean.value, "generated_low": mean.low, "generated_high": mean.high}
            record |= {name: value for name, value in ends.items() if value is not None}
        for part in PARTS:
            record |= results.spread(f"{part}_seconds", [found[part] for found in pair.parts if part in found])
        record |= results.spread("seconds", seconds[-1])
        return record | results.spread("speedup", timing.ratios(seconds)[-1])

    def pooled(
        self, tally: Tally, seconds: list[list[float]], memory: timing.Memory, lengths: list[float]
    ) -> tuple[Any, ...]:
        """Samples, times, memory and lengths of a row, with those of other processes where there are any."""
        return tally, seconds, memory, lengths

    def close(self) -> None:
        """Free what was begun to measure."""


def reason(error: Exception) -> str:
    """The text of an error in one line."""
    return " ".join(str(error).split()) or type(error).__name__
