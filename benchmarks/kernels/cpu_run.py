"""The rows of the CPU benchmark as data, and how one is checked, timed and its allocations counted."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

import tokred
from benchmarks.kernels import decode, matching, scores
from benchmarks.kernels import rows as row_cases
from benchmarks.kernels.case import Draw, Inputs, Run
from benchmarks.kernels.check import check
from benchmarks.kernels.table import Goal, Row
from tokred.bench.timing import paired, spread
from tokred.core.environment import describe

HEADER = (
    "kernel",
    "size",
    "floor ms",
    "goal",
    "ms",
    "quartiles",
    "x floor",
    "x chain",
    "quartiles",
    "peak",
    "error",
    "met",
)

# Floors in microseconds, of two cores with their caches warm.
ROWS = (
    Row(matching.alternate, {"B": 8, "N": 197, "C": 64}, 70, Goal(times=4)),
    Row(row_cases.merge, {"B": 8, "N": 197, "M": 181, "C": 768}, 100, Goal(times=4)),
    Row(scores.columns_twice, {"B": 8, "H": 16, "N": 577, "D": 64}, None, Goal(speedup=1, memory=0.1)),
    Row(scores.columns, {"B": 8, "H": 16, "N": 577, "D": 64}),
    Row(matching.alternate, {"B": 8, "N": 577, "C": 64}),
    Row(matching.everywhere, {"B": 2, "N": 4096, "C": 320}),
    Row(matching.windowed, {"B": 2, "N": 4096, "C": 320, "window": 16}),
    Row(matching.energy, {"B": 8, "N": 197, "C": 64}),
    Row(row_cases.merge_norm, {"B": 8, "N": 197, "M": 181, "C": 768}),
    Row(row_cases.unmerge, {"B": 8, "N": 197, "M": 181, "C": 768}),
    Row(row_cases.gather, {"B": 8, "N": 197, "M": 99, "C": 768}),
    Row(scores.window_twice, {"B": 1, "H": 32, "Hk": 8, "M": 64, "N": 4096, "D": 128}),
    Row(row_cases.cache, {"B": 1, "Hk": 8, "N": 4096, "K": 2048, "D": 128}),
    Row(decode.flat_weights, {"H": 32, "Hk": 8, "T": 32768, "D": 128}),
    Row(decode.flat, {"H": 32, "Hk": 8, "T": 32768, "D": 128}),
    Row(decode.rectangular, {"B": 1, "H": 32, "Hk": 8, "K": 4096, "D": 128}),
    Row(scores.attend, {"B": 8, "H": 12, "N": 197, "D": 64}),
)


def rows(args: argparse.Namespace) -> Iterator[Row]:
    """The rows that were asked for."""
    for row in ROWS:
        if args.only and not any(name in row.case.name for name in args.only):
            continue
        yield Row(row.case, row.case.tiny) if args.tiny else row


def peak_allocation(run: Callable[[], object]) -> float:
    """MiB that torch allocates at most at a time while ``run()`` runs, results included."""
    run()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    results: Any = profiler.profiler.kineto_results  # type: ignore[union-attr]
    events = sorted((e.start_ns(), e.nbytes()) for e in results.events() if e.name() == "[memory]")
    now = peak = 0
    for _, change in events:
        now += change
        peak = max(peak, now)
    return peak / 2**20


def _calls(run: Run, inputs: Inputs, least: float) -> int:
    """How many calls take at least ``least`` seconds."""
    times = []
    for _ in range(3):
        start = time.perf_counter()
        run(inputs)
        times.append(time.perf_counter() - start)
    return max(1, min(1000, round(least / max(min(times), 1e-7))))


def _timed(row: Row, sets: Sequence[Inputs], args: argparse.Namespace, seed: int) -> tuple[list[float], list[float]]:
    """Milliseconds of a call of the operator and of its chain, round by round."""
    runs = (row.case.ours, row.case.chain)
    counts = [_calls(run, sets[0], args.region / 1e3) for run in runs]
    current = [0]

    def entering(arm: int) -> Callable[[], Any]:
        @contextmanager
        def enter() -> Iterator[None]:
            current[0] = arm
            yield

        return enter

    def run(i: int) -> None:
        arm = current[0]
        function = runs[arm]
        for call in range(counts[arm]):
            function(sets[(i + call) % len(sets)])

    seconds = paired([entering(0), entering(1)], run, args.rounds, warmup=2, seed=seed)
    ours, chain = ([s / count * 1e3 for s in arm] for arm, count in zip(seconds, counts, strict=True))
    return ours, chain


@torch.no_grad()
def measure(row: Row, args: argparse.Namespace, seed: int) -> dict[str, Any]:
    """One line of the CSV file; ``check`` is empty when the row is right."""
    device, case = torch.device("cpu"), row.case
    draw = Draw(device, torch.float32, seed)
    sets = [case.make(row.sizes, draw) for _ in range(args.sets)]
    verdict = check(case, sets[0], device)
    peak, chain_peak = (peak_allocation(lambda run=run: run(sets[0])) for run in (case.ours, case.chain))  # type: ignore[misc]
    ours, chain = _timed(row, sets, args, seed)
    mine, theirs = spread(ours), spread(chain)
    ratio = spread([c / o for c, o in zip(chain, ours, strict=True)])
    memory = peak / chain_peak if chain_peak else 0.0
    met = row.goal.met(mine.median * 1e3, row.floor, ratio.median, memory)
    about = describe("cpu") | {"tokred": tokred.__version__}
    return {
        "kernel": case.name,
        "size": row.size,
        "floor_ms": "" if row.floor is None else row.floor / 1e3,
        "goal": row.goal.text(),
        "ms": mine.median, "ms_q25": mine.low, "ms_q75": mine.high,
        "times_floor": "" if row.floor is None else mine.median * 1e3 / row.floor,
        "chain_ms": theirs.median, "chain_ms_q25": theirs.low, "chain_ms_q75": theirs.high,
        "speedup": ratio.median, "speedup_q25": ratio.low, "speedup_q75": ratio.high,
        "peak_mib": peak, "chain_peak_mib": chain_peak, "peak_ratio": memory,
        "error": verdict.error, "plain_error": verdict.plain, "check": verdict.failure,
        "met": "" if row.goal.text() == "-" else met,
        "rounds": args.rounds,
        **{name: about[name] for name in ("device", "threads", "python", "torch", "tokred", "commit", "date")},
    }  # fmt: skip


def cells(record: dict[str, Any]) -> list[str]:
    """The line of the printed table."""
    floor, times = record["floor_ms"], record["times_floor"]
    status = {"": "-", True: "met", False: "missed"}[record["met"]]
    return [
        record["kernel"],
        record["size"],
        "-" if floor == "" else f"{floor:.2f}",
        record["goal"],
        f"{record['ms']:.3f}",
        f"{record['ms_q25']:.3f}-{record['ms_q75']:.3f}",
        "-" if times == "" else f"{times:.2f}",
        f"{record['speedup']:.2f}",
        f"{record['speedup_q25']:.2f}-{record['speedup_q75']:.2f}",
        f"{record['peak_ratio']:.3f}",
        f"{record['error']:.1e}",
        f"CHECK FAILED: {record['check']}" if record["check"] else status,
    ]
