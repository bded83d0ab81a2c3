"""Places of tokens on the grid of their image."""

from __future__ import annotations

import torch
from torch import Tensor


def sides(count: int, device: torch.device | str | None = None) -> Tensor:
    """``(count,)`` float32 evenly from 0 to 1; one half where there is one."""
    return torch.linspace(0, 1, count, device=device) if count > 1 else torch.full((count,), 0.5, device=device)


def grid_places(rows: int, columns: int, device: torch.device | str | None = None) -> Tensor:
    """``(rows * columns, 2)`` float32: row and column of every token of a grid, both in [0, 1]."""
    return torch.cartesian_prod(sides(rows, device), sides(columns, device)).view(-1, 2)
