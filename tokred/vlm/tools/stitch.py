"""Implicit semantic stitching: tiles that overlap agree on what they both see."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from tokred.core.checks import check_choice

Blend = Literal["ramp", "mean", "nearest"]


def overlap_of(side: int, share: float = 0.125) -> int:
    """Tokens that neighbouring tiles share: ``share`` of a side, rounded.

    Args:
        side: of a tile in tokens.
        share: in [0, 0.5).

    Raises:
        ValueError: the share is out of range.
    """
    if not 0 <= share < 0.5:
        raise ValueError(f"share must lie in [0, 0.5), got {share!r}")
    return round(side * share)


def shares(parts: int, side: int, overlap: int, blend: Blend = "ramp") -> Tensor:
    """Weight of each tile along one side of the canvas.

    Args:
        parts: tiles beside each other.
        side: of a tile in tokens.
        overlap: tokens that neighbours share, at most half of the side.
        blend: ``"ramp"``: in proportion to one more than the distance to the tile's own border; ``"mean"``: alike.

    Returns:
        ``(parts, length)`` float32 weights, not yet normalised; 0 where the tile does not reach.

    Raises:
        ValueError: tiles overlap by more than half.
    """
    if overlap < 0 or (parts > 1 and 2 * overlap > side):
        raise ValueError(f"tiles of {side} tokens may overlap by at most half, got {overlap}")
    place = torch.arange(parts * (side - overlap) + overlap)
    own = place - torch.arange(parts).unsqueeze(1) * (side - overlap)
    inside = (own >= 0) & (own < side)
    height = torch.minimum(own, side - 1 - own) + 1 if blend == "ramp" else torch.ones_like(own)
    return torch.where(inside, height, 0).float()


def weights(rows: int, columns: int, grid: tuple[int, int], overlap: int, blend: Blend = "ramp") -> Tensor:
    """Weight of each tile at each place of the canvas: ``(P, Hc, Wc)`` float32, one in sum over the tiles.

    Args:
        rows, columns: of tiles.
        grid: rows and columns of the tokens of a tile.
        overlap: tokens that neighbours share.
        blend: ``"ramp"``: in proportion to one more than the distance to the nearest border of the tile; ``"mean"``:
            alike; ``"nearest"``: the tile with the nearest centre alone, ties to the first.

    Raises:
        ValueError: tiles overlap by more than half, or ``blend`` is unknown.
    """
    check_choice(blend, "blend", ("ramp", "mean", "nearest"))
    high, wide = grid
    kind: Blend = "mean" if blend == "mean" else "ramp"
    # The distance to the nearest of four borders is the smaller of the two along rows and along columns.
    y, x = shares(rows, high, overlap, kind), shares(columns, wide, overlap, kind)
    both = torch.minimum(y[:, None, :, None], x[None, :, None, :]).flatten(0, 1)
    if blend == "nearest":
        at = [(torch.arange(t.shape[1]) - torch.arange(n).unsqueeze(1) * (side - overlap) - (side - 1) / 2).square()
              for t, n, side in ((y, rows, high), (x, columns, wide))]  # fmt: skip
        far = (at[0][:, None, :, None] + at[1][None, :, None, :]).flatten(0, 1)
        first = far.masked_fill(both == 0, torch.inf).argmin(0, keepdim=True)
        return torch.zeros_like(both).scatter(0, first, 1.0)
    return both / both.sum(0)


def stitch(
    tiles: Tensor, rows: int, columns: int, grid: tuple[int, int], overlap: int, blend: Blend = "ramp"
) -> Tensor:
    """Tiles on one canvas; where they overlap their features are blended, in float32.

    How the authors reach their consensus is not published: the blends are ours.

    Args:
        tiles: ``(B, P, N, C)``, ``P`` tiles row by row.
        rows, columns: of tiles.
        grid: rows and columns of the tokens of a tile.
        overlap: tokens that neighbours share.
        blend: see :func:`weights`.

    Returns:
        ``(B, Hc * Wc, C)`` of the tiles' type; a side of the canvas has ``n * (side - overlap) + overlap`` tokens.

    Source: Zhang et al., Flash-VL 2B, 2025 (implicit semantic stitching), our reading.
    """
    b, p, n, c = tiles.shape
    if p != rows * columns or n != grid[0] * grid[1]:
        raise ValueError(f"{rows} x {columns} tiles of {grid[0]} x {grid[1]} tokens do not fit {tuple(tiles.shape)}")
    share = weights(rows, columns, grid, overlap, blend).to(tiles.device)
    index = windows(rows, columns, grid, overlap).to(tiles.device)
    share = share.flatten(1).gather(1, index)
    length = index.max() + 1 if index.numel() else 0
    canvas = torch.zeros(b, int(length), c, device=tiles.device)
    canvas = canvas.index_add(1, index.flatten(), (tiles.float() * share.unsqueeze(-1)).flatten(1, 2))
    return canvas.to(tiles.dtype)


def unstitch(canvas: Tensor, rows: int, columns: int, grid: tuple[int, int], overlap: int) -> Tensor:
    """Every tile's window of a canvas: ``(B, Hc * Wc, C)`` to ``(B, P, N, C)``.

    After :func:`stitch` the tiles hold what they agreed on, at the host's own number of tokens.

    Args:
        canvas: as :func:`stitch` returns it.
        rows, columns, grid, overlap: as there.
    """
    return canvas[:, windows(rows, columns, grid, overlap).to(canvas.device)]


def windows(rows: int, columns: int, grid: tuple[int, int], overlap: int) -> Tensor:
    """``(P, N)`` int64: the place on the canvas of every token of every tile."""
    (high, wide), o = grid, overlap
    length = columns * (wide - o) + o
    y = torch.arange(rows).view(-1, 1, 1, 1) * (high - o) + torch.arange(high).view(1, 1, -1, 1)
    x = torch.arange(columns).view(1, -1, 1, 1) * (wide - o) + torch.arange(wide)
    return (y * length + x).flatten(2).flatten(0, 1)
