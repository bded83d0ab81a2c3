"""The operators in ``kernels/`` on a CPU in float32, each beside the plain torch chain that it replaces.

    python -m benchmarks kernels/cpu --threads 2 --out benchmarks/results/kernels.csv --overwrite
    python -m benchmarks kernels/cpu --only merge --rounds 50 --threads 2
    python -m benchmarks kernels/cpu --tiny --rounds 2     # a test of this script

Both arms run in every round in a new random order, on alternating inputs; reported are medians and quartiles of the
times and of the per-round ratio. Each row is checked against float64 before it is timed, and what one call allocates at
most is counted from torch's own allocations. The exit status is 1 if a check failed; a missed goal is reported only.
"""

from __future__ import annotations

import argparse
import os
import sys

from benchmarks.saving import save, saving


def arguments(given: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--only", nargs="+", metavar="NAME", help="rows whose kernel's name contains one of these")
    parser.add_argument("--rounds", type=int, default=41)
    parser.add_argument("--region", type=float, default=5.0, help="least milliseconds of calls that are timed together")
    parser.add_argument("--threads", type=int, help="default: torch's")
    parser.add_argument("--sets", type=int, default=2, help="how many inputs alternate")
    parser.add_argument("--tiny", action="store_true", help="the smallest shapes")
    parser.add_argument("--seed", type=int, default=0)
    saving(parser)
    return parser.parse_args(given)


def main() -> int:
    """Run the benchmark; returns the exit status."""
    args = arguments()
    os.environ.pop("TRITON_INTERPRET", None)
    os.environ["TOKRED_KERNELS"] = "auto"
    os.environ.setdefault(
        "KINETO_LOG_LEVEL", "99"
    )  # the profiler that counts allocations says when it starts and stops
    import torch

    if args.threads:
        torch.set_num_threads(args.threads)
    from benchmarks.kernels.cpu_run import HEADER, cells, measure, rows
    from benchmarks.kernels.table import render

    lines: list[list[str]] = []
    failed = False
    for number, row in enumerate(rows(args)):
        record, failure = measure(row, args, args.seed + number)
        lines.append(cells(record, failure))
        failed |= bool(failure)
        print("  ".join(lines[-1]), file=sys.stderr, flush=True)
        save([record], "cpu", args)
    if not lines:
        print("no row has such a name", file=sys.stderr)
        return 1
    print(render(HEADER, lines))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
