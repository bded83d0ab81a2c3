"""Methods on a real denoiser: how far its images move from the unmerged ones of the same seeds, beside speed.

The denoiser is the terrain UNet of ``benchmarks/zoo`` (one step, 28 self-attention layers on 1,024, 256 and 64 tokens;
methods act on the 1,024, AsymRnR on all). What needs steps, guidance or frames has nothing to show here. For every arm
and every seed: PSNR, mean absolute error and the distance of the radial power spectra, against the unpatched model's
image; in the same runs, interleaved in one process in an order shuffled anew in each round, images per second and the
ratio to the unpatched model; peak memory afterwards.

    python -m benchmarks diffusion/quality                  # 64 samples, all arms
    python -m benchmarks diffusion/quality --quick          # 8 samples, to see that it runs
    python -m benchmarks diffusion/quality --device cuda

Written to ``--out``: diffusion.csv, diffusion.png (PSNR against speed), diffusion_samples.png (a contact sheet).
"""

from __future__ import annotations

import argparse
import contextlib
import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import tokred
from tokred.bench import plots, timing
from tokred.bench import results as outputs
from tokred.core import environment

ROOT = Path(__file__).resolve().parents[2]
RATIOS = (0.25, 0.5, 0.6, 0.75)
FINEST = 4  # how much coarser the finest attention of the terrain UNet is than its image
DIFFICULTY = 50.0
SHOWN = ("ratio=0.5", "factor=2")  # on the contact sheet


@dataclass(frozen=True)
class Arm:
    """One setting. ``method`` None is the unpatched model."""

    family: str
    setting: str
    method: tokred.Method | None = None

    def enter(self, model: Any) -> Callable[[], AbstractContextManager[object]]:
        """What ``timing.paired`` enters."""
        if self.method is None:
            return contextlib.nullcontext
        return lambda: tokred.applied(model, self.method)


def arms(quick: bool) -> list[Arm]:
    """The unpatched model first."""
    ratios = (0.5,) if quick else RATIOS
    found = [Arm("unpatched", "")]
    for ratio in ratios:
        at = {"ratio": ratio, "max_downsample": FINEST}
        found += [
            Arm("ToMeSD", f"ratio={ratio}", tokred.ToMeSD(**at)),
            Arm("ToMeSD, shared plan", f"ratio={ratio}", tokred.ToMeSD(**at, share="resolution")),
            Arm("ToMeSD, fixed choice", f"ratio={ratio}", tokred.ToMeSD(**at, use_rand=False)),
            Arm("random pruning", f"ratio={ratio}", tokred.RandomLatentPrune(**at)),
            Arm("KeyMerge", f"ratio={ratio}", tokred.KeyMerge(**at)),
            Arm("KeyMerge, a plan a block", f"ratio={ratio}", tokred.KeyMerge(**at, share="block")),
            Arm("KeyMerge, queries too", f"ratio={ratio}", tokred.KeyMerge(**at, queries=True)),
            Arm("ToMA", f"ratio={ratio}", tokred.ToMA(**at, cover="attention", first_full=0)),
            Arm("AsymRnR, queries", f"ratio={ratio}", tokred.AsymRnR(q=ratio, kv=0, first_full=0)),
            Arm("AsymRnR, keys", f"ratio={ratio}", tokred.AsymRnR(q=0, kv=ratio, first_full=0)),
        ]
    for factor in (2,) if quick else (2, 3, 4):
        factors = (1, 1, factor)
        for mode in ("nearest",) if quick else ("nearest", "nearest-exact", "average"):
            found.append(Arm(f"ToDo, {mode}", f"factor={factor}", tokred.ToDo(factors=factors, mode=mode)))
    return found


def psnr(x: Tensor, y: Tensor) -> Tensor:
    """``(B,)`` dB, of images in -1..1; at most 200."""
    mse = (x - y).double().square().flatten(1).mean(1).clamp_min(1e-20)
    return 10 * (4 / mse).log10()


