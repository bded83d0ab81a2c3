"""Denoisers that rotate queries and keys inside the attention: tables at the rows that are left, and Flux's grid."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor

from tokred.adapters.contract import words
from tokred.adapters.diffusion.flight import Plan
from tokred.adapters.diffusion.session import EnterDenoiser, Session
from tokred.adapters.passes import outliving
from tokred.core.reduction import Reduction
from tokred.errors import UnsupportedModelError


class OwnRows:
    """A table of rotations with rows of each sample's own, where hosts expect one table for the whole batch.

    They give theirs a batch dimension by ``table[None, ...]``; here it has one already.

    Args:
        rows: ``(B, L, D)``.
    """

    def __init__(self, rows: Tensor) -> None:
        self.rows = rows

    def __getitem__(self, index: Any) -> Tensor:
        if not isinstance(index, tuple) or index[0] is not None:
            raise UnsupportedModelError(
                "the attention's processor does not use its rotary table as those of diffusers do, so samples cannot "
                "have tokens of their own: set the host's own processor, or call tokred.remove(model) first"
            )
        return self.rows[(slice(None), *index[1:])]


def table_of(given: Any) -> Any:
    """The rotary table among the arguments of a call, or None."""
    return given(words.TURNS)


def at_rows(table: Any, reduction: Reduction) -> Any:
    """A table of rotations at the tokens that are left: the destination stands for its sources, with its own rotation.

    Args:
        table: ``(N, D)``; with the text's rows first ``(T + N, D)``; or ``(1, N, 1, D)``. A tuple: each of them.
        reduction: batch ``(B,)``. All samples with the same rows (stride 0) keep a table for the whole batch.
    """
    if isinstance(table, tuple):
        return tuple(at_rows(part, reduction) for part in table)
    rows, batched = reduction.representative, table.ndim == 4
    shared = rows.shape[0] == 1 or rows.stride(0) == 0
    flat = table[0, :, 0] if batched else table
    before = flat.shape[0] - reduction.length
    index = rows[:1] if shared else rows
    if before:
        text = torch.arange(before, device=rows.device).expand(index.shape[0], -1)
        index = torch.cat([text, index + before], 1)
    index = index.to(flat.device)
    picked = flat.index_select(0, index.reshape(-1)).view(*index.shape, flat.shape[-1])
    if batched:
        return picked.unsqueeze(2)
    return picked[0] if shared else OwnRows(picked)


def for_plan(table: Any, plan: Plan) -> Any:
    """:func:`at_rows`, once for all blocks that share a plan and a table."""
    seen = plan.__dict__.get("rotated")
    if seen is None or seen[0] is not table:
        with outliving():
            seen = plan.__dict__["rotated"] = (table, at_rows(table, plan.reduction))
    return seen[1]


class EnterPacked(EnterDenoiser):
    """Before the forward of a denoiser whose sample is a sequence: its grid is read from the ids of its places."""

    def __init__(self, session: Session, names: tuple[str, ...], sample: str) -> None:
        super().__init__(session, names, sample)
        self._seen: tuple[Any, int, tuple[int, int]] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_seen": None}

    def __call__(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = {**dict(zip(self.names, args, strict=False)), **kwargs}
        size = self.session.fixed or self._size(words.PLACES.at(given), given[self.sample].shape[1])
        self.session.begin(size, words.TIMESTEP.of(given), sample=given[self.sample])

    def _size(self, ids: Tensor, length: int) -> tuple[int, int]:
        """Rows and columns of the image. Reading ids waits for the device, once a tensor; pipelines make one each."""
        version = 0 if ids.is_inference() else ids._version
        if self._seen is not None and self._seen[0]() is ids and self._seen[1] == version:
            return self._seen[2]
        size = grid_of(ids[0] if ids.ndim == 3 else ids)
        if size is None or size[0] * size[1] != length:
            raise UnsupportedModelError(
                f"{length} tokens stand on {_places(ids)}: several images in one sequence (as Kontext has "
                "reference images) cannot be reduced; call tokred.remove(model) first"
            )
        self._seen = (weakref.ref(ids), version, size)
        return size


def grid_of(ids: Tensor) -> tuple[int, int] | None:
    """Rows and columns of the one image whose tokens have these ids, row by row, wherever it begins; None: no such one.

    Args:
        ids: ``(N, 3)``: number of the image, row and column of each token.
    """
    ids = ids.detach().to("cpu", torch.float64)
    if not len(ids):
        return None
    places = ids - ids[0]
    rows, columns = (int(side) + 1 for side in places[:, 1:3].amax(0).tolist())
    if rows * columns != len(ids):
        return None
    y, x = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    expected = torch.stack([torch.zeros(rows * columns), y.flatten(), x.flatten()], 1)
    return (rows, columns) if torch.equal(places, expected.to(places)) else None


def _places(ids: Tensor) -> str:
    """A description of the places where tokens stand, for a message."""
    places = (ids[0] if ids.ndim == 3 else ids).detach().to("cpu", torch.float64)
    if not len(places):
        return "no places"
    rows, columns = (places[:, 1:3].amax(0) - places[:, 1:3].amin(0) + 1).to(torch.int64).tolist()
    images = len(set(places[:, 0].tolist()))
    return f"a grid of {rows} x {columns} places" + (f" of {images} images" if images > 1 else ", not row by row")
