# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"
"""Triton kernel of the row merges, alone or with the LayerNorm that follows; the backward is a segmented sum.

One program owns a block of slots. It reads their representatives, looks up the members of its slots rank by rank (the
first source of each slot, then the second, ...) and folds them in, so every row of the input is read once, every row of
the answer written once, and the order of additions is fixed.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from tokred.kernels.gather_rows.triton import Entries, next_entries, tile
from tokred.kernels.merge_rows.reference import SHORTEST

_MODES = {"mean": 0, "sum": 1, "max": 2, "mlerp": 3, "keep": 4}
_MEAN, _SUM, _MAX, _MLERP, _KEEP = (tl.constexpr(value) for value in _MODES.values())
_SHORTEST = tl.constexpr(SHORTEST)


@triton.jit
def _gain(size, weight, row, has, HAS_SIZE: tl.constexpr, HAS_WEIGHT: tl.constexpr):
    """The gain of rows: size times weight; zero where ``has`` is false."""
    gain = has.to(tl.float32)
    if HAS_SIZE:
        gain *= tl.load(size + row, mask=has, other=0).to(tl.float32)
    if HAS_WEIGHT:
        gain *= tl.load(weight + row, mask=has, other=0).to(tl.float32)
    return gain


@triton.jit
def _store_norm(
    value, normed, norm_weight, norm_bias, out_row, slot_mask, c, C, eps,
    HAS_NORM_WEIGHT: tl.constexpr, HAS_NORM_BIAS: tl.constexpr,
):  # fmt: skip
    """LayerNorm of rows held in registers, as the stored (rounded) rows would give it."""
    inside = (c < C)[None, :]
    value = value.to(normed.dtype.element_ty).to(tl.float32)
    mean = tl.sum(tl.where(inside, value, 0.0), axis=1) / C
    centred = tl.where(inside, value - mean[:, None], 0.0)
    rstd = 1.0 / tl.sqrt_rn(tl.sum(centred * centred, axis=1) / C + eps)
    answer = centred * rstd[:, None]
    if HAS_NORM_WEIGHT:
        answer *= tl.load(norm_weight + c, mask=c < C, other=0).to(tl.float32)[None, :]
    if HAS_NORM_BIAS:
        answer += tl.load(norm_bias + c, mask=c < C, other=0).to(tl.float32)[None, :]
    where = normed + out_row[:, None] * C + c[None, :]
    tl.store(where, answer.to(normed.dtype.element_ty), mask=slot_mask[:, None] & inside)


@triton.jit(do_not_specialize=["N", "M", "R", "blocks"])
def merge_rows_fwd_kernel(
    x, representative, source, target, order, offsets, size, weight, out,
    normed, norm_weight, norm_bias, eps,
    N, M, R, blocks, C, stride_b, stride_n,
    MODE: tl.constexpr, HAS_SIZE: tl.constexpr, HAS_WEIGHT: tl.constexpr, SORTED: tl.constexpr,
    NORM: tl.constexpr, HAS_NORM_WEIGHT: tl.constexpr, HAS_NORM_BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """Merge the members of a block of slots, for a block of channels (all of them where a norm needs them)."""
    pid = tl.program_id(0)
    b = (pid // blocks).to(tl.int64)
    m = (pid % blocks) * BLOCK_M + tl.arange(0, BLOCK_M)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    slot_mask, in_channels = m < M, (c < C)[None, :]
    x += b * stride_b
    size += b * N
    weight += b * N
    rep = tl.load(representative + b * M + m, mask=slot_mask, other=0)
    first = tl.load(
        x + rep[:, None] * stride_n + c[None, :], mask=slot_mask[:, None] & in_channels, other=0
    ).to(tl.float32)  # fmt: skip
    value = first
    total = _gain(size, weight, rep, slot_mask, HAS_SIZE, HAS_WEIGHT)
    if MODE == _SUM and HAS_WEIGHT:
        value = value * total[:, None]
    longest = tl.sqrt_rn(tl.sum(first * first, axis=1)) if MODE == _MLERP else total
    best = rep
    best_key = tl.full([BLOCK_M], -1, tl.int64)
    took = tl.zeros([BLOCK_M], tl.int32)

    if MODE != _KEEP:
        rank = 0
        keys, sorted_keys, begins = target + b * R, order + b * R, offsets + b * (M + 1)
        cursor = tl.zeros([BLOCK_M], tl.int64)
        found = next_entries(keys, sorted_keys, begins, m, slot_mask, cursor, rank, R, SORTED, BLOCK_E)
        while tl.min(found, axis=0) < R:
            has = found < R
            row = tl.load(source + b * R + found, mask=has, other=0)
            member = tl.load(
                x + row[:, None] * stride_n + c[None, :], mask=has[:, None] & in_channels, other=0
            ).to(tl.float32)  # fmt: skip
            gain = _gain(size, weight, row, has, HAS_SIZE, HAS_WEIGHT)
            if MODE == _SUM:
                value += member * gain[:, None] if HAS_WEIGHT else member
            elif MODE == _MAX:
                larger = tl.maximum(value, member, propagate_nan=tl.PropagateNan.ALL)
                value = tl.where(has[:, None], larger, value)
            else:
                # A running mean: a constant stays constant, and a slot without weight stays its representative.
                total += gain
                share = tl.where(total > 0, gain / tl.where(total > 0, total, 1.0), 0.0)
                value += tl.where(has[:, None], share[:, None] * (member - value), 0.0)
            if MODE == _MLERP:
                length = tl.sqrt_rn(tl.sum(member * member, axis=1))
                longer = has & ((length > longest) | ((length == longest) & (row < best_key)))
                longest = tl.where(longer, length, longest)
                best = tl.where(longer, row, best)
                best_key = tl.where(longer, row, best_key)
            took = tl.maximum(took, has.to(tl.int32))
            cursor = found + 1
            rank += 1
            found = next_entries(keys, sorted_keys, begins, m, slot_mask, cursor, rank, R, SORTED, BLOCK_E)
        if MODE == _MLERP:
            length = tl.sqrt_rn(tl.sum(value * value, axis=1))
            short = length < _SHORTEST
            fallback = tl.load(
                x + best[:, None] * stride_n + c[None, :], mask=(short & slot_mask)[:, None] & in_channels, other=0
            ).to(tl.float32)  # fmt: skip
            scale = longest / tl.where(short, 1.0, length)
            stretched = tl.where(short[:, None], fallback, value * scale[:, None])
            value = tl.where((took > 0)[:, None], stretched, first)
    out_row = b * M + m
    inside = slot_mask[:, None] & in_channels
    tl.store(out + out_row[:, None] * C + c[None, :], value.to(out.dtype.element_ty), mask=inside)
    if NORM:
        _store_norm(
            value, normed, norm_weight, norm_bias, out_row, slot_mask, c, C, eps,
            HAS_NORM_WEIGHT, HAS_NORM_BIAS,
        )  # fmt: skip


def launch(
    x: Tensor,
    representative: Tensor,
    source: Tensor,
    target: Tensor,
    size: Tensor | None,
    weight: Tensor | None,
    mode: str,
    norm: tuple[Tensor | None, Tensor | None, float] | None = None,
) -> tuple[Tensor, Tensor | None]:
    """The merged rows and, given a LayerNorm's scale, shift and epsilon, their norm; arguments as in the reference."""
    x = x if x.stride(-1) == 1 else x.contiguous()
    (batch, n, channels), slots, sources = x.shape, representative.shape[1], source.shape[1]
    out = torch.empty(batch, slots, channels, dtype=x.dtype, device=x.device)
    normed = None if norm is None else torch.empty_like(out)
    norm_weight, norm_bias, eps = norm or (None, None, 0.0)
    if out.numel() == 0:
        return out, normed
    entries = Entries(target, slots)
    shape = tile(channels, slots, most=16, whole=norm is not None or mode == "mlerp")
    blocks = triton.cdiv(slots, shape.rows)
    merge_rows_fwd_kernel[(batch * blocks, triton.cdiv(channels, shape.channels))](
        x, representative.contiguous(), source.contiguous(), entries.keys, entries.order, entries.offsets,
        x if size is None else size.contiguous(), x if weight is None else weight.contiguous(), out,
        out if normed is None else normed, x if norm_weight is None else norm_weight.contiguous(),
        x if norm_bias is None else norm_bias.contiguous(), eps,
        n, slots, sources, blocks, channels, x.stride(0), x.stride(1),
        MODE=_MODES[mode], HAS_SIZE=size is not None and mode != "sum", HAS_WEIGHT=weight is not None,
        SORTED=entries.sorted, NORM=norm is not None,
        HAS_NORM_WEIGHT=norm_weight is not None, HAS_NORM_BIAS=norm_bias is not None,
        BLOCK_M=shape.rows, BLOCK_C=shape.channels, BLOCK_E=entries.block, num_warps=shape.warps,
    )  # fmt: skip
    return out, normed
