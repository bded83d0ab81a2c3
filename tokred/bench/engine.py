"""The engine of a benchmark: all rows of one model on the same data, each beside the unpatched model."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from tokred import adapters, api
from tokred.bench import results, samples, timing
from tokred.bench.arms import BASE
from tokred.bench.entries import Cost, Entry, of_equal_work
from tokred.bench.feeds import Batches, Feed, Unreadable, fingerprint
from tokred.bench.progress import telling
from tokred.bench.scoring import Scorer, Tally
from tokred.core.method import Method
from tokred.errors import NothingRemovedWarning

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
        model: unpatched, in evaluation mode, on ``device``: a module, or a pipeline.
        stage: of the methods; of several, with ``+`` between.
        score: the metric.
        feed: how the model runs on a batch.
        batches: the data.
        device: where it is measured.
        rounds: times that a pair is at least timed.
        seed: of the order.
        name: of the model.
        path: of the table that rows are written to, or None.
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
        self.rounds = max(rounds, batches.count)
        module: nn.Module = adapters.module_of(model)
        dtype = next((p.dtype for p in module.parameters() if p.is_floating_point()), torch.float32)
        self.where = self._where(dtype)
        # Rows of other weights or data, under the same name, are no rows of this table.
        weights = fingerprint([*module.parameters(), *module.buffers()])
        self.head = {"scenario": SCENARIO, "model": name, "stage": stage, "scored_by": score.name}
        self.head["case"] = fingerprint([f"{weights} {batches.prints} {feed.name} {feed.settings}"])
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
            with torch.inference_mode():
                output = self.feed.finish(self.feed.run(self.model, self.batches.first), self.batches.first)
        except Exception as error:
            error.add_note("tokred: this is the unpatched model on the first batch of data")
            raise
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
            more = of_equal_work(self.stage, costs, self._cost_of) if baselines else []
            total(1 + len(wanted) + len(more))
            known = {one.label: cost for one, cost in costs}
            todo = [Todo(base, _of_all(costs[0][1]) if costs else {})]
            todo += [Todo(one, known.get(one.label), refused.get(one.label)) for one in (*wanted, *more)]
            found = {one.label: tell(one, record) for one, record in self.each(todo)}
        return [found[item.entry.label] for item in todo]

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

    def _cost_of(self, method: Method) -> Cost:
        return self.cost(Entry(method.name, "", (method,)))

    def cost(self, one: Entry) -> Cost:
        """The tokens, work or bytes that a row's methods keep of the first batch, by their report.

        Raises:
            Exception: whatever the method, or the model with it, refuses by.
        """
        others = one.stages - set(self.feed.stages)
        if others:
            raise ValueError(
                f"it acts at stage {', '.join(sorted(others))}, which run {self.feed.name!r} does not measure: that is "
                f"for {', '.join(self.feed.stages)}"
            )
        with torch.inference_mode(), one.applied(self.model):
            self.feed.probe(self.model, self.batches.first)
            report: Any = api.report(self.model)
        layers = report.layers
        if report.stage == "block":
            ends = {"tokens_in": layers[0].tokens_in, "tokens_out": layers[-1].tokens_out}
            return {**ends, "gmacs": report.macs / 1e9, "gmacs_share": report.macs / report.macs_unpatched}
        rows = sum(layer.rows for layer in layers) / len(layers)
        return {"rows_left": rows, "bytes": report.bytes, "dense_bytes": report.dense_bytes}

    def measured(self, one: Entry) -> dict[str, Any]:
        """Quality, times and peak memory of a row, beside the unpatched model."""
        batches, tally = self.batches, Tally()
        arms = [Entry(BASE, ""), one] if one.methods else [one]
        entered, outputs = [0] * len(arms), {}
        batches.restart()

        @contextmanager
        def enter(arm: int) -> Iterator[None]:
            # Entering is not timed: here the batch is fetched. The first time is the warm-up, on the first batch.
            batches.seek(max(0, entered[arm] - 1))
            entered[arm] += 1
            with arms[arm].applied(self.model):
                yield

        def collect(arm: int, i: int, result: Any) -> None:
            if i >= batches.count:  # a batch that came round again, to be timed
                return
            outputs[arm] = self.feed.finish(result, batches.batch)
            if len(outputs) < len(arms):
                return
            dense, mine = outputs[0], outputs[len(arms) - 1]
            tally.take(self.score, mine, batches.batch, dense)
            outputs.clear()

        def run(i: int) -> Any:
            return self.feed.run(self.model, batches.batch)

        with warnings.catch_warnings():
            warnings.simplefilter("ignore", NothingRemovedWarning)  # it was said when the cost was taken
            entering = [partial(enter, arm) for arm in range(len(arms))]
            seconds = timing.paired(entering, run, self.rounds, device=self.device, seed=self.seed, collect=collect)
            with one.applied(self.model):
                memory = timing.peak_memory(lambda: self.feed.run(self.model, batches.first), self.device)
        tally, seconds, memory = self.pooled(tally, seconds, memory)
        self.samples[one.label] = tally
        record = {**tally.record(self.score), **memory.record(), "rounds": self.rounds}
        record |= results.spread("seconds", seconds[-1])
        return record | results.spread("speedup", timing.ratios(seconds)[-1])

    def pooled(self, tally: Tally, seconds: list[list[float]], memory: timing.Memory) -> tuple[Any, ...]:
        """Samples, times and memory of a row, with those of other processes where there are any."""
        return tally, seconds, memory

    def close(self) -> None:
        """Free what was begun to measure."""


def _of_all(cost: Cost) -> Cost:
    """The cost of the unpatched model, which every report tells beside that of its method."""
    if "gmacs" in cost:
        gmacs = cost["gmacs"] / cost["gmacs_share"]
        return {"tokens_in": cost["tokens_in"], "tokens_out": cost["tokens_in"], "gmacs": gmacs, "gmacs_share": 1.0}
    return {"bytes": cost["dense_bytes"], "dense_bytes": cost["dense_bytes"]}


def reason(error: Exception) -> str:
    """The text of an error in one line."""
    return " ".join(str(error).split()) or type(error).__name__
