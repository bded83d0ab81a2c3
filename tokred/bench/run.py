"""An encoder's features, top-1 and saliency map under methods, with paired times: what a forward's output tells not.

:func:`tokred.benchmark` scores outputs; here the features in front of the head and the restored patch tokens are
compared too, of models that :mod:`tokred.bench.models` reads. Times are paired (:mod:`tokred.bench.timing`); quality is
measured apart from them, on all images.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tokred.bench import arms as arms_of
from tokred.bench import images as photos
from tokred.bench import plots, probe, timing
from tokred.bench import results as outputs
from tokred.bench.arms import Arm
from tokred.bench.images import Images
from tokred.bench.models import Answer, Subject, zoo
from tokred.bench.tasks import Task
from tokred.core.settings import parse_setting

SHARES = (0.85, 0.7, 0.55, 0.4)
MEASURES = ("top1", "cosine", "saliency_mae")
SCENARIO = "bench"
Tick = Callable[[], None]


@dataclass(frozen=True)
class Options:
    """Options of a run of a benchmark.

    Attributes:
        batch: images of a forward.
        rounds: timed forwards of each arm.
        warmup: untimed forwards of each arm before.
        device, dtype: of the model.
        seed: of the arms' order.
    """

    batch: int = 16
    rounds: int = 20
    warmup: int = 2
    device: str = "cpu"
    dtype: torch.dtype = torch.float32
    seed: int = 0


def supported(subject: Subject, names: Sequence[str]) -> tuple[list[str], list[str]]:
    """Methods that run on the model, and for the others why not."""
    from tokred import supports

    rows = {row.method: row for row in supports(subject.model)}
    good = [n for n in names if rows[n].works]
    return good, [f"{n}: {rows[n].reason}" for n in names if not rows[n].works]


def choose(
    subject: Subject, names: Sequence[str], settings: Sequence[str] = (), shares: Sequence[float] = SHARES
) -> list[Arm]:
    """The unpatched model; each named method at equal shares of its multiply-adds; and settings given one by one.

    Raises:
        UnknownMethodError, TypeError, ValueError, MissingInputError: a method or a setting does not fit.
    """
    base = arms_of.unpatched(subject.model, subject.shape)
    chosen = [base, *arms_of.ladder(subject.model, subject.shape, names, [int(base.macs * s) for s in shares])]
    for text in settings:
        name, parameters = parse_setting(text)
        chosen.append(arms_of.arm(subject.model, subject.shape, name, **parameters))
    return chosen


@dataclass(frozen=True)
class _Read:
    """Answers for many images, on the CPU."""

    logits: Tensor | None
    features: Tensor
    patches: Tensor | None


@torch.inference_mode()
def _read(subject: Subject, arm: Arm, images: Images, options: Options, patches: bool, tick: Tick) -> _Read:
    found: list[Answer] = []
    with arm.applied(subject.model, subject.expose if arm.method is not None else "auto"):
        for part in torch.split(images.images, options.batch):
            x = photos.normalise(part.to(options.device), subject.mean, subject.std, options.dtype)
            answer = subject.read(x)
            kept = answer.patches.float().cpu() if patches and answer.patches is not None else None
            logits = None if answer.logits is None else answer.logits.float().cpu()
            found.append(Answer(logits, answer.features.float().cpu(), kept))
            tick()

    def join(parts: list[Tensor | None]) -> Tensor | None:
        there = [p for p in parts if p is not None]
        return torch.cat(there) if there else None

    logits, maps = join([a.logits for a in found]), join([a.patches for a in found])
    return _Read(logits, torch.cat([a.features for a in found]), maps)


def _batches(count: int, batch: int) -> int:
    return -(-count // batch)


def quality_ticks(task: Task, arms: Sequence[Arm], options: Options) -> int:
    """Number of times that :func:`quality` calls ``tick``."""
    every = _batches(len(task.photos.images), options.batch)
    if task.test is not None and task.test is not task.photos:
        every += _batches(len(task.test.images), options.batch)
    train = 0 if task.train is None else _batches(len(task.train.images), options.batch)
    return every * len(arms) + train


def quality(
    subject: Subject, task: Task, arms: Sequence[Arm], options: Options, tick: Tick | None = None
) -> list[dict[str, Any]]:
    """Top-1, features' cosine and the saliency map's error, one record an arm; the first arm is the reference."""
    tick = tick or (lambda: None)
    fitted = None
    if task.train is not None and task.train.labels is not None:
        seen = _read(subject, arms[0], task.train, options, False, tick)
        fitted = probe.fit(seen.features, task.train.labels)
    out: list[dict[str, Any]] = []
    base: _Read | None = None
    hits: list[Tensor] = []
    base_map: Tensor | None = None
    for arm in arms:
        wants = task.saliency is not None
        seen = _read(subject, arm, task.photos, options, wants, tick)
        base = base or seen
        record: dict[str, Any] = {}
        if task.test is not None and task.test.labels is not None:
            same = task.test is task.photos
            tested = seen if same else _read(subject, arm, task.test, options, False, tick)
            hits.append(_hits(task, tested, fitted))
            record |= _top1(task, hits[-1], hits[0])
        cosine = F.cosine_similarity(base.features, seen.features, dim=1)
        error = float(cosine.double().std() / len(cosine) ** 0.5) if len(cosine) > 1 else 0.0
        record |= outputs.mean("cosine", cosine.mean().item(), error) | {"cosine_lowest": cosine.min().item()}
        record |= {"cosine_images": len(cosine), "photos": task.photos.name}
        if task.saliency is not None and seen.patches is not None:
            drawn = _maps(task.saliency, seen.patches, subject.size[0])
            base_map = drawn if base_map is None else base_map
            off = zoo("evaluate").map_error(base_map, drawn)
            record |= {f"saliency_{k}": v for k, v in off._asdict().items()}
        out.append(record)
    return out


def _hits(task: Task, seen: _Read, fitted: probe.Probe | None) -> Tensor:
    """Mask of the test images that are answered right, by the probe or else by the model's head."""
    assert task.test is not None  # asked for by the caller
    assert task.test.labels is not None
    if fitted is not None:
        return fitted.logits(seen.features).argmax(1) == task.test.labels
    assert seen.logits is not None  # a task without a probe has a head
    labels = task.test.labels if task.outputs is None else torch.tensor(task.outputs)[task.test.labels]
    return seen.logits.argmax(1) == labels


