"""The rows of the CPU benchmark as data, and how one is checked, timed and its allocations counted."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.kernels import decode, matching, scores
from benchmarks.kernels import rows as row_cases
from benchmarks.kernels.case import Draw, Inputs, Run
from benchmarks.kernels.check import check
from benchmarks.kernels.table import Goal, Row
from tokred.bench import results, timing

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
    """The rows that were asked for; of the smallest shapes each case once."""
    seen = set[str]()
    for row in ROWS:
        if args.only and not any(name in row.case.name for name in args.only):
            continue
        if not args.tiny:
            yield row
        elif row.case.name not in seen:
            seen.add(row.case.name)
            yield Row(row.case, row.case.tiny)


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
    times = [timing.seconds_of(lambda: run(inputs))[0] for _ in range(3)]
    return max(1, min(1000, round(least / max(min(times), 1e-7))))


def _timed(row: Row, sets: Sequence[Inputs], args: argparse.Namespace, seed: int) -> tuple[list[float], list[float]]:
    """Milliseconds of a call of the operator and of its chain, round by round."""
    runs = (row.case.ours, row.case.chain)
    counts = [_calls(run, sets[0], args.region / 1e3) for run in runs]

    def calling(arm: int) -> Callable[[int], None]:
        def calls(i: int) -> None:
            for call in range(counts[arm]):
                runs[arm](sets[(i + call) % len(sets)])

        return calls

    seconds = timing.compared([calling(0), calling(1)], args.rounds, warmup=2, seed=seed)
    ours, chain = ([s / count * 1e3 for s in arm] for arm, count in zip(seconds, counts, strict=True))
    return ours, chain


@torch.no_grad()
def measure(row: Row, args: argparse.Namespace, seed: int) -> tuple[dict[str, Any], str]:
    """The record of one row, and what is wrong with its results; nothing, where they are right."""
    device, case = torch.device("cpu"), row.case
    draw = Draw(device, torch.float32, seed)
    sets = [case.make(row.sizes, draw) for _ in range(args.sets)]
    verdict = check(case, sets[0], device)
    peak, chain_peak = (peak_allocation(lambda run=run: run(sets[0])) for run in (case.ours, case.chain))  # type: ignore[misc]
    ours, chain = _timed(row, sets, args, seed)
    memory = peak / chain_peak if chain_peak else 0.0
    goal = row.goal.text()
    record: dict[str, Any] = {"method": case.name, "setting": row.size, "goal": "" if goal == "-" else goal}
    record |= {"rounds": args.rounds, **results.here("cpu", torch.float32)}
    record |= results.spread("ms", ours) | results.spread("chain_ms", chain)
    record |= results.spread("speedup", [c / o for c, o in zip(chain, ours, strict=True)])
    record |= {"call_mib": peak, "chain_mib": chain_peak, "memory_ratio": memory}
    record |= {"error": verdict.error, "plain_error": verdict.plain, "failed": int(bool(verdict.failure))}
    if row.floor is not None:
        record |= {"floor_ms": row.floor / 1e3, "times_floor": record["ms"] * 1e3 / row.floor}
    if goal != "-":
        record["met"] = int(row.goal.met(record["ms"] * 1e3, row.floor, record["speedup"], memory))
    return record, verdict.failure


def cells(record: dict[str, Any], failure: str) -> list[str]:
    """The line of the printed table."""
    return [
        record["method"],
        record["setting"],
        f"{record['floor_ms']:.2f}" if "floor_ms" in record else "-",
        record["goal"] or "-",
        f"{record['ms']:.3f}",
        f"{record['ms_low']:.3f}-{record['ms_high']:.3f}",
        f"{record['times_floor']:.2f}" if "times_floor" in record else "-",
        f"{record['speedup']:.2f}",
        f"{record['speedup_low']:.2f}-{record['speedup_high']:.2f}",
        f"{record['memory_ratio']:.3f}",
        f"{record['error']:.1e}",
        f"CHECK FAILED: {failure}" if failure else {None: "-", 1: "met", 0: "missed"}[record.get("met")],
    ]
