"""Visual tokens of a forward by the picture that they belong to: which one, where in it, and in which of its frames."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tokred.adapters.vlm.layout import Picture, places_in
from tokred.adapters.vlm.sites import shown
from tokred.adapters.vlm.taps import Modality
from tokred.errors import MissingInputError

if TYPE_CHECKING:
    from tokred.adapters.vlm.forward import Forward


def images_in(forward: Forward) -> Tensor:
    """``(B, L)`` int64: which image of its sample each visual token belongs to.

    Raises:
        MissingInputError: that is not known, since the features were not made by the patched model.
    """
    found = torch.zeros(forward.batch, forward.length, dtype=torch.long, device=forward.device)
    for modality in forward.call.modalities:
        if _unknown(modality):
            raise MissingInputError(
                "which image a visual token belongs to is not known, since the features were not made by the "
                "patched model: give pixel_values"
            )
        rows, columns = modality.visual.nonzero().unbind(1)
        for one in shown(modality):
            some = slice(one.first, one.first + one.picture.tokens)
            found[rows[some], columns[some]] = one.image
    return found


def places_of(forward: Forward) -> Tensor | None:
    """``(B, L, 2)`` float32: row and column of each visual token in its image, in [0, 1]; None: not known."""
    found = torch.zeros(forward.batch, forward.length, 2, device=forward.device)
    for modality in forward.call.modalities:
        rows, columns = modality.visual.nonzero().unbind(1)
        for one in shown(modality):
            place = places_in(one.picture, forward.device)
            if place is None:
                return None
            some = slice(one.first, one.first + one.picture.tokens)
            found[rows[some], columns[some]] = place
        if _unknown(modality):
            return None
    return found


def moments_of(forward: Forward) -> Tensor:
    """``(B, L, 2)`` int64: which frame of its clip each visual token is of, and which token of that frame; those of
    images, and tokens that are of no frame, such as newlines, are of frame 0, each another token of it."""
    found = torch.zeros(forward.batch, forward.length, 2, dtype=torch.long, device=forward.device)
    for modality in forward.call.modalities:
        rows, columns = modality.visual.nonzero().unbind(1)
        for one in shown(modality):
            some = slice(one.first, one.first + one.picture.tokens)
            found[rows[some], columns[some]] = _moments(one.picture, forward.device)
    return found


def _moments(picture: Picture, device: torch.device) -> Tensor:
    """``(tokens, 2)`` int64 of one picture."""
    found = torch.zeros(picture.tokens, 2, dtype=torch.long, device=device)
    # Tokens of no frame may stand between the frames: numbers that no place of a frame has.
    found[:, 1] = picture.tokens + torch.arange(picture.tokens, device=device)
    for part in picture.parts:
        if part.frames is not None:
            cells = part.count // part.frames
            place = torch.arange(part.count, device=device)
            found[part.where.offsets(device)] = torch.stack([place // cells, place % cells], 1)
    return found


def _unknown(modality: Modality) -> bool:
    """True where there are tokens of features that were not made by the patched model."""
    return modality.record is None and any(modality.counts)


def gathered_rows(rows: dict[str, Tensor], columns: Tensor) -> dict[str, Tensor]:
    """State ``(B, L)`` of some columns."""
    return {name: state.gather(1, columns) for name, state in rows.items()}


def at_columns(values: Tensor, columns: Tensor) -> Tensor:
    """``(B, M, 2)`` of ``(B, L, 2)``."""
    return values.gather(1, columns.unsqueeze(-1).expand(-1, -1, 2))
