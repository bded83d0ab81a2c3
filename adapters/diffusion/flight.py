"""Plans in use, and what one thread knows of the forward of a denoiser that it runs."""

from __future__ import annotations

import threading
from typing import Any, NamedTuple

from torch import Tensor

from tokred.adapters.diffusion.frames import samples_of
from tokred.adapters.diffusion.steps import Steps
from tokred.core.reduction import Reduction
from tokred.diffusion.method import AttentionMethod
from tokred.kernels.merge_rows import unmerge_rows


class Plan:
    """A reduction in use, with its inverse map."""

    def __init__(self, reduction: Reduction, part: str, proportional: bool = False) -> None:
        self.reduction, self.part, self.proportional = reduction, part, proportional
        # What attention adds to the scores of each key, or a mask of those that are real.
        self.weights = reduction.sizes().log() if proportional else reduction.mask
        plain = type(reduction) is Reduction  # the others know themselves how they are undone
        self.index = reduction.index if plain and part != "kv" else None

    def fits(self, x: Tensor) -> bool:
        """True where the plan fits ``x`` ``(B, N, C)`` in batch, length and device."""
        rows = self.reduction.representative
        return self.reduction.batch == (x.shape[0],) and self.reduction.length == x.shape[1] and rows.device == x.device

    def at(self, rows: Tensor) -> Plan:
        """The plan of some samples."""
        return Plan(samples_of(self.reduction, rows), self.part, self.proportional)

    def merge(self, x: Tensor) -> Tensor:
        """``(B, N, C)`` to ``(B, M, C)``."""
        return self.reduction.merge(x)

    def restore(self, y: Tensor) -> Tensor:
        """``(B, M, C)`` to ``(B, N, C)``; dropped tokens get zeros, so the residual stream leaves them as they are."""
        return self.reduction.unmerge(y) if self.index is None else unmerge_rows(y, self.index)


class SpotRecord(NamedTuple):
    """A sub-layer in the last forward.

    Attributes:
        name: in the denoiser.
        role: ``"self"``, ``"cross"`` or ``"mlp"``.
        tokens: of the image, before.
        left: tokens (or keys) that it ran on.
    """

    name: str
    role: str
    tokens: int
    left: int


class Flight:
    """State of the forward that one thread runs, and of the image that its steps make.

    Args:
        kind: name of the denoiser's class, see :class:`Session`.
        now: the method in force.

    Attributes:
        size: rows and columns of the sample; None: no forward has begun.
        frames: of the sample.
        key: of the step, for random choices.
        inputs: of the blocks that are running, by number.
        plans: that hold, by place.
        channels: of the sample.
        steps: of the image.
    """

    def __init__(self, kind: str, now: AttentionMethod | None) -> None:
        self.size: tuple[int, int] | None = None
        self.frames = 1
        self.key: int | Tensor = 0
        self.inputs: dict[int, Tensor] = {}
        self.now = now
        self.plans: dict[Any, Any] = {}
        self.channels = 0
        self.steps = Steps(kind)


class Local(threading.local):
    """The flight of each thread: several may use one denoiser."""

    def __init__(self, kind: str, now: AttentionMethod | None) -> None:
        self.flight = Flight(kind, now)
