"""Flash-VL's and Nemotron's compression: cells of neighbouring visual tokens become one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from tokred.core.checks import check_choice, check_count
from tokred.core.method import Parameters
from tokred.core.place import Place
from tokred.core.reduction import Reduction
from tokred.core.registry import register
from tokred.vlm.before_llm import ProjectorMethod, Space, VisualSite
from tokred.vlm.tools.shuffle import cells


@register("flash_vl")
@dataclass(frozen=True)
class FlashVL(ProjectorMethod):
    """Flash-VL's compression of four tokens into one, without its trained connector.

    Flash-VL sets the tokens of a cell side by side in the channels (:func:`tokred.vlm.tools.shuffle.pixel_shuffle`) and
    trains a connector on them. A model that was not trained so takes one token's channels: here a cell is the mean of
    its tokens (our reading), which no published figure speaks for. The operators and the connector, for models that
    are trained with them, and stitching of overlapping tiles are in :mod:`tokred.vlm.tools.shuffle` and
    :mod:`tokred.vlm.tools.stitch`.

    Args:
        s: side of a cell in tokens: 1, 2 or 4. Cells at the edges may be smaller.
        space: ``"tower"``: means are taken before the projector, where the host can run it on them; ``"x"``: behind it.

    Source: after Zhang et al., Flash-VL 2B, 2025 (arXiv 2505.09498).
    """

    summary: ClassVar[str] = "cells of neighbouring visual tokens become their mean (pixel shuffle, untrained)"
    source: ClassVar[str] = "after Zhang et al., 2025 (arXiv 2505.09498)"
    nothing: ClassVar[Parameters | None] = {"s": 1}

    s: int = 2
    space: Space = "tower"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.s not in (1, 2, 4) or isinstance(self.s, bool):
            raise ValueError(f"s must be 1, 2 or 4, got {self.s!r}")
        check_choice(self.space, "space", ("tower", "x"))

    @property
    def reads(self) -> frozenset[str]:
        """The tokens and their grid."""
        return frozenset({"x", "grid", "tower"} if self.space == "tower" else {"x", "grid"})

    @property
    def frames_of_a_cell(self) -> int:
        """One frame: each frame of a video is an image."""
        return 1

    def count(self, n: int) -> int:
        """Cells of a square grid, or about as many of another."""
        side = round(n**0.5)
        return (-(-side // self.s)) ** 2 if side * side == n else -(-n // self.s**2)

    def choose(self, site: VisualSite) -> Reduction:
        """Every token goes to its cell."""
        (b, n), grid = site.shape, site.grid
        cell = cells(grid, self.s, n // (grid[0] * grid[1]), self.frames_of_a_cell)
        order = cell.argsort(stable=True)
        slot = cell[order]
        first = torch.ones_like(slot, dtype=torch.bool)
        first[1:] = slot[1:] != slot[:-1]
        rows, source, target = (t.to(site.device).expand(b, -1) for t in (order[first], order[~first], slot[~first]))
        return Reduction(rows, source, target, n, mode="mean", by_size=False, complete=True)


@register("nemotron")
@dataclass(frozen=True)
class Nemotron(FlashVL):
    """The fixed reduction of Nemotron Nano V2 VL, untrained: cells of ``s`` by ``s`` tokens, and of several frames.

    The model itself shuffles the tokens of a cell into the channels and trains its connector on them
    (:class:`tokred.vlm.tools.shuffle.NemotronConnector`). Here a cell is the mean of its tokens (our reading).

    Args:
        s: side of a cell; 2 is the model's ratio of 0.5.
        space: see :class:`FlashVL`.
        tubelet: frames of a video that make one; 2 in the omni model.

    Source: after NVIDIA, Nemotron Nano V2 VL, 2025.
    """

    summary: ClassVar[str] = "cells of neighbouring visual tokens, and of several frames, become their mean"
    source: ClassVar[str] = "after NVIDIA, Nemotron Nano V2 VL, 2025"

    tubelet: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count(self.tubelet, "tubelet", 1)

    @property
    def frames_of_a_cell(self) -> int:
        return self.tubelet

    def acts(self, n: int, place: Place) -> bool:
        """Unless every token is a cell."""
        return n > 1 and (self.s > 1 or self.tubelet > 1)
