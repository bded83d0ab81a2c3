"""Launchers of decode attention's Triton kernels for both layouts of the cache."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from tokred.kernels import dispatch
from tokred.kernels.column_scores.launch import Shape, channel_blocks, choose, multiprocessors, precision, upcast
from tokred.kernels.decode_attention.triton import (
    decode_combine_fwd_kernel,
    decode_fwd_kernel,
    decode_weights_fwd_kernel,
)

# Programs per multiprocessor over which the keys are split, and the fewest rows of a chunk.
_PROGRAMS = 4
_MIN_CHUNK = 128
_COMBINE_BLOCK = 32


class _Cache(NamedTuple):
    """A cache's layout: everything in which a rectangular and a flattened one differ."""

    offsets: Tensor | None  # [pairs + 1], None for the rectangular layout
    pairs: int
    heads: int  # key/value heads
    rows: int  # per pair if rectangular, else in all
    k_strides: tuple[int, ...]  # sample, head, row, channel
    v_strides: tuple[int, ...]
    p_strides: tuple[int, ...]  # sample, head, row
    w_strides: tuple[int, int]  # pair, head of the group


class _Visible(NamedTuple):
    """Terms that say which slots the query sees."""

    positions: Tensor | None
    query_position: Tensor | None
    last: int
    key_mask: Tensor | None


