"""``tokred demo``: accuracy against speed of a few methods, measured here and now on the embedded model.

Every row is measured in the run by :func:`tokred.benchmark`, on the same batches as the unpatched model.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tokred.analysis.viz import draw as viz
from tokred.bench import arms as arms_of
from tokred.bench import embedded, plots
from tokred.bench import results as outputs
from tokred.bench.arms import Arm
from tokred.bench.benchmark import benchmark
from tokred.bench.shown import PART
from tokred.bench.table import Benchmark
from tokred.core.settings import parse_setting

METHODS = ("tome", "pitome", "evit", "random_prune")
# What two cores do in under two minutes; the most leaves half of the work.
COUNTS, QUICK_COUNTS = (12, 18, 25), (12, 25)
PAIRS = 5  # times that a row is timed beside the unpatched model
PICTURE_R = 18
PICTURE_CLASSES = (9, 0, 8, 7, 3)  # ankle boot, T-shirt, bag, sneaker, dress: the first of each in the sample
FILES = ("demo.csv", "demo.png", "merged.png")


def choose(
    model: nn.Module,
    shape: Sequence[int] = embedded.SHAPE,
    counts: Sequence[int] = COUNTS,
    methods: Sequence[str] = METHODS,
) -> list[Arm]:
    """The unpatched model and the arms that settings name.

    Of a name alone: methods with an ``r`` at each count, and the others where they cost as much as ToMe does.
    """
    chosen = [arms_of.unpatched(model, shape)]
    targets = [arms_of.arm(model, shape, "tome", r=r).macs for r in counts]
    for text in methods:
        name, parameters = parse_setting(text)
        if parameters:
            chosen.append(arms_of.arm(model, shape, name, **parameters))
        elif arms_of.knob(name)[0] == "r":
            chosen += [arms_of.arm(model, shape, name, r=r) for r in counts]
        else:
            chosen += arms_of.ladder(model, shape, [name], targets)
    return list({arm.label: arm for arm in chosen}.values())


def measure(
    model: nn.Module,
    arms: Sequence[Arm],
    images: Tensor,
    labels: Tensor,
    path: Path,
    *,
    batch: int = 50,
    seed: int = 0,
    progress: bool = True,
) -> Benchmark:
    """Top-1, and agreement with the unpatched model, of all arms on all images, timed beside the unpatched model.

    Args:
        model: unpatched; it is so again afterwards.
        arms: as :func:`choose` gives them, the unpatched model first.
        images: ``(N, C, H, W)`` normalised.
        labels: ``(N,)``.
        path: the table, to which each row is added when it is measured; rows that it has are not measured again.
        batch: images of a forward.
        seed: of the order in which a method and the unpatched model take turns.
        progress: a bar, or a line a row, on standard error.
    """
    batches = list(zip(torch.split(images, batch), torch.split(labels, batch), strict=True))
    settings = [arm.label for arm in arms if arm.method is not None]
    return benchmark(
        model, settings, batches, ["top1", "agreement"], out=path, baselines=False, rounds=PAIRS, pairs=PAIRS,
        name="embedded", seed=seed, progress=progress,
    )  # fmt: skip


def brief(result: Benchmark) -> Benchmark:
    """Result by top-1 as the demo prints it: without the parts of the time, which the table on disk keeps."""
    found = result.by("top1")
    rows = [{name: value for name, value in row.items() if not name.endswith(PART)} for row in found.rows]
    return replace(found, rows=rows)


def measured(path: Path, arms: Sequence[Arm]) -> list[Arm]:
    """The arms that a table has rows of, after an interruption."""
    there = {f"{r['method']} {r['setting']}".strip() for r in outputs.records(outputs.read(path))}
    return [arm for arm in arms if arm.label in there]


def picture(model: nn.Module, images: Tensor, labels: Tensor, r: int = PICTURE_R) -> Any:
    """A figure of what ToMe merges into what, on one image each of a few classes.

    Args:
        model: unpatched; it is so again afterwards.
        images: ``(N, 3, 112, 112)`` normalised.
        labels: ``(N,)``.
        r: tokens merged per block.
    """
    found = [int((labels == c).nonzero()[0, 0]) for c in PICTURE_CLASSES if bool((labels == c).any())]
    chosen = images[found]
    arm = arms_of.arm(model, tuple(chosen.shape), "tome", r=r)
    grid = _grid(model)
    blocks = list(model.blocks)  # type: ignore[arg-type]
    shown = sorted({max(1, round(len(blocks) * share)) for share in (0.25, 0.5, 1.0)})
    with torch.inference_mode(), arm.applied(model):
        answers = model(chosen).argmax(1).tolist()
        steps = [viz.after(model, block - 1) for block in shown]
    plain = embedded.pixels(chosen)
    pictures = [
        [viz.enlarge(plain[i], grid), *(viz.paint(plain[i], step, grid, sample=i) for step in steps)]
        for i in range(len(found))
    ]
    titles = [f"image: {grid[0] * grid[1]} patches"]
    titles += [f"after block {b}: {step.slots - 1} tokens" for b, step in zip(shown, steps, strict=True)]
    names = [
        embedded.CLASSES[int(labels[k])] + ("" if int(labels[k]) == a else f"\n(taken for {embedded.CLASSES[a]})")
        for k, a in zip(found, answers, strict=True)
    ]
    figure = viz.sheet(pictures, titles, names)
    figure.suptitle(f"ToMe, r = {r}: patches that became one token share colour and outline", fontsize=11)
    return figure


def _grid(model: Any) -> tuple[int, int]:
    rows, columns = model.patch_embed.grid_size
    return int(rows), int(columns)


def needs() -> None:
    """Ask for what drawing needs before anything is measured.

    Raises:
        ImportError: matplotlib or pandas is not installed.
    """
    for name in ("matplotlib", "pandas"):
        if importlib.util.find_spec(name) is None:
            raise ImportError(f"the demo's pictures need {name}: pip install 'tokred[bench]'")


def draw(result: Benchmark, model: nn.Module, images: Tensor, labels: Tensor, paths: Mapping[str, Path]) -> None:
    """Draw the plot of what was measured, and the picture of what was merged."""
    result.plot(paths["demo.png"])
    plots.save(picture(model, images, labels), paths["merged.png"])
