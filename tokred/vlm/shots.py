"""Frames that merge inside the vision tower: what a method decides there, and what is known of it behind the tower."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from tokred.core.reduction import Reduction
from tokred.vlm.frames import ClipMethod

Segments = tuple[tuple[int, int], ...]


@dataclass(frozen=True, eq=False)
class Shots:
    """Frames of one clip of ``T``, of which ``T'`` are left behind the tower.

    Attributes:
        root: ``(T,)`` int64, the frame that each frame went into: the first of those that became one; -1: it is lost.
        weight: ``(T,)`` float32, its share in it. Shares of what became one frame add up to 1.
        segments: first and last of the frames that are left, counted among them, of each segment.
        scores: ``(T', N)`` float32, what each token of a frame received of the tower's attention where frames merged
            last, mixed as they were; None: not yet known.
    """

    root: Tensor
    weight: Tensor
    segments: Segments = ()
    scores: Tensor | None = None

    @classmethod
    def begin(cls, frames: int, device: torch.device | str | None = None) -> Shots:
        """All frames, each by itself."""
        return cls(torch.arange(frames, device=device), torch.ones(frames, device=device))

    # Both are asked for several times, and to count frames waits for the device.
    @cached_property
    def first(self) -> Tensor:
        """``(T',)`` int64: the frames that are left, ascending."""
        return (self.root == torch.arange(len(self.root), device=self.root.device)).nonzero().squeeze(1)

    @cached_property
    def slot(self) -> Tensor:
        """``(T,)`` int64: which of the frames that are left each one went into; of lost ones that before them."""
        at = torch.arange(len(self.root), device=self.root.device)
        found = torch.searchsorted(self.first, torch.where(self.root < 0, at, self.root), right=True) - 1
        return found.clamp_min(0)

    def then(self, step: Reduction) -> Shots:
        """Behind one more reduction ``(1, T')`` of the frames that are left."""
        if step.trivial:
            return self
        slot = self.slot
        into = step.index[0][slot]
        root = self.first[step.representative[0][into.clamp_min(0)]]
        share = torch.ones_like(self.weight) if step.weight is None else step.weight[0].float()[slot]
        return replace(self, root=torch.where((self.root < 0) | (into < 0), -1, root), weight=self.weight * share)


@dataclass(frozen=True)
class FrameMerger(ClipMethod):
    """Base of methods that merge frames of a clip behind some blocks of the vision tower, and choose tokens of those
    that are left before the language model. The tower is called with whole clips, and its blocks run on the frames that
    are left; what it puts out has all frames again, those that became one alike, so that places and positions fit.

    A subclass says behind which blocks (:attr:`layers`), which frames become one (:meth:`merge_frames`), what the
    segments of the frames that are left are (:meth:`segments`), and which tokens stay (:meth:`choose`), which finds
    ``site.shots``.
    """

    @property
    def reads(self) -> frozenset[str]:
        """The tokens, and what became of their frames."""
        return frozenset({"x", "frames", "shots"})

    @property
    @abstractmethod
    def layers(self) -> tuple[int, ...]:
        """Blocks of the tower, 0-based and ascending, behind which frames may merge; scores are those of the last."""

    @abstractmethod
    def merge_frames(self, x: Tensor) -> Reduction:
        """Which frames of a clip become one.

        Args:
            x: ``(T, S, C)`` hidden states of the frames that are left.

        Returns:
            A reduction ``(1, T)`` of frames, by sums with weights.
        """

    @abstractmethod
    def segments(self, x: Tensor) -> Segments:
        """First and last frame of each segment.

        Args:
            x: ``(T, S, C)`` as above, behind the last of the blocks.
        """
