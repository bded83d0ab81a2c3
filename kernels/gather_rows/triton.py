# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"
"""Triton kernels of the row gathers: rows by index, their transpose (a segmented sum), and a KV cache's compaction.

All are bound by memory: whole rows move in 16-byte pieces, each once. Nothing is added atomically; a row that several
entries add to is owned by one program, which adds them in ascending order.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

# Up to this many entries a program finds its own by looking at all of them; beyond, they are sorted once.
SCAN_LIMIT = 2048
# Entries looked at together, and what a program holds: channels of a row at most, and elements.
SCAN_BLOCK = 256
WIDEST = 1024
ELEMENTS = 4096


@triton.jit
def next_entries(keys, order, offsets, rows, row_mask, cursor, rank, E, SORTED: tl.constexpr, BLOCK_E: tl.constexpr):
    """For each row the next entry whose key is that row: entry number ``rank`` in ascending order, ``E`` when none.

    ``keys`` ``[E]`` is scanned from ``cursor`` on; or, SORTED, ``order`` ``[E]`` holds the entries by ascending key and
    ``offsets`` where each row's begin.
    """
    if SORTED:
        begin = tl.load(offsets + rows, mask=row_mask, other=0)
        end = tl.load(offsets + rows + 1, mask=row_mask, other=0)
        has = begin + rank < end
        found = tl.where(has, tl.load(order + begin + rank, mask=has, other=0), E)
    else:
        found = tl.full(rows.shape, 0, tl.int64) + E
        for start in range(0, E, BLOCK_E):
            entry = start + tl.arange(0, BLOCK_E)
            key = tl.load(keys + entry, mask=entry < E, other=-1)
            hit = (key[None, :] == rows[:, None]) & (entry[None, :] >= cursor[:, None]) & row_mask[:, None]
            found = tl.minimum(found, tl.min(tl.where(hit, entry[None, :].to(tl.int64), E), axis=1))
    return found


@triton.jit(do_not_specialize=["K", "blocks"])
def gather_rows_fwd_kernel(
    x, index, out, K, blocks, heads, C, stride_b, stride_h, stride_n, index_b, index_h,
    OR_ZERO: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """``out[b, h, k] = x[b, h, index[b, h, k]]``; with OR_ZERO a negative index gives zeros."""
    pid = tl.program_id(0)
    bh = (pid // blocks).to(tl.int64)
    b, h = bh // heads, bh % heads
    k = (pid % blocks) * BLOCK_K + tl.arange(0, BLOCK_K)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    n = tl.load(index + b * index_b + h * index_h + k, mask=k < K, other=-1)
    inside = (k < K)[:, None] & (c < C)[None, :]
    wanted = inside & (n >= 0)[:, None] if OR_ZERO else inside
    rows = x + b * stride_b + h * stride_h + n.to(tl.int64) * stride_n
    tile = tl.load(rows[:, None] + c[None, :], mask=wanted, other=0)
    to = out + (bh * K + k).to(tl.int64) * C
    tl.store(to[:, None] + c[None, :], tile, mask=inside)


@triton.jit(do_not_specialize=["E", "rows", "blocks", "x_rows"])
def segment_sum_fwd_kernel(
    x, keys, slots, coefficients, order, offsets, out, E, rows, x_rows, blocks, C,
    HAS_SLOTS: tl.constexpr, HAS_COEFFICIENTS: tl.constexpr, SORTED: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """``out[i, n] = sum of coefficients[i, e] x[i, slots[i, e]] over the entries e with keys[i, e] == n``."""
    pid = tl.program_id(0)
    i = (pid // blocks).to(tl.int64)
    n = (pid % blocks) * BLOCK_N + tl.arange(0, BLOCK_N)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    row_mask, in_channels = n < rows, c < C
    cursor = tl.zeros([BLOCK_N], tl.int64)
    rank = 0
    total = tl.zeros([BLOCK_N, BLOCK_C], tl.float32)
    found = next_entries(
        keys + i * E, order + i * E, offsets + i * (rows + 1), n, row_mask, cursor, rank, E, SORTED, BLOCK_E
    )
    while tl.min(found, axis=0) < E:
        has = found < E
        slot = tl.load(slots + i * E + found, mask=has, other=0) if HAS_SLOTS else found
        source = x + (i * x_rows + slot) * C
        tile = tl.load(source[:, None] + c[None, :], mask=has[:, None] & in_channels[None, :], other=0).to(tl.float32)
        if HAS_COEFFICIENTS:
            tile *= tl.load(coefficients + i * E + found, mask=has, other=0)[:, None]
        total += tile
        cursor = found + 1
        rank += 1
        found = next_entries(
            keys + i * E, order + i * E, offsets + i * (rows + 1), n, row_mask, cursor, rank, E, SORTED, BLOCK_E
        )
    to = out + (i * rows + n) * C
    tl.store(to[:, None] + c[None, :], total.to(out.dtype.element_ty), mask=row_mask[:, None] & in_channels[None, :])


@triton.jit(do_not_specialize=["K", "blocks"])
def gather_cache_fwd_kernel(
    keys, values, positions, index, out_keys, out_values, out_positions, K, blocks, heads, D, DV,
    key_b, key_h, key_n, value_b, value_h, value_n, position_b, position_h, position_n, index_b, index_h,
    out_key_b, out_key_h, out_key_n, out_value_b, out_value_h, out_value_n,
    out_position_b, out_position_h, out_position_n,
    BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Rows ``index`` of keys, values and positions, copied to the outputs."""
    pid = tl.program_id(0)
    bh = (pid // blocks).to(tl.int64)
    b, h = bh // heads, bh % heads
    k = ((pid % blocks) * BLOCK_K + tl.arange(0, BLOCK_K)).to(tl.int64)
    d = tl.arange(0, BLOCK_D)
    real = k < K
    n = tl.load(index + b * index_b + h * index_h + k, mask=real, other=0).to(tl.int64)
    in_keys = real[:, None] & (d < D)[None, :]
    in_values = real[:, None] & (d < DV)[None, :]
    key_rows = keys + b * key_b + h * key_h + n * key_n
    value_rows = values + b * value_b + h * value_h + n * value_n
    key_tile = tl.load(key_rows[:, None] + d[None, :], mask=in_keys, other=0)
    value_tile = tl.load(value_rows[:, None] + d[None, :], mask=in_values, other=0)
    position = tl.load(positions + b * position_b + h * position_h + n * position_n, mask=real, other=0)
    to_keys = out_keys + b * out_key_b + h * out_key_h + k * out_key_n
    to_values = out_values + b * out_value_b + h * out_value_h + k * out_value_n
    tl.store(to_keys[:, None] + d[None, :], key_tile, mask=in_keys)
    tl.store(to_values[:, None] + d[None, :], value_tile, mask=in_values)
    tl.store(out_positions + b * out_position_b + h * out_position_h + k * out_position_n, position, mask=real)


@triton.jit
def _compact_slice(base, index, stride_n, K, d, D, BLOCK_K: tl.constexpr):
    """Move rows of one slice of channels to the front. A chunk is read in full before its first row is written."""
    for start in range(0, K, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        n = tl.load(index + k, mask=k < K, other=0).to(tl.int64)
        inside = (k < K)[:, None] & (d < D)[None, :]
        tile = tl.load(base + n[:, None] * stride_n + d[None, :], mask=inside, other=0)
        tl.debug_barrier()
        tl.store(base + k.to(tl.int64)[:, None] * stride_n + d[None, :], tile, mask=inside)


@triton.jit(do_not_specialize=["K"])
def compact_cache_kernel(
    keys, values, positions, index, K, heads, D, DV, slices,
    key_b, key_h, key_n, value_b, value_h, value_n, position_b, position_h, position_n, index_b, index_h,
    BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """In place: one program owns a slice of the channels of one head and walks the rows upwards, chunk by chunk.

    Ascending indices never point below the chunk at hand, so no other chunk's source is overwritten early.
    """
    bh = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    b, h = bh // heads, bh % heads
    index += b * index_b + h * index_h
    d = (part % slices) * BLOCK_D + tl.arange(0, BLOCK_D)
    if part < slices:
        _compact_slice(keys + b * key_b + h * key_h, index, key_n, K, d, D, BLOCK_K)
    else:
        _compact_slice(values + b * value_b + h * value_h, index, value_n, K, d, DV, BLOCK_K)
    if part == 0:
        one = tl.arange(0, 1)
        _compact_slice(positions + b * position_b + h * position_h, index, position_n, K, one, 1, BLOCK_K)


def _rows_contiguous(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _ceil(a: int, b: int) -> int:
    return -(-a // b)


class Tile(NamedTuple):
    """The tile that one program covers."""

    channels: int
    rows: int
    warps: int


def tile(channels: int, rows: int, *, most: int = 256, whole: bool = False) -> Tile:
    """Wide pieces of a row first, then as many rows as fill a program.

    Args:
        channels: length of a row.
        rows: how many there are.
        most: rows per program at most.
        whole: whether a program needs whole rows.
    """
    block_c = triton.next_power_of_2(channels)
    block_c = block_c if whole else min(block_c, WIDEST)
    block_rows = max(1, min(ELEMENTS // block_c, triton.next_power_of_2(rows), most))
    return Tile(block_c, block_rows, max(1, min(8, block_c * block_rows // 1024)))


def launch_gather(x: Tensor, index: Tensor, or_zero: bool) -> Tensor:
    """Rows ``index`` of ``x``; shapes as in the reference."""
    x, index = _rows_contiguous(x), _rows_contiguous(index)
    lead, channels, count = x.shape[:-2], x.shape[-1], index.shape[-1]
    heads = lead[1] if len(lead) == 2 else 1
    out = torch.empty(*lead, count, channels, dtype=x.dtype, device=x.device)
    if out.numel() == 0:
        return out
    shape = tile(channels, count)
    blocks = _ceil(count, shape.rows)
    gather_rows_fwd_kernel[(lead.numel() * blocks, _ceil(channels, shape.channels))](
        x, index, out, count, blocks, heads, channels,
        x.stride(0), x.stride(1) if x.ndim == 4 else 0, x.stride(-2),
        index.stride(0), index.stride(1) if index.ndim == 3 else 0,
        OR_ZERO=or_zero, BLOCK_K=shape.rows, BLOCK_C=shape.channels, num_warps=shape.warps,
    )  # fmt: skip
    return out


class Entries:
    """Which entries belong to which row, as the kernels want it: as they are, or sorted when there are many."""

    def __init__(self, keys: Tensor, rows: int) -> None:
        """``keys`` is ``(I, E)`` int64, the row of each entry or -1."""
        self.keys = keys.contiguous()
        count = keys.shape[1]
        self.sorted = count > SCAN_LIMIT
        self.block = min(SCAN_BLOCK, max(16, triton.next_power_of_2(count)))
        self.order = self.offsets = self.keys
        if self.sorted:
            ascending, self.order = self.keys.sort(dim=1, stable=True)
            bounds = torch.arange(rows + 1, device=keys.device).expand(keys.shape[0], -1).contiguous()
            self.offsets = torch.searchsorted(ascending, bounds)


def launch_segment_sum(x: Tensor, keys: Tensor, slots: Tensor | None, coefficients: Tensor | None, rows: int) -> Tensor:
    """``(I, S, C)`` rows added into ``(I, rows, C)``; entries ``(I, E)``, see :func:`reference.segment_sum`."""
    x = x.contiguous()
    out = torch.empty(x.shape[0], rows, x.shape[2], dtype=x.dtype, device=x.device)
    if out.numel() == 0:
        return out
    entries = Entries(keys, rows)
    shape = tile(x.shape[2], rows, most=16)
    blocks = _ceil(rows, shape.rows)
    segment_sum_fwd_kernel[(x.shape[0] * blocks, _ceil(x.shape[2], shape.channels))](
        x, entries.keys,
        entries.keys if slots is None else slots.contiguous(),
        x if coefficients is None else coefficients.contiguous(),
        entries.order, entries.offsets, out, keys.shape[1], rows, x.shape[1], blocks, x.shape[2],
        HAS_SLOTS=slots is not None, HAS_COEFFICIENTS=coefficients is not None, SORTED=entries.sorted,
        BLOCK_N=shape.rows, BLOCK_C=shape.channels, BLOCK_E=entries.block, num_warps=shape.warps,
    )  # fmt: skip
    return out


def launch_gather_cache(
    keys: Tensor, values: Tensor, positions: Tensor, index: Tensor, out: tuple[Tensor, Tensor, Tensor]
) -> None:
    """Rows ``index`` of the cache into ``out``, one launch."""
    keys, values, index = _rows_contiguous(keys), _rows_contiguous(values), _rows_contiguous(index)
    batch, heads, count = index.shape
    if index.numel() == 0:
        return
    widest = max(keys.shape[3], values.shape[3])
    block_d = triton.next_power_of_2(widest)
    block_k = max(1, min(ELEMENTS // block_d, triton.next_power_of_2(count)))
    blocks = _ceil(count, block_k)
    strides: list[Any] = []
    for tensor in (keys, values, positions, index, *out):
        strides.extend(tensor.stride()[: 2 if tensor is index else 3])
    gather_cache_fwd_kernel[(batch * heads * blocks,)](
        keys, values, positions, index, *out, count, blocks, heads, keys.shape[3], values.shape[3], *strides,
        BLOCK_K=block_k, BLOCK_D=block_d, num_warps=max(1, min(8, block_k * block_d // 1024)),
    )  # fmt: skip


def launch_compact_cache(keys: Tensor, values: Tensor, positions: Tensor, index: Tensor) -> None:
    """Rows ``index`` of the cache to its front, one launch; keys and values have contiguous channels."""
    index = _rows_contiguous(index)
    batch, heads, count = index.shape
    if index.numel() == 0:
        return
    widest = max(keys.shape[3], values.shape[3])
    # 32 bytes of a row are the least that memory moves; wider slices while enough programs remain.
    block_d = min(triton.next_power_of_2(widest), 32 // keys.element_size())
    while block_d < widest and batch * heads * _ceil(widest, block_d) >= 256:
        block_d *= 2
    block_k = min(4 * ELEMENTS // block_d, max(16, triton.next_power_of_2(count)))
    slices = _ceil(widest, block_d)
    strides: list[Any] = []
    for tensor in (keys, values, positions, index):
        strides.extend(tensor.stride()[: 2 if tensor is index else 3])
    compact_cache_kernel[(batch * heads, 2 * slices)](
        keys, values, positions, index, count, heads, keys.shape[3], values.shape[3], slices, *strides,
        BLOCK_K=block_k, BLOCK_D=block_d, num_warps=8 if block_k * block_d >= 8192 else 4,
    )  # fmt: skip
