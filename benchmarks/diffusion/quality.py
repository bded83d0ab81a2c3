"""Methods on a real denoiser: how far its images move from the unmerged ones of the same seeds, beside speed.

The denoiser is the terrain UNet of ``benchmarks/zoo`` (one step, 28 self-attention layers on 1,024, 256 and 64 tokens;
methods act on the 1,024, AsymRnR on all). What needs steps, guidance or frames has nothing to show here. For every arm
and every seed: PSNR, mean absolute error and the distance of the radial power spectra, against the unpatched model's
image; in the same runs, interleaved in one process in an order shuffled anew in each round, images per second and the
ratio to the unpatched model; peak memory afterwards.

    python -m benchmarks.zoo.fetch terrain
    python -m benchmarks diffusion/quality --threads 2 --out benchmarks/results/diffusion.csv --overwrite
    python -m benchmarks diffusion/quality --quick --pictures /tmp/quality      # 8 samples, to see that it runs
    python -m benchmarks diffusion/quality --device cuda

``--pictures`` leaves a contact sheet, ``diffusion_samples.png``; ``python -m benchmarks pages`` makes the plot.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import tokred
from benchmarks.saving import save, saving
from tokred.bench import plots, results, timing
from tokred.bench.arms import Arm, typed

RATIOS = (0.25, 0.5, 0.6, 0.75)
FINEST = 4  # how much coarser the finest attention of the terrain UNet is than its image
DIFFICULTY = 50.0
SHOWN = ("=0.5", "factors=(1,1,2)")  # on the contact sheet


def arms(quick: bool) -> list[Arm]:
    """The unpatched model first."""
    found = ["unpatched"]
    for ratio in (0.5,) if quick else RATIOS:
        at = f"ratio={ratio} max_downsample={FINEST}"
        found += [
            f"tomesd {at}",
            f"tomesd {at} share=resolution",
            f"tomesd {at} use_rand=False",
            f"random_latent_prune {at}",
            f"keymerge {at}",
            f"keymerge {at} share=block",
            f"keymerge {at} queries=True",
            f"toma {at} cover=attention first_full=0",
            f"asymrnr q={ratio} kv=0 first_full=0",
            f"asymrnr q=0 kv={ratio} first_full=0",
        ]
    for factor in (2,) if quick else (2, 3, 4):
        for mode in ("nearest",) if quick else ("nearest", "nearest-exact", "average"):
            found.append(f"todo factors=(1,1,{factor}) mode={mode}")
    return [typed(text) for text in found]


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

    enters = [lambda arm=arm: arm.applied(model.unet) for arm in chosen]
    seconds = timing.paired(enters, run, rounds, device=device, collect=collect)
    speeds = timing.summarise(seconds, [batch] * rounds)
    made = [torch.cat([found[i] for i in range(rounds)]) for found in images]
    where = {"batch": batch, "difficulty": DIFFICULTY, "rounds": rounds, "samples": samples}
    where |= results.here(device, next(model.parameters()).dtype)
    rows = []
    for arm, speed, out in zip(chosen, speeds, made, strict=True):
        row: dict[str, Any] = {"model": "terrain", "method": arm.name, "setting": arm.setting, **where}
        row["tokens_in"], row["tokens_left"] = tokens(model, arm)
        if arm.method is not None:
            row |= _mean("psnr", psnr(out, made[0])) | _mean("mae", (out - made[0]).abs().flatten(1).mean(1))
            row |= _mean("spectrum_db", spectrum_distance(out, made[0]))
        row |= results.between("images_per_second", *speed.images_per_second)
        row |= results.between("speedup", *speed.speedup)
        with arm.applied(model.unet):
            row |= timing.peak_memory(lambda: run(0), device).record()
        rows.append(row)
    return rows, made


def _mean(name: str, values: Tensor) -> dict[str, float]:
    """With its interval over samples."""
    n = len(values)
    return results.mean(name, float(values.mean()), float(values.std() / math.sqrt(n)) if n > 1 else 0.0)


def tokens(model: Any, arm: Arm) -> tuple[int, int]:
    """Tokens of the finest attention, and how many are left of them."""
    with arm.applied(model.unet), torch.inference_mode():
        if arm.method is None:
            return 1024, 1024
        model.sample(1)
        found = max(tokred.report(model.unet).sublayers, key=lambda row: row.tokens)
    return found.tokens, found.left


def contact_sheet(chosen: Sequence[Arm], images: Sequence[Tensor], path: Path, columns: int = 6) -> Path:
    """A row an arm: the same seeds, and how far the first one is off."""
    columns = min(columns, len(images[0]))
    figure, axes = plots.grid(len(chosen), columns + 1, 1.25)
    for row, (arm, found) in enumerate(zip(chosen, images, strict=True)):
        for column in range(columns):
            axes[row, column].imshow(found[column, 0], cmap="terrain", vmin=-1, vmax=1)
        off = (found[0, 0] - images[0][0, 0]).abs()
        axes[row, columns].imshow(off, cmap="magma", vmin=0, vmax=0.3)
        label = arm.label.replace(" ", "\n", 2)
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
    parser.add_argument("--pictures", type=Path, help="folder for a contact sheet")
    saving(parser)
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
    save(rows, "quality", given)
    if given.pictures is not None:
        given.pictures.mkdir(parents=True, exist_ok=True)
        shown = [i for i, arm in enumerate(chosen) if not arm.setting or any(s in arm.setting for s in SHOWN)]
        sheet = given.pictures / "diffusion_samples.png"
        contact_sheet([chosen[i] for i in shown], [images[i] for i in shown], sheet)
    for row in rows:
        quality = f"{row['psnr']:6.2f} dB {row['mae']:.4f} {row['spectrum_db']:6.3f} dB" if "psnr" in row else ""
        speed = f"{row['images_per_second']:7.2f} images/s {row['speedup']:.3f}x"
        print(f"{row['method']:<20} {row['setting']:<44} {row['tokens_left']:>5} {quality:<28} {speed}")


if __name__ == "__main__":
    main()
