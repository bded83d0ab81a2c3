"""Rows of a benchmark as tasks of Ray: on the cores of this machine, or on a cluster.

Each row is one task, which measures the method beside the unpatched model on one worker. A task whose worker is lost is
run again elsewhere; what is measured is written by the process that began the benchmark.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch

from tokred.bench import results
from tokred.bench.engine import Engine, Record, Todo, reason
from tokred.bench.entries import Cost, Entry
from tokred.bench.feeds import Batches, Unreadable
from tokred.bench.scoring import Tally

LOCAL = "local"
RETRIES = 3  # times that a row is begun again after its worker was lost
# Engines of this worker, by the benchmark that they are for: a worker measures many rows of one.
_built: dict[str, Engine] = {}


class Shared(NamedTuple):
    """All that a worker needs for any row: the model, the data and how both are used."""

    model: Any
    stage: str
    scores: Any
    feed: Any
    data: Any
    prepared: bool
    device: str
    rounds: int
    seed: int
    name: str
    threads: int
    pairs: int | None


def check(workers: int | None) -> None:
    """Refuse what cannot be spread.

    Raises:
        ImportError: Ray is not installed.
        ValueError: ``workers`` is no number above 0.
    """
    try:
        import ray  # noqa: F401
    except ImportError as error:
        raise ImportError("ray= needs Ray: pip install 'tokred[ray]'") from error
    if workers is not None and (isinstance(workers, bool) or not isinstance(workers, int) or workers < 1):
        raise ValueError(f"workers must be a whole number of at least 1, got {workers!r}")


def _as_is(item: Any, index: int) -> Any:
    return item


def _engine(shared: Shared) -> Engine:
    """The engine of a worker."""
    torch.set_num_threads(shared.threads)
    device = torch.device(shared.device)
    shared.model.to(device)
    prepare = _as_is if shared.prepared else shared.feed.prepare
    batches = Batches(shared.data, device, prepare, shared.seed)
    given = (shared.model, shared.stage, shared.scores, shared.feed, batches, device, shared.rounds, shared.seed)
    return Engine(*given, shared.name, None, shared.pairs)


def _measure(key: str, boxed: list[Any], one: Entry, cost: Cost | None) -> tuple[list[Record], list[Tally] | None]:
    """A row's records and samples; runs on a worker.

    Args:
        key: of the benchmark.
        boxed: the reference to its :class:`Shared`, in a list, so that it is fetched only where it is needed.
        one: the row.
        cost: what it keeps; None: to be found out.
    """
    import ray

    if key not in _built:
        _built.clear()
        _built[key] = _engine(ray.get(boxed[0]))
    engine = _built[key]
    records = engine.tried(Todo(one, cost))
    return records, engine.samples.get(one.label)


def _here(threads: int, device: str, dtype: torch.dtype) -> dict[str, Any]:
    """Where a worker runs, as a record tells it."""
    torch.set_num_threads(threads)
    return results.here(torch.device(device), dtype)


class RayEngine(Engine):
    """An engine whose rows are measured by workers.

    Args:
        address: of the cluster; ``"local"``: one is begun on this machine, and ended.
        workers: rows that a local cluster measures at a time; None: two, or as many as there are GPUs.
        given: of :class:`~tokred.bench.engine.Engine`.
    """

    def __init__(self, address: str, workers: int | None, *given: Any) -> None:
        import ray

        self.begun = not ray.is_initialized()
        cores = os.cpu_count() or 1
        gpus = torch.cuda.device_count()
        local = address == LOCAL
        count = workers or max(1, gpus if given[5].type == "cuda" else min(2, cores))
        self.threads = max(1, cores // count) if local else torch.get_num_threads()
        if self.begun:
            where = {"num_cpus": count, "num_gpus": gpus, "include_dashboard": False} if local else {"address": address}
            ray.init(**where, log_to_driver=False, logging_level="ERROR")
        task = {"num_cpus": 1 if local else self.threads, "num_gpus": int(given[5].type == "cuda")}
        self._remote = {**task, "max_retries": RETRIES}
        super().__init__(*given)

    def _where(self, dtype: torch.dtype) -> dict[str, Any]:
        import ray

        found: dict[str, Any] = ray.get(ray.remote(**self._remote)(_here).remote(self.threads, str(self.device), dtype))
        return found

    def each(self, todo: Sequence[Todo]) -> Iterator[tuple[Entry, list[Record]]]:
        """The rows in the order in which workers finish them."""
        import ray

        waiting: dict[Any, Entry] = {}
        task = ray.remote(**self._remote)(_measure)
        missing = [item for item in todo if item.why is None and not self.has(item.entry)]
        boxed = [ray.put(self._shared())] if missing else []
        key = f"{self.case} {id(self)} {os.getpid()}"
        for item in todo:
            if item not in missing:
                yield item.entry, self.tried(item)
            else:
                waiting[task.remote(key, boxed, item.entry, item.cost)] = item.entry
        try:
            while waiting:
                done, _ = ray.wait(list(waiting), num_returns=1)
                one = waiting.pop(done[0])
                yield one, self._taken(one, done[0])
        finally:
            for reference in waiting:  # after an interruption
                ray.cancel(reference, force=True)

    def _taken(self, one: Entry, reference: Any) -> list[Record]:
        """The records of a row that a worker finished, written to the table; or why there is none."""
        import ray

        records: list[Record]
        try:
            records, tallies = ray.get(reference)
        except ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, Unreadable) or not one.methods:
                raise error.cause from None
            return [{"reason": reason(error.cause)} for _ in self.scores]
        except ray.exceptions.RayError as error:
            why = f"its worker was lost {RETRIES + 1} times: {reason(error)}"
            return [{"reason": why} for _ in self.scores]
        if tallies is not None:
            self.samples[one.label] = tallies
            # Code reads differently where it has been sent to.
            records = [{**r, "case": case} for r, case in zip(records, self.cases(one), strict=True)]
            self.write(one, records)
        return records

    def _shared(self) -> Shared:
        held = self.batches.held
        data = self.batches.source if held is None else held
        return Shared(
            self.model, self.stage, self.scores, self.feed, data, held is not None, str(self.device), self.rounds,
            self.seed, self.name, self.threads, self.pairs,
        )  # fmt: skip

    def close(self) -> None:
        """End the cluster that was begun for this benchmark, or leave the one that it joined."""
        import ray

        if self.begun:
            ray.shutdown()
