"""Check the operators in ``kernels/`` against float64 on a GPU, time them, and compare with their floors.

    python benchmarks/gpu.py                       # everything, less than 10 minutes
    python benchmarks/gpu.py --diffusion           # denoising steps alone (benchmarks/diffusion/speed.py)
    python benchmarks/gpu.py --vlm                 # choosing visual tokens alone (benchmarks/vlm/cost.py)
    python benchmarks/gpu.py --quick               # the rows that have a goal, with few repeats, 2 minutes
    python benchmarks/gpu.py --only merge decode   # rows whose name contains one of these
    python benchmarks/gpu.py --interpret           # no GPU: the checks alone, on tiny shapes in Triton's interpreter

Needs torch and triton; tokred is taken from this checkout and need not be installed. Where diffusers is installed,
steps of denoisers are timed in what is left of the ten minutes, into a CSV file beside. One table is printed, and
``benchmarks/results/<device>-<date>.json`` holds all figures with the versions they belong to. Times are medians over
replays of CUDA graphs whose inputs rotate, so that the cache does not hold them; the plain torch chain runs in the same
rounds. The exit status is 1 if a check failed and 2 if there is no GPU; a missed goal is reported and no error.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.util
import os
import re
import sys
import time
from pathlib import Path

from checkout import ROOT, use_checkout

TEN_MINUTES = 540.0  # after which no further denoiser is begun


def arguments(given: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--only", nargs="+", metavar="NAME", help="rows whose kernel's name contains one of these")
    parser.add_argument("--quick", action="store_true", help="few repeats, and timings only of rows that have a goal")
    parser.add_argument("--diffusion", action="store_true", help="only time denoisers; needs diffusers")
    parser.add_argument("--vlm", action="store_true", help="only time VLMs' selectors; needs transformers")
    parser.add_argument("--interpret", action="store_true", help="only check, on tiny shapes, without a GPU")
    parser.add_argument("--autotune", action="store_true", help="let kernels try their launch configurations")
    parser.add_argument("--out", type=Path, metavar="DIR", help="where the JSON goes; default benchmarks/results")
    parser.add_argument("--limit", type=float, help="seconds after which no further row is timed; default 450 or 60")
    parser.add_argument("--seed", type=int, help="of the random inputs; default: another one each time")
    parser.add_argument("--commit", help="what the JSON says, where the copy of the checkout has no git")
    args = parser.parse_args(given)
    args.limit = args.limit if args.limit is not None else (60.0 if args.quick else 450.0)
    args.seed = args.seed if args.seed is not None else time.time_ns() % 2**31
    return args


def table(folder: Path, kind: str) -> Path:
    """Where a CSV file goes."""
    import torch

    name = re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name().lower()).strip("-")
    folder.mkdir(parents=True, exist_ok=True)
    return folder / f"{name}-{datetime.datetime.now(datetime.UTC):%Y-%m-%d}-{kind}.csv"


def selectors(folder: Path) -> int:
    """Time what chooses visual tokens; returns the exit status."""
    if importlib.util.find_spec("transformers") is None:
        print("gpu.py: transformers is not installed, so VLMs are not timed", file=sys.stderr)
        return 1
    from benchmarks.vlm import cost as vlm_cost

    out = table(folder, "vlm")
    given = ["--device", "cuda", "--layers", "0", "--rounds", "9", "--out", str(out)]
    vlm_cost.run(vlm_cost.parser().parse_args(given))
    print(f"written to {out}")
    return 0


def denoisers(args: argparse.Namespace, folder: Path, seconds: float) -> int:
    """Time denoising steps, as many cases as there is time for; returns the exit status."""
    if importlib.util.find_spec("diffusers") is None:
        print("gpu.py: diffusers is not installed, so denoisers are not timed", file=sys.stderr)
        return 1 if args.diffusion else 0
    from benchmarks.diffusion import speed as diffusion_speed

    out = table(folder, "diffusion")
    given = ["--device", "cuda", "--dtype", "float16", "--limit", str(seconds), "--out", str(out)]
    diffusion_speed.run(diffusion_speed.parser().parse_args(given))
    print(f"written to {out}")
    return 0


def main() -> int:
    """Run the benchmark; returns the exit status."""
    start, args = time.monotonic(), arguments()
    # Before torch and triton are imported: the operators must run their kernels or say why not.
    os.environ["TOKRED_KERNELS"] = "triton"
    os.environ["TOKRED_AUTOTUNE"] = "1" if args.autotune else "0"
    if args.interpret:
        os.environ["TRITON_INTERPRET"] = "1"
    else:
        os.environ.pop("TRITON_INTERPRET", None)
    use_checkout()
    import torch

    if not args.interpret and not torch.cuda.is_available():
        print("gpu.py: no CUDA device was found; --interpret checks the kernels without one", file=sys.stderr)
        return 2
    if args.interpret and (args.diffusion or args.vlm):
        print("gpu.py: denoisers and VLMs are not timed in the interpreter", file=sys.stderr)
        return 2
    if args.interpret:
        torch.set_num_threads(1)
    from benchmarks.kernels.cuda_clock import Clock
    from benchmarks.kernels.gpu_run import run

    device = torch.device("cpu" if args.interpret else "cuda")
    results = ROOT / "benchmarks" / "results"
    status = 0
    if args.vlm:
        os.environ["TOKRED_KERNELS"] = "auto"
        return selectors(args.out or results)
    if not args.diffusion:
        status = run(args, results, device, None if args.interpret else Clock(device))
    if args.diffusion or not (args.interpret or args.quick or args.only):
        # The operators choose their paths as in use, not the kernels alone.
        os.environ["TOKRED_KERNELS"] = "auto"
        status = denoisers(args, args.out or results, TEN_MINUTES - (time.monotonic() - start)) or status
    return status


if __name__ == "__main__":
    sys.exit(main())