def radial_spectrum(x: Tensor) -> Tensor:
    """``(B, side / 2)``: the power of images ``(B, 1, side, side)`` at each whole radius above 0, in dB."""
    side = x.shape[-1]
    power = torch.fft.fft2(x.double().squeeze(1)).abs().square()
    axis = torch.fft.fftfreq(side, 1 / side, device=x.device)
    radius = (axis.unsqueeze(0).square() + axis.unsqueeze(1).square()).sqrt().round().long().flatten()
    rings = side // 2
    total = torch.zeros(x.shape[0], int(radius.max()) + 1, dtype=power.dtype, device=x.device)
    total.index_add_(1, radius, power.flatten(1))
    mean = total / radius.bincount()
    return 10 * mean[:, 1 : rings + 1].clamp_min(1e-20).log10()


def spectrum_distance(x: Tensor, y: Tensor) -> Tensor:
    """``(B,)`` dB: mean absolute difference of the radial spectra."""
    return (radial_spectrum(x) - radial_spectrum(y)).abs().mean(1)


def mean_error(values: Tensor) -> tuple[float, float]:
    """Mean and its standard error."""
    n = len(values)
    return float(values.mean()), float(values.std() / math.sqrt(n)) if n > 1 else 0.0


def measure(model: Any, chosen: Sequence[Arm], samples: int, batch: int) -> tuple[list[dict[str, Any]], list[Tensor]]:
    """A row an arm, and its images ``(samples, 1, 128, 128)``."""
    device = next(model.parameters()).device
    rounds = samples // batch
    images: list[dict[int, Tensor]] = [{} for _ in chosen]

    def run(i: int) -> Tensor:
        out: Tensor = model.sample(batch, DIFFICULTY, seed=i)
        return out

    def collect(arm: int, i: int, out: Tensor) -> None:
        images[arm][i] = out.float().cpu()

    enters = [arm.enter(model.unet) for arm in chosen]
    seconds = timing.paired(enters, run, rounds, device=device, collect=collect)
    speeds = timing.summarise(seconds, [batch] * rounds)
    made = [torch.cat([found[i] for i in range(rounds)]) for found in images]
    where = environment.describe(device) | {"diffusers": environment.version("diffusers")}
    rows = []
    for arm, speed, out in zip(chosen, speeds, made, strict=True):
        row: dict[str, Any] = {"model": "terrain", "method": arm.family, "setting": arm.setting, "samples": len(out)}
        row["tokens"], row["left"] = tokens(model, arm)
        for name, values in (
            ("psnr", psnr(out, made[0])),
            ("mae", (out - made[0]).abs().flatten(1).mean(1)),
            ("spectrum_db", spectrum_distance(out, made[0])),
        ):
            row[name], row[f"{name}_error"] = (None, None) if arm.method is None else mean_error(values)
        row["images_per_second"] = speed.images_per_second.median
        row["speedup"], row["speedup_q25"], row["speedup_q75"] = speed.speedup
        with arm.enter(model.unet)():
            memory = timing.peak_memory(lambda: run(0), device)
        row["peak_mib"], row["forward_mib"], row["memory"] = memory
        rows.append(row | {"batch": batch, "difficulty": DIFFICULTY} | where)
    return rows, made


def tokens(model: Any, arm: Arm) -> tuple[int, int]:
    """Tokens of the finest attention, and how many are left of them."""
    with arm.enter(model.unet)(), torch.inference_mode():
        if arm.method is None:
            return 1024, 1024
        model.sample(1)
        found = max(tokred.report(model.unet).sublayers, key=lambda row: row.tokens)
    return found.tokens, found.left


