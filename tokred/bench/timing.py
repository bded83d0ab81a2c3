"""Paired timing and peak memory: how every number of the demo and the benchmark is measured.

All arms run in one process on the same batches, in a new random order every round, so that whatever else the machine
does meets all of them alike. What is reported is the median of the per-round ratio against the base arm, and its
quartiles.
"""

from __future__ import annotations

import ctypes
import gc
import random
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from functools import partial, wraps
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch

T = TypeVar("T")
AFTER = "resident memory after the forward"  # a lower bound, where the system keeps no high-water mark
Enter = Callable[[], AbstractContextManager[object]]


class Spread(NamedTuple):
    """Median and quartiles."""

    median: float
    low: float
    high: float


class Memory(NamedTuple):
    """Peak memory of a forward in MiB: in all, and above what was in use before; and how it was measured."""

    peak: float
    forward: float
    kind: str

    def record(self) -> dict[str, float | str]:
        """Fields of a record of results; where the peak is only a lower bound, a condition says so."""
        found: dict[str, float | str] = {"peak_mib": self.peak, "forward_mib": self.forward}
        return found | ({"memory": "after-the-forward"} if self.kind == AFTER else {})


def spread(values: Sequence[float]) -> Spread:
    """Median and quartiles of at least one value."""
    if len(values) == 1:
        return Spread(values[0], values[0], values[0])
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return Spread(median, low, high)


def synchronise(device: torch.device) -> None:
    """Wait for a GPU; nothing elsewhere."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def paired(
    arms: Sequence[Enter],
    run: Callable[[int], T],
    rounds: int,
    *,
    device: torch.device | str = "cpu",
    warmup: int = 1,
    seed: int = 0,
    collect: Callable[[int, int, T], None] | None = None,
    tick: Callable[[], None] | None = None,
    group: int = 1,
    ready: Callable[[int, int], None] | None = None,
    until: Sequence[int] | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> list[list[float]]:
    """Seconds of each arm in each round.

    Args:
        arms: each enters the state that is to be timed (a patched model); entering is not timed.
        run: ``run(round)`` is what is timed.
        rounds: how often; the order of the arms is shuffled in each.
        device: waited for before and after.
        warmup: untimed runs of every arm before the first round.
        seed: of the order.
        collect: ``collect(arm, round, result)``, outside the timed part.
        tick: called after every timed run and every arm's warm-up: ``len(arms) * (rounds + 1)`` times in all.
        group: rounds that an arm runs before it is the next one's turn, where entering takes long beside running.
        ready: ``ready(arm, round)``, before the timed part.
        until: of each arm, after how many rounds it rests; None: none does.
        clock: seconds; :func:`time.process_time` counts those of this process alone, on a machine that others use.

    Returns:
        ``[arm][round]``.
    """
    device = torch.device(device)
    order, shuffle = list(range(len(arms))), random.Random(seed).shuffle
    ends = [rounds] * len(arms) if until is None else until
    seconds = [[0.0] * end for end in ends]
    tick = tick or (lambda: None)
    collecting = gc.isenabled()
    with torch.inference_mode():
        for enter in arms:
            with enter() if warmup else nullcontext():
                for _ in range(warmup):
                    run(0)
            tick()
        try:
            gc.collect()
            gc.disable()
            for begin in range(0, rounds, group):
                shuffle(order)
                for arm in order:
                    found: list[T] = []
                    turn = range(begin, min(begin + group, ends[arm]))
                    if not turn:
                        continue
                    with arms[arm]():
                        for i in turn:
                            if ready is not None:
                                ready(arm, i)
                            synchronise(device)
                            start = clock()
                            found.append(run(i))
                            synchronise(device)
                            seconds[arm][i] = clock() - start
                    for i, result in zip(turn, found, strict=True):
                        if collect is not None:
                            collect(arm, i, result)
                        tick()
        finally:
            if collecting:
                gc.enable()
    return seconds


def compared(functions: Sequence[Callable[[int], object]], rounds: int, **options: Any) -> list[list[float]]:
    """Seconds of plain functions of the round: :func:`paired` for arms that have no state to enter."""
    current = [functions[0]]

    @contextmanager
    def enter(function: Callable[[int], object]) -> Iterator[None]:
        current[0] = function
        yield

    return paired([partial(enter, f) for f in functions], lambda i: current[0](i), rounds, **options)


def ratios(seconds: Sequence[Sequence[float]], base: int = 0) -> list[list[float]]:
    """Speed of each arm in each round, as a multiple of the base arm's in the same round."""
    return [[b / s for b, s in zip(seconds[base], arm, strict=True)] for arm in seconds]


