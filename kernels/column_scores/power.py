"""Column scores whose weights are the scores before, again and again: ``s <- A^T s`` for every head's attention ``A``.

On the CPU the weights of a few heads are made once, in a buffer that stays in the cache, and read by all rounds.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from tokred.kernels.column_scores.blocked import (
    _BLOCK_ELEMENTS,
    _Block,
    _inputs,
    _ranges,
    _weights,
    column_scores_blocked,
)
from tokred.kernels.column_scores.reference import Options, weights_reference

# A matrix of weights larger than this (16 MiB of float32) is made again in every round, in blocks.
_HEAD_ELEMENTS = 1 << 22


def iterate(vote: Callable[[Tensor], Tensor], s: Tensor, rounds: int, tolerance: float, *, look: bool) -> Tensor:
    """``s <- vote(s)``; what a round changed by less than ``tolerance``, summed over the last dimension, is settled and
    stays. With ``look`` no round is run once all is settled, which waits for a device."""
    settled: Tensor | None = None
    for step in range(rounds):
        voted = vote(s)
        if tolerance <= 0:
            s = voted
            continue
        still = (voted - s).abs().sum(-1, keepdim=True) < tolerance
        s = voted if settled is None else torch.where(settled, s, voted)
        settled = still if settled is None else settled | still
        if look and step + 1 < rounds and bool(settled.all()):
            break
    return s


def column_power_reference(
    q: Tensor, k: Tensor, s: Tensor, rounds: int, tolerance: float, bias: Tensor | None, key_mask: Tensor | None,
    options: Options,
) -> Tensor:  # fmt: skip
    """The definition, with the whole matrix of weights in memory; ``s`` is ``[B, H, N]``."""
    p = weights_reference(q, k, None, bias, key_mask, options)
    return iterate(lambda s: (s.unsqueeze(-2) @ p).squeeze(-2), s, rounds, tolerance, look=False)


@torch.no_grad()
def column_power_blocked(
    q: Tensor, k: Tensor, s: Tensor, rounds: int, tolerance: float, bias: Tensor | None, key_mask: Tensor | None,
    options: Options,
) -> Tensor:  # fmt: skip
    """The result of ``column_power_reference``, with the matrices of a few heads in memory at a time."""
    (b, h, _, _), (_, hk, n, _) = q.shape, k.shape
    g = h // hk
    look = q.device.type == "cpu"
    if g * n * n > _HEAD_ELEMENTS:
        return iterate(
            lambda s: column_scores_blocked(q, k, s, None, bias, key_mask, options), s, rounds, tolerance, look=look
        )
    x, _, _ = _inputs(q, k, None, None, bias, key_mask, options)
    samples = min(b, max(1, _BLOCK_ELEMENTS // max(h * n * n, 1)))
    heads = min(hk, max(1, _BLOCK_ELEMENTS // max(g * n * n, 1)))
    buffer = torch.empty(samples * heads * g * n * n, dtype=s.dtype, device=q.device)
    out = torch.empty(b, h, n, dtype=s.dtype, device=q.device)
    for sample in _ranges(b, samples):
        for head in _ranges(hk, heads):
            p, alive = _weights(x, _Block(sample, head, slice(0, n), slice(0, n)), buffer)
            if alive is not None:
                p.mul_(alive[..., None])
            at = (sample, slice(head.start * g, head.stop * g))
            out[at] = _rounds(p, s[at], rounds, tolerance, look)
    return out


def _rounds(p: Tensor, s: Tensor, rounds: int, tolerance: float, look: bool) -> Tensor:
    return iterate(lambda s: (s.unsqueeze(-2) @ p).squeeze(-2), s, rounds, tolerance, look=look)
