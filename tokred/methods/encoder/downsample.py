"""downsample: average neighbouring patches on the grid, whatever they show; what every choice of tokens has to beat."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tokred.core.checks import check_count, check_flags, check_share
from tokred.core.method import Parameters
from tokred.core.place import Place
from tokred.core.reduction import Reduction
from tokred.core.registry import register
from tokred.core.schedules import whole
from tokred.core.site import Site
from tokred.encoder.method import BlockMethod
from tokred.encoder.padding import reduce_each


@register("downsample")
@dataclass(frozen=True)
class Downsample(BlockMethod):
    """Plain down-sampling of the patch grid in one block: patches of one cell of a coarser grid become their mean.

    The coarser grid has ``round(side * sqrt(keep))`` rows and columns, so the number of tokens is near ``keep``; cells
    differ by at most one patch a side.

    Args:
        keep: share of the patches that is left, in (0, 1].
        block: where it happens, 0-based. The first block by default, so that nearly all of the model is faster.
        prop_attn: proportional attention, since a cell stands for several patches.

    Source: baseline (ours).
    """

    summary: ClassVar[str] = "average neighbouring patches of the grid in one block (the plain alternative)"
    source: ClassVar[str] = "baseline"
    example: ClassVar[Parameters] = {"keep": 0.5}
    nothing: ClassVar[Parameters | None] = {"keep": 1.0}
    usual: ClassVar[Parameters] = {"keep": 0.5}

    keep: float = 1.0
    block: int = 0
    prop_attn: bool = True

    def __post_init__(self) -> None:
        check_flags(prop_attn=self.prop_attn)
        check_share(self.keep, "keep")
        check_count(self.block, "block")

    @property
    def reads(self) -> frozenset[str]:
        """The tokens and their grid."""
        return frozenset({"x", "grid"})

    @property
    def proportional(self) -> bool:
        return self.prop_attn

    def check(self, depth: int) -> None:
        if self.block >= depth:
            raise ValueError(f"block is {self.block}, but the model has {depth} blocks (0 to {depth - 1})")

    def tokens(self, n: int, place: Place) -> int:
        """The cells of the coarser grid; exact for a square grid."""
        if place.layer != self.block:
            return n
        side = math.isqrt(max(0, place.free(n)))
        rows, columns = self.coarse((side, side)) if side * side == place.free(n) else (0, 0)
        return place.prefix + rows * columns + place.suffix if rows else n - self._estimate(place.free(n))

    def _estimate(self, free: int) -> int:
        return free - max(1, round(free * self.keep)) if free else 0

    def acts(self, n: int, place: Place) -> bool:
        """True in its block, unless every token is kept."""
        return place.layer == self.block and self.keep < 1 and n > place.protected + 1

    def coarse(self, grid: tuple[int, int]) -> tuple[int, int]:
        """Rows and columns that are left of a grid."""
        factor = math.sqrt(self.keep)
        rows, columns = (whole(side) for side in grid)  # traced sides are tensors
        return max(1, round(rows * factor)), max(1, round(columns * factor))

    def reduce(self, site: Site) -> Reduction:
        """Every patch goes to its cell of the coarser grid."""
        if site.mask is not None:
            return reduce_each(self, site, always=True)
        b, n = site.shape
        grid = site.grid
        rows, columns = self.coarse(grid)
        if (rows, columns) == grid or n - site.prefix - site.suffix < grid[0] * grid[1]:
            return Reduction.identity((b,), n, site.device)
        cell = cells(grid, (rows, columns), site.device)
        head = torch.arange(site.prefix, device=site.device)
        tail = torch.arange(site.suffix, device=site.device) + site.prefix + rows * columns
        index = torch.cat([head, cell + site.prefix, tail]).expand(b, -1)
        return Reduction.from_index(index, site.prefix + rows * columns + site.suffix, sure=True)


def cells(grid: tuple[int, int], coarse: tuple[int, int], device: torch.device | str | None = None) -> Tensor:
    """``(Hg * Wg,)`` the cell of a coarser grid that each patch lies in, in raster order."""
    row = torch.arange(grid[0], device=device) * coarse[0] // grid[0]
    column = torch.arange(grid[1], device=device) * coarse[1] // grid[1]
    return (row.unsqueeze(1) * coarse[1] + column).flatten()
