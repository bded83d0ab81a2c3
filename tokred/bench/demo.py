"""``tokred demo``: accuracy against speed of a few methods, measured here and now on the embedded model.

Every row is measured in the run: all arms classify the same batches in one process, in a new random order for each
batch, and the same forwards give the predictions and the times.
"""

from __future__ import annotations

import importlib.util
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
from tokred.core.settings import parse_setting

METHODS = ("tome", "pitome", "evit", "random_prune")
# What two cores do in under two minutes; the most leaves half of the work.
COUNTS, QUICK_COUNTS = (12, 18, 25), (12, 25)
PICTURE_R = 18
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


class Rounds:
    """A run of the demo, a batch a round: all arms on it, timed, in a new random order.

    Args:
        model: unpatched; it is so again after each round.
        arms: the first is what the others are compared with.
        images: ``(N, C, H, W)`` normalised.
        labels: ``(N,)``.
        batch: images of a round; those that do not fill a last batch are left out.
        seed: of the arms' order.

    Raises:
        ValueError: there are fewer images than one batch.
    """

    def __init__(
        self, model: nn.Module, arms: Sequence[Arm], images: Tensor, labels: Tensor, *, batch: int = 50, seed: int = 0
    ) -> None:
        self.model, self.arms, self.batch, self.seed = model, list(arms), batch, seed
        self.total = len(images) // batch
        if self.total < 1:
            raise ValueError(f"a batch of {batch} needs as many images, got {len(images)}")
        self._pixels, self._labels = images, labels
        self._answers = torch.empty(len(arms), len(images), dtype=torch.int64)
        self._seconds: list[list[float]] = []  # [round][arm]
        self.interrupted = False

    @property
    def images(self) -> int:
        """Images that every arm has classified."""
        return len(self._seconds) * self.batch

    def run(self, tick: Callable[[], None] | None = None) -> None:
        """All rounds; ``tick`` is called after every arm of each. Ctrl-C ends them after those that are complete.

        Raises:
            KeyboardInterrupt: there was Ctrl-C.
        """
        entries = [lambda a=a: a.applied(self.model) for a in self.arms]
        for i in range(len(self._seconds), self.total):
            span = slice(i * self.batch, (i + 1) * self.batch)

            def run(_: int, span: slice = span) -> Tensor:
                found: Tensor = self.model(self._pixels[span])
                return found

            def collect(arm: int, _: int, logits: Tensor, span: slice = span) -> None:
                self._answers[arm, span] = logits.argmax(1)
                if tick is not None:
                    tick()

            try:
                found = timing.paired(
                    entries,
                    run,
                    1,
                    warmup=1 if i == 0 else 0,
                    seed=self.seed + i,
                    collect=collect,
                )
            except KeyboardInterrupt:
                self.interrupted = True
                raise
            self._seconds.append([one[0] for one in found])

    def rows(self) -> list[Row]:
        """Figures of the rounds so far; empty where none is complete."""
        if not self._seconds:
            return []
        count = self.images
        answers, labels = self._answers[:, :count], self._labels[:count]
        turned = [list(one) for one in zip(*self._seconds, strict=True)]
        timings = timing.summarise(turned, [self.batch] * len(self._seconds))
        hits = answers == labels
        right = hits.double().mean(1).tolist()
        error = ((hits != hits[0]).sum(1).double().sqrt() / count).tolist()
        same = (answers == answers[0]).double().mean(1).tolist()
        return [
            Row(arm, right[i], right[i] - right[0], error[i], same[i], timings[i]) for i, arm in enumerate(self.arms)
        ]


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
    """Classify all images with every arm, timed; see :class:`Rounds`.

    Raises:
        ValueError: there are fewer images than one batch.
    """
    rounds = Rounds(model, arms, images, labels, batch=batch, seed=seed)
    rounds.run(tick)
    return rounds.rows()


def ticks(arms: Sequence[Arm], count: int, batch: int) -> int:
    """Number of times that :func:`measure` will call ``tick``."""
    return len(arms) * (count // batch)


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


def save(path: Path, rows: Sequence[Row], images: int, batch: int) -> Path:
    """Write the table, which needs no other library, in place of one that is there."""
    path.unlink(missing_ok=True)
    return outputs.write(path, records(rows, images, batch))


def draw(
    rows: Sequence[Row], model: nn.Module, images: Tensor, labels: Tensor, paths: dict[str, Path], *, batch: int = 50
) -> None:
    """Draw the plot of a table that was saved, and the picture of what was merged."""
    flat = records(rows, len(images) // batch * batch, batch)
    count, where = flat[0]["images"], flat[0]
    figure = plots.pareto(
        outputs.wide(outputs.read(paths["demo.csv"])),
        title="Fewer tokens: accuracy against speed",
        note=(
            f"Embedded ViT (197 tokens), {count} {embedded.NAME}, batch {batch}, float32, "
            f"{where['threads']} threads, {where['device']}. Across: median and quartiles of {count // batch} rounds. "
            "Up and down: 95 % interval of the difference to the unpatched model. Up and right is better."
        ),
    )
    plots.save(figure, paths["demo.png"])
    plots.save(picture(model, images, labels), paths["merged.png"])