def launch_rectangular(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    positions: Tensor | None,
    query_position: Tensor | None,
    last: int,
    key_mask: Tensor | None,
    scale: float,
    softcap: float,
    weights: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Output ``[B, H, D]``, log-sum-exp ``[B, H]`` and weights ``[B, H, K]`` or empty."""
    (b, h, _), (_, hk, n, _) = q.shape, k.shape
    p = torch.empty((b, h, n) if weights else (0,), dtype=torch.float32, device=q.device)
    p_strides = (0, 0, 0) if positions is None else positions.stride()
    cache = _Cache(None, b * hk, hk, n, k.stride(), v.stride(), p_strides, (h // hk * n, n))
    return _launch(q, k, v, cache, _Visible(positions, query_position, last, key_mask), scale, softcap, p)


def launch_flat(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    offsets: Tensor,
    positions: Tensor | None,
    query_position: Tensor | None,
    last: int,
    key_mask: Tensor | None,
    scale: float,
    softcap: float,
    weights: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Output ``[B, H, D]``, log-sum-exp ``[B, H]`` and weights ``[G, T]`` or empty."""
    (b, h, _), pairs, t = q.shape, offsets.shape[0] - 1, k.shape[0]
    group = b * h // pairs
    # Zeros, because rows outside the offsets belong to no program.
    p = torch.zeros((group, t) if weights else (0,), dtype=torch.float32, device=q.device)
    p_strides = (0, 0, 0) if positions is None else (0, 0, positions.stride(0))
    k_strides, v_strides = (0, 0, *k.stride()), (0, 0, *v.stride())
    cache = _Cache(offsets.contiguous(), pairs, pairs // b, t, k_strides, v_strides, p_strides, (0, t))
    return _launch(q, k, v, cache, _Visible(positions, query_position, last, key_mask), scale, softcap, p)


def _shapes(d: int, dtype: torch.dtype) -> list[Shape]:
    if dtype == torch.float32:
        return [Shape(0, 64 if d <= 64 else 32 if d <= 128 else 16, 4, 2)]
    if d <= 128:
        return [Shape(0, 64, 4, 3), Shape(0, 128, 4, 2), Shape(0, 128, 8, 2), Shape(0, 32, 4, 4)]
    return [Shape(0, 32, 4, 3), Shape(0, 64, 4, 2)]


def _chunks(cache: _Cache, device: torch.device, block: int) -> tuple[int, int, int]:
    """Rows per chunk, chunks per pair (rectangular) and programs."""
    wanted = _PROGRAMS * multiprocessors(device)
    if cache.offsets is None:
        share = triton.cdiv(cache.rows, max(1, triton.cdiv(wanted, cache.pairs)))
        chunk = triton.cdiv(max(share, min(_MIN_CHUNK, cache.rows)), block) * block
        splits = triton.cdiv(cache.rows, chunk)
        return chunk, splits, splits * cache.pairs
    chunk = triton.cdiv(max(triton.cdiv(cache.rows, wanted), _MIN_CHUNK), block) * block
    # The lengths are unknown here: as many programs as the least lucky lengths would need.
    return chunk, 1, triton.cdiv(cache.rows, chunk) + cache.pairs


def _launch(
    q: Tensor, k: Tensor, v: Tensor, cache: _Cache, see: _Visible, scale: float, softcap: float, weights: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    b, h, d = q.shape
    group = h // cache.heads
    out = torch.empty(b, h, d, dtype=q.dtype, device=q.device)
    lse = torch.empty(b, h, dtype=torch.float32, device=q.device)
    heads = max(16, triton.next_power_of_2(group))
    flat = cache.offsets is not None
    layout: dict[str, Any] = {"FLAT": flat, "PAIRS": triton.next_power_of_2(cache.pairs) if flat else 1}
    offsets = q if cache.offsets is None else cache.offsets

    def launch(s: Shape) -> None:
        chunk, splits, programs = _chunks(cache, q.device, s.keys)
        partial = torch.empty(programs, group, d, dtype=torch.float32, device=q.device)
        partial_lse = torch.empty(programs, group, dtype=torch.float32, device=q.device)
        decode_fwd_kernel[(programs,)](
            q, k, v, offsets, *_pointers(see, q), partial, partial_lse, weights,
            cache.pairs, cache.heads, group, splits, chunk, cache.rows, see.last, _length(see), scale, softcap,
            *q.stride(), *cache.k_strides, *cache.v_strides, *cache.p_strides, *_see_strides(see), *cache.w_strides,
            D=d, **dict(zip(("D1", "D2"), channel_blocks(d), strict=True)), **layout,
            HAS_POSITIONS=see.positions is not None, HAS_QUERY=see.query_position is not None,
            HAS_MASK=see.key_mask is not None, SOFTCAP=softcap > 0, WEIGHTS=weights.numel() > 0,
            PRECISION=precision(q.dtype), UPCAST=upcast(q.dtype), HEADS=heads, BLOCK_N=s.keys,
            num_warps=s.warps, num_stages=s.stages,
        )  # fmt: skip
        decode_combine_fwd_kernel[(b * h,)](
            partial, partial_lse, offsets, out, lse, cache.pairs, group, splits, chunk,
            D=d, BLOCK_D=triton.next_power_of_2(d), **layout, BLOCK_S=_COMBINE_BLOCK,
        )  # fmt: skip
        if weights.numel() > 0:
            decode_weights_fwd_kernel[(programs,)](
                weights, lse, offsets, cache.pairs, group, splits, chunk, cache.rows, *cache.w_strides,
                **layout, HEADS=triton.next_power_of_2(group), BLOCK_N=256,
            )  # fmt: skip

    key = (q.dtype, d, group, flat, weights.numel() > 0, cache.pairs, dispatch.round_up_bucket(cache.rows), q.device)
    launch(choose("decode", _shapes(d, q.dtype), key, launch))
    return out, lse, weights


def _pointers(see: _Visible, q: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Positions, query position and mask; an absent one still needs a pointer, which is never read."""
    return (
        q if see.positions is None else see.positions,
        q if see.query_position is None else see.query_position,
        q if see.key_mask is None else see.key_mask.view(torch.uint8),
    )


def _see_strides(see: _Visible) -> tuple[int, int, int]:
    """Stride of the query position over samples, and both strides of the mask."""
    query = see.query_position
    step = query.stride(0) if query is not None and query.dim() == 1 and query.shape[0] > 1 else 0
    return (step, 0, 0) if see.key_mask is None else (step, see.key_mask.stride(0), see.key_mask.stride(1))


def _length(see: _Visible) -> int:
    return 0 if see.key_mask is None else see.key_mask.shape[1]
