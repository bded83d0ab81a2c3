"""Denoisers that rotate queries and keys inside the attention (Flux): tables at the rows left, and the grid."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from tokred.adapters.diffusion.session import EnterDenoiser, Plan, Session
from tokred.errors import UnsupportedModelError

TABLE = "image_rotary_emb"


def attend(
    forward: Callable[..., Any], module: nn.Module, plan: Plan, x: Tensor, text: int, args: Any, rest: dict[str, Any]
) -> Any:
    """An attention of text and image with the image's tokens reduced.

    Tokens at different places are never averaged: the destination stands for its sources, with its own rotation.

    Args:
        forward: the host's, without its module.
        module: the attention.
        plan: for the tokens of the image.
        x: ``(B, N, C)`` the image; or, where ``text`` stands in the same tensor, ``(B, T + N, C)``, text first.
        text: ``T`` of the tokens of text in ``x``.
        args: the other positional arguments.
        rest: the other keyword arguments, with the table ``(T + N, D)`` for text and image.
    """
    rows = plan.reduction.representative
    if rows.shape[0] == 1 or rows.stride(0) == 0:
        return _restored(plan, text, forward(module, _short(plan, x, text), *args, **_at(rest, rows[0], x, text)))
    # Hosts take one table for the whole batch, and each sample has rows of its own.
    parts = []
    for i in range(len(rows)):
        short = torch.cat([x[i : i + 1, :text], x[i : i + 1, text:].index_select(1, rows[i])], 1)
        own = {k: _sample(v, i, len(rows)) for k, v in rest.items()}
        others = (_sample(v, i, len(rows)) for v in args)
        parts.append(forward(module, short, *others, **_at(own, rows[i], x, text)))
    if isinstance(parts[0], tuple):
        return _restored(plan, text, tuple(torch.cat(found) for found in zip(*parts, strict=True)))
    return _restored(plan, text, torch.cat(parts))


def _short(plan: Plan, x: Tensor, text: int) -> Tensor:
    image = plan.reduction.gather(x[:, text:])
    return torch.cat([x[:, :text], image], 1) if text else image


def _sample(value: Any, i: int, batch: int) -> Any:
    """What belongs to one sample of a batch; tables of all samples as they are."""
    if isinstance(value, list | tuple):
        return type(value)(_sample(v, i, batch) for v in value)
    whole = isinstance(value, Tensor) and value.ndim >= 3 and value.shape[0] == batch
    return value[i : i + 1] if whole else value


def _at(rest: dict[str, Any], rows: Tensor, x: Tensor, text: int) -> dict[str, Any]:
    """The arguments with the table at the rows that are left; all of the text's."""
    n = x.shape[1] - text

    def pick(table: Tensor) -> Tensor:
        before = table.shape[0] - n
        return torch.cat([table[:before], table[before:].index_select(0, rows)])

    table = rest[TABLE]
    return {**rest, TABLE: tuple(pick(t) for t in table) if isinstance(table, tuple) else pick(table)}


def _restored(plan: Plan, text: int, y: Any) -> Any:
    """The image at full length again; in a tuple of results the second is the text."""
    if isinstance(y, tuple):
        return tuple(part if i == 1 else plan.restore(part) for i, part in enumerate(y))
    return torch.cat([y[:, :text], plan.restore(y[:, text:])], 1) if text else plan.restore(y)


class EnterPacked(EnterDenoiser):
    """Before the forward of a denoiser whose sample is a sequence: its grid is read from the ids of its places."""

    def __init__(self, session: Session, names: tuple[str, ...], sample: str) -> None:
        super().__init__(session, names, sample)
        self._seen: tuple[Any, tuple[int, int]] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_seen": None}

    def __call__(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = {**dict(zip(self.names, args, strict=False)), **kwargs}
        size = self.session.fixed or self._size(given["img_ids"], given[self.sample].shape[1])
        self.session.begin(size, given.get("timestep"))

    def _size(self, ids: Tensor, length: int) -> tuple[int, int]:
        """Waits for the device, once for each tensor of ids; pipelines make one for an image."""
        if self._seen is not None and self._seen[0]() is ids:
            return self._seen[1]
        places = ids[0] if ids.ndim == 3 else ids
        rows, columns = (int(side) + 1 for side in places[:, 1:3].amax(0).tolist())
        if rows * columns != length:
            raise UnsupportedModelError(
                f"{length} tokens stand on a grid of {rows} x {columns} places: several images in one sequence cannot "
                "be reduced; call tokred.remove(model) first"
            )
        self._seen = (weakref.ref(ids), (rows, columns))
        return rows, columns
