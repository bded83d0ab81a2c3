"""Calibration of attention to visual tokens: what rotary embeddings take from far keys, and merging from large ones."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Turns(NamedTuple):
    """The rotary embedding of a language model, as far as distances go.

    Attributes:
        angles: ``(J,)`` float32, the turn of each pair of channels from one position to the next.
        axis: ``(J,)`` int64, which axis of the positions turns it; all 0 where there is one.
        pairs: pairs of channels of a head, those that do not turn included.
    """

    angles: Tensor
    axis: Tensor
    pairs: int


def nearness(far: Tensor, turns: Turns) -> Tensor:
    """``D``: the mean cosine of a head's pairs, turned by a distance; 1 at none, and falling.

    Args:
        far: ``(A, ...)`` int64 distances along each axis, not negative.
        turns: of the model.

    Returns:
        ``(...)`` float32. Pairs that do not turn count as 1.
    """
    angles, axis = turns.angles.to(far.device, torch.float64), turns.axis.to(far.device)
    total = torch.full(far.shape[1:], float(turns.pairs - len(angles)), device=far.device)
    for a, distance in enumerate(far):
        own = angles[axis == a]
        if len(own) and distance.numel():
            # A step asks of fewer distances than lie between them; a prompt asks of each many times.
            most = int(distance.max()) + 1
            few = distance.numel() < most
            steps = distance.double() if few else torch.arange(most, device=far.device, dtype=torch.float64)
            summed = torch.cos(steps.unsqueeze(-1) * own).sum(-1).float()
            total += summed if few else summed[distance]
    return total / turns.pairs


def calibration_bias(far: Tensor, sizes: Tensor, turns: Turns, c: float = 2.0) -> Tensor:
    """``log(s (c - D))``: what is added to the logits of visual keys; 0 where ``sizes`` is.

    Args:
        far: ``(A, B, Q, K)`` int64 distances of queries and keys.
        sizes: ``(B, K)`` float32, tokens that each key stands for; 0: not visual.
        turns: of the model.
        c: offset, more than 1.

    Returns:
        ``(B, Q, K)`` float32.
    """
    factor = sizes.unsqueeze(1) * (c - nearness(far, turns))
    return torch.where(sizes.unsqueeze(1) > 0, factor, 1.0).log()
