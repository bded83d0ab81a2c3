"""How the rows of a packed forward stand: which row is which patch of which frame, and what may attend to what.

Towers of this kind take patches in an order of their own: cells of 2 x 2 that will be joined stand together, and cells
of one window too. Methods see frames of one size as a batch, patches in reading order; rows that are left go back in
the tower's order, so that cells, windows and frames stay together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from tokred.adapters.encoder.sides import Sides
from tokred.adapters.encoder.state import TokenState
from tokred.core.reduction import Reduction


class Folding(NamedTuple):
    """The order in which a tower takes the patches of a frame.

    Attributes:
        cell: patches of a side that stand together, 1: reading order.
        window: cells of a side of a window, whose cells stand together; 0: there are no windows.
        joint: whether all frames of a clip see each other.
    """

    cell: int
    window: int = 0
    joint: bool = False

    def order(self, rows: int, columns: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Where each patch of a frame, in reading order, stands among its rows, and the window of each row.

        Args:
            rows, columns: patches of the frame; multiples of ``cell``.
            device: of the answer.

        Returns:
            ``(rows * columns,)`` int64 twice.
        """
        cell, high, wide = self.cell, rows // self.cell, columns // self.cell
        number = torch.arange(high * wide, device=device)
        if self.window:
            across = -(-wide // self.window)
            window = number // wide // self.window * across + number % wide // self.window
            taken = torch.argsort(window, stable=True)
        else:
            window, taken = torch.zeros_like(number), number
        place = torch.empty_like(taken).scatter_(0, taken, number)
        i = torch.arange(rows, device=device).unsqueeze(1)
        j = torch.arange(columns, device=device)
        inside = i % cell * cell + j % cell
        at = place[i // cell * wide + j // cell] * cell * cell + inside
        return at.flatten(), window[taken].repeat_interleave(cell * cell)


class Group(NamedTuple):
    """Frames (or clips) of one size: a batch of sequences.

    Attributes:
        sides: how their patches stand.
        rows: ``(G, N)`` int64, the row of each patch, in reading order.
    """

    sides: Sides
    rows: Tensor


@dataclass(frozen=True, eq=False)
class Layout:
    """The rows of one forward.

    Attributes:
        groups: all frames (or clips), those of one size together.
        frames: ``(S,)`` int64, the frame of each row.
        windows: ``(S,)`` int64, the window of each row; None: there are no windows.
        cell: patches of a side of a cell.
    """

    groups: tuple[Group, ...]
    frames: Tensor
    windows: Tensor | None
    cell: int

    @property
    def length(self) -> int:
        """``S``, the rows of all frames."""
        return self.frames.shape[0]

    @classmethod
    def of(
        cls,
        grids: Sequence[tuple[int, int, int]],
        folding: Folding,
        device: torch.device,
        *,
        clips: bool = False,
        pixels: Tensor | None = None,
    ) -> Layout:
        """The layout of images and clips, one after another.

        Args:
            grids: frames, rows and columns of patches of each.
            folding: the tower's order.
            device: of the tensors.
            clips: the frames of a clip are one sequence, not a sequence each.
            pixels: ``(S, F)`` as the tower is given them, before it orders its windows; None: nobody asks.
        """
        # Frames of one size have one order, which is worked out once.
        orders: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}
        found: dict[tuple[int, int, int], list[tuple[Tensor, Tensor]]] = {}
        clips = clips or folding.joint
        frames, windows, first, frame, before = [], [], 0, 0, 0
        for count, rows, columns in grids:
            order, window = orders.setdefault((rows, columns), folding.order(rows, columns, device))
            area, most = rows * columns, int(window.max()) + 1
            step = torch.arange(count, device=device)
            start, wide = (first + step * area).unsqueeze(1), (1, -1) if clips else (count, -1)
            given = order if pixels is None else folding._replace(window=0).order(rows, columns, device)[0]
            own = (order + start).view(wide), (given + start).view(wide)
            found.setdefault((count if clips else 1, rows, columns), []).append(own)
            frames.append((frame + step * (not folding.joint)).repeat_interleave(area))
            windows.append((window + (before + step * most).unsqueeze(1)).flatten())
            first, frame, before = first + count * area, frame + count, before + count * most
        groups = []
        for (count, rows, columns), places in found.items():
            at = torch.cat([one[0] for one in places])
            seen = None if pixels is None else pixels[torch.cat([one[1] for one in places])]
            groups.append(Group(Sides(count if count > 1 else None, rows, columns, pixels=seen), at))
        return cls(tuple(groups), torch.cat(frames), torch.cat(windows) if folding.window else None, folding.cell)

    def lean(self) -> Layout:
        """The layout without pixels, which are asked for before the first block alone."""
        groups = tuple(g._replace(sides=g.sides._replace(pixels=None)) for g in self.groups)
        return Layout(groups, self.frames, self.windows, self.cell)

    def ends(self, kept: Tensor | None, windowed: bool) -> Tensor:
        """``(segments + 1,)`` int32: where each frame, or window, ends among the rows that are left; those that have
        lost all their rows are no segments.

        Args:
            kept: ``(M,)`` int64 rows that are left, ascending; None: all.
            windowed: of windows.
        """
        of = self.windows if windowed else self.frames
        assert of is not None  # asked for by blocks with windows alone
        counts = torch.unique_consecutive(of if kept is None else of[kept], return_counts=True)[1]
        return torch.nn.functional.pad(counts.cumsum(0), (1, 0)).int()


@dataclass(frozen=True, eq=False)
class PackedState(TokenState):
    """State of all rows between two blocks. ``steps`` are over the rows in the tower's order, as one sample.

    Attributes:
        layout: how the rows stood before the first block.
        parts: the state of each group.
        kept: ``(M,)`` int64 rows that are left, ascending; None: all.
        places: for each group ``(G, M')``, where its slots stand among the rows that are left.
        source: ``(M,)`` the slot that each row is, of the slots of all groups one after another.
        pairs: keys that all queries together see in this block, as it ran and unpatched; None: not known.
    """

    layout: Layout = None  # type: ignore[assignment]
    parts: tuple[TokenState, ...] = ()
    kept: Tensor | None = None
    places: tuple[Tensor, ...] = ()
    source: Tensor | None = None
    pairs: tuple[Tensor, Tensor] | None = None

    @classmethod
    def begin(cls, layout: Layout) -> PackedState:
        """The state before the first block."""
        return cls.settled(layout, tuple(TokenState(g.rows.shape[1], sides=g.sides) for g in layout.groups))

    @classmethod
    def settled(cls, layout: Layout, parts: tuple[TokenState, ...]) -> PackedState:
        """The state of these parts: their rows in the tower's order."""
        rows = [
            g.rows if p.representative is None else g.rows.gather(1, p.representative)
            for g, p in zip(layout.groups, parts, strict=True)
        ]
        flat = torch.cat([r.flatten() for r in rows])
        real = None
        if any(p.mask is not None for p in parts):
            masks = [
                torch.ones_like(r, dtype=torch.bool) if p.mask is None else p.mask
                for r, p in zip(rows, parts, strict=True)
            ]
            real = torch.cat([m.flatten() for m in masks]).nonzero().view(-1)
        order = torch.argsort(flat if real is None else flat[real])
        source = order if real is None else real[order]
        # Padding stands at some row, whose values nobody reads there.
        place = torch.zeros_like(flat).scatter_(0, source, torch.arange(len(source), device=flat.device))
        places = tuple(
            p.view(r.shape) for p, r in zip(torch.split(place, [r.numel() for r in rows]), rows, strict=True)
        )
        moved = any(p.representative is not None for p in parts)
        kept, size = (flat[source] if moved else None), None
        if any(p.size is not None for p in parts):
            sizes = [
                torch.ones(r.shape, device=r.device) if p.size is None else p.size
                for r, p in zip(rows, parts, strict=True)
            ]
            size = torch.cat([s.flatten() for s in sizes])[source].unsqueeze(0)
        steps = (_whole(layout, parts, places, len(source)),) if moved else ()
        return cls(
            layout.length, size, None if kept is None else kept.unsqueeze(0), steps, layout=layout, parts=parts,
            kept=kept, places=places, source=source,
        )  # fmt: skip

    def unpack(self, rows: Tensor) -> list[Tensor]:
        """``(M, ...)`` the rows that are left, to ``(G, M', ...)`` of each group."""
        return [rows.index_select(0, p.flatten()).view(*p.shape, *rows.shape[1:]) for p in self.places]

    def pack(self, parts: Sequence[Tensor]) -> Tensor:
        """``(M, ...)`` the inverse of :meth:`unpack`."""
        assert self.source is not None  # settled
        return torch.cat([p.flatten(0, 1) for p in parts]).index_select(0, self.source)

    def restore(self, y: Tensor) -> Tensor:
        """``(M, C)`` back to ``(S, C)``. A dropped row takes its last features before it was dropped."""
        full = [part.restore(one) for part, one in zip(self.parts, self.unpack(y), strict=True)]
        return PackedState.begin(self.layout).pack(full)

    def shorten(self, x: Tensor) -> Tensor:
        """``(S, C)`` to the rows of this state: the inverse of :meth:`restore`."""
        return x if self.kept is None else x.index_select(0, self.kept)


def _whole(layout: Layout, parts: Sequence[TokenState], places: Sequence[Tensor], slots: int) -> Reduction:
    """All steps of all parts as one reduction of the rows in the tower's order."""
    index = torch.full((layout.length,), -1, device=layout.frames.device)
    for group, part, place in zip(layout.groups, parts, places, strict=True):
        total = part.composed()
        slot = place if total is None else torch.where(total.index < 0, -1, place.gather(1, total.index.clamp(min=0)))
        index.scatter_(0, group.rows.flatten(), slot.flatten())
    return Reduction.from_index(index.unsqueeze(0), slots, sure=True)
