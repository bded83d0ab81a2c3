"""Baselines between a vision tower and a language model: random tokens, evenly spaced ones, plain down-sampling, fewer
frames."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tokred.core.checks import check_count
from tokred.core.method import Parameters
from tokred.core.reduction import Reduction
from tokred.core.registry import register
from tokred.core.selection import random_order
from tokred.methods.encoder.downsample import cells
from tokred.vlm.before_llm import Budgeted, VisualSite
from tokred.vlm.frames import ClipMethod, cells_of
from tokred.vlm.tools.budget import Budget, as_budget, count_of


@register("random_visual")
@dataclass(frozen=True)
class RandomVisual(Budgeted):
    """Random visual tokens of each image stay; what every selection has to beat.

    Args:
        budget: tokens kept of each image, an integer or a share in (0, 1].
        seed: which random choice; the same for every image of one size.

    Source: baseline.
    """

    summary: ClassVar[str] = "keep random visual tokens of each image (the floor)"
    source: ClassVar[str] = "baseline"

    budget: Budget = 0.25
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count(self.seed, "seed")

    def choose(self, site: VisualSite) -> Reduction:
        """Keep the first of a random order, in the order of the image."""
        b, n = site.shape
        order = random_order(b, n, self.seed, site.tile.index, 0, site.device)
        return site.keep(order[:, : self.count(n)].sort(1).values)


@register("uniform_visual")
@dataclass(frozen=True)
class UniformVisual(Budgeted):
    """Evenly spaced visual tokens of each image stay: rows of the grid as evenly as the budget allows, and evenly
    within each row; without a grid, evenly along the sequence.

    Args:
        budget: tokens kept of each image, an integer or a share in (0, 1].

    Source: baseline.
    """

    summary: ClassVar[str] = "keep evenly spaced visual tokens of each image"
    source: ClassVar[str] = "baseline"

    budget: Budget = 0.25

    @property
    def reads(self) -> frozenset[str]:
        """The tokens and their grid."""
        return frozenset({"x", "grid"})

    def choose(self, site: VisualSite) -> Reduction:
        """Keep the spots of a regular pattern."""
        b, n = site.shape
        kept = spots(site.known_grid or (1, n), n, self.count(n), site.device)
        return site.keep(kept.expand(b, -1))


@register("downsample_visual")
@dataclass(frozen=True)
class DownsampleVisual(Budgeted):
    """Visual tokens of one cell of a coarser grid become their mean: plain down-sampling to at most the budget.

    Args:
        budget: tokens left of each image, an integer or a share in (0, 1]; the coarser grid has the image's proportions
            as nearly as whole rows and columns allow, and never more cells.

    Source: baseline.
    """

    summary: ClassVar[str] = "average neighbouring visual tokens of each image (plain down-sampling)"
    source: ClassVar[str] = "baseline"

    budget: Budget = 0.25

    @property
    def reads(self) -> frozenset[str]:
        """The tokens and their grid."""
        return frozenset({"x", "grid"})

    @property
    def drops(self) -> bool:
        """Never."""
        return False

    def choose(self, site: VisualSite) -> Reduction:
        """Every token goes to its cell."""
        b, n = site.shape
        grid = site.grid
        frames = n // (grid[0] * grid[1])
        rows, columns = coarser(grid, max(1, self.count(n) // frames))
        cell = cells(grid, (rows, columns), site.device)
        index = torch.arange(frames, device=site.device).unsqueeze(1) * (rows * columns) + cell
        return Reduction.from_index(index.flatten().expand(b, -1), frames * rows * columns, sure=True)


@register("uniform_frames")
@dataclass(frozen=True)
class UniformFrames(ClipMethod):
    """Fewer frames of a video: as many whole ones, evenly spaced, as the budget has tokens for.

    Args:
        budget: tokens kept of each clip, an integer or a share in (0, 1]; rounded to whole frames, at least one.

    Source: baseline.
    """

    summary: ClassVar[str] = "keep evenly spaced whole frames of a video"
    source: ClassVar[str] = "baseline"
    example: ClassVar[Parameters] = {"budget": 0.5}
    nothing: ClassVar[Parameters | None] = {"budget": 1.0}

    budget: Budget = 0.25

    def __post_init__(self) -> None:
        super().__post_init__()
        as_budget(self.budget)

    def frames_of(self, frames: int, cells: int) -> int:
        """Whole frames that stay."""
        wanted = self.budget / cells if isinstance(self.budget, int) else round(self.budget * frames, 9)
        return min(frames, max(1, round(wanted)))

    def kept(self, frames: int, cells: int) -> int:
        """Tokens of the frames that stay."""
        return self.frames_of(frames, cells) * cells

    def count(self, n: int) -> int:
        """The budget, as a number of tokens."""
        return count_of(self.budget, n)

    def choose(self, site: VisualSite) -> Reduction:
        """Keep the frames in the middle of so many equal stretches."""
        (b, n), cells = site.shape, cells_of(site)
        frames = n // cells
        some = self.frames_of(frames, cells)
        stay = torch.arange(1, 2 * some, 2, device=site.device) * frames // (2 * some)
        place = torch.arange(cells, device=site.device)
        return site.keep((stay.unsqueeze(1) * cells + place).flatten().expand(b, -1))


def coarser(grid: tuple[int, int], count: int) -> tuple[int, int]:
    """Rows and columns of a grid of at most ``count`` cells, of the proportions of ``grid`` as nearly as can be."""
    best = (1, 1)
    for rows in range(1, grid[0] + 1):
        columns = min(grid[1], count // rows)
        if columns == 0:
            break
        if _fit(grid, (rows, columns)) > _fit(grid, best):
            best = (rows, columns)
    return best


def _fit(grid: tuple[int, int], coarse: tuple[int, int]) -> float:
    """Cells, less for cells that are far from square."""
    side = grid[0] / coarse[0], grid[1] / coarse[1]
    return coarse[0] * coarse[1] * min(side) / max(side)


def spots(grid: tuple[int, int], n: int, count: int, device: torch.device | str | None = None) -> Tensor:
    """``(count,)`` int64 ascending: evenly spaced places on a grid of ``n`` tokens (frames one after another)."""
    height, width = grid[0] * (n // (grid[0] * grid[1])), grid[1]
    rows = min(height, count, max(1, round((count * height / width) ** 0.5), -(-count // width)))
    found = []
    for r in range(rows):
        some = count * (r + 1) // rows - count * r // rows
        y = (2 * r + 1) * height // (2 * rows)
        found += [y * width + (2 * c + 1) * width // (2 * some) for c in range(some)]
    return torch.tensor(found, device=device)
