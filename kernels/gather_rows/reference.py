"""The definition of the row gathers in plain torch: also the tuned path on a CPU, and what autograd and compile see."""

from __future__ import annotations

import torch
from torch import Tensor

from tokred.kernels.rows import contiguous_steps, flat_index, rows_of

# Rows moved at a time by the in-place form: enough to amortise the calls, small beside a cache.
_CHUNK = 2048


def gather_rows(x: Tensor, index: Tensor) -> Tensor:
    """Rows of ``x`` by a shared or per-head index.

    Args:
        x: ``(B, N, C)`` or ``(B, H, N, D)``.
        index: ``(B, K)`` or, with four dimensions, ``(B, H, K)``.

    Returns:
        ``(B, K, C)`` or ``(B, H, K, D)``.
    """
    if index.ndim < x.ndim - 1:
        index = index.unsqueeze(1)
    rows = rows_of(x)
    lead = x.shape[:-2]
    flat = flat_index(index, rows.steps, lead)
    return rows.table.index_select(0, flat).view(*lead, index.shape[-1], x.shape[-1])


def gather_rows_or_zero(x: Tensor, index: Tensor) -> Tensor:
    """Rows of ``x`` ``(B, M, C)`` by ``index`` ``(B, N)``; the index -1 gives a row of zeros."""
    missing = index < 0
    # On a CPU looking at the values costs nothing; a device would be waited for, and a trace would break.
    if index.device.type == "cpu" and type(index) is Tensor and not torch.compiler.is_compiling():
        holes = missing.reshape(-1).nonzero().view(-1)
        if holes.numel() == 0:
            return gather_rows(x, index)
        gathered = gather_rows(x, index.clamp(min=0))
        gathered.view(-1, gathered.shape[-1]).index_fill_(0, holes, 0)
        return gathered
    gathered = gather_rows(x, index.clamp(min=0))
    # Selecting, unlike multiplying by zero, keeps the holes free of another row's infinities.
    return torch.where(missing.unsqueeze(-1), gathered.new_zeros(()), gathered)


def segment_sum(x: Tensor, index: Tensor, rows: int) -> Tensor:
    """The transpose of :func:`gather_rows_or_zero`: row ``index[k]`` of the answer collects row ``k`` of ``x``.

    Args:
        x: ``(B, K, C)`` or ``(B, H, K, D)``.
        index: ``(B, K)`` or ``(B, H, K)``; -1 is left out.
        rows: length of the answer's row dimension.

    Returns:
        ``(B, rows, C)`` or ``(B, H, rows, D)``.
    """
    if index.ndim < x.ndim - 1:
        index = index.unsqueeze(1)
    lead, channels = x.shape[:-2], x.shape[-1]
    index = index.expand(*lead, index.shape[-1])
    # Left-out rows go to a last row that is cut off.
    slots = torch.where(index < 0, rows, index)
    steps = contiguous_steps((*lead, rows + 1))
    wide = x.to(torch.float32) if x.dtype in (torch.float16, torch.bfloat16) else x
    total = wide.new_zeros(lead.numel() * (rows + 1), channels)
    total = total.index_add(0, flat_index(slots, steps, lead), wide.reshape(-1, channels))
    return total.view(*lead, rows + 1, channels)[..., :rows, :].to(x.dtype)


def gather_positions(positions: Tensor, index: Tensor) -> Tensor:
    """``positions`` ``(B, Hk, N)`` at ``index`` ``(B, Hk, K)``."""
    return positions.gather(2, index)


def compact_(x: Tensor, index: Tensor) -> Tensor:
    """Move rows ``index`` of ``x`` to its front, in place.

    Because the index ascends, ``index[k] >= k``: a chunk of targets never covers a source of a later chunk.

    Args:
        x: ``(B, Hk, N, D)``; changed.
        index: ``(B, Hk, K)``, strictly ascending along K.

    Returns:
        A view of the first K rows of ``x``.
    """
    count = index.shape[-1]
    for start in range(0, count, _CHUNK):
        stop = min(start + _CHUNK, count)
        x[:, :, start:stop] = gather_rows(x, index[:, :, start:stop])
    return x[:, :, :count]
