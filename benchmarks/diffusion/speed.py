"""Time and peak memory of denoising steps of real geometries with random weights, against the unpatched denoiser.

Time does not depend on the weights. Arms run in one process, in an order shuffled anew in each round, and ratios are
per round; the unpatched denoiser runs torch's fused attention, as diffusers has it. A timed run is several steps of one
image, so that plans that are kept for some steps show what they cost on average. Beside each ratio stands the ceiling
by multiply-adds that ``tokred.explain`` counts (attention of small heads takes longer than its multiply-adds say), and
the share of a step that deciding takes, which is measured on its own, waiting for the device around each decision.

    python -m benchmarks diffusion/speed --device cuda --dtype float16 --out speed.csv     # all
    python -m benchmarks diffusion/speed --case sd15:512 --width 64                        # a narrow one, on a CPU
    python -m benchmarks diffusion/speed --case wan-1.3b:49x480x832 --arm "todo factors=(1,2)" --device cuda
    python -m benchmarks diffusion/speed --quick                                           # does it run? tiny, 1 minute
"""

from __future__ import annotations

import argparse
import inspect
import sys
import time
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

import tokred
from benchmarks.saving import save, saving
from tokred.adapters.diffusion.geometry import GEOMETRIES, build
from tokred.adapters.diffusion.survey import example
from tokred.bench import results, timing
from tokred.bench.arms import Arm, typed

CASES = (  # what matters most first, for machines that are lent for minutes
    *(f"{name}:{side}" for side in (1024, 2048) for name in ("sd15", "sdxl", "flux")),
    *(f"{name}:{side}" for side in (512, 768, 1536) for name in ("sd15", "flux")),
    "sdxl:1536",
)
QUICK = ("sd15:128", "sdxl:128", "flux:128", "wan-1.3b:5x64x64")
QUICK_SETTINGS: dict[str, tuple[int, dict[str, Any]]] = {
    "sd15": (32, {"layers_per_block": 1}),
    "sdxl": (32, {"layers_per_block": 1, "transformer_layers_per_block": 1}),
    "flux": (128, {"num_layers": 1, "num_single_layers": 1}),
    "wan-1.3b": (128, {"num_layers": 1}),
}
# The blocks of these are alike, so some of them say what all would.
DEPTH: dict[str, dict[str, Any]] = {
    "flux": {"num_layers": 2, "num_single_layers": 4},
    "pixart": {"num_layers": 4},
    "sd3": {"num_layers": 4},
    "sd35-medium": {"num_layers": 4, "dual_attention_layers": (0, 1)},
    "cogvideox-2b": {"num_layers": 3},
    "cogvideox-5b": {"num_layers": 3},
    "wan-1.3b": {"num_layers": 4},
    "wan-14b": {"num_layers": 2},
    "hunyuan-video": {"num_layers": 1, "num_single_layers": 2},
}
FINEST = {"sd15": 1, "sd21": 1}  # how much coarser than the sample the finest attention is; elsewhere 2
REFRESH = 5


def chosen(name: str, wanted: Sequence[str] | None, quick: bool = False) -> list[Arm]:
    """The unpatched denoiser, and methods.

    Args:
        name: of the geometry.
        wanted: such as ``"todo factors=4"``; None: the usual ones.
        quick: fewer of them.
    """
    if wanted is not None:
        return [typed(text) for text in ("unpatched", *wanted)]
    d = FINEST.get(name, 2)
    found, merging = ["unpatched"], f"max_downsample={d} merge_mlp={name not in FINEST}"
    for ratio in (0.5,) if quick else (0.25, 0.5, 0.75):
        found.append(f"tomesd ratio={ratio} {merging}")
        found.append(f"tomesd ratio={ratio} share=resolution refresh={REFRESH} {merging}")
    for factor in (2,) if quick else (2, 3, 4):
        found.append(f"todo factors=({factor},)" if d == 1 else f"todo factors=(1,{factor})")
    if not quick:
        found.append(f"toma ratio=0.5 max_downsample={d} first_full=0")
        found.append(f"keymerge refresh={REFRESH} max_downsample={d}")
    return [typed(text) for text in found]