def plot(rows: Sequence[dict[str, Any]], path: Path) -> Path:
    """PSNR and spectra against speed, a line a method."""
    plt = plots.pyplot()
    panels = (
        ("psnr", "PSNR to the unmerged image (dB)"),
        ("mae", "mean absolute error (lower is better)"),
        ("spectrum_db", "distance of spectra (dB, lower is better)"),
    )
    figure, axes = plt.subplots(1, len(panels), figsize=(15, 4.6), layout="constrained")
    families = list(dict.fromkeys(row["method"] for row in rows if row["psnr"] is not None))
    for axis, (column, label) in zip(axes, panels, strict=True):
        for i, family in enumerate(families):
            mine = [row for row in rows if row["method"] == family]
            axis.errorbar(
                [row["speedup"] for row in mine],
                [row[column] for row in mine],
                yerr=[row[f"{column}_error"] for row in mine],
                color=plots.COLOURS[i % 8],
                marker=plots.MARKERS[(i + i // 8) % 8],
                label=family,
                lw=1.2,
                ms=5,
            )
            if column == "psnr":
                for row in mine:
                    text = row["setting"].partition("=")[2]
                    axis.annotate(text, (row["speedup"], row[column]), fontsize=6, xytext=(3, 3),
                                  textcoords="offset points")  # fmt: skip
        axis.axvline(1, color="0.7", lw=0.8, zorder=0)
        axis.set_xlabel("times as fast as the unpatched denoiser")
        axis.set_ylabel(label)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].legend(fontsize=7, frameon=False)
    first = rows[0]
    figure.suptitle(
        f"Terrain UNet, {first['samples']} samples, batch {first['batch']}; {first['device']}, "
        f"{first['threads']} threads, {first['date']}",
        fontsize=9,
    )
    return plots.save(figure, path)


def contact_sheet(chosen: Sequence[Arm], images: Sequence[Tensor], path: Path, columns: int = 6) -> Path:
    """A row an arm: the same seeds, and how far the first one is off."""
    columns = min(columns, len(images[0]))
    figure, axes = plots.grid(len(chosen), columns + 1, 1.25)
    for row, (arm, found) in enumerate(zip(chosen, images, strict=True)):
        for column in range(columns):
            axes[row, column].imshow(found[column, 0], cmap="terrain", vmin=-1, vmax=1)
        off = (found[0, 0] - images[0][0, 0]).abs()
        axes[row, columns].imshow(off, cmap="magma", vmin=0, vmax=0.3)
        label = f"{arm.family}\n{arm.setting}".strip().replace(", ", ",\n")
        axes[row, 0].set_ylabel(label, fontsize=5.5, rotation=0, ha="right", va="center")
    for axis in axes.flat:
        axis.set_xticks([])
        axis.set_yticks([])
    axes[0, columns].set_title("first one: error, 0 to 0.3", fontsize=5)
    return plots.save(figure, path)


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="8 samples and one setting a method")
    parser.add_argument("--samples", type=int, default=None, help="default: 64")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    given = parser.parse_args()
    samples = given.samples or (8 if given.quick else 64)
    batch = min(given.batch, samples // 2 if given.quick else samples)
    if samples % batch:
        parser.error(f"--samples {samples} is no multiple of --batch {batch}")
    if given.threads:
        torch.set_num_threads(given.threads)
    from benchmarks.zoo import terrain

    model, chosen = terrain.load().to(given.device), arms(given.quick)
    rows, images = measure(model, chosen, samples, batch)
    given.out.mkdir(parents=True, exist_ok=True)
    outputs.write_rows(given.out / "diffusion.csv", rows)
    plot(rows, given.out / "diffusion.png")
    shown = [i for i, arm in enumerate(chosen) if arm.setting in ("", *SHOWN)]
    contact_sheet([chosen[i] for i in shown], [images[i] for i in shown], given.out / "diffusion_samples.png")
    for row in rows:
        quality = "" if row["psnr"] is None else f"{row['psnr']:6.2f} dB {row['mae']:.4f} {row['spectrum_db']:6.3f} dB"
        speed = f"{row['images_per_second']:7.2f} images/s {row['speedup']:.3f}x"
        print(f"{row['method']:<24} {row['setting']:<12} {row['left']:>5} {quality:<28} {speed}")


if __name__ == "__main__":
    import sys

    sys.path.insert(0, str(ROOT))
    main()
