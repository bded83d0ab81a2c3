"""Pixel shuffle: neighbouring tokens side by side in one, as many vision-language models take them."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokred.core.checks import check_choice

Layout = Literal["v2", "v1"]


def pixel_shuffle(x: Tensor, grid: tuple[int, int], s: int = 2, layout: Layout = "v2") -> Tensor:
    """Space to depth: the ``s * s`` tokens of a cell become one token of as many channels.

    Channels are ordered by row within the cell, then column, then the token's own. Sides that ``s`` does not divide are
    continued by their last row or column (our choice).

    Args:
        x: ``(B, Hg * Wg, C)``, row by row.
        grid: ``(Hg, Wg)``.
        s: side of a cell.
        layout: ``"v2"``, cells row by row; ``"v1"``, column by column, which some published checkpoints were trained
            with.

    Returns:
        ``(B, ceil(Hg / s) * ceil(Wg / s), C * s * s)``.

    Raises:
        ValueError: the grid does not fit the tokens, or ``s`` or ``layout`` is not allowed.

    Source: Zhang et al., Flash-VL 2B, 2025, section 3; layouts as InternVL's ``ps_version``.
    """
    b, n, c = x.shape
    high, wide = grid
    if high * wide != n or s < 1:
        raise ValueError(f"s must be at least 1 and the grid have {n} tokens, got s={s} and {high} x {wide}")
    check_choice(layout, "layout", ("v2", "v1"))
    x = x.view(b, high, wide, c)
    down, right = -high % s, -wide % s
    if down or right:
        x = F.pad(x.permute(0, 3, 1, 2), (0, right, 0, down), mode="replicate").permute(0, 2, 3, 1)
    rows, columns = (high + down) // s, (wide + right) // s
    cells = x.reshape(b, rows, s, columns, s, c).permute(0, 1, 3, 2, 4, 5)
    if layout == "v1":
        cells = cells.transpose(1, 2)
    return cells.reshape(b, rows * columns, s * s * c)


def pixel_unshuffle(y: Tensor, grid: tuple[int, int], s: int = 2, layout: Layout = "v2") -> Tensor:
    """Depth to space: undoes :func:`pixel_shuffle`, bit for bit.

    Args:
        y: as :func:`pixel_shuffle` returns it.
        grid: the one before.
        s, layout: as before.
    """
    check_choice(layout, "layout", ("v2", "v1"))
    (high, wide), (b, _, c) = grid, y.shape
    rows, columns = -(-high // s), -(-wide // s)
    shape = (rows, columns) if layout == "v2" else (columns, rows)
    cells = y.view(b, *shape, s, s, c // (s * s))
    if layout == "v1":
        cells = cells.transpose(1, 2)
    whole = cells.permute(0, 1, 3, 2, 4, 5).reshape(b, rows * s, columns * s, -1)
    return whole[:, :high, :wide].reshape(b, high * wide, -1)


class FlashConnector(nn.Module):
    """Flash-VL's connector: pixel shuffle, LayerNorm, and linear layers to the language model's width.

    The number of linear layers and the activation are our reading: two, with GELU between.

    Args:
        channels: of the tower.
        width: of the language model.
        s: side of a cell.
        layout: of the pixel shuffle.
    """

    def __init__(self, channels: int, width: int, s: int = 2, layout: Layout = "v2") -> None:
        super().__init__()
        wide = channels * s * s
        self.s, self.layout = s, layout
        self.norm: nn.Module = nn.LayerNorm(wide)
        self.layers = nn.Sequential(nn.Linear(wide, width), nn.GELU(), nn.Linear(width, width))

    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        """Tokens ``(B, N, C)`` to ``(B, N / s^2, width)``."""
        out: Tensor = self.layers(self.norm(pixel_shuffle(x, grid, self.s, self.layout)))
        return out


class SquaredReLU(nn.Module):
    """The square of what is positive."""

    def forward(self, x: Tensor) -> Tensor:
        return x.relu().square()


class NemotronConnector(FlashConnector):
    """The connector of Nemotron Nano V2 VL: pixel shuffle, RMSNorm, two linear layers without bias, squared ReLU.

    Args:
        channels: of the tower.
        width: of the language model.
        hidden: between the linear layers.
        s: side of a cell; 2 is its ratio of 0.5.
        layout: of the pixel shuffle.

    Source: Nemotron Nano V2 VL, 2025, as transformers has it (``nemotron_h_omni``).
    """

    def __init__(self, channels: int, width: int, hidden: int | None = None, s: int = 2, layout: Layout = "v2") -> None:
        super().__init__(channels, width, s, layout)
        wide, hidden = channels * s * s, hidden or width
        self.norm = nn.RMSNorm(wide, eps=1e-5)
        self.layers = nn.Sequential(
            nn.Linear(wide, hidden, bias=False), SquaredReLU(), nn.Linear(hidden, width, bias=False)
        )


def cells(grid: tuple[int, int], s: int, frames: int = 1, tubelet: int = 1) -> Tensor:
    """``(N,)`` int64 on the CPU: the cell of every token, numbered frame by frame, row by row.

    Args:
        grid: rows and columns of a frame.
        s: side of a cell; those at the edges may be smaller.
        frames: of a video.
        tubelet: frames of a cell.
    """
    high, wide = grid
    rows, columns = -(-high // s), -(-wide // s)
    t = torch.arange(frames).view(-1, 1, 1) // tubelet
    y = torch.arange(high).view(1, -1, 1) // s
    return ((t * rows + y) * columns + torch.arange(wide) // s).flatten()
