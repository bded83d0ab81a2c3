"""Matching on a grid of tokens: one destination per cell, and rows that stand for their neighbours."""

from __future__ import annotations

import torch
from torch import Tensor

from tokred.kernels.similarity_rows import best_match, unit
from tokred.reduction import Reduction
from tokred.selection import ranked


def cell_destinations(
    grid: tuple[int, int], cell: tuple[int, int], offsets: Tensor | None, device: torch.device | str | None = None
) -> tuple[Tensor, Tensor]:
    """One destination in each whole cell of a grid stored row by row; every other token is a source.

    Args:
        grid: rows and columns.
        cell: rows and columns of a cell. Tokens outside the whole cells are sources.
        offsets: integers, one per cell row by row: which token of the cell, counted row by row. None: the top left one.
        device: where the positions are wanted.

    Returns:
        Sources ``(N - K,)`` and destinations ``(K,)``, positions in ascending order.

    Raises:
        ValueError: a cell is larger than the grid, or there is not one offset per cell.
    """
    high, wide = grid
    rows, columns = check_cells(grid, cell)
    if offsets is None:
        offsets = torch.zeros(rows * columns, dtype=torch.int64, device=device)
    elif offsets.numel() != rows * columns:
        raise ValueError(f"offsets must be one for each of the {rows * columns} cells, got {tuple(offsets.shape)}")
    offsets = offsets.reshape(rows, columns).to(device=device, dtype=torch.int64)
    y = torch.arange(rows, device=device).unsqueeze(1) * cell[0] + offsets // cell[1]
    x = torch.arange(columns, device=device) * cell[1] + offsets % cell[1]
    chosen = torch.zeros(high * wide, dtype=torch.uint8, device=device)
    chosen = chosen.scatter(0, (y * wide + x).reshape(-1), 1)
    order = chosen.argsort(stable=True)
    count = high * wide - rows * columns
    return order[:count], order[count:]


def check_cells(grid: tuple[int, int], cell: tuple[int, int]) -> tuple[int, int]:
    """Rows and columns of whole cells.

    Raises:
        ValueError: a cell is larger than the grid.
    """
    rows, columns = grid[0] // cell[0], grid[1] // cell[1]
    if not rows or not columns:
        raise ValueError(
            f"cells of {cell[0]} x {cell[1]} tokens (rows x columns) are larger than the grid of {grid[0]} x {grid[1]}"
        )
    return rows, columns


def match_cells(metric: Tensor, sources: Tensor, destinations: Tensor, r: int) -> Reduction:
    """Merge the ``r`` sources that are most similar to a destination into it, wherever it stands.

    Args:
        metric: ``(B, N, C)``, compared by cosine in float32.
        sources: ``(R,)`` positions, shared by the batch.
        destinations: ``(K,)`` positions.
        r: how many, at most ``R``.

    Returns:
        Slots: the sources that stay, best score first, then the destinations. The mean of a slot is the plain one.

    Source: Bolya and Hoffman, Token Merging for Fast Stable Diffusion, 2023, section 4; ties to the lower index (ours).
    """
    b, n, _ = metric.shape
    r = min(r, len(sources))
    if r == 0:
        return Reduction.identity((b,), n, metric.device)
    with torch.no_grad():
        rows = unit(metric.detach())
        score, match = best_match(rows.index_select(1, sources), rows.index_select(1, destinations), metric="dot")
        order = ranked(score)
        merged, alone = order[:, :r], order[:, r:]
        representative = torch.cat([sources[alone], destinations.expand(b, -1)], 1)
        target = match.gather(1, merged) + alone.shape[1]
        return Reduction(representative, sources[merged], target, n, mode="mean", by_size=False, complete=True)


def kept_lines(n: int, factor: int, *, exact: bool = False) -> list[int]:
    """Rows (or columns) that down-sampling by a factor keeps of ``n``, as nearest-neighbour resizing picks them.

    Args:
        n: rows.
        factor: of the down-sampling; ``n // factor`` rows are kept.
        exact: pick the one nearest to the middle (``nearest-exact``) rather than the first.

    Raises:
        ValueError: the factor is larger than ``n``.
    """
    kept = n // factor
    if not kept:
        raise ValueError(f"a factor of {factor} is larger than the {n} rows or columns of the grid")
    return [(2 * i + 1) * n // (2 * kept) if exact else i * n // kept for i in range(kept)]


def pool_cells(grid: tuple[int, int], factor: int, batch: int, mode: str, device: torch.device | str) -> Reduction:
    """Each whole ``factor x factor`` cell becomes one slot; tokens outside are dropped.

    Args:
        grid: rows and columns.
        factor: side of a cell.
        batch: ``B``.
        mode: ``"mean"`` or ``"max"``.
        device: where the positions are wanted.
    """
    high, wide = grid
    rows, columns = check_cells(grid, (factor, factor))
    y = torch.arange(rows * factor, device=device).view(rows, 1, factor, 1)
    x = torch.arange(columns * factor, device=device).view(1, columns, 1, factor)
    members = (y * wide + x).reshape(rows * columns, -1)
    target = torch.arange(rows * columns, device=device).unsqueeze(1).expand(-1, members.shape[1] - 1)
    parts = (members[:, 0], members[:, 1:].reshape(-1), target.reshape(-1))
    rep, source, into = (p.expand(batch, -1) for p in parts)
    return Reduction(rep, source.contiguous(), into.contiguous(), high * wide, mode=mode, by_size=False, complete=True)