def settings(name: str, width: int | None) -> dict[str, Any]:
    """Fewer blocks where they are alike, and another width on request."""
    import diffusers

    changes = dict(DEPTH.get(name, {}))
    if width is None:
        return changes
    made = GEOMETRIES[name]
    channels = made.settings.get("block_out_channels")
    if channels is not None:
        heads = made.settings["attention_head_dim"]
        fewer = heads if isinstance(heads, int) else tuple(max(1, h * width // channels[0]) for h in heads)
        scaled = tuple(c * width // channels[0] for c in channels)
        return changes | {"block_out_channels": scaled, "attention_head_dim": fewer}
    known = inspect.signature(getattr(diffusers, made.cls).__init__).parameters
    size = made.settings.get("attention_head_dim", known["attention_head_dim"].default)
    changes["num_attention_heads"] = max(1, width // size)
    for other in ("cross_attention_dim", "caption_projection_dim"):
        if other in known:
            changes[other] = changes["num_attention_heads"] * size
    if "ffn_dim" in known:
        changes["ffn_dim"] = 4 * changes["num_attention_heads"] * size
    return changes


def real(given: Any, batch: int, device: torch.device, grid: tuple[int, int]) -> Any:
    """Arguments on the meta device as random ones of a batch."""
    if isinstance(given, dict):
        out = {k: real(v, batch, device, grid) for k, v in given.items()}
        if "img_ids" in out:
            rows = torch.arange(grid[0], device=device).repeat_interleave(grid[1])
            columns = torch.arange(grid[1], device=device).repeat(grid[0])
            out["img_ids"] = torch.stack([rows * 0, rows, columns], 1).float()
            out["txt_ids"] = torch.zeros(given["txt_ids"].shape, device=device)
        if "encoder_attention_mask" in out:
            out["encoder_attention_mask"] = torch.ones_like(out["encoder_attention_mask"])
        return out
    if isinstance(given, tuple):  # tables of rotations, one for the batch
        return tuple(torch.randn(part.shape, device=device) for part in given)
    if not isinstance(given, Tensor):
        return given
    shape = (batch, *given.shape[1:])
    if not given.is_floating_point():
        return torch.ones(shape, device=device, dtype=given.dtype)
    return torch.randn(shape, device=device, dtype=given.dtype)


class Steps:
    """Denoising steps of one image: timesteps fall, and start anew at every call."""

    def __init__(self, model: nn.Module, given: dict[str, Any], steps: int) -> None:
        self.model, self.given = model, given
        old = given["timestep"]
        times = (0.9 - 0.01 * i if old.is_floating_point() else 900 - 10 * i for i in range(steps))
        self.times = [torch.full_like(old, time) for time in times]

    def one(self) -> None:
        """A single step."""
        self.model(**self.given)

    def all(self, _: int = 0) -> None:
        """Several."""
        for moment in self.times:
            self.model(**{**self.given, "timestep": moment})


def plan_seconds(run: Steps, method: tokred.Method, device: torch.device, rounds: int) -> list[float]:
    """Of each round, the seconds that decisions take in a step, on average over the steps of :class:`Steps`."""
    watch, totals = timing.Watch(device), []
    with tokred.applied(run.model, method), torch.inference_mode(), watch.around(type(method), "reduce", "plan"):
        run.all()
        for _ in range(rounds):
            watch.clear()
            run.all()
            totals.append(watch.total() / len(run.times))
    return totals


def prepare(case: str, options: argparse.Namespace) -> tuple[str, nn.Module, tuple[int, ...], Steps]:
    """Name, denoiser, size of its sample, and its steps."""
    name, _, text = case.partition(":")
    device, dtype = torch.device(options.device), getattr(torch, options.dtype)
    size = GEOMETRIES[name].sample(_sides(text))
    width, fewer = options.width, dict[str, Any]()
    if options.quick:
        width, fewer = QUICK_SETTINGS.get(name, (width, fewer))
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        model = build(name, options.device, **settings(name, width) | fewer)
    finally:
        torch.set_default_dtype(before)
    torch.manual_seed(0)
    given = real(example(model, size), options.batch, device, (size[-2] // 2, size[-1] // 2))
    return name, model, size, Steps(model, given, options.steps)


def _sides(text: str) -> tuple[int, ...]:
    """``1024``, or ``49x480x832``."""
    parts = text.split("x")
    if not all(part.isdigit() for part in parts):
        raise ValueError(f"a case is name:pixels or name:frames x height x width, such as sd15:512, got {text!r}")
    sides = tuple(int(part) for part in parts)
    return sides * 2 if len(sides) == 1 else sides


def measure(case: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    """A record an arm of one case."""
    name, model, size, run = prepare(case, options)
    device, found = torch.device(options.device), chosen(name, options.arm, options.quick)
    where = {"size": case.partition(":")[2], "batch": options.batch, "width": options.width, "weights": "random"}
    where |= {"depth": str(DEPTH.get(name, "")), "moments": options.steps, "rounds": options.rounds}
    where |= results.here(device, options.dtype)
    rows, ceilings = [], dict[Any, float]()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*reduced nothing|.*ceiling")
        enters = [lambda arm=arm: arm.applied(model) for arm in found]
        seconds = timing.paired(enters, run.all, options.rounds, device=device)
        for arm, spent, faster in zip(found, seconds, timing.ratios(seconds), strict=True):
            row: dict[str, Any] = {"model": name, "method": arm.name, "setting": arm.setting, **where}
            row |= results.spread("seconds", [s / options.steps for s in spent]) | results.spread("speedup", faster)
            row |= {"ceiling": 1.0, "plan_share": 0.0}
            if arm.method is not None:
                plans = plan_seconds(run, arm.method, device, max(1, options.rounds // 2))
                row["ceiling"] = _ceiling(model, arm.method, size, ceilings)
                row["plan_share"] = timing.spread(plans).median / row["seconds"]
            with arm.applied(model):
                row |= timing.peak_memory(run.one, device).record()
            rows.append(row)
            print(_line(case, row), flush=True)
    return rows


def _ceiling(model: nn.Module, method: Any, size: tuple[int, ...], seen: dict[Any, float]) -> float:
    """By multiply-adds, which sharing plans does not change."""
    shared = {k: v for k, v in method.to_dict()["parameters"].items() if k not in ("share", "refresh")}
    key = (method.name, repr(shared))
    if key not in seen:
        seen[key] = tokred.explain(model, method, size).ceiling
    return seen[key]


def _line(case: str, row: dict[str, Any]) -> str:
    return (
        f"{case:<20} {row['method']:<10} {row['setting']:<60} {row['seconds'] * 1e3:9.1f} ms {row['speedup']:6.3f}x of "
        f"{row['ceiling']:5.2f}x, plan {row['plan_share']:5.1%}, {row['forward_mib']:8.0f} MiB"
    )


def parser() -> argparse.ArgumentParser:
    """The command line."""
    found = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("--case", action="append", help="name:pixels, or name:frames x height x width; default: all")
    found.add_argument("--arm", action="append", help='such as "todo factors=4", as often as needed')
    found.add_argument("--device", default="cpu")
    found.add_argument("--dtype", default="float32", choices=("float32", "float16", "bfloat16"))
    found.add_argument("--batch", type=int, default=2, help="guidance has two halves")
    found.add_argument("--steps", type=int, default=REFRESH, help="denoising steps of a timed run")
    found.add_argument("--rounds", type=int, default=8)
    found.add_argument("--width", type=int, default=None, help="channels of the finest level")
    found.add_argument("--threads", type=int, default=None)
    found.add_argument("--limit", type=float, default=float("inf"), help="seconds after which no further case begins")
    found.add_argument("--quick", action="store_true", help="tiny and narrow, one round: does it run?")
    saving(found)
    return found


def run(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Measure every case, and write its rows after each.

    Raises:
        ValueError: a case names no known denoiser, or its size does not fit.
    """
    start = time.monotonic()
    if options.threads:
        torch.set_num_threads(options.threads)
    if options.quick:
        options.rounds, options.steps = 1, min(options.steps, 2)
    cases = options.case or (QUICK if options.quick else CASES)
    for case in cases:
        if case.partition(":")[0] not in GEOMETRIES:
            raise ValueError(f"no denoiser is named {case!r}; known are {', '.join(GEOMETRIES)}")
    rows: list[dict[str, Any]] = []
    for case in cases:
        if time.monotonic() - start > options.limit:
            print(f"{case}: not begun, out of time", flush=True)
            continue
        try:
            new = measure(case, options)
            save(new, "speed", options)
            rows += new
        except torch.cuda.OutOfMemoryError as error:
            print(f"{case}: {str(error).splitlines()[0]}", file=sys.stderr, flush=True)
        if torch.device(options.device).type == "cuda":
            torch.cuda.empty_cache()
    return rows


def main() -> None:
    """See the module."""
    found = parser()
    options = found.parse_args()
    try:
        run(options)
    except ValueError as error:
        found.error(str(error))


if __name__ == "__main__":
    main()
