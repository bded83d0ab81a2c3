"""The engine of a benchmark: all rows of one model on the same data, each beside the unpatched model."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch

from tokred import adapters
from tokred.bench import feeds, results, samples, timing
from tokred.bench.arms import BASE
from tokred.bench.codes import code_of, model_of
from tokred.bench.costs import Costs
from tokred.bench.entries import Cost, Entry
from tokred.bench.feeds import Batches, Feed, Unreadable, fingerprint
from tokred.bench.feeds.batches import nbytes
from tokred.bench.intervals import estimate
from tokred.bench.pair import Pair
from tokred.bench.parts import PARTS, Parts, roles
from tokred.bench.progress import telling
from tokred.bench.rivals import of_equal_work
from tokred.bench.scoring import Scorer, Tally
from tokred.core.method import Method
from tokred.errors import NothingRemovedWarning, UnsupportedModelError

SCENARIO = "benchmark"
KEPT = 2**24  # bytes of the unpatched model's outputs, fewer than readings of memory can tell
Key = tuple[str, ...]  # case, method and setting
Record = dict[str, Any]
T = TypeVar("T")


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
        scores: the metrics, each of which has a record of every row.
        feed: how the model runs on a batch.
        batches: the data.
        device: where it is measured.
        rounds: times that a pair is at least timed.
        seed: of the order.
        name: of the model.
        path: of the table that rows are written to, or None.
        pairs: times that a pair is at most timed, where outputs of the unpatched model can be kept; None: no limit.

    Attributes:
        kept: outputs of the unpatched model by number of batch, while they are small.
        spent: seconds of runs of the model that were ``"timed"`` and ``"untimed"``.
        samples: for each row, by its label, values of single samples by each metric.
        reused: labels of rows that an earlier run has measured.
    """

    def __init__(
        self,
        model: Any,
        stage: str,
        scores: Sequence[Scorer],
        feed: Feed,
        batches: Batches,
        device: torch.device,
        rounds: int,
        seed: int,
        name: str,
        path: Path | None,
        pairs: int | None = None,
    ) -> None:
        self.model, self.stage, self.scores, self.feed, self.batches = model, stage, tuple(scores), feed, batches
        self.device, self.seed, self.name, self.path, self.pairs = device, seed, name, path, pairs
        self.kept: dict[int, Any] = {}
        self._room = KEPT
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
        what = f"{model_of(feeds.modules(model))} {code_of(type(model))} {fingerprint(held)}"
        self.case = fingerprint([f"{what} {batches.prints} {feed.name} {feed.settings}"])
        self.head = {"scenario": SCENARIO, "model": name}
        self._cases: dict[str, list[str]] = {}
        self._metrics = ["" if s.own is None else f"{code_of(s.own)} {s.better}" for s in self.scores]
        self.there = [{}] * len(self.scores) if path is None else self._there(path)
        self.samples: dict[str, list[Tally]] = {}
        self.stored = [{}] * len(self.scores) if path is None else self._stored(path)
        self.reused: set[str] = set()
        self.against = [""] * len(self.scores)

    def _where(self, dtype: torch.dtype) -> dict[str, Any]:
        """Where rows are measured, as records tell it."""
        return results.here(self.device, dtype)

    @property
    def first(self) -> bool:
        """True in the process that tells of progress."""
        return True

    def known(self, score: Scorer) -> Record:
        """Fields by which rows of this model are known in a table: of a metric, and where they were measured."""
        where = {name: self.where[name] for name in ("device", "threads", "dtype")}
        return {**self.head, "scored_by": score.name, **where}

    def cases(self, one: Entry) -> list[str]:
        """A row's case by each metric: model, data and run, and the code of methods and metrics that are not ours."""
        if one.label not in self._cases:
            codes = [code for method in one.methods if (code := code_of(type(method), *_functions(method)))]
            found = [fingerprint([self.case, *codes, own]) if own or codes else self.case for own in self._metrics]
            self._cases[one.label] = found
        return self._cases[one.label]

    def _there(self, path: Path) -> list[dict[Key, Record]]:
        """For each metric, records of earlier runs of the same model."""
        found = [r for r in results.records(results.read(path), SCENARIO) if "speedup" in r]
        mine: list[dict[Key, Record]] = []
        for score in self.scores:
            known = {name: str(value) for name, value in self.known(score).items()}
            fits = [r for r in found if all(str(r.get(name)) == value for name, value in known.items())]
            mine.append({(str(r.get("case")), r["method"], r["setting"]): r for r in fits})
        return mine

    def _stored(self, path: Path) -> list[dict[Key, Tally]]:
        """Samples of the same rows, where they were kept."""
        by = ("case", "method", "setting")
        return [samples.read(samples.beside(path), self.known(score), by) for score in self.scores]

    def _of(self, found: Sequence[Mapping[Key, T]], one: Entry) -> list[T] | None:
        """A row's own of what earlier runs have, one a metric; None where one has none."""
        keys = [(case, one.name, one.setting) for case in self.cases(one)]
        mine = [kept[key] for kept, key in zip(found, keys, strict=True) if key in kept]
        return mine if len(mine) == len(keys) else None

    def rows(self, wanted: Sequence[Entry], baselines: bool, progress: bool) -> list[Record]:
        """All rows, the unpatched model's first, and of each method as many as there are metrics."""
        base = Entry(BASE, "")
        try:
            output = self.untimed()
        except Exception as error:
            error.add_note("tokred: this is the unpatched model on the first batch of data")
            raise
        first = self.batches.first
        # As in the rows: what metrics read may run through modules of the user's.
        with torch.inference_mode():
            output = self.feed.finish(self.model, output, first)
            self.scores = tuple(self._fitted(score) for score in self.scores)
            for score in self.scores:
                score(output, first, output)  # a metric that does not fit is found before any row
        self.against = [score.against(first) for score in self.scores]
        with telling(progress and self.first, self.scores) as (total, tell):
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
            found = {one.label: tell(one, records, one.label in self.reused) for one, records in self.each(todo)}
        return [row for item in todo for row in found[item.entry.label]]

    def _fitted(self, score: Scorer) -> Scorer:
        """The metric; one that is fitted, on what the unpatched model answers to all batches."""
        if score.ready is None or score.ready.fit is None:
            return score
        see, make = score.ready.fit
        seen = []
        self.batches.restart()
        for i in range(self.batches.count):
            self.batches.seek(i)
            batch = self.batches.batch
            output = self._counted(partial(self.feed.run, self.model, batch))
            seen.append(see(self.feed.finish(self.model, output, batch), batch))
        return replace(score, fitted=make(self.everywhere(seen)))

    def everywhere(self, found: list[Any]) -> list[Any]:
        """A list, with those of other processes where there are any."""
        return found

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

    def each(self, todo: Sequence[Todo]) -> Iterator[tuple[Entry, list[Record]]]:
        """Rows with their records, one a metric, as they are finished."""
        for item in todo:
            yield item.entry, self.tried(item)

    def tried(self, item: Todo) -> list[Record]:
        """The records of a row, one a metric; where the method cannot run, ``{"reason": ...}``.

        Raises:
            Unreadable: the data is at fault.
            Exception: the unpatched model's own row failed.
        """
        one, cost, why = item
        if why is None:
            try:
                return self.records(one, self.cost(one) if cost is None else cost)
            except Unreadable:
                raise
            except Exception as error:
                if not one.methods:
                    raise
                why = reason(error)
        return [{"reason": why} for _ in self.scores]

    def has(self, one: Entry) -> bool:
        """True if an earlier run has measured the row."""
        return self._of(self.there, one) is not None

    def records(self, one: Entry, cost: Cost) -> list[Record]:
        """The records of a row, read from the table or measured and written to it."""
        found = self._of(self.there, one)
        if found is not None:
            self.reused.add(one.label)
            if (stored := self._of(self.stored, one)) is not None:
                self.samples[one.label] = stored
            return found
        common = {**self.head, "method": one.name, "setting": one.setting, **cost, **self.where}
        measured = self.measured(one)
        tallies = zip(self.cases(one), self.scores, self.samples[one.label], strict=True)
        records = [{**common, "case": c, "scored_by": s.name, **t.record(s), **measured} for c, s, t in tallies]
        self.write(one, records)
        return records

    def write(self, one: Entry, records: Sequence[Record]) -> None:
        """Add a row to the table, its samples first."""
        if self.path is not None:
            for case, score, tally in zip(self.cases(one), self.scores, self.samples[one.label], strict=True):
                head = {**self.known(score), "case": case, "method": one.name, "setting": one.setting}
                samples.write(samples.beside(self.path), head, tally)
            results.write(self.path, records, overwrite=True)

    def cost(self, one: Entry, single: bool = False) -> Cost:
        """The tokens, work or bytes that a row's methods keep of the first batch, by their report.

        Args:
            one: the row.
            single: the first sample is enough.

        Raises:
            Exception: whatever the method, or the model with it, refuses by.
        """
        return self.costs.of(one, single)

    def measured(self, one: Entry) -> Record:
        """Times and peak memory of a row, beside the unpatched model; its samples are put into :attr:`samples`."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", NothingRemovedWarning)  # it was said when the cost was taken
            pair = Pair(self, one)
            seconds, memory = pair.run()
        self.spent["timed"] += sum(map(sum, seconds))
        both = [arm[: len(seconds[0])] for arm in seconds]
        times = [timing.ratios(both)[-1], seconds[-1]]
        tallies, (ratios, mine), memory, pair.lengths = self.pooled(pair.tallies, times, memory, pair.lengths)
        self.samples[one.label] = tallies
        record: Record = {**memory.record(), "rounds": self.rounds}
        if pair.lengths:
            mean = estimate(pair.lengths, [1.0] * len(pair.lengths))
            ends = {"generated": mean.value, "generated_low": mean.low, "generated_high": mean.high}
            record |= {name: value for name, value in ends.items() if value is not None}
        for part in PARTS:
            record |= results.spread(f"{part}_seconds", [found[part] for found in pair.parts if part in found])
        record |= results.spread("seconds", mine)
        return record | results.spread("speedup", ratios) | {"speedup_count": len(ratios)}

    def keep(self, index: int, output: Any) -> None:
        """Keep the unpatched model's output of a batch, where rows are not to be paired with it each time."""
        if self.pairs is not None and index not in self.kept and self._room > 0:
            self._room -= nbytes(output)
            self.kept[index] = output

    def pooled(
        self, tallies: list[Tally], times: list[list[float]], memory: timing.Memory, lengths: list[float]
    ) -> tuple[Any, ...]:
        """Samples, ratios and times, memory and lengths of a row, with those of other processes where there are any."""
        return tallies, times, memory, lengths

    def close(self) -> None:
        """Free what was begun to measure."""


def _functions(method: Method) -> list[Any]:
    """Functions among the parameters of a method."""
    return [value for value in vars(method).values() if callable(value)]


def reason(error: Exception) -> str:
    """The text of an error in one line."""
    return " ".join(str(error).split()) or type(error).__name__