def _top1(task: Task, hits: Tensor, base: Tensor) -> dict[str, Any]:
    test, n = task.test, len(hits)
    assert test is not None  # there are hits
    assert test.labels is not None
    difference = (hits.double() - base.double()).mean().item()
    return {
        **outputs.share("top1", int(hits.sum()), n),
        # Only images that one of the two gets right and the other not count towards chance.
        **outputs.mean("top1_difference", difference, int((hits != base).sum()) ** 0.5 / n),
        "answered_by": task.kind,
        "data": test.name,
        "top1_images": n,
        "chance": test.labels.bincount().max().item() / n,
    }


@torch.inference_mode()
def _maps(head: Callable[[Tensor, int], Tensor], patches: Tensor, size: int) -> Tensor:
    return torch.cat([head(part, size) for part in torch.split(patches, 8)])


def speed(
    subject: Subject, task: Task, arms: Sequence[Arm], options: Options, tick: Tick | None = None
) -> list[dict[str, Any]]:
    """Paired rates and peak memory of the whole model's forward, one record an arm."""
    images = task.photos.images
    part = images[torch.arange(options.batch) % len(images)].to(options.device)
    x = photos.normalise(part, subject.mean, subject.std, options.dtype)
    model = subject.model

    def forward() -> object:
        return model(pixel_values=x) if subject.name.startswith("hf:") else model(x)

    entries = [lambda a=a: a.applied(model) for a in arms]
    seconds = timing.paired(
        entries,
        lambda _: forward(),
        options.rounds,
        device=options.device,
        warmup=options.warmup,
        seed=options.seed,
        tick=tick,
    )
    out = []
    for arm, timed in zip(arms, timing.summarise(seconds, [options.batch] * options.rounds), strict=True):
        with arm.applied(model):
            memory = timing.peak_memory(forward, options.device)
        record: dict[str, Any] = {}
        for name, value in (("images_per_second", timed.images_per_second), ("speedup", timed.speedup)):
            record |= outputs.between(name, *value)
        out.append(record | memory.record())
    return out


def ticks(task: Task, arms: Sequence[Arm], options: Options) -> int:
    """Number of times that :func:`run` calls ``tick``."""
    return quality_ticks(task, arms, options) + len(arms) * (options.rounds + 1)


def run(
    subject: Subject, task: Task, arms: Sequence[Arm], options: Options, tick: Tick | None = None
) -> list[dict[str, Any]]:
    """Measure everything; one record an arm. The model is moved to the options' device."""
    subject.model.to(options.device, options.dtype)
    fast = speed(subject, task, arms, options, tick)
    good = quality(subject, task, arms, options, tick)
    where = outputs.here(options.device, options.dtype)
    rows = []
    for arm, q, s in zip(arms, good, fast, strict=True):
        head = {
            "scenario": SCENARIO,
            "model": subject.name,
            "weights": subject.weights,
            "input": f"{subject.size[0]}x{subject.size[1]}",
            "method": arm.name,
            "setting": arm.setting,
            "tokens_in": arm.tokens_in,
            "tokens_out": arm.tokens_out,
            "gmacs": arm.macs / 1e9,
            "gmacs_share": arm.macs / arms[0].macs,
        }
        rows.append({**head, **q, **s, "batch": options.batch, "rounds": options.rounds, **where})
    return rows


def plot(found: Sequence[dict[str, Any]], path: Path) -> Path:
    """Pareto plot of the measures that the records have, each point with its interval."""
    frame = outputs.wide([row for record in found for row in outputs.rows(record)])
    shown = tuple(m for m in MEASURES if m in frame and frame[m].notna().any())
    first = found[0]
    note = (
        f"{first['model']}, {first['input']} px, {first['tokens_in']} tokens, batch {first['batch']}, "
        f"{first['dtype']}, {first['device']}, {first['threads']} threads, tokred at {first['commit'] or 'a package'}"
    )
    if first.get("top1") is not None:
        note += f". Top-1: {first['answered_by']}, {first['top1_images']} images of {first['data']}"
    title = f"{first['model']}: quality against speed, each point paired with the unpatched model"
    return plots.save(plots.pareto(frame, shown, title=title, note=note), path)
