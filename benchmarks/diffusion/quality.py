"""Methods on a real denoiser: how far its images move from the unmerged ones of the same seeds, beside speed.

The denoiser is the terrain UNet of ``benchmarks/zoo`` (one step, 28 self-attention layers on 1,024, 256 and 64 tokens;
methods act on the 1,024, AsymRnR on all). What needs steps, guidance or frames has nothing to show here. For every arm
and every seed: PSNR, mean absolute error and the distance of the radial power spectra, against the unpatched model's
image, and beside them speed and peak memory, by ``tokred.benchmark``.

    python -m benchmarks.zoo.fetch terrain
    python -m benchmarks diffusion/quality --threads 2 --out benchmarks/results/diffusion.csv --overwrite
    python -m benchmarks diffusion/quality --quick --pictures /tmp/quality      # 8 samples, to see that it runs
    python -m benchmarks diffusion/quality --device cuda

``--pictures`` leaves a contact sheet, ``diffusion_samples.png``; ``python -m benchmarks pages`` makes the plot.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import tokred
from benchmarks.engine import measured, threads
from benchmarks.saving import save, saving
from benchmarks.zoo import carriers
from tokred.bench import plots
from tokred.bench.arms import BASE
from tokred.bench.entries import entry

RATIOS = (0.25, 0.5, 0.6, 0.75)
FINEST = 4  # how much coarser the finest attention of the terrain UNet is than its image
DIFFICULTY = 50.0
SHOWN = ("=0.5", "factors=(1,1,2)")  # on the contact sheet


def settings(quick: bool) -> list[str]:
    """Every method at every amount."""
    found = []
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


def batches(samples: int, size: int) -> list[Tensor]:
    """Seeds ``(size,)``, of which the first one draws the noise of them all."""
    return [torch.arange(start, start + size) for start in range(0, samples, size)]


def nearness(output: Tensor, batch: Tensor, dense: Tensor) -> Tensor:
    """``(B,)`` dB, beside the unpatched model's images."""
    return psnr(output.float(), dense.float())


def distance(output: Tensor, batch: Tensor, dense: Tensor) -> Tensor:
    """``(B,)`` mean absolute error."""
    return (output.float() - dense.float()).abs().flatten(1).mean(1)


def spectra(output: Tensor, batch: Tensor, dense: Tensor) -> Tensor:
    """``(B,)`` distance of the radial spectra in dB."""
    return spectrum_distance(output.float(), dense.float())


METRICS = {"psnr": nearness, "mae": distance, "spectrum_db": spectra}


def measure(
    model: Any, chosen: Sequence[str], samples: int, batch: int, values: Path | None = None, pairs: int | None = None
) -> list[dict[str, Any]]:
    """A row a setting, the unpatched model's first; timed beside it on so many batches, None: on all."""

    def image(unet: Any, seeds: Tensor) -> Tensor:
        out: Tensor = model.sample(batch, DIFFICULTY, seed=int(seeds[0]) // batch)
        return out

    more = {"batch": batch, "difficulty": DIFFICULTY, "samples": samples}
    data = batches(samples, batch)
    source = {"name": "terrain", "data_from": carriers.cited("terrain"), "more": more, "values": values}
    rows = measured(model.unet, chosen, data, METRICS, run=image, rounds=samples // batch, pairs=pairs, **source)
    for row in rows:
        row["tokens_in"], row["tokens_left"] = tokens(model, row)
        row.pop("tokens_out", None)
        for field in [f"{n}{end}" for n in METRICS for end in ("", "_low", "_high", "_count")]:
            if row["method"] == BASE:  # beside itself
                row.pop(field, None)
    return rows


def tokens(model: Any, row: dict[str, Any]) -> tuple[int, int]:
    """Tokens of the finest attention, and how many are left of them."""
    if row["method"] == BASE:
        return 1024, 1024
    with entry(f"{row['method']} {row['setting']}").applied(model.unet), torch.inference_mode():
        model.sample(1)
        found = max(tokred.report(model.unet).sublayers, key=lambda layer: layer.tokens)
    return found.tokens, found.left


@torch.inference_mode()
def contact_sheet(model: Any, chosen: Sequence[str], path: Path, columns: int = 6) -> Path:
    """A row a setting: the same seeds, and how far the first one is off."""
    images = []
    for setting in chosen:
        with entry(setting).applied(model.unet):
            images.append(model.sample(columns, DIFFICULTY).float().cpu())
    figure, axes = plots.grid(len(chosen), columns + 1, 1.25)
    for row, (setting, found) in enumerate(zip(chosen, images, strict=True)):
        for column in range(columns):
            axes[row, column].imshow(found[column, 0], cmap="terrain", vmin=-1, vmax=1)
        off = (found[0, 0] - images[0][0, 0]).abs()
        axes[row, columns].imshow(off, cmap="magma", vmin=0, vmax=0.3)
        label = setting.replace(" ", "\n", 2)
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
    parser.add_argument("--pairs", type=int, help="batches timed beside the unpatched model; default: all")
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--pictures", type=Path, help="folder for a contact sheet")
    parser.add_argument("--values", type=Path, help="folder of tables by which a run that was broken off goes on")
    saving(parser)
    given = parser.parse_args()
    samples = given.samples or (8 if given.quick else 64)
    batch = min(given.batch, samples // 2 if given.quick else samples)
    if samples % batch:
        parser.error(f"--samples {samples} is no multiple of --batch {batch}")
    threads(given.threads)
    from benchmarks.zoo import terrain

    model, chosen = terrain.load().to(given.device), settings(given.quick)
    save(measure(model, chosen, samples, batch, given.values, given.pairs), "quality", given)
    if given.pictures is not None:
        given.pictures.mkdir(parents=True, exist_ok=True)
        shown = [BASE, *(one for one in chosen if any(part in one for part in SHOWN))]
        contact_sheet(model, shown, given.pictures / "diffusion_samples.png")


if __name__ == "__main__":
    main()
