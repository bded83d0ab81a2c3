"""Windows and 2-D regions: which tokens are compared with which, so that matching costs O(N)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Windows(NamedTuple):
    """Groups of rows; a row of ``a`` is compared with the rows of ``b`` in its own group only.

    Attributes:
        a: ``(W, Na)`` int64 positions of rows of ``a``, group by group; -1 fills up short groups.
        b: ``(W, Nb)`` int64 positions of rows of ``b``.
        padded: whether any position may be -1. A plain flag, so that no tensor is read on the host.
    """

    a: Tensor
    b: Tensor
    padded: bool = True


def grid_regions(
    height: int, width: int, region: tuple[int, int], *, device: torch.device | str | None = None
) -> Windows:
    """Cut a ``height x width`` grid, stored row by row, into regions; every token is compared with its whole region.

    Args:
        height: rows of the grid.
        width: columns of the grid.
        region: height and width of a region; those at the lower and right edge may be cut.
        device: where the positions are wanted.

    Returns:
        Windows with ``a is b``, of ``ceil(height / region[0]) * ceil(width / region[1])`` regions.

    Raises:
        ValueError: a size is below 1.
    """
    positions = _tiles(height, width, region, device).flatten(1)
    return Windows(positions, positions, height % region[0] != 0 or width % region[1] != 0)


def cell_regions(
    height: int,
    width: int,
    region: tuple[int, int],
    *,
    cell: tuple[int, int] = (2, 2),
    offsets: Tensor | None = None,
    device: torch.device | str | None = None,
) -> Windows:
    """Regions of a grid with one destination (row of ``b``) per cell, the other tokens as sources (rows of ``a``).

    Tokens outside the whole cells are sources. Inside a region sources stand cell by cell, not in ascending order.

    Args:
        height: rows of the grid.
        width: columns of the grid.
        region: height and width of a region, multiples of the cell's.
        cell: height and width of a cell.
        offsets: ``(height // cell[0], width // cell[1])`` int64 or the same flat: which token of each cell is its
            destination, counted row by row inside the cell. None takes the top left one.
        device: where the positions are wanted; that of ``offsets`` if they are given.

    Raises:
        ValueError: a size is below 1, ``region`` is no multiple of ``cell``, or ``offsets`` has another size.

    Source: the cells are those of Bolya and Hoffman, Token Merging for Fast Stable Diffusion, section 3; the regions
    are ours.
    """
    if min(cell) < 1 or region[0] % cell[0] or region[1] % cell[1]:
        raise ValueError(f"region {region} is not a multiple of cell {cell}")
    device = device if offsets is None else offsets.device
    tiles = _tiles(height, width, region, device)  # [W, rh, rw]
    cell_rows, cell_columns = height // cell[0], width // cell[1]
    if offsets is not None and offsets.numel() != cell_rows * cell_columns:
        raise ValueError(
            f"offsets has shape {tuple(offsets.shape)}; expected {(cell_rows, cell_columns)}, one per whole cell"
        )
    inner = (region[0] // cell[0], cell[0], region[1] // cell[1], cell[1])
    cells = tiles.view(-1, *inner).transpose(2, 3).flatten(3).flatten(1, 2)  # [W, cells, tokens of a cell]
    size = cells.shape[-1]
    # The last token of a cut cell lies outside: as its destination it is padding, and the cell's tokens are sources.
    whole = cells[..., -1] >= 0
    chosen = torch.zeros_like(whole, dtype=torch.int64)
    if offsets is not None and cell_rows * cell_columns > 0:
        row, column = cells[..., 0] // width // cell[0], cells[..., 0] % width // cell[1]
        number = torch.where(whole, row * cell_columns + column, 0)
        chosen = offsets.to(torch.int64).flatten().index_select(0, number.flatten()).view_as(number)
    chosen = torch.where(whole, chosen, size - 1).unsqueeze(-1)
    others = torch.arange(size - 1, device=cells.device)
    others = others + (others >= chosen)  # [W, cells, size - 1]
    padded = height % region[0] != 0 or width % region[1] != 0
    return Windows(cells.gather(-1, others).flatten(1), cells.gather(-1, chosen).flatten(1), padded)


def _tiles(height: int, width: int, region: tuple[int, int], device: torch.device | str | None) -> Tensor:
    """Positions ``(W, rh, rw)`` of the tokens of each region, -1 outside the grid."""
    if min(height, width, *region) < 1:
        raise ValueError(f"a {height} x {width} grid cannot be cut into regions of {region}; all must be at least 1")
    rows, columns = -(-height // region[0]), -(-width // region[1])
    y = torch.arange(rows * region[0], device=device).view(rows, 1, region[0], 1)
    x = torch.arange(columns * region[1], device=device).view(1, columns, 1, region[1])
    inside = (y < height) & (x < width)
    return torch.where(inside, y * width + x, -1).view(rows * columns, *region)


def gather_rows(x: Tensor, positions: Tensor) -> Tensor:
    """Rows ``(B, W, n, D)`` of ``x`` ``(B, N, D)``; padding takes row 0."""
    flat = positions.clamp_min(0).flatten()
    return x.index_select(1, flat).view(x.shape[0], *positions.shape, x.shape[-1])


def gather_mask(mask: Tensor | None, positions: Tensor, padded: bool) -> Tensor | None:
    """The mask of gathered rows, ``(W, n)`` or ``(B, W, n)``, without the padding; None where all take part."""
    if mask is None:
        return positions >= 0 if padded else None
    mask = mask.index_select(-1, positions.clamp_min(0).flatten()).view(*mask.shape[:-1], *positions.shape)
    return mask & (positions >= 0) if padded else mask


def to_positions(index: Tensor, positions: Tensor) -> Tensor:
    """Turn indices inside a group, ``(B, W, Na, k)``, into positions of ``b``."""
    groups = torch.arange(positions.shape[0], device=index.device).view(-1, 1, 1) * positions.shape[1]
    return positions.flatten().index_select(0, (index + groups).flatten()).view_as(index)
