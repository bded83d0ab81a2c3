"""Images that a host cuts into tiles: how the tiles lie beside each other, and where they show the whole image."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Tiles(NamedTuple):
    """The tiles of one image: the first shows the whole of it at low resolution, the others a part each, row by row.

    Attributes:
        rows, columns: of the parts.
        grid: rows and columns of the tokens of one tile.
        cut: rows and columns of tokens that the host cuts away at each of two opposite sides of the parts laid side by
            side, since they show padding.
    """

    rows: int
    columns: int
    grid: tuple[int, int]
    cut: tuple[int, int] = (0, 0)

    @property
    def total(self) -> int:
        """Tiles, the whole image counted."""
        return 1 + self.rows * self.columns

    def real(self, device: torch.device | str | None = None) -> Tensor:
        """``(P, N)`` bool: False on tokens that are cut away; those of the whole image are all real."""
        (high, wide), (up, left) = self.grid, self.cut
        y = torch.arange(self.rows * high, device=device)
        x = torch.arange(self.columns * wide, device=device)
        inside = ((y >= up) & (y < len(y) - up)).unsqueeze(1) & ((x >= left) & (x < len(x) - left))
        parts = inside.view(self.rows, high, self.columns, wide).transpose(1, 2).flatten(2).flatten(0, 1)
        return torch.cat([torch.ones_like(parts[:1]), parts])

    def cell(self, device: torch.device | str | None = None) -> Tensor:
        """``(N,)`` int64: for each token of the whole image the part, counted from 0, that shows the same place."""
        y = _parts(self.grid[0], self.rows, self.cut[0], device)
        x = _parts(self.grid[1], self.columns, self.cut[1], device)
        return (y.unsqueeze(1) * self.columns + x).flatten()


def _parts(side: int, parts: int, cut: int, device: torch.device | str | None) -> Tensor:
    """``(side,)`` which part each row of the whole image lies in."""
    length = parts * side - 2 * cut
    edges = [max(0, i * side - cut) * side // length for i in range(1, parts)]
    place = torch.arange(side, device=device)
    return (place.unsqueeze(1) >= torch.tensor(edges, dtype=torch.long, device=device)).sum(1)
