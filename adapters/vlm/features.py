"""What the vision side made of images: call-through wrappers of feature getters, and taps on tower and projector."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from tokred.adapters.encoder.block import split_heads
from tokred.adapters.swap import Hook
from tokred.vlm.before_llm import Tile
from tokred.vlm.tools.tiles import Tiles

# What this thread knows of the forward in flight: ``call``, ``forward``, ``tap``, ``labels``, ``done``; and ``last``,
# the records of the features that it made last, by model.
local = threading.local()


@dataclass(frozen=True)
class Part:
    """Visual tokens that are judged together: an image, a tile of it, or a video.

    Attributes:
        where: which tokens of the picture, in order: their first and count, or rows of a larger grid.
        grid: rows and columns, of one frame; None where they form none.
        frames: of a video; None for an image.
        tile: which tile; None: all of the image.
        tower: which row of the tower's batch; -1 where none fits.
        patches: which of the tower's patches they are; None: all, in order.
        skip: class tokens before the patches among the tower's features.
        corner: row and column of its first token among all of the image's, and how many of these there are, where it
            shows a part of the image; None: its grid is the image's.
        tiles: how all tiles of the image lie, where it has several that are judged apart.
        whole: row of the tower's batch that shows the whole image; -1 where none fits.
    """

    where: Span
    grid: tuple[int, int] | None = None
    frames: int | None = None
    tile: Tile | None = None
    tower: int = -1
    patches: Span | None = None
    skip: int = 0
    corner: tuple[int, int, int, int] | None = None
    tiles: Tiles | None = None
    whole: int = -1

    @property
    def count(self) -> int:
        """How many tokens."""
        return self.where.rows * self.where.columns


@dataclass(frozen=True)
class Span:
    """Places of a rectangle in a sequence: ``rows`` of ``columns``, ``stride`` apart, from ``start``."""

    start: int
    rows: int
    columns: int
    stride: int

    @classmethod
    def line(cls, start: int, count: int) -> Span:
        """Consecutive places."""
        return cls(start, 1, count, count)

    def offsets(self, device: torch.device) -> Tensor:
        """``(rows * columns,)`` int64."""
        rows = torch.arange(self.rows, device=device).unsqueeze(1) * self.stride
        return (self.start + rows + torch.arange(self.columns, device=device)).flatten()


class Picture(NamedTuple):
    """One image or video, in the order of the placeholders.

    Attributes:
        tokens: how many.
        parts: what is judged.
        lines: rows of tokens that end in a newline, which leaves with the last token of its row; or None.
    """

    tokens: int
    parts: tuple[Part, ...]
    lines: Span | None = None


class Fused(NamedTuple):
    """An attention with one projection for queries, keys and values: its output and the rotary tables."""

    attention: Any
    projected: Tensor | None
    tables: Any


@dataclass
class Tap:
    """What taps noted while one feature getter ran."""

    inputs: Tensor | None = None
    heads: dict[tuple[int, str], Tensor] = field(default_factory=dict)
    fused: Fused | None = None


@dataclass
class Record:
    """What one call of a feature getter gave.

    Attributes:
        pictures: in the order of the placeholders.
        tower: ``(rows, N, Ct)`` input of the projector, with its gradient, or None.
        heads: queries and keys ``(rows, H, P + N, D)`` of tower layers, by layer and "q" or "k".
        layer: which layer's features are used, of ``depth``.
        prefix: class tokens in them.
        scale: of the tower's attention.
        received: gives what the tokens of a picture receive, ``(H, N)``, by its number; None: see ``heads``.
        marks: ``(T,)`` int64 one number for each feature, by which it is found again.
    """

    pictures: list[Picture]
    tower: Tensor | None = None
    heads: dict[tuple[int, str], Tensor] = field(default_factory=dict)
    layer: int = 0
    depth: int = 0
    prefix: int = 0
    scale: float | None = None
    received: Callable[[int], Tensor] | None = None
    marks: Tensor | None = None


class ProjectorTap(Hook):
    """Before the projector: note its input."""

    def __call__(self, module: nn.Module, args: Any) -> None:
        tap: Tap | None = getattr(local, "tap", None)
        if tap is not None and tap.inputs is None and args:
            tap.inputs = args[0]


class TowerTap(Hook):
    """After the vision tower: note that there are features."""

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        call = getattr(local, "call", None)
        if call is not None:
            call[1].towers = True


class HeadTap(Hook):
    """After a projection of the tower's attention: note queries or keys.

    Args:
        layer: of the tower.
        which: "q" or "k".
        heads: to split the output into.
    """

    def __init__(self, layer: int, which: str, heads: int) -> None:
        self.layer = layer
        self.which = which
        self.heads = heads

    def __call__(self, module: nn.Module, args: Any, output: Tensor) -> None:
        tap: Tap | None = getattr(local, "tap", None)
        if tap is not None and output.ndim == 3:
            tap.heads[self.layer, self.which] = split_heads(output.detach(), self.heads)
