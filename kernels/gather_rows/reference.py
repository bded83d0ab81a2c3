"""The definition of the row gathers in plain torch: also the tuned path on a CPU, and what autograd and compile see."""

from __future__ import annotations

import torch
from torch import Tensor

from tokred.kernels import dispatch
from tokred.kernels.rows import flat_index, rows_of

# Rows, over all heads, that the in-place form moves at a time: they stay in the processor's cache on their way.
_CHUNK = 4096


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
    if index.device.type == "cpu" and type(index) is Tensor and not dispatch.traced():
        holes = missing.reshape(-1).nonzero().view(-1)
        if holes.numel() == 0:
            return gather_rows(x, index)
        gathered = gather_rows(x, index.clamp(min=0))
        gathered.view(-1, gathered.shape[-1]).index_fill_(0, holes, 0)
        return gathered
    gathered = gather_rows(x, index.clamp(min=0))
    # Selecting, unlike multiplying by zero, keeps the holes free of another row's infinities.
    return torch.where(missing.unsqueeze(-1), gathered.new_zeros(()), gathered)


def segment_sum(x: Tensor, keys: Tensor, slots: Tensor | None, coefficients: Tensor | None, rows: int) -> Tensor:
    """Rows added into rows: ``out[i, n]`` is the sum over the entries ``e`` with ``keys[i, e] == n``.

    It is the transpose of a gather, and of every merge.

    Args:
        x: ``(I, S, C)``.
        keys: ``(I, E)`` int64 in ``[0, rows)``, or -1 to leave the entry out.
        slots: ``(I, E)`` int64 in ``[0, S)``, the row of ``x`` each entry adds; None: entry ``e`` adds row ``e``.
        coefficients: ``(I, E)`` float, the factor of each entry; None: ones.
        rows: length of the answer's row dimension.

    Returns:
        ``(I, rows, C)``, summed in float32 for half precision.
    """
    batch, channels = x.shape[0], x.shape[2]
    added = x.to(dispatch.accumulator_dtype(x.dtype))
    if slots is not None:
        added = gather_rows(added, slots)
    if coefficients is not None:
        added = added * coefficients.to(added.dtype).unsqueeze(-1)
    # Entries left out go to a last row that is cut off.
    flat = flat_index(torch.where(keys < 0, rows, keys), (rows + 1, 1))
    total = added.new_zeros(batch * (rows + 1), channels)
    total = total.index_add(0, flat, added.reshape(-1, channels))
    return total.view(batch, rows + 1, channels)[:, :rows].to(x.dtype).contiguous()


def gather_cache(keys: Tensor, values: Tensor, positions: Tensor, index: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Rows ``index`` ``(B, Hk, K)`` of keys and values ``(B, Hk, N, D)`` and of positions ``(B, Hk, N)``."""
    return gather_rows(keys, index), gather_rows(values, index), positions.gather(2, index)


def gather_cache_out(
    keys: Tensor, values: Tensor, positions: Tensor, index: Tensor, out: tuple[Tensor, Tensor, Tensor]
) -> None:
    """:func:`gather_cache` into given tensors, without a detour where they are contiguous."""
    for x, to in zip((keys, values), out, strict=False):
        if _plain(x) or not to.is_contiguous():
            to.copy_(gather_rows(x, index))
        else:
            rows = rows_of(x)
            torch.index_select(rows.table, 0, flat_index(index, rows.steps), out=to.view(-1, x.shape[-1]))
    out[2].copy_(positions.gather(2, index))


def gather_cache_(keys: Tensor, values: Tensor, positions: Tensor, index: Tensor) -> None:
    """Move rows ``index`` of a cache to its front; the index ascends."""
    _compact(keys, index)
    _compact(values, index)
    positions[:, :, : index.shape[2]] = positions.gather(2, index)


def _plain(x: Tensor) -> bool:
    """True where the compiler or autograd must see plain operations instead of work in given memory."""
    return dispatch.traced() or (x.requires_grad and torch.is_grad_enabled())


def _compact(x: Tensor, index: Tensor) -> None:
    """Chunk by chunk through a small buffer.

    Because the index ascends, ``index[k] >= k``: a chunk of targets never covers a source of a later chunk.
    """
    batch, heads, count = index.shape
    if _plain(x):
        x[:, :, :count] = gather_rows(x, index)
        return
    rows = rows_of(x)
    chunk = max(1, min(count, _CHUNK // max(1, batch * heads)))
    buffer = x.new_empty(batch * heads * chunk, x.shape[-1])
    for start in range(0, count, chunk):
        stop = min(start + chunk, count)
        part = buffer[: batch * heads * (stop - start)]
        torch.index_select(rows.table, 0, flat_index(index[:, :, start:stop], rows.steps), out=part)
        x[:, :, start:stop] = part.view(batch, heads, stop - start, -1)