@contextmanager
def entering(owner: Any, name: str, enter: Enter) -> Iterator[None]:
    """While this lasts, ``enter()`` is entered around every call of a function of a module or a class."""
    own, inherited = getattr(owner, name), name not in vars(owner)

    @wraps(own)
    def call(*args: Any, **kwargs: Any) -> Any:
        with enter():
            return own(*args, **kwargs)

    setattr(owner, name, call)
    try:
        yield
    finally:
        if inherited:
            delattr(owner, name)
        else:
            setattr(owner, name, own)


class Watch:
    """Seconds by part of a run, the device waited for around each.

    Args:
        device: waited for.
        clock: seconds; :func:`time.process_time` counts those of this process alone, on a machine that others use.

    Attributes:
        spent: from each part to the seconds of every time that it ran.
    """

    def __init__(self, device: torch.device | str = "cpu", clock: Callable[[], float] = time.perf_counter) -> None:
        self.device, self.clock = torch.device(device), clock
        self.spent: dict[str, list[float]] = {}

    def now(self) -> float:
        """Seconds, when the device has done what it was given."""
        synchronise(self.device)
        return self.clock()

    @contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        start = self.now()
        try:
            yield
        finally:
            self.spent.setdefault(part, []).append(self.now() - start)

    def around(self, owner: Any, name: str, part: str) -> AbstractContextManager[None]:
        """Time every call of a function of a module or a class while this lasts."""
        return entering(owner, name, lambda: self(part))

    def total(self, *parts: str) -> float:
        """Seconds of some parts together; of all, where none is named."""
        return sum(sum(found) for part, found in self.spent.items() if not parts or part in parts)

    def clear(self) -> None:
        self.spent.clear()


def seconds_of(run: Callable[[], T], device: torch.device | str = "cpu") -> tuple[float, T]:
    """Seconds of a single call, and what it returns."""
    watch = Watch(device)
    with watch("run"):
        found = run()
    return watch.total(), found


def peak_memory(run: Callable[[], object], device: torch.device | str = "cpu") -> Memory:
    """Peak memory while ``run()`` runs.

    On CUDA what torch has allocated; on Linux the process's high-water mark of resident memory, which the kernel keeps
    exactly and which is reset before; elsewhere the resident memory after, a lower bound.
    """
    device = torch.device(device)
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        with torch.inference_mode():
            run()
        torch.cuda.synchronize(device)
        peak = torch.cuda.max_memory_allocated(device)
        return Memory(peak / 2**20, (peak - before) / 2**20, "CUDA memory allocated by torch")
    _trim()
    exact = _reset_high_water()
    start = _resident("VmRSS")
    with torch.inference_mode():
        run()
    end = _resident("VmHWM" if exact else "VmRSS")
    kind = "resident memory of the process, high-water mark" if exact else AFTER
    return Memory(end, max(0.0, end - start), kind)


def _trim() -> None:
    """Give freed heap back to the system, so that one arm's garbage does not hide the next one's need."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def _reset_high_water() -> bool:
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError:
        return False
    return True


def _resident(field: str) -> float:
    """MiB of a field of /proc/self/status, or psutil's resident memory where there is none."""
    try:
        text = Path("/proc/self/status").read_text(encoding="utf8")
    except OSError:
        import psutil

        return float(psutil.Process().memory_info().rss) / 2**20
    return next(float(line.split()[1]) / 1024 for line in text.splitlines() if line.startswith(field))
