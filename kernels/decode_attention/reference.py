"""Attention of one query over a cache with heads of different lengths, in plain torch: the definition.

Traceable and differentiable; no tensor's value is read on the host. Weights and log-sum-exp are kept in float32, or
float64 for float64 inputs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tokred.kernels.column_scores.reference import MASKED
from tokred.kernels.dispatch import accumulator_dtype

# The position of an empty slot: later than any query, so that it is never seen.
SENTINEL = torch.iinfo(torch.int32).max


def visible_positions(positions: Tensor, query_position: Tensor | int | None, key_mask: Tensor | None) -> Tensor:
    """Which slots a query at ``query_position`` sees.

    Args:
        positions: the position each slot holds ``[B, ...]``, ``SENTINEL`` for empty slots.
        query_position: position of the query, one for all or ``[B]``; None sees every slot that is not empty.
        key_mask: bool ``[B, L]`` by position, false for padding; positions from ``L`` on count as true. None: no
            padding.

    Returns:
        Bool of the shape of ``positions``.
    """
    last: Tensor | int = SENTINEL - 1 if query_position is None else query_position
    if isinstance(last, Tensor):
        last = last.clamp(max=SENTINEL - 1).reshape(-1, *[1] * (positions.dim() - 1))
    else:
        last = min(last, SENTINEL - 1)
    seen = positions <= last
    if key_mask is None or key_mask.shape[1] == 0:
        return seen
    length = key_mask.shape[1]
    # One gather over a flat view of the samples; the index beyond the mask is clamped and its answer overruled.
    index = positions.clamp(0, length - 1).reshape(positions.shape[0], -1).long()
    return seen & (key_mask.gather(1, index).view(positions.shape) | (positions >= length))


def _softmax(s: Tensor, seen: Tensor | None) -> tuple[Tensor, Tensor]:
    """Weights and log-sum-exp over the last dimension; zero and -inf in rows that see nothing."""
    if seen is None:
        return torch.softmax(s, -1), torch.logsumexp(s, -1)
    p = torch.softmax(s.masked_fill(~seen, MASKED), -1).masked_fill(~seen, 0.0)
    return p, torch.logsumexp(s.masked_fill(~seen, -torch.inf), -1)


def _cap(s: Tensor, softcap: float) -> Tensor:
    return torch.tanh(s / softcap) * softcap if softcap > 0 else s


def decode_reference(
    q: Tensor, k: Tensor, v: Tensor, seen: Tensor | None, scale: float, softcap: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Decode attention over a rectangular cache.

    Args:
        q: ``[B, H, D]``.
        k: ``[B, Hk, K, D]``.
        v: ``[B, Hk, K, E]``.
        seen: bool ``[B, 1 or Hk, K]``, or None when all slots are visible.
        scale: factor on ``q . k``.
        softcap: logits become ``softcap * tanh(logits / softcap)``; 0 is none.

    Returns:
        Output ``[B, H, E]``, log-sum-exp ``[B, H]`` and weights ``[B, H, K]``.
    """
    dtype = accumulator_dtype(q.dtype)
    (b, h, d), hk = q.shape, k.shape[1]
    s = q.to(dtype).reshape(b, hk, h // hk, d) @ k.to(dtype).transpose(-1, -2) * scale
    p, lse = _softmax(_cap(s, softcap), None if seen is None else seen[:, :, None])
    out = (p @ v.to(dtype)).to(q.dtype)
    return out.reshape(b, h, v.shape[3]), lse.reshape(b, h), p.reshape(b, h, k.shape[2])


def row_segments(offsets: Tensor, rows: int) -> Tensor:
    """The segment of every row ``[T]`` int64; rows before the first or after the last offset get the nearest one."""
    index = torch.arange(rows, device=offsets.device, dtype=offsets.dtype)
    segment = torch.searchsorted(offsets[1:].contiguous(), index, right=True)
    return segment.clamp(max=offsets.shape[0] - 2)


def decode_flat_reference(
    q: Tensor, k: Tensor, v: Tensor, offsets: Tensor, seen: Tensor | None, scale: float, softcap: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Decode attention over a flattened cache.

    Args:
        q: ``[B, H, D]``.
        k: ``[T, D]``: the rows of all ``(sample, key/value head)`` pairs in this order.
        v: ``[T, E]``.
        offsets: int ``[B * Hk + 1]``, ascending: where the rows of each pair begin.
        seen: bool ``[T]``, or None when all rows are visible.
        scale: factor on ``q . k``.
        softcap: cap of the logits; 0 is none.

    Returns:
        Output ``[B, H, E]``, log-sum-exp ``[B, H]`` and weights ``[G, T]`` with ``G = H / Hk``.
    """
    dtype = accumulator_dtype(q.dtype)
    (b, h, d), pairs, t = q.shape, offsets.shape[0] - 1, k.shape[0]
    g = b * h // pairs
    segment = row_segments(offsets, t)
    index = torch.arange(t, device=k.device)
    inside = (index >= offsets[0]) & (index < offsets[-1])
    seen = inside if seen is None else seen & inside
    queries = q.to(dtype).reshape(pairs, g, d)
    s = _cap((queries[segment] @ k.to(dtype)[:, :, None])[..., 0] * scale, softcap)  # [T, G]
    s = s.masked_fill(~seen[:, None], -torch.inf)
    where = segment[:, None].expand(t, g)
    largest = s.new_full((pairs, g), -torch.inf).scatter_reduce(0, where, s.detach(), "amax")
    largest = largest.masked_fill(largest == -torch.inf, 0.0)
    e = torch.exp(s - largest[segment])
    total = e.new_zeros(pairs, g).index_add(0, segment, e)
    lse = torch.log(total) + largest
    p = e / torch.where(total > 0, total, 1.0)[segment]
    out = p.new_zeros(pairs, g, v.shape[1]).index_add(0, segment, p[:, :, None] * v.to(dtype)[:, None])
    return out.to(q.dtype).reshape(b, h, v.shape[1]), lse.reshape(b, h), p.transpose(0, 1).contiguous()
