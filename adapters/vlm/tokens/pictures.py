"""Visual tokens of a forward by the picture that they belong to: which one, where in it, and in which of its frames."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tokred.adapters.vlm.layout import Picture, places_in
from tokred.adapters.vlm.sites import Shown, shown
from tokred.errors import MissingInputError
from tokred.vlm.frames import moments

if TYPE_CHECKING:
    from tokred.adapters.vlm.forward import Forward


def images_in(forward: Forward) -> Tensor:
    """``(B, L)`` int64: which image of its sample each visual token belongs to.

    Raises:
        MissingInputError: that is not known, since the features were not made by the patched model.
    """
    if _unknown(forward):
        raise MissingInputError(
            "which image a visual token belongs to is not known, since the features were not made by the "
            "patched model: give pixel_values"
        )
    found = torch.zeros(forward.batch, forward.length, dtype=torch.long, device=forward.device)
    for one, where in _pictures(forward):
        found[where] = one.image
    return found


def places_of(forward: Forward) -> Tensor | None:
    """``(B, L, 2)`` float32: row and column of each visual token in its image, in [0, 1]; None: not known."""
    if _unknown(forward):
        return None
    found = torch.zeros(forward.batch, forward.length, 2, device=forward.device)
    for one, where in _pictures(forward):
        place = places_in(one.picture, forward.device)
        if place is None:
            return None
        found[where] = place
    return found


def moments_of(forward: Forward) -> Tensor:
    """``(B, L, 2)`` int64: which frame of its clip each visual token is of, and which token of that frame; those of
    images, and tokens that are of no frame, such as newlines, are of frame 0, each another token of it."""
    found = torch.zeros(forward.batch, forward.length, 2, dtype=torch.long, device=forward.device)
    for one, where in _pictures(forward):
        found[where] = _moments(one.picture, forward.device)
    return found


def _pictures(forward: Forward) -> Iterator[tuple[Shown, tuple[Tensor, Tensor]]]:
    """Every picture whose features are known, with sample and column ``(tokens,)`` of each of its tokens."""
    for modality in forward.call.modalities:
        rows, columns = modality.visual.nonzero().unbind(1)
        for one in shown(modality):
            some = slice(one.first, one.first + one.picture.tokens)
            yield one, (rows[some], columns[some])


def _moments(picture: Picture, device: torch.device) -> Tensor:
    """``(tokens, 2)`` int64 of one picture."""
    found = torch.zeros(picture.tokens, 2, dtype=torch.long, device=device)
    # Tokens of no frame may stand between the frames: numbers that no place of a frame has.
    found[:, 1] = picture.tokens + torch.arange(picture.tokens, device=device)
    for part in picture.parts:
        if part.frames is not None:
            found[part.where.offsets(device)] = moments(part.count, part.count // part.frames, device)
    return found


def _unknown(forward: Forward) -> bool:
    """True where there are tokens of features that were not made by the patched model."""
    return any(modality.record is None and any(modality.counts) for modality in forward.call.modalities)


def gathered_rows(rows: dict[str, Tensor], columns: Tensor) -> dict[str, Tensor]:
    """State ``(B, L)`` of some columns."""
    return {name: state.gather(1, columns) for name, state in rows.items()}
