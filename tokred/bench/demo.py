"""``tokred demo``: accuracy against speed of a few methods, measured here and now on the embedded model.

Every row is measured in the run: all arms classify the same batches in one process, in a new random order for each
batch, and the same forwards give the predictions and the times.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tokred.analysis.viz import draw as viz
from tokred.bench import arms as arms_of
from tokred.bench import embedded, plots, timing
from tokred.bench import results as outputs
from tokred.bench.arms import Arm

METHODS = ("tome", "pitome", "evit", "random")
COUNTS, QUICK_COUNTS = (8, 12, 16), (8, 16)  # what two cores do in under two minutes
PICTURE_R = 12
PICTURE_CLASSES = (9, 0, 8, 7, 3)  # ankle boot, T-shirt, bag, sneaker, dress: the first of each in the sample
FILES = ("demo.csv", "demo.png", "merged.png")


@dataclass(frozen=True)
class Row:
    """Figures of one arm.

    Attributes:
        arm: method and setting.
        top1: share of right answers.
        top1_difference: to the unpatched model on the same images.
        top1_error: standard error of that difference, from the images that only one of the two gets right.
        agreement: share of images with the unpatched model's answer.
        timing: rate, and ratio to the unpatched model, with quartiles over the rounds.
    """

    arm: Arm
    top1: float
    top1_difference: float
    top1_error: float
    agreement: float
    timing: timing.Timing


def choose(
    model: nn.Module,
    shape: Sequence[int] = embedded.SHAPE,
    counts: Sequence[int] = COUNTS,
    methods: Sequence[str] = METHODS,
) -> list[Arm]:
    """The unpatched model, methods with an ``r`` at each count, and the others where they cost as much as ToMe does."""
    chosen = [arms_of.unpatched(model, shape)]
    targets = [arms_of.arm(model, shape, "tome", r=r).macs for r in counts]
    for name in methods:
        if arms_of.knob(name)[0] == "r":
            chosen += [arms_of.arm(model, shape, name, r=r) for r in counts]
        else:
            chosen += arms_of.ladder(model, shape, [name], targets)
    return chosen


def measure(
    model: nn.Module,
    arms: Sequence[Arm],
    images: Tensor,
    labels: Tensor,
    *,
    batch: int = 50,
    seed: int = 0,
    tick: Callable[[], None] | None = None,
) -> list[Row]:
    """Classify all images with every arm, timed.

    Args:
        model: unpatched; it is so again afterwards.
        arms: the first is what the others are compared with.
        images: ``(N, C, H, W)`` normalised.
        labels: ``(N,)``.
        batch: images of a round; those that do not fill a last batch are left out.
        seed: of the arms' order.
        tick: called ``len(arms) * (rounds + 1)`` times.

    Raises:
        ValueError: there are fewer images than one batch.
    """
    rounds = len(images) // batch
    if rounds < 1:
        raise ValueError(f"a batch of {batch} needs as many images, got {len(images)}")
    images, labels = images[: rounds * batch], labels[: rounds * batch]
    answers = torch.empty(len(arms), len(images), dtype=torch.int64)

    def run(i: int) -> Tensor:
        out: Tensor = model(images[i * batch : (i + 1) * batch])
        return out

    def collect(arm: int, i: int, logits: Tensor) -> None:
        answers[arm, i * batch : (i + 1) * batch] = logits.argmax(1)

    entries = [lambda a=a: a.applied(model) for a in arms]
    seconds = timing.paired(entries, run, rounds, seed=seed, collect=collect, tick=tick)
    timings = timing.summarise(seconds, [batch] * rounds)
    hits = answers == labels
    right = hits.double().mean(1).tolist()
    error = ((hits != hits[0]).sum(1).double().sqrt() / len(labels)).tolist()
    same = (answers == answers[0]).double().mean(1).tolist()
    return [Row(arm, right[i], right[i] - right[0], error[i], same[i], timings[i]) for i, arm in enumerate(arms)]


def ticks(arms: Sequence[Arm], count: int, batch: int) -> int:
    """Number of times that :func:`measure` will call ``tick``."""
    return len(arms) * (count // batch + 1)


def records(rows: Sequence[Row], images: int, batch: int) -> list[dict[str, Any]]:
    """Records for the table: what was measured, on how much, where."""
    where = outputs.here("cpu", torch.float32)
    out = []
    for row in rows:
        record: dict[str, Any] = {"scenario": "demo", "model": "embedded", "method": row.arm.name}
        record |= {"setting": row.arm.setting, "batch": batch, "rounds": images // batch}
        record |= {"tokens_in": row.arm.tokens_in, "tokens_out": row.arm.tokens_out, "gmacs": row.arm.macs / 1e9}
        record |= {"images": images, "top1_images": images}
        record |= outputs.share("top1", round(row.top1 * images), images)
        record |= outputs.mean("top1_difference", row.top1_difference, row.top1_error)
        record |= outputs.share("agreement", round(row.agreement * images), images)
        record |= outputs.between("images_per_second", *row.timing.images_per_second)
        record |= outputs.between("speedup", *row.timing.speedup)
        out.append(record | where)
    return out


def picture(model: nn.Module, images: Tensor, labels: Tensor, r: int = PICTURE_R) -> Any:
    """A figure of what ToMe merges into what, on one image each of a few classes.

    Args:
        model: unpatched; it is so again afterwards.
        images: ``(N, 1, 28, 28)`` normalised.
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


def write(
    rows: Sequence[Row],
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    folder: Path,
    *,
    batch: int = 50,
    force: bool = False,
) -> list[Path]:
    """Write the table, the plot and the picture; returns their paths."""
    paths = outputs.free(folder, FILES, force=force)
    count = len(images) // batch * batch
    flat = records(rows, count, batch)
    paths["demo.csv"].unlink(missing_ok=True)
    table = outputs.read(outputs.write(paths["demo.csv"], flat))
    where = flat[0]
    figure = plots.pareto(
        outputs.wide(table),
        title="Fewer tokens: accuracy against speed",
        note=(
            f"Embedded ViT (197 tokens), {count} test images of Fashion-MNIST, batch {batch}, float32, "
            f"{where['threads']} threads, {where['device']}. Across: median and quartiles of {count // batch} rounds. "
            "Up and down: 95 % interval of the difference to the unpatched model."
        ),
    )
    plots.save(figure, paths["demo.png"])
    plots.save(picture(model, images, labels), paths["merged.png"])
    return list(paths.values())
