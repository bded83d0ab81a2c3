"""Tiles of a grid that are merged softly: two matrix products a tile, one to merge and its transpose to restore."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from tokred.core.reduction import Reduction
from tokred.kernels.dispatch import without_autocast
from tokred.kernels.similarity_rows import unit


class Tile(NamedTuple):
    """Tiles of one shape.

    Attributes:
        rows: ``(W, n)`` int64, the tokens of each of the ``W`` tiles.
        share: ``(B, W, d, n)`` float32: the part of each token that each of the tile's ``d`` slots gets; over the slots
            they sum to one.
        weight: ``(B, W, d, n)`` float32: the same with the parts of each slot summing to one.
    """

    rows: Tensor
    share: Tensor
    weight: Tensor


@dataclass(frozen=True, eq=False)
class TileReduction(Reduction):
    """A reduction in which every token of a tile has a part in every slot of it, the slots' own tokens too.

    :attr:`Reduction.representative` holds the token that each slot was chosen for, and :attr:`Reduction.target` the
    slot that gets most of a token: what drawings and counts see.

    Attributes:
        tiles: by their shape.
        order: ``(N,)`` int64, where each token stands when those of all tiles are written down one after the other.
    """

    composes: ClassVar[bool] = False
    tiles: tuple[Tile, ...] = ()
    order: Tensor | None = None

    @classmethod
    def make(cls, rows: list[Tensor], chosen: list[Tensor], share: list[Tensor], length: int) -> TileReduction:
        """A reduction from the tiles, the tokens chosen in each, and the share that each token hands to them.

        Args:
            rows: of every shape of tile, ``(W, n)`` int64.
            chosen: ``(B, W, d)`` int64, positions in the tile.
            share: ``(B, W, d, n)`` float32; columns sum to one. A slot that gets nothing is its own token.
            length: ``N``.
        """
        tiles, representative, source, target, before = [], [], [], [], 0
        for own, picks, part in zip(rows, chosen, share, strict=True):
            b, w, d, n = part.shape
            total = part.sum(-1, keepdim=True)
            alone = torch.zeros_like(part).scatter(-1, picks.unsqueeze(-1), 1)
            tiles.append(Tile(own, part, torch.where(total > 0, part / total, alone)))
            where = own.expand(b, -1, -1)
            representative.append(where.gather(-1, picks).flatten(1))
            first = torch.arange(w, device=own.device).unsqueeze(1) * d + before
            slot = part.argmax(2) + first
            taken = torch.zeros(b, w, n, dtype=torch.uint8, device=own.device).scatter(-1, picks, 1)
            others = taken.argsort(dim=-1, stable=True)[..., : n - d]
            source.append(where.gather(-1, others).flatten(1))
            target.append(slot.gather(-1, others).flatten(1))
            before += w * d
        order = torch.cat([own.flatten() for own in rows]).argsort()
        return cls(
            torch.cat(representative, 1),
            torch.cat(source, 1),
            torch.cat(target, 1),
            length,
            by_size=False,
            complete=True,
            tiles=tuple(tiles),
            order=order,
        )

    def merge(
        self, x: Tensor, size: Tensor | None = None, mode: str | None = None, *, slot_size: Tensor | None = None
    ) -> Tensor:
        """The weighted means of every tile: ``(B, N, C)`` to ``(B, M, C)`` of ``x``'s type; sizes play no part.

        Raises:
            ValueError: ``x`` does not fit, or a mode other than mean or keep is asked for.
        """
        if x.ndim != 3 or x.shape[1] != self.length or x.shape[0] != self.representative.shape[0]:
            raise ValueError(f"x must be {(*self.batch, self.length)} + (C,), got {tuple(x.shape)}")
        if mode == "keep":
            return self.gather(x)
        if mode not in (None, "mean"):
            raise ValueError(f"mode is {mode!r}; a reduction of tiles allows 'mean' and 'keep'")
        merged = []
        for tile in self.tiles:
            own = x.index_select(1, tile.rows.flatten()).view(len(x), *tile.rows.shape, -1)
            merged.append((tile.weight.to(x.dtype) @ own).flatten(1, 2))
        return torch.cat(merged, 1)

    def unmerge(self, y: Tensor, fill: Tensor | None = None) -> Tensor:
        """Full length again: each token gets its shares of the slots of its tile, ``(B, M, C)`` to ``(B, N, C)``.

        Raises:
            ValueError: ``y`` does not fit.
        """
        if y.ndim != 3 or y.shape[:2] != self.representative.shape:
            raise ValueError(f"y must be {(*self.batch, self.slots)} + (C,), got {tuple(y.shape)}")
        assert self.order is not None  # make() sets it
        restored, before = [], 0
        for tile in self.tiles:
            w, d = tile.share.shape[1:3]
            own = y[:, before : before + w * d].reshape(len(y), w, d, -1)
            restored.append((tile.share.to(y.dtype).mT @ own).flatten(1, 2))
            before += w * d
        return torch.cat(restored, 1).index_select(1, self.order)

    def join(self, frames: int) -> TileReduction:
        """The reduction of clips, from this one of their frames: ``frames`` samples in a row are a clip."""
        b, n = self.representative.shape[0] // frames, self.length
        first = torch.arange(frames, device=self.representative.device)
        tiles, parts = [], [list[Tensor](), list[Tensor](), list[Tensor]()]
        before = seen = other = 0
        for rows, share, weight in self.tiles:
            w, d, size = share.shape[1:]
            own = (rows + first.view(-1, 1, 1) * n).flatten(0, 1)
            shares = (t.reshape(b, frames * w, d, size) for t in (share, weight))
            tiles.append(Tile(own, *shares))
            spans = ((w * d, seen, n, 0), (w * (size - d), other, n, 0), (w * (size - d), other, w * d, before - seen))
            for part, index, (count, start, step, shift) in zip(
                parts, (self.representative, self.source, self.target), spans, strict=True
            ):
                found = index[:, start : start + count].reshape(b, frames, count) + shift
                part.append((found + first.unsqueeze(1) * step).flatten(1))
            seen, other, before = seen + w * d, other + w * (size - d), before + frames * w * d
        order = torch.cat([tile.rows.flatten() for tile in tiles]).argsort()
        representative, source, target = (torch.cat(part, 1) for part in parts)
        return replace(
            self,
            representative=representative,
            source=source,
            target=target,
            length=frames * n,
            tiles=tuple(tiles),
            order=order,
        )

    def to(self, device: torch.device | str) -> TileReduction:
        """The same reduction with its tensors on ``device``."""
        moved = super().to(device)
        assert isinstance(moved, TileReduction)
        tiles = tuple(Tile(*(t.to(device) for t in tile)) for tile in self.tiles)
        return replace(moved, tiles=tiles, order=None if self.order is None else self.order.to(device))


def tile_rows(grid: tuple[int, int], side: int, device: torch.device | str | None = None) -> list[Tensor]:
    """Tokens of the tiles of a grid stored row by row, ``(W, n)`` for each shape of tile; those at the edges are cut.

    Args:
        grid: rows and columns.
        side: rows and columns of a whole tile.
        device: where the positions are wanted.
    """
    found = []
    for top, high in _spans(grid[0], side):
        for left, wide in _spans(grid[1], side):
            y = torch.tensor(top, device=device).view(-1, 1, 1, 1) + torch.arange(high, device=device).view(-1, 1)
            x = torch.tensor(left, device=device).view(1, -1, 1, 1) + torch.arange(wide, device=device)
            found.append((y * grid[1] + x).flatten(2).flatten(0, 1))
    return found


def tile_sizes(grid: tuple[int, int], side: int) -> list[tuple[int, int]]:
    """How many tiles there are of each shape, and their tokens, as :func:`tile_rows` lists them."""
    spans = (_spans(grid[0], side), _spans(grid[1], side))
    return [(len(top) * len(left), high * wide) for top, high in spans[0] for left, wide in spans[1]]


def _spans(length: int, side: int) -> list[tuple[list[int], int]]:
    """Starts of whole tiles along one axis with their length, and of the cut one behind them."""
    whole = length // side * side
    spans = [(list(range(0, whole, side)), side)] if whole else []
    return spans + ([([whole], length - whole)] if length > whole else [])


def facility_location(similarity: Tensor, k: int) -> Tensor:
    """The ``k`` rows that stand for all rows best, chosen greedily: ``(..., k)`` int64 in the order of the choice.

    Each choice adds the row that raises the sum over all rows of their similarity to the nearest chosen one most; the
    sum comes within ``1 - 1/e`` of the best possible. Equal gains go to the lower index. Similarities count in steps of
    1/4096: two rows that are each other's nearest gain the same, and sums of such steps are exact, so that rounding
    does not choose between them.

    Args:
        similarity: ``(..., n, n)`` symmetric, at least -1; ``n`` up to 2,048.
        k: how many, at most ``n``.
    """
    similarity = (torch.maximum(similarity, similarity.mT) * 4096).round() / 4096
    covered = torch.full(similarity.shape[:-1], -1.0, dtype=similarity.dtype, device=similarity.device)
    taken = torch.zeros_like(covered)
    picks = []
    for _ in range(k):
        gain = torch.maximum(similarity, covered.unsqueeze(-2)).sum(-1) - covered.sum(-1, keepdim=True) - taken
        pick = gain.argmax(-1, keepdim=True)
        picks.append(pick)
        taken = taken.scatter(-1, pick, torch.inf)
        rows = similarity.gather(-2, pick.unsqueeze(-1).expand(*pick.shape, similarity.shape[-1])).squeeze(-2)
        covered = torch.maximum(covered, rows)
    return torch.cat(picks, -1)


def soft_shares(similarity: Tensor, chosen: Tensor, tau: float) -> Tensor:
    """The share of each row that goes to each chosen one: ``(..., k, n)`` float, columns sum to one.

    Args:
        similarity: ``(..., n, n)``.
        chosen: ``(..., k)`` int64.
        tau: temperature of the softmax over the chosen; 0: all to the most similar, the first of equals.
    """
    rows = similarity.gather(-2, chosen.unsqueeze(-1).expand(*chosen.shape, similarity.shape[-1]))
    if tau == 0:
        return torch.zeros_like(rows).scatter(-2, rows.argmax(-2, keepdim=True), 1)
    return (rows / tau).softmax(-2)


def tile_similarity(x: Tensor, rows: Tensor) -> Tensor:
    """Cosines of the tokens of each tile: ``(B, W, n, n)`` float32, of ``x`` ``(B, N, C)`` and ``rows`` ``(W, n)``."""
    own = unit(x.index_select(1, rows.flatten())).view(len(x), *rows.shape, -1)
    with without_autocast(x):
        found: Tensor = own @ own.mT
    return found
