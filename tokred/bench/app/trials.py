"""Trials: one setting on one picture, beside the unpatched model: what was merged, the answers, the time, the work."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from tokred import api
from tokred.analysis.viz import recording as stages
from tokred.bench import images, models, timing
from tokred.bench.arms import BASE, Arm
from tokred.bench.models import Subject
from tokred.bench.read import answer
from tokred.bench.sources import Source, pictures
from tokred.core.registry import methods as registered
from tokred.core.settings import parse_setting
from tokred.errors import UnsupportedModelError

BEST = 3  # answers that are shown
SECONDS = 2.0  # that the timing of a trial is meant to take
ROUNDS = (5, 60)  # rounds of a timing, whatever the seconds say


class Picture(NamedTuple):
    """A picture: ``pixels`` ``(1 or 3, H, W)`` to be drawn, ``input`` ``(C, H, W)`` as the model takes it, a name."""

    pixels: Tensor
    input: Tensor
    name: str


class Guess(NamedTuple):
    """One of a model's answers to a picture, with its probability."""

    name: str
    share: float


@dataclass(frozen=True)
class Clock:
    """The time of a trial.

    Attributes:
        ratio: how many times as fast as the unpatched model in the same round: median and quartiles.
        before, after: seconds of a forward, unpatched and patched.
        batch: copies of the picture in a forward.
        rounds: both ran once in each, in random order.
        place: device, and threads on a CPU, in words.
    """

    ratio: timing.Spread
    before: timing.Spread
    after: timing.Spread
    batch: int
    rounds: int
    place: str

    @property
    def told(self) -> bool:
        """True if the quartiles lie on one side of "as fast as before", and the two medians on the same one."""
        apart = self.before.median / self.after.median - 1
        # On a busy machine pairs and medians may contradict each other.
        return not self.ratio.low <= 1 <= self.ratio.high and (apart > 0) == (self.ratio.median > 1)


@dataclass(frozen=True)
class Trial:
    """One setting on one picture.

    Attributes:
        setting: the method with its parameters, as typed.
        recording: what each block left, with tokens and multiply-adds.
        before, after: the likeliest classes, unpatched and patched; empty where the model has no classifier.
        cosine: of the logits or else the pooled features, unpatched with patched.
        notes: warnings that came up.
    """

    setting: str
    recording: stages.Recording
    before: tuple[Guess, ...]
    after: tuple[Guess, ...]
    cosine: float
    notes: tuple[str, ...] = ()

    @property
    def tokens(self) -> tuple[int, int]:
        """Tokens before the first block, and after the last one."""
        run = self.recording.runs[0]
        return int(run.tokens[0, 0]), int(run.tokens[0, -1])

    @property
    def macs(self) -> tuple[int, int]:
        """Multiply-adds of the blocks, unpatched and patched."""
        return self.recording.base[-1], int(self.recording.runs[0].macs[0, -1])


