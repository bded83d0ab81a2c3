"""``Pair``: one row beside the unpatched model, on all batches, in turns."""

from __future__ import annotations

import time
from functools import partial
from typing import TYPE_CHECKING, Any

from tokred.bench import timing
from tokred.bench.arms import BASE
from tokred.bench.entries import Entry
from tokred.bench.outputs import Generated
from tokred.bench.scoring import Tally

if TYPE_CHECKING:
    from tokred.bench.engine import Engine

TURN = 0.02  # share of its forwards that patching and unpatching may take
GROUP = 16  # batches that an arm runs at most before it is the other's turn


class Pair:
    """A row and the unpatched model on all batches.

    Args:
        engine: of the benchmark.
        one: the row; without methods it is measured alone.

    Attributes:
        tallies: values of the samples, by each metric.
        lengths: tokens of each answer that the row generated.
        parts: seconds of the parts of each of the row's runs.
    """

    def __init__(self, engine: Engine, one: Entry) -> None:
        self.engine, self.methods = engine, one.methods
        self.tallies = [Tally() for _ in engine.scores]
        self.arms = [Entry(BASE, ""), one] if one.methods else [one]
        self.lengths: list[float] = []
        self.parts: list[dict[str, float]] = []
        self.outputs: dict[int, dict[int, Any]] = {}
        self.window: dict[int, Any] = {}
        self.dense = engine.rounds  # after which the unpatched model rests, and its outputs are those that were kept

    def run(self) -> tuple[list[list[float]], timing.Memory]:
        """Seconds of each arm in each round, and the row's peak memory; everything else is left in the attributes."""
        engine = self.engine
        engine.batches.restart()
        if self.methods and engine.pairs is not None and len(engine.kept) == engine.batches.count:
            self.dense = min(engine.pairs, engine.rounds)
        memory, turn, seconds = self._warm()
        # Arms take turns after so many batches that patching takes little of the time.
        group = min(GROUP, max(1, int(turn / (TURN * len(self.arms) * seconds))), engine.batches.together)
        with engine.parts.watching(engine.roles, self.methods):
            found = timing.paired(
                [partial(arm.applied, engine.target) for arm in self.arms],
                self._run,
                engine.rounds,
                device=engine.device,
                warmup=0,
                seed=engine.seed,
                collect=self._collect,
                group=group,
                ready=self._ready,
                until=[*[self.dense] * (len(self.arms) - 1), engine.rounds],
            )
        return found, memory

    def _warm(self) -> tuple[timing.Memory, float, float]:
        """Peak memory in the run that warms up, seconds of patching and unpatching, and of that run.

        The unpatched model has been run before.
        """
        engine = self.engine
        start = time.perf_counter()
        with self.arms[-1].applied(engine.target):
            begin = time.perf_counter()
            before = engine.spent["untimed"]
            memory = timing.peak_memory(engine.untimed, engine.device)
            seconds = engine.spent["untimed"] - before
            end = time.perf_counter()
        return memory, time.perf_counter() - end + begin - start, seconds

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
        if arm == 0 and new:
            engine.keep(i, seen[arm])
        if i >= self.dense:
            seen[0] = engine.kept.get(i)
        if len(seen) < len(self.arms):
            return
        batch = self.window.pop(i)
        dense, mine = self.outputs.pop(i)[0], seen[last]
        if not new:
            return
        for score, tally in zip(engine.scores, self.tallies, strict=True):
            tally.take(score, mine, batch, dense)
        if isinstance(mine, Generated):
            self.lengths += map(float, mine.lengths)
