"""Matching on a grid of tokens: one destination per cell, and rows that stand for their neighbours."""

from __future__ import annotations

import torch
from torch import Tensor

from tokred.core.ragged import bounds, pack
from tokred.core.reduction import Reduction
from tokred.core.selection import besides, ranked
from tokred.kernels.gather_rows import gather_rows
from tokred.kernels.similarity_rows import best_match, unit


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
    check_cells(grid, cell)
    return clip_destinations((1, *grid), (1, *cell), offsets, device)


def clip_destinations(
    grid: tuple[int, int, int],
    cell: tuple[int, int, int],
    offsets: Tensor | None,
    device: torch.device | str | None = None,
) -> tuple[Tensor, Tensor]:
    """:func:`cell_destinations` of a clip: frames, rows and columns; cells go over frames, too.

    Raises:
        ValueError: a cell is larger than the clip, or there is not one offset per cell.
    """
    counts = tuple(side // step for side, step in zip(grid, cell, strict=True))
    cells = counts[0] * counts[1] * counts[2]
    if not cells:
        raise ValueError(f"cells of {cell} are larger than the clip of {grid} (frames, rows, columns)")
    if offsets is None:
        offsets = torch.zeros(cells, dtype=torch.int64, device=device)
    elif offsets.numel() != cells:
        raise ValueError(f"offsets must be one for each of the {cells} cells, got {tuple(offsets.shape)}")
    offsets = offsets.reshape(counts).to(device=device, dtype=torch.int64)
    t = torch.arange(counts[0], device=device).view(-1, 1, 1) * cell[0] + offsets // (cell[1] * cell[2])
    y = torch.arange(counts[1], device=device).view(-1, 1) * cell[1] + offsets // cell[2] % cell[1]
    x = torch.arange(counts[2], device=device) * cell[2] + offsets % cell[2]
    n = grid[0] * grid[1] * grid[2]
    chosen = torch.zeros(n, dtype=torch.uint8, device=device)
    chosen = chosen.scatter(0, ((t * grid[1] + y) * grid[2] + x).reshape(-1), 1)
    order = chosen.argsort(stable=True)
    return order[: n - cells], order[n - cells :]


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


def whole_cells(grid: tuple[int, int], cell: tuple[int, int]) -> int:
    """How many whole cells there are in a grid: none where it is smaller than one, and nothing can be merged."""
    return (grid[0] // cell[0]) * (grid[1] // cell[1])


def typical_tokens(metric: Tensor, grid: tuple[int, int], cell: tuple[int, int]) -> Tensor:
    """The token of each whole cell that is most like the cell's mean, ``(B, K)`` positions in ascending order.

    Args:
        metric: ``(B, N, C)``, compared by cosine in float32, in steps of 1/4096, so that rounding does not choose.
        grid: rows and columns.
        cell: rows and columns of a cell.

    Raises:
        ValueError: a cell is larger than the grid.
    """
    rows, columns = check_cells(grid, cell)
    places = torch.arange(grid[0] * grid[1], device=metric.device).view(grid)
    places = places[: rows * cell[0], : columns * cell[1]].reshape(rows, cell[0], columns, cell[1])
    members = places.transpose(1, 2).reshape(rows * columns, -1)
    with torch.no_grad():
        own = unit(metric.detach()).index_select(1, members.flatten())
        own = own.view(len(metric), *members.shape, -1)
        score = ((own * own.mean(2, keepdim=True)).sum(-1) * 4096).round()
        chosen = score.argmax(-1, keepdim=True)
        return members.expand(len(metric), -1, -1).gather(2, chosen).squeeze(-1).sort(dim=1).values


def match_cells(
    metric: Tensor, sources: Tensor, destinations: Tensor, r: int, *, by: str = "cosine", mode: str = "mean"
) -> Reduction:
    """Merge the ``r`` sources that are most similar to a destination into it, wherever it stands.

    Args:
        metric: ``(B, N, C)``, compared in float32.
        sources: ``(R,)`` positions, shared by the batch.
        destinations: ``(K,)`` positions.
        r: how many, at most ``R``.
        by: ``"cosine"``, ``"dot"`` or ``"distance"``.
        mode: how a slot combines its members, ``"mean"`` or ``"keep"``.

    Returns:
        Slots: the sources that stay, best score first, then the destinations. The mean of a slot is the plain one.

    Source: Bolya and Hoffman, Token Merging for Fast Stable Diffusion, 2023, section 4; ties to the lower index (ours).
    """
    b, n, _ = metric.shape
    r = min(r, len(sources))
    if r == 0:
        return Reduction.identity((b,), n, metric.device)
    with torch.no_grad():
        rows, by = (unit(metric.detach()), "dot") if by == "cosine" else (metric.detach(), by)
        score, match = best_match(rows.index_select(1, sources), rows.index_select(1, destinations), metric=by)
        order = ranked(score)
        merged, alone = order[:, :r], order[:, r:]
        representative = torch.cat([sources[alone], destinations.expand(b, -1)], 1)
        target = match.gather(1, merged) + alone.shape[1]
        return Reduction(representative, sources[merged], target, n, mode=mode, by_size=False, complete=True)


def match_above(metric: Tensor, sources: Tensor, destinations: Tensor, threshold: float) -> Reduction:
    """Merge every source whose best destination is more similar than a threshold. Waits for the device once.

    Args:
        metric: ``(B, N, C)``, compared by cosine in float32.
        sources: ``(R,)`` positions, shared by the batch.
        destinations: ``(K,)`` positions.
        threshold: of the cosine.

    Returns:
        Slots: the sources that stay and the destinations, each in their order; a mask where samples keep different
        numbers. The mean of a slot is the plain one.
    """
    b, n, _ = metric.shape
    k = len(destinations)
    with torch.no_grad():
        rows = unit(metric.detach())
        score, match = best_match(rows.index_select(1, sources), rows.index_select(1, destinations), metric="dot")
        merged = score > threshold
        stays = torch.cat([~merged, merged.new_ones(b, k)], 1)
        low, high = bounds(stays.sum(1), n)
        if low == n:
            return Reduction.identity((b,), n, metric.device)
        slot = stays.cumsum(1) - 1
        target = torch.where(merged, slot[:, n - k :].gather(1, match), -1)
        line = torch.cat([sources, destinations]).expand(b, -1)
        representative, mask = pack(line, stays, (low, high))
        return Reduction(representative, sources.expand(b, -1), target, n, mask=mask, mode="mean", by_size=False)


def match_around(metric: Tensor, destinations: Tensor, protected: Tensor, left: int) -> Reduction:
    """Merge every token into its most similar destination, but for some protected ones, least similar first.

    Args:
        metric: ``(B, N, C)``, compared by cosine in float32.
        destinations: ``(B, K)`` positions, ascending, of each sample's own.
        protected: ``(B, N)`` bool: who may stay alone. In each sample at least ``left`` tokens are protected or
            destinations.
        left: tokens that remain, at least ``K``.

    Returns:
        Slots: those that stay alone, then the destinations, each in ascending position. The mean of a slot is plain.
    """
    n, k = metric.shape[1], destinations.shape[1]
    with torch.no_grad():
        sources = besides(destinations, n)
        rows = unit(metric.detach())
        parts = (gather_rows(rows, at) for at in (sources, destinations))
        score, match = best_match(*parts, metric="dot")
        score = score.masked_fill(~protected.gather(1, sources), torch.inf)
        order = score.argsort(dim=1, stable=True)
        alone, merged = (part.sort(dim=1).values for part in (order[:, : left - k], order[:, left - k :]))
        representative = torch.cat([sources.gather(1, alone), destinations], 1)
        target = match.gather(1, merged) + (left - k)
        source = sources.gather(1, merged)
        return Reduction(representative, source, target, n, mode="mean", by_size=False, complete=True)


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
