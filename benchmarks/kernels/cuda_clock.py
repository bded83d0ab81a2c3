"""Time on a CUDA device: events, graph replays, rotating inputs, and the two ceilings.

A short kernel called from Python waits for Python, so the calls over all input sets are captured in one CUDA graph and
its replays are timed. Each timed replay follows an untimed one: that leaves the cache as the calls themselves leave it,
and keeps the device busy while the start event and the timed replay are queued, so that no launch is timed with it.
"""

from __future__ import annotations

import random
import statistics
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

from benchmarks.kernels.case import Case, Draw, Inputs, Run, Sizes, bytes_of
from tokred.bench.timing import Spread, spread

# Input sets together are this many times as large as the second-level cache; no more than so many of them.
CACHES = 4
MOST_SETS = 48
FEWEST_SETS = 3


class Ceilings(NamedTuple):
    """What the device reaches: bytes per second of a copy, read and written, and bfloat16 operations per second."""

    copy: float
    matmul: float


class Paired(NamedTuple):
    """An operator and its plain chain in the same rounds.

    Attributes:
        ours: microseconds of a call, in graph replays.
        chain: the same of the chain.
        speedup: chain over ours, per round.
        again: a second copy of ours over the first, per round; how far it is from 1 is noise.
        ours_eager: microseconds of a call from Python, launches included.
        chain_eager: the same of the chain.
        graphs: whether both could be captured; if not, calls from Python were timed.
        rounds: how many.
        sets: how many input sets.
        peaks: MiB that one call allocates, of ours and of the chain.
    """

    ours: Spread
    chain: Spread
    speedup: Spread
    again: Spread
    ours_eager: Spread
    chain_eager: Spread
    graphs: bool
    rounds: int
    sets: int
    peaks: tuple[float, float]


class Clock:
    """Events around work on the current stream, behind another run of the same work."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.cache = int(getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 0)) or 50 << 20

    def seconds(self, work: Callable[[], object]) -> float:
        """Seconds on the device from the beginning of ``work`` to its end."""
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        work()
        start.record()
        work()
        stop.record()
        stop.synchronize()
        return start.elapsed_time(stop) / 1e3

    def median(self, work: Callable[[], object], repeats: int = 20) -> float:
        """Median seconds after untimed runs."""
        for _ in range(2):
            work()
        return statistics.median(self.seconds(work) for _ in range(repeats))

    def ceilings(self, draw: Draw) -> Ceilings:
        """Measure a copy of 1 GiB and a bfloat16 product of 8192 x 8192 matrices, on random values."""
        return Ceilings(self._copy_rate(draw), self._matmul_rate(draw))

    def _copy_rate(self, draw: Draw) -> float:
        source = draw.normal(1 << 29, dtype=torch.bfloat16)
        target = torch.empty_like(source)
        return 2 * source.numel() * source.element_size() / self.median(lambda: target.copy_(source))

    def _matmul_rate(self, draw: Draw, n: int = 8192) -> float:
        a, b = (draw.normal(n, n, dtype=torch.bfloat16) for _ in range(2))
        out = torch.empty_like(a)
        return 2 * n**3 / self.median(lambda: torch.mm(a, b, out=out))

    def sets(self, case: Case, sizes: Sizes, draw: Draw) -> list[Inputs]:
        """Input sets that do not fit into the cache together."""
        first = case.make(sizes, draw)
        count = min(MOST_SETS, max(FEWEST_SETS, -(-CACHES * self.cache // max(1, bytes_of(first)))))
        return [first, *(case.make(sizes, draw) for _ in range(count - 1))]

    @torch.no_grad()
    def paired(self, case: Case, sets: Sequence[Inputs], seconds: float, rounds: tuple[int, int], seed: int) -> Paired:
        """Time a case's operator against its chain.

        Args:
            case: the operator.
            sets: from :meth:`sets`.
            seconds: device time to spend on graph replays, about, untimed ones included.
            rounds: fewest and most.
            seed: of the order of the arms, which is another one in each round.
        """
        peaks = (self._peak(case.ours, sets[0]), self._peak(case.chain, sets[0]))
        loops = {"ours": _loop(case.ours, sets), "chain": _loop(case.chain, sets)}
        captured = {
            "ours": _capture(loops["ours"]),
            "again": _capture(loops["ours"]),
            "chain": _capture(loops["chain"]),
        }
        graphs = all(captured.values())
        if graphs:
            arms = {name: graph.replay for name, (graph, _) in captured.items()}
        else:
            arms = {**loops, "again": loops["ours"]}
        once = 2 * sum(self.median(run, 3) for run in arms.values())
        count = min(rounds[1], max(rounds[0], int(seconds / once)))
        times = self._rounds(arms, count, seed)
        eager = self._rounds(loops, max(rounds[0] // 2, min(count // 4, 20)), seed)
        per_call = {name: _scaled(values, len(sets)) for name, values in times.items()}
        eager_call = {name: _scaled(values, len(sets)) for name, values in eager.items()}
        return Paired(
            spread(per_call["ours"]),
            spread(per_call["chain"]),
            spread([c / o for c, o in zip(per_call["chain"], per_call["ours"], strict=True)]),
            spread([a / o for a, o in zip(per_call["again"], per_call["ours"], strict=True)]),
            spread(eager_call["ours"]),
            spread(eager_call["chain"]),
            graphs,
            count,
            len(sets),
            peaks,
        )

    def _rounds(self, arms: dict[str, Callable[[], Any]], count: int, seed: int) -> dict[str, list[float]]:
        shuffle = random.Random(seed).shuffle
        times: dict[str, list[float]] = {name: [] for name in arms}
        order = list(arms)
        for _ in range(count):
            shuffle(order)
            for name in order:
                times[name].append(self.seconds(arms[name]))
        return times

    def _peak(self, run: Run, inputs: Inputs) -> float:
        run(inputs)
        torch.cuda.synchronize(self.device)
        before = torch.cuda.memory_allocated(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        run(inputs)
        torch.cuda.synchronize(self.device)
        return (torch.cuda.max_memory_allocated(self.device) - before) / 2**20


def _scaled(seconds: Sequence[float], calls: int) -> list[float]:
    """Microseconds of a call."""
    return [s / calls * 1e6 for s in seconds]


def _loop(run: Run, sets: Sequence[Inputs]) -> Callable[[], list[Any]]:
    """A function that runs every input set once and keeps the outputs, so that these rotate as well."""
    return lambda: [run(inputs) for inputs in sets]


def _capture(loop: Callable[[], list[Any]]) -> tuple[torch.cuda.CUDAGraph, list[Any]] | None:
    """The loop as a graph, with the outputs that it writes; None where it cannot be captured."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        loop()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            outputs = loop()
    except torch.cuda.OutOfMemoryError:
        raise
    except RuntimeError:
        torch.cuda.synchronize()
        return None
    return graph, outputs
