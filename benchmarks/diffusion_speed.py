"""Time and peak memory of one denoising step of real geometries with random weights, against the unpatched denoiser.

Time does not depend on the weights. Arms run in one process, in an order shuffled anew in each round, and ratios are
per round; the unpatched denoiser runs diffusers' fused attention. Beside each ratio stands the ceiling by
multiply-adds that ``tokred.explain`` counts; attention of small heads takes longer than its multiply-adds say.

    python benchmarks/diffusion_speed.py --device cuda --dtype float16                     # all sizes
    python benchmarks/diffusion_speed.py --case sd15:512 --width 64 --dtype float32        # a narrow one, on a CPU
"""

from __future__ import annotations

import argparse
import contextlib
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import tokred
from tokred import environment, outputs, timing
from tokred.adapters.diffusion.geometry import GEOMETRIES, build
from tokred.adapters.diffusion.survey import example

ROOT = Path(__file__).resolve().parents[1]
CASES = (
    *(f"sd15:{side}" for side in (512, 768, 1024, 1536, 2048)),
    *(f"sdxl:{side}" for side in (1024, 1536, 2048)),
    *(f"flux:{side}" for side in (1024, 1536, 2048)),
)
# Flux has 19 double and 38 single blocks; the blocks are alike, so some of each say what all would.
DEPTH: dict[str, dict[str, int]] = {"flux": {"num_layers": 2, "num_single_layers": 4}}
FINEST = {"sd15": 1, "sd21": 1}  # how much coarser than the sample the finest attention is; elsewhere 2


def arms(name: str) -> list[tuple[str, tokred.Method | None]]:
    """Labels and methods; the unpatched denoiser first."""
    d = FINEST.get(name, 2)
    merging = {"max_downsample": d, "merge_mlp": name not in FINEST}
    found: list[tuple[str, tokred.Method | None]] = [("unpatched", None)]
    for ratio in (0.25, 0.5, 0.75):
        found.append((f"tomesd ratio={ratio}", tokred.ToMeSD(ratio=ratio, **merging)))
        shared = tokred.ToMeSD(ratio=ratio, share="resolution", **merging)
        found.append((f"tomesd ratio={ratio} share=resolution", shared))
    if name != "flux":
        for factor in (2, 3, 4):
            found.append((f"todo factor={factor}", tokred.ToDo(factors=(factor,) if d == 1 else (1, factor))))
    return found


def narrow(name: str, width: int | None) -> dict[str, Any]:
    """Settings of a denoiser of another width (UNets only)."""
    changes = dict(DEPTH.get(name, {}))
    if width is None:
        return changes
    channels = GEOMETRIES[name][1].get("block_out_channels")
    if channels is None:
        raise SystemExit(f"--width is for UNets, not for {name}")
    heads = GEOMETRIES[name][1]["attention_head_dim"]
    fewer = heads if isinstance(heads, int) else tuple(max(1, h * width // channels[0]) for h in heads)
    scaled = tuple(c * width // channels[0] for c in channels)
    return changes | {"block_out_channels": scaled, "attention_head_dim": fewer}


def real(given: Any, batch: int, device: torch.device, grid: tuple[int, int]) -> Any:
    """Arguments on the meta device as random ones of a batch."""
    if isinstance(given, dict):
        out = {k: real(v, batch, device, grid) for k, v in given.items()}
        if "img_ids" in out:
            rows = torch.arange(grid[0], device=device).repeat_interleave(grid[1])
            columns = torch.arange(grid[1], device=device).repeat(grid[0])
            out["img_ids"] = torch.stack([rows * 0, rows, columns], 1).float()
            out["txt_ids"] = torch.zeros(given["txt_ids"].shape, device=device)
        return out
    if not isinstance(given, Tensor):
        return given
    shape = (batch, *given.shape[1:])
    if not given.is_floating_point():
        return torch.ones(shape, device=device, dtype=given.dtype)
    return torch.randn(shape, device=device, dtype=given.dtype)


def measure(case: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    """A row an arm of one case."""
    name, _, pixels = case.partition(":")
    device, dtype = torch.device(options.device), getattr(torch, options.dtype)
    changes = narrow(name, options.width)
    side = int(pixels) // GEOMETRIES[name][2]
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        model: Any = build(name, options.device, **changes)
    finally:
        torch.set_default_dtype(before)
    torch.manual_seed(0)
    given = real(example(model, (side, side)), options.batch, device, (side // 2, side // 2))
    chosen = arms(name)

    def enter(method: tokred.Method | None) -> Callable[[], AbstractContextManager[object]]:
        return contextlib.nullcontext if method is None else lambda: tokred.applied(model, method)

    enters = [enter(method) for _, method in chosen]
    seconds = timing.paired(enters, lambda i: model(**given), options.rounds, device=device)
    speeds = timing.summarise(seconds, [options.batch] * options.rounds)
    rows = []
    for (label, method), state, speed in zip(chosen, enters, speeds, strict=True):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            ceiling = 1.0 if method is None else tokred.explain(model, method, side).ceiling
        with state():
            memory = timing.peak_memory(lambda: model(**given), device)
        row: dict[str, Any] = {"model": name, "pixels": int(pixels), "width": options.width, "arm": label}
        row |= {"seconds": options.batch / speed.images_per_second.median, "ceiling": ceiling}
        row["speedup"], row["speedup_q25"], row["speedup_q75"] = speed.speedup
        row["peak_mib"], row["forward_mib"], row["memory"] = memory
        row |= {"batch": options.batch, "dtype": options.dtype, "depth": str(DEPTH.get(name, ""))}
        rows.append(row)
        print(
            f"{case:<10} {label:<32} {row['seconds'] * 1e3:9.1f} ms {row['speedup']:.3f}x of at most {ceiling:.2f}x "
            f"{row['forward_mib']:8.0f} MiB",
            flush=True,
        )
    return rows


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", action="append", help="name:pixels, as often as needed; default: all")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=("float32", "float16", "bfloat16"))
    parser.add_argument("--batch", type=int, default=2, help="guidance has two halves")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--width", type=int, default=None, help="channels of a UNet's finest level")
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--out", type=Path, default=None, help="a CSV file")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    where = environment.describe(options.device) | {"diffusers": environment.version("diffusers")}
    rows = []
    for case in options.case or CASES:
        if case.partition(":")[0] not in GEOMETRIES:
            parser.error(f"no denoiser is named {case!r}; known are {', '.join(GEOMETRIES)}")
        rows += [row | where for row in measure(case, options)]
        if options.out is not None:
            outputs.write_rows(options.out, rows)


if __name__ == "__main__":
    main()
