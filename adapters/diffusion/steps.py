"""Records that a denoiser's session keeps from one denoising step to the next: plans, memories, predictions."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from tokred.diffusion.method import AttentionMethod
from tokred.diffusion.site import Step, SublayerPlace

# Samples whose plans are kept from the first step of an image. A model of one step runs every image at one time, which
# cannot be told from the tiles of a large first step; later steps keep what they have, however much it is.
_FIRST = 256
# Timesteps from no noise to all of it, where it is not a thousand.
_SPANS = {"FluxTransformer2DModel": 1.0}


class Turn(NamedTuple):
    """The number of a forward within its step.

    Attributes:
        part: which sample of the step (a tile, a view of a panorama), where samples are looked at; else 0.
        call: forwards of this step before it, or of this part: prompted, unprompted, those of editing pipelines.
    """

    part: int = 0
    call: int = 0


class Steps:
    """Counts the steps of an image, and the calls of each step, of which there may be any number.

    Times fall within an image: a forward whose timestep is not below the one before starts another image, unless it is
    the same, as guidance in several calls has it, and tiles. An image that was given up in its first step ends at the
    time at which the next one begins: how many forwards a step has is known from whole steps of the images before.

    Args:
        family: of the denoiser, in words that end in the name of its class.
    """

    def __init__(self, family: str) -> None:
        self.span = _SPANS.get(family.rpartition(" ")[2], 1000.0)
        self.forget()

    def forget(self) -> None:
        """Begin anew, with no step of any image behind."""
        self.time: float | None = None
        self.last = 0  # steps of the image before this one
        self.forwards = 0  # of this step, before this one
        self.usual = 0  # of the last whole step behind the first of an image; 0: there was none
        self.at = Turn()
        self.count = 0
        self.since = 0  # count of the step at which the method in force came into it
        self.force: AttentionMethod | None = None
        self.kept: dict[Turn, dict[Any, Any]] = {}
        self.memories: dict[Turn, dict[Any, dict[str, Any]]] = {}
        self.sample: Tensor | None = None
        self.given: Tensor | None = None  # of the last forward, in the first step of an image
        # Samples of each part, and where among them the two sides of guidance stand.
        self.layouts: dict[int, tuple[int, str]] = {}
        self.predicted: dict[int, list[tuple[Tensor, str]]] = {}  # with the layout that it was made in
        self.before: dict[int, list[tuple[Tensor, str]]] = {}

    @property
    def call(self) -> int:
        """Forwards of this step before this one, on the same sample where samples are looked at."""
        return self.at.call

    def turn(
        self, method: AttentionMethod, timestep: Any, sample: Tensor | None, given: Tensor | None = None
    ) -> AttentionMethod | None:
        """The method in force in the forward that begins; None where none is. Waits for the device once.

        Args:
            method: of the session.
            timestep: a number, or a tensor of any shape, of which the first value counts.
            sample: of the denoiser, which tells calls on one sample from those on another, and these from steps at one
                time; None: the time alone does.
            given: the sample, whether it is to be looked at or not: another one in the first step, where it is not for
                one more call, is of another image.
        """
        time = float(timestep.reshape(-1)[0]) if isinstance(timestep, Tensor) else float(timestep or 0)
        left = self._left(time, given)
        if left or time != self.time or self._again(sample):
            falls = not left and self.time is not None and time <= self.time
            self._next(follows=falls, sample=sample)
            self.last = 0 if left else self.last
            self.time = time
            force = method.at(self._step(self.count))
            if force != self.force:
                self.force, self.since, self.kept = force, self.count, {}
            if force is not None and (self.count - self.since) % force.refresh == 0:
                self.kept = {}
        elif self._seen(sample):
            self.at = self.at._replace(call=self.at.call + 1)
        else:
            self._look(self.at.part + 1, sample)
        self.forwards += 1
        self.given = given.detach() if given is not None and self.count == 0 else None
        self.kept.setdefault(self.at, {})
        self.memories.setdefault(self.at, {})
        if self.count == 0:
            for found in (self.kept, self.memories, self.predicted, self.layouts):
                _shorten(found)
        # A sample that no step has had before is at its first one.
        fresh = sample is not None and self.count > 0 and self.at.part not in self.before
        return method.at(self._step(0)) if fresh else self.force

    def _step(self, number: int) -> Step:
        return Step(min(1.0, max(0.0, (self.time or 0) / self.span)), number)

    def _seen(self, sample: Tensor | None) -> bool:
        if sample is None:
            return True
        return self.sample is not None and _same(self.sample, sample)

    def _again(self, sample: Tensor | None) -> bool:
        """True where all samples of this step were seen and this is another one: some schedulers run their second
        timestep twice."""
        return self.count > 0 and self.at.part >= max(self.before, default=-1) and not self._seen(sample)

    def _left(self, time: float, given: Tensor | None) -> bool:
        """True where the image before was given up in its first step: this sample is another, and no more calls are
        usual."""
        if time != self.time or self.count or not 0 < self.usual <= self.forwards:
            return False
        return given is not None and self.given is not None and not _same(self.given, given)

    def _next(self, follows: bool, sample: Tensor | None) -> None:
        if follows:
            self.usual = self.forwards if self.count else self.usual
            self.count += 1
            self.before = self.predicted
        else:
            self.last = 0 if self.time is None else self.count + 1
            self.count, self.since, self.force = 0, 0, None
            self.kept, self.memories, self.before, self.layouts = {}, {}, {}, {}
        self.predicted, self.forwards = {}, 0
        self._look(0, sample)

    def _look(self, part: int, sample: Tensor | None) -> None:
        """Move on to another sample of the same step."""
        self.at, self.sample = Turn(part), None if sample is None else sample.detach()
        # Looking waits for the device; a pipeline that switches guidance off goes on with half of the samples.
        if sample is not None and self.layouts.get(part, (-1, ""))[0] != sample.shape[0]:
            self.layouts[part] = sample.shape[0], _layout(sample)

    @property
    def plans(self) -> dict[Any, Any]:
        """Plans of this call, with those of earlier steps that still hold."""
        return self.kept[self.at]

    def memory(self, slot: Any) -> dict[str, Any]:
        """The memory that a method has at one place, in this call of a step."""
        return self.memories[self.at].setdefault(slot, {})

    def remember(self, predicted: Tensor) -> None:
        """Keep the prediction of the forward that has ended."""
        layout = self.layouts.get(self.at.part, (0, ""))[1]
        self.predicted.setdefault(self.at.part, []).append((predicted.detach(), layout))

    def guidance(self, place: SublayerPlace, batch: int, channels: int) -> Tensor | None:
        """``(B, N)`` how much guidance changed each token in the step before; None: there was no guidance."""
        before, layout = self.before.get(self.at.part, []), self.layouts.get(self.at.part, (0, ""))[1]
        then = before[0][1] if before else ""
        if then and len(before) == 1:
            both = before[0][0]
            first, second = both.chunk(2) if then == "halves" else (both[::2], both[1::2])
        elif not then and len(before) > 1:
            first, second = before[0][0], before[1][0]
        else:
            return None
        found = on_grid((first.float() - second.float()).abs(), place, channels)
        if not layout or batch != 2 * found.shape[0]:
            return found
        return found.repeat(2, 1) if layout == "halves" else found.repeat_interleave(2, 0)


def _shorten(found: dict[Any, Any]) -> None:
    """Drop the oldest entries beyond ``_FIRST``."""
    while len(found) > _FIRST:
        del found[next(iter(found))]


def _same(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.equal(a, b)


def _layout(sample: Tensor) -> str:
    """Where in a batch both sides of guidance stand: ``"halves"``, ``"pairs"`` (as panoramas have them), or ``""``."""
    b = sample.shape[0]
    if b == 0 or b % 2:
        return ""
    if torch.equal(sample[: b // 2], sample[b // 2 :]):
        return "halves"
    return "pairs" if torch.equal(sample[::2], sample[1::2]) else ""


def on_grid(values: Tensor, place: SublayerPlace, channels: int) -> Tensor:
    """A map of the sample's size as one value for each token, ``(B, N)`` float32.

    Args:
        values: ``(B, C, H, W)``, or ``(B, N, C)`` where the sample is a sequence of tokens at one resolution.
        place: whose tokens.
        channels: of the sample; predictions may have more behind them, which are no noise.
    """
    if values.ndim == 3:
        return values.mean(-1)
    mean = values[:, :channels].mean(1, keepdim=True)
    return torch.nn.functional.adaptive_avg_pool2d(mean, place.grid).flatten(1)
