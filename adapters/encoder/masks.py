"""Masks that hosts hand to their blocks: which tokens they hide from every query, or that they hide pairs."""

from __future__ import annotations

import torch
from torch import Tensor

from tokred.errors import UnsupportedModelError

PAIRS = (
    "{name} hides pairs of tokens from each other, which tokens that stand for several others could not keep apart: "
    "give a mask that hides the same tokens from all (as [B, 1, 1, N], or [B, N] where the model makes that of it), or "
    "call tokred.remove(model) first"
)
PADDED = (
    "the batch holds padded tokens (a mask hides some of them), which would be merged with real ones: give "
    "inputs of one size without padding, or call tokred.remove(model) first"
)
# A logit this low is a probability of zero, whatever the host fills its masks with; no learned bias comes near it.
_HIDDEN = -1e3


def seen(mask: Tensor) -> Tensor:
    """Where a mask lets attention through: a boolean one where it is True, one that is added to logits where it is not
    far below zero."""
    return mask if mask.dtype == torch.bool else mask > _HIDDEN


def visible(open_: Tensor, batch: int, name: str) -> Tensor:
    """``(batch, N)`` bool: the tokens that the others see.

    Args:
        open_: ``(..., M, N)`` bool, where the mask lets attention through, up to four dimensions.
        batch: number of samples.
        name: of the argument, for the message.

    Raises:
        UnsupportedModelError: not all queries see the same tokens (in a compiled graph, a RuntimeError with the same
            text). Those that nobody sees may see anything: their answers are read by none.
    """
    while open_.ndim < 4:
        open_ = open_.unsqueeze(0)
    rows, n = open_.shape[-2:]
    if open_.shape[1] == 1 and (rows == 1 or open_.stride(-2) == 0):
        return open_[:, 0, 0].expand(batch, -1)
    others = open_
    if rows == n:  # a hidden token may see itself, so that it sees something
        others = open_ & ~torch.eye(n, dtype=torch.bool, device=open_.device)
    real = others.flatten(1, 2).any(1)
    unread = ~real[:, None, :, None] if rows == n else torch.zeros_like(open_[..., :1])
    require((open_ == real[:, None, None, :]) | unread, PAIRS.format(name=name))
    return real.expand(batch, -1)


def require(holds: Tensor, message: str) -> None:
    """Raise where something does not hold.

    Raises:
        UnsupportedModelError: with this message (in a compiled graph, a RuntimeError with the same text).
    """
    if torch.compiler.is_compiling():
        torch._assert_async(holds.all(), message)
    elif not bool(holds.all()):
        raise UnsupportedModelError(message)


def refuse_padding(mask: Tensor | None = None) -> None:
    """Raise for a batch whose mask hides some tokens; a boolean mask that hides none is let through.

    Raises:
        UnsupportedModelError: some tokens are padding (in a compiled graph, a RuntimeError with the same text).
    """
    if mask is not None and torch.compiler.is_compiling():
        torch._assert_async(mask.all(), PADDED)
    elif mask is None or not bool(mask.all()):
        raise UnsupportedModelError(PADDED)
