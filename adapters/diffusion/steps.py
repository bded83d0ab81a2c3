"""What a denoiser's session keeps from one denoising step to the next: plans, memories, and what was predicted."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tokred.denoise import AttentionMethod, Place, Step

# Calls of one step that guidance can make: prompted, unprompted, and those of editing pipelines.
_CALLS = 4
# Timesteps from no noise to all of it, where it is not a thousand.
_SPANS = {"FluxTransformer2DModel": 1.0}


class Steps:
    """Counts the steps of an image, and the calls of each step.

    Times fall within an image: a forward whose timestep is not below the one before starts another image, unless it is
    the same, as guidance in several calls has it.

    Args:
        family: of the denoiser.
    """

    def __init__(self, family: str) -> None:
        self.span = _SPANS.get(family.rpartition(" ")[2], 1000.0)
        self.forget()

    def forget(self) -> None:
        """Nothing has been run."""
        self.time: float | None = None
        self.call = self.count = 0
        self.since = 0  # count of the step at which the method in force came into it
        self.force: AttentionMethod | None = None
        self.kept: list[dict[Any, Any]] = []
        self.memories: list[dict[Any, dict[str, Any]]] = []
        self.sample: Tensor | None = None
        self.halves = False
        self.predicted: list[Tensor] = []
        self.before: list[Tensor] = []

    def turn(self, method: AttentionMethod, timestep: Any, sample: Tensor | None) -> AttentionMethod | None:
        """Another forward begins; what is in force in it. Waits for the device once.

        Args:
            method: of the session.
            timestep: a number, or a tensor of any shape, of which the first value counts.
            sample: of the denoiser, which tells calls of one step from steps at one time; None: the time alone does.
        """
        time = float(timestep.reshape(-1)[0]) if isinstance(timestep, Tensor) else float(timestep or 0)
        if time == self.time and self.call + 1 < _CALLS and self._seen(sample):
            self.call += 1
        else:
            falls = self.time is not None and time < self.time
            # Some schedulers run their second timestep twice; models of one step run every image at one timestep.
            stays = time == self.time and sample is not None and self.count > 0
            self._next(follows=falls or stays, sample=sample)
            self.time = time
            force = method.at(Step(min(1.0, max(0.0, time / self.span)), self.count))
            if force != self.force:
                self.force, self.since, self.kept = force, self.count, []
            if force is not None and (self.count - self.since) % force.refresh == 0:
                self.kept = []
        while len(self.kept) <= self.call:
            self.kept.append({})
        while len(self.memories) <= self.call:
            self.memories.append({})
        return self.force

    def _seen(self, sample: Tensor | None) -> bool:
        if sample is None:
            return True
        return self.sample is not None and self.sample.shape == sample.shape and torch.equal(self.sample, sample)

    def _next(self, follows: bool, sample: Tensor | None) -> None:
        if follows:
            self.count += 1
            self.before = self.predicted
        else:
            self.count, self.since, self.force = 0, 0, None
            self.kept, self.memories, self.before = [], [], []
            b = 0 if sample is None else sample.shape[0]
            self.halves = b > 0 and b % 2 == 0 and torch.equal(sample[: b // 2], sample[b // 2 :])  # type: ignore[index]
        self.call, self.predicted, self.sample = 0, [], None if sample is None else sample.detach()

    @property
    def plans(self) -> dict[Any, Any]:
        """Of this call, those of earlier steps that still hold."""
        return self.kept[self.call]

    def memory(self, slot: Any) -> dict[str, Any]:
        """What a method keeps for one place."""
        return self.memories[self.call].setdefault(slot, {})

    def remember(self, predicted: Tensor) -> None:
        """A forward is over, and this is what it predicted."""
        self.predicted.append(predicted.detach())

    def guidance(self, place: Place, batch: int, channels: int) -> Tensor | None:
        """``(B, N)`` how much guidance changed each token in the step before; None: there was no guidance."""
        if self.halves and len(self.before) == 1:
            first, second = self.before[0].chunk(2)
        elif not self.halves and len(self.before) > 1:
            first, second = self.before[0], self.before[1]
        else:
            return None
        found = on_grid((first.float() - second.float()).abs(), place, channels)
        return found.repeat(2, 1) if self.halves and batch == 2 * found.shape[0] else found


def on_grid(values: Tensor, place: Place, channels: int) -> Tensor:
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
