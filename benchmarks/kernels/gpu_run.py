"""The run of the GPU benchmark: checks, timings, one table and one JSON file."""

from __future__ import annotations

import argparse
import datetime
import gc
import json
import re
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

import tokred
from benchmarks.kernels.case import Draw
from benchmarks.kernels.check import Verdict, check
from benchmarks.kernels.cuda_clock import Ceilings, Clock, Paired
from benchmarks.kernels.table import CHECKS, EXP_RATE, GOALS, NONE, OTHERS, Row, floor_of, render
from tokred.bench import results
from tokred.core.environment import commit, version

HEADER = ("kernel", "size", "floor us", "goal", "us", "x floor", "x chain", "eager us", "error", "met")
# Device seconds of graph replays per row, and the fewest and most rounds.
FULL = (3.0, (20, 200))
QUICK = (0.8, (10, 50))


@dataclass
class Result:
    """What came out for one row."""

    row: Row
    dtype: torch.dtype
    verdict: Verdict | None = None
    times: Paired | None = None
    notes: list[str] = field(default_factory=list)

    @property
    def failed(self) -> bool:
        """Whether the check failed or something raised."""
        return self.verdict is None or bool(self.verdict.failure)

    @property
    def met(self) -> bool | None:
        """Whether the goal was reached; None where there is none, or no time."""
        if self.times is None or self.row.goal == NONE:
            return None
        return self.row.goal.met(self.times.ours.median, self.row.floor_us(), self.times.speedup.median)

    def cells(self) -> list[str]:
        """The line of the table."""
        t, floor = self.times, self.row.floor_us()
        status = "CHECK FAILED" if self.failed else {True: "met", False: "missed", None: "-"}[self.met]
        return [
            self.row.case.name,
            f"{self.row.size} {str(self.dtype).removeprefix('torch.')}",
            "-" if floor is None or (t is None and self.row.goal == NONE) else f"{floor:.1f}",
            self.row.goal.text(),
            "-" if t is None else f"{t.ours.median:.1f}",
            "-" if t is None or floor is None else f"{t.ours.median / floor:.2f}",
            "-" if t is None else f"{t.speedup.median:.2f}",
            "-" if t is None else f"{t.ours_eager.median:.1f}",
            "-" if self.verdict is None else f"{self.verdict.error:.1e}",
            "; ".join([status, *self.notes]),
        ]

    def record(self, ceilings: Ceilings | None, exps: float) -> dict[str, Any]:
        """Everything, for the JSON file."""
        row, here = self.row, None
        if ceilings is not None and row.case.work is not None:
            here = floor_of(row.case.work(row.sizes), ceilings.copy, ceilings.matmul, exps)
        return {
            "kernel": row.case.name,
            "sizes": dict(row.sizes),
            "dtype": str(self.dtype).removeprefix("torch."),
            "floor_us": row.floor_us(),
            "floor_us_at_measured_ceilings": here,
            "goal": row.goal.text(),
            "met": self.met,
            "check": None if self.verdict is None else self.verdict._asdict() | {"passed": not self.verdict.failure},
            "times": None if self.times is None else _as_dict(self.times),
            "notes": self.notes,
        }

    def figures(self, where: dict[str, Any]) -> dict[str, Any]:
        """The times, for a table of results."""
        assert self.times is not None  # asked for where there are some
        t, goal, floor = self.times, self.row.goal.text(), self.row.floor_us()
        found: dict[str, Any] = {"method": self.row.case.name, "setting": self.row.size, "rounds": t.rounds, **where}
        found |= {"goal": "" if goal == "-" else goal, "failed": int(self.failed)}
        found |= results.between("ms", *(us / 1e3 for us in t.ours)) | results.between("speedup", *t.speedup)
        found |= results.between("chain_ms", *(us / 1e3 for us in t.chain))
        if self.verdict is not None:
            found |= {"error": self.verdict.error, "plain_error": self.verdict.plain}
        if floor is not None:
            found |= {"floor_ms": floor / 1e3, "times_floor": t.ours.median / floor}
        return found | ({} if self.met is None else {"met": int(self.met)})


def _as_dict(times: Paired) -> dict[str, Any]:
    return {k: v._asdict() if hasattr(v, "_asdict") else v for k, v in times._asdict().items()}


def selected(args: argparse.Namespace, device: torch.device) -> Iterator[tuple[Row, torch.dtype, bool]]:
    """Rows with the type of their inputs and whether they are timed, in the order in which they run."""
    rows = [(row, row in GOALS or (row in OTHERS and not args.quick)) for row in (*GOALS, *CHECKS, *OTHERS)]
    seen = set()
    for row, timed in rows:
        if args.only and not any(name in row.case.name for name in args.only):
            continue
        # Triton's interpreter cuts bfloat16 off where a device rounds: there float32, and once per case.
        if device.type == "cpu":
            if row.case.name not in seen:
                seen.add(row.case.name)
                yield Row(row.case, row.case.tiny, None, NONE), torch.float32, False
            continue
        yield row, torch.bfloat16, timed
        if row in CHECKS:
            yield row, torch.float32, False


