"""Clips before the language model: frames of a video as methods see them, and the base of methods that act on them.

A site with ``frames`` holds clips of one shape: its ``T * N`` tokens stand frame after frame, ``N`` of each, row after
row, so that token ``t * N + j`` is place ``j`` of frame ``t``. Clips of one prompt or batch are rows of the site's
batch, each by itself; a method never compares one with the next.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tokred.core.place import MANY, Place
from tokred.core.reduction import Reduction
from tokred.core.site import Site
from tokred.vlm.before_llm import ProjectorMethod, VisualSite


@dataclass(frozen=True)
class ClipMethod(ProjectorMethod):
    """Base of methods before the language model that act on clips; images beside them stay whole.

    A subclass says how many tokens it leaves of a clip, as far as that is known before there are features
    (:meth:`kept`), how many of ``n`` about (:meth:`count`), and which (:meth:`choose`).

    Attributes:
        clips: True of all of them.
    """

    clips: ClassVar[bool] = True

    @property
    def reads(self) -> frozenset[str]:
        """The tokens, and that they are frames."""
        return frozenset({"x", "frames"})

    @abstractmethod
    def kept(self, frames: int, cells: int) -> int:
        """How many tokens are left of a clip, known from its shape alone; at most so many where features decide.

        Args:
            frames: of the clip, ``T``.
            cells: tokens of a frame, ``N``.
        """

    def leaving(self, count: int, frames: int, cells: int) -> ProjectorMethod:
        """The same method, set to leave so many tokens of a clip, as nearly as its settings and its rules allow.

        Args:
            count: at least 1, of the whole clip.
            frames, cells: the clip's shape, ``T`` and ``N``.

        Raises:
            ValueError: no setting says how many.
        """
        return self.with_budget(count)

    def acts(self, n: int, place: Place) -> bool:
        """Unless the settings keep everything: what a clip leaves depends on its frames, which are not asked about."""
        return n > 1 and self.count(MANY) < MANY

    def reduce(self, site: Site) -> Reduction:
        """Keep, or merge into, some of each clip's tokens.

        Raises:
            ValueError: the tokens do not divide into the frames.
            MissingInputError: the site lacks something that the method reads.
        """
        if site.frames is None:
            return Reduction.identity((site.shape[0],), site.shape[1], site.device)
        cells_of(site)
        return super().reduce(site)


def cells_of(site: Site) -> int:
    """``N``, the tokens of a frame.

    Raises:
        ValueError: the site has no frames, or its tokens do not divide into them.
    """
    n, frames = site.shape[1], site.frames
    if frames is None or frames < 1 or n % frames:
        raise ValueError(f"{n} tokens are no clip of {frames} frames of one size")
    return n // frames


def moments(count: int, cells: int, device: torch.device) -> Tensor:
    """``(count, 2)`` int64: frame, and place in the frame, of each token of a clip with ``cells`` tokens a frame."""
    token = torch.arange(count, device=device)
    return torch.stack([token // cells, token % cells], 1)


def framed(site: VisualSite, values: Tensor | None = None) -> Tensor:
    """``(B, T, N, ...)``: what each token of a clip has, by frame and place.

    Args:
        site: with frames.
        values: ``(B, T * N, ...)``; None: the tokens, in float32.
    """
    values = site.x.detach().float() if values is None else values
    frames = site.frames or 1
    return values.view(values.shape[0], frames, cells_of(site), *values.shape[2:])