@dataclass
class Trials:
    """A model on which settings are tried, one at a time: a second caller waits for the first.

    Args:
        subject: the model, unpatched; it is so again after every trial.
        device: to run it on.
        outputs: of its classifier; 0: it has none.
        classes: names of these; empty: numbers.

    Raises:
        UnsupportedModelError: what happens in its blocks cannot be shown, or no method runs on it.
    """

    subject: Subject
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    outputs: int = 0
    classes: Sequence[str] = ()

    def __post_init__(self) -> None:
        model = self.subject.model
        stages.check(model, ())
        rows = [row for row in api.supports(model) if registered.get(row.method).stage == "block"]
        self.methods = {row.method: registered.get(row.method).summary for row in rows if row.works}
        self.refused = {row.method: row.reason for row in rows if not row.works}
        if not self.methods:
            raise UnsupportedModelError(f"no method runs on {self.subject.name}: {rows[0].reason}")
        model.to(self.device)
        self._lock = threading.Lock()

    @property
    def depth(self) -> int:
        """Blocks of the model."""
        return stages.check(self.subject.model, ()).depth

    def picture(self, path: Path | str) -> Picture:
        """A file as the model sees it: the middle at the model's size.

        Raises:
            ValueError: it cannot be read as an image.
        """
        found = pictures.picture(Path(path), "RGB" if self.subject.channels == 3 else "L")
        pixels = images.fitted(found, self.subject.size, self.subject.channels, self.subject.crop)
        return self.pictures(pixels[None], pixels[None], [Path(path).name])[0]

    def pictures(self, inputs: Tensor, pixels: Tensor, names: Sequence[str]) -> list[Picture]:
        """Pictures from batches.

        Args:
            inputs: ``(N, C, H, W)``, uint8 or normalised.
            pixels: ``(N, 1 or 3, H, W)``, what is drawn.
            names: of the pictures.
        """
        dtype = next(self.subject.model.parameters()).dtype
        normal = images.normalise(inputs, self.subject.mean, self.subject.std, dtype)
        return [Picture(*found) for found in zip(pixels, normal, names, strict=True)]

    def arm(self, setting: str) -> Arm:
        """A setting as an arm that has been checked against the model.

        Raises:
            UnknownMethodError, TypeError, ValueError, MissingInputError, UnsupportedModelError: it does not fit.
        """
        name, parameters = parse_setting(setting)
        if name not in self.methods and name in self.refused:
            raise UnsupportedModelError(f"{name} does not run on {self.subject.name}: {self.refused[name]}")
        method = api.make(name, **parameters)
        stages.check(self.subject.model, [(setting, method)])
        return Arm(method.name, setting.strip().partition(" ")[2].strip(), method)

    def run(self, picture: Picture, setting: str) -> Trial:
        """One setting on one picture; nothing is timed.

        Raises:
            UnknownMethodError, TypeError, ValueError, MissingInputError, UnsupportedModelError: the setting does not
                fit the model.
        """
        arm, model, subject = self.arm(setting), self.subject.model, self.subject
        x = picture.input[None].to(self.device)
        with self._lock, torch.inference_mode(), warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            dense = answer(subject.read(x))
            with arm.applied(model):
                reduced = answer(subject.read(x))
            recording = stages.record(
                model, x, [arm.label], pixels=picture.pixels[None], names=[picture.name], forward=subject.read
            )
        cosine = F.cosine_similarity(dense.double().flatten(), reduced.double().flatten(), dim=0)
        notes = dict.fromkeys(str(one.message) for one in said if not issubclass(one.category, DeprecationWarning))
        return Trial(arm.label, recording, self._best(dense), self._best(reduced), float(cosine), tuple(notes))

    def clock(self, picture: Picture, setting: str, batch: int = 1, seconds: float = SECONDS) -> Clock:
        """The time of the unpatched model and of one setting, in pairs and in random order.

        Args:
            picture: as many copies of it as ``batch`` are one forward.
            setting: the method with its parameters.
            batch: copies.
            seconds: that it is meant to take; there are at least 5 and at most 60 rounds.

        Raises:
            UnknownMethodError, TypeError, ValueError, MissingInputError, UnsupportedModelError: the setting does not
                fit the model.
        """
        arms, model = [Arm(BASE, ""), self.arm(setting)], self.subject.model
        x = picture.input[None].to(self.device).repeat(batch, 1, 1, 1)
        enter = [partial(arm.applied, model) for arm in arms]
        measure: Callable[[int], list[list[float]]] = lambda rounds: timing.paired(  # noqa: E731
            enter, lambda _: self.subject.read(x), rounds, device=self.device, warmup=0
        )
        with self._lock, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # `run` has told them
            measure(1)  # warms up
            once = sum(arm[0] for arm in measure(1))
            rounds = max(ROUNDS[0], min(ROUNDS[1], int(seconds / max(once, 1e-6))))
            found = measure(rounds)
        ratio = timing.spread(timing.ratios(found)[1])
        return Clock(ratio, timing.spread(found[0]), timing.spread(found[1]), batch, rounds, self._place())

    def _best(self, logits: Tensor) -> tuple[Guess, ...]:
        if not self.outputs or logits.shape != (1, self.outputs):
            return ()
        shares = logits[0].float().softmax(-1)
        best = shares.topk(min(BEST, len(shares)))
        named = len(self.classes) == len(shares)
        found = zip(best.indices.tolist(), best.values.tolist(), strict=True)
        return tuple(Guess(self.classes[i] if named else f"class {i}", share) for i, share in found)

    def _place(self) -> str:
        if self.device.type == "cuda":
            return str(torch.cuda.get_device_name(self.device))
        threads = torch.get_num_threads()
        return (
            f"{self.device}, {threads} thread{'s' if threads > 1 else ''}"
            if self.device.type == "cpu"
            else str(self.device)
        )


def of(source: Source, device: torch.device | None = None) -> Trials:
    """Trials of a model that was found by name.

    Raises:
        NoModelError: it is none of images.
        UnsupportedModelError: as :class:`Trials`.
    """
    return Trials(models.of(source), device or torch.device("cpu"), source.classes, class_names(source))


def class_names(source: Source) -> tuple[str, ...]:
    """Names of the outputs of a model's head; empty where nobody knows them."""
    if source.name == "embedded":
        from tokred.bench import embedded

        return tuple(embedded.CLASSES)
    names = getattr(getattr(source.model, "config", None), "id2label", None)
    if names:
        return tuple(str(names[i]) for i in sorted(names))
    return _imagenet() if source.classes == 1000 else ()


def _imagenet() -> tuple[str, ...]:
    """The first of the words that timm has for each of ImageNet's 1,000 classes; empty without timm."""
    try:
        from timm.data import ImageNetInfo
    except ImportError:
        return ()
    info: Any = ImageNetInfo()
    return tuple(str(info.index_to_description(i)).split(",")[0] for i in range(1000))