def run(args: argparse.Namespace, folder: Path, device: torch.device, clock: Clock | None) -> int:
    """Do it all.

    Args:
        args: the command line of ``benchmarks/gpu.py``.
        folder: where the JSON file and the table of times go unless the command line says otherwise.
        device: where.
        clock: times; None: only check, and write no file unless one is asked for.

    Returns:
        The exit status.
    """
    start = time.monotonic()
    ceilings = None if clock is None else clock.ceilings(Draw(device, torch.bfloat16, args.seed))
    if ceilings is not None:
        print(
            f"copy {ceilings.copy / 1e12:.2f} TB/s, bfloat16 product {ceilings.matmul / 1e12:.0f} TFLOP/s", flush=True
        )
    done: list[Result] = []
    for number, (row, dtype, timed) in enumerate(selected(args, device)):
        result = Result(row, dtype)
        done.append(result)
        draw = Draw(device, dtype, args.seed + number)
        late = time.monotonic() - start > args.limit
        try:
            _measure(result, draw, clock if timed and not late else None, args)
        except Exception as error:
            traceback.print_exc()
            result.notes.append(f"{type(error).__name__}: {str(error).splitlines()[0][:80] if str(error) else ''}")
        if timed and late:
            result.notes.append("not timed: out of time")
        print(f"{time.monotonic() - start:6.1f} s  {'  '.join(result.cells())}", file=sys.stderr, flush=True)
        _release(device)
    print(render(HEADER, [result.cells() for result in done]))
    if not done:
        print("no row has such a name", file=sys.stderr)
        return 1
    if args.out is not None or clock is not None:
        path = _write(args, args.out or folder, device, ceilings, done)
        print(f"written to {path}")
    clocked = [result for result in done if result.times is not None]
    if clocked:
        here = results.here(device) | {"commit": args.commit or commit()}
        rows = (r.figures(here | {"dtype": str(r.dtype).removeprefix("torch.")}) for r in clocked)
        print(f"written to {results.write(path.with_suffix('.csv'), rows, 'gpu', overwrite=True)}")
    failed = [result for result in done if result.failed]
    for result in failed:
        why = result.verdict.failure if result.verdict is not None else "; ".join(result.notes)
        print(f"check failed: {result.row.case.name} {result.row.size} {result.dtype}: {why}", file=sys.stderr)
    return 1 if failed else 0


def _measure(result: Result, draw: Draw, clock: Clock | None, args: argparse.Namespace) -> None:
    case, sizes = result.row.case, result.row.sizes
    result.verdict = check(case, case.make(sizes, draw), draw.device, repeat=draw.device.type == "cuda")
    _release(draw.device)
    if clock is None:
        return
    seconds, rounds = QUICK if args.quick else FULL
    result.times = clock.paired(case, clock.sets(case, sizes, draw), seconds, rounds, args.seed)
    if not result.times.graphs:
        result.notes.append("no graph: times include launches")


def _release(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def describe(args: argparse.Namespace, device: torch.device, ceilings: Ceilings | None) -> dict[str, Any]:
    """Device, driver and versions."""
    found: dict[str, Any] = {
        "device": "triton-interpreter",
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "python": sys.version.split()[0],
        "torch": torch.__version__,
        "triton": version("triton"),
        "tokred": tokred.__version__,
        "commit": args.commit or commit(),
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found |= {
            "device": properties.name,
            "multiprocessors": properties.multi_processor_count,
            "memory_gib": round(properties.total_memory / 2**30, 1),
            "driver": _driver(),
            "cuda": torch.version.cuda,
        }
    if ceilings is not None:
        found |= {"copy_bytes_per_second": ceilings.copy, "bf16_flops_per_second": ceilings.matmul}
    return found


def _driver() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=30, check=True).stdout.split("\n")[0]
    except (OSError, subprocess.SubprocessError):
        return ""


def _write(
    args: argparse.Namespace, folder: Path, device: torch.device, ceilings: Ceilings | None, done: Sequence[Result]
) -> Path:
    about = describe(args, device, ceilings)
    # The rate of exponentials is not measured: it goes with the number of multiprocessors.
    exps = EXP_RATE * about.get("multiprocessors", 132) / 132
    name = re.sub(r"[^a-z0-9]+", "-", about["device"].lower()).strip("-")
    part = "-only" if args.only else "-quick" if args.quick else ""
    path = folder / f"{name}-{about['date'][:10]}{part}.json"
    folder.mkdir(parents=True, exist_ok=True)
    options = {"seed": args.seed, "quick": args.quick, "autotune": args.autotune, "only": args.only}
    record = about | {"options": options, "rows": [result.record(ceilings, exps) for result in done]}
    path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf8")
    return path
