# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"
"""Triton kernels over packed rows: bytes are read, rows are restored in registers, and never written.

A program takes a share of the rows of one (sample, key/value head) pair, a tile at a time. Codes that lie in one byte
belong to different rows or channels of the tile, so a byte is loaded for each of them; all but the first come from the
cache.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from tokred.kernels.packed_rows.launch import Given, scores, sums, without_gaps
from tokred.kernels.packed_rows.reference import PackedRows, bytes_of


@triton.jit
def restored_rows(
    codes, scale, zero, t, inside, c, channel,
    BITS: tl.constexpr, GROUP: tl.constexpr, SIZE: tl.constexpr, WIDTH: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """Float32 rows ``[T, C]`` of one pair: tokens ``t``, channels ``c``."""
    both = inside[:, None] & channel[None, :]
    if TOKENS:
        unit = t // GROUP
        place = t % GROUP
        at = (unit * SIZE + place % SIZE)[:, None] * WIDTH + c[None, :]
        shift = (place // SIZE * BITS)[:, None]
        side = unit[:, None] * WIDTH + c[None, :]
    else:
        group = c // GROUP
        place = c % GROUP
        at = t[:, None] * (WIDTH // GROUP * SIZE) + (group * SIZE + place % SIZE)[None, :]
        shift = (place // SIZE * BITS)[None, :]
        side = t[:, None] * (WIDTH // GROUP) + group[None, :]
    byte = tl.load(codes + at, mask=both, other=0).to(tl.int32)
    code = ((byte >> shift) & ((1 << BITS) - 1)).to(tl.float32)
    a = tl.load(scale + side, mask=both, other=0.0).to(tl.float32)
    b = tl.load(zero + side, mask=both, other=0.0).to(tl.float32)
    return code * a + b


@triton.jit(do_not_specialize=["count", "share"])
def packed_scores_fwd_kernel(
    q, codes, scale, zero, out, HK, G, count, share, code_b, code_h, side_b, side_h,
    BITS: tl.constexpr, GROUP: tl.constexpr, SIZE: tl.constexpr, WIDTH: tl.constexpr, TOKENS: tl.constexpr,
    HEADS: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """Products of the queries of a pair with its share of the rows."""
    pair = tl.program_id(0).to(tl.int64)
    first = tl.program_id(1) * share
    b, h = pair // HK, pair % HK
    c = tl.arange(0, BLOCK_C)
    g = tl.arange(0, HEADS)
    channel = c < WIDTH
    rows_of = (b * code_b + h * code_h, b * side_b + h * side_h)
    query = tl.load(
        q + pair * G * WIDTH + g[:, None] * WIDTH + c[None, :], mask=(g < G)[:, None] & channel[None, :], other=0.0
    ).to(tl.float32)
    for start in range(first, min(first + share, count), BLOCK_T):
        t = start + tl.arange(0, BLOCK_T)
        inside = t < min(first + share, count)
        rows = restored_rows(
            codes + rows_of[0], scale + rows_of[1], zero + rows_of[1], t.to(tl.int64), inside, c, channel,
            BITS, GROUP, SIZE, WIDTH, TOKENS,
        )  # fmt: skip
        found = tl.dot(query, tl.trans(rows), input_precision="ieee")
        where = out + pair * G * count + g.to(tl.int64)[:, None] * count + t[None, :]
        tl.store(where, found, mask=(g < G)[:, None] & inside[None, :])


@triton.jit(do_not_specialize=["count", "share"])
def packed_sums_fwd_kernel(
    weights, codes, scale, zero, out, HK, G, count, share, splits, code_b, code_h, side_b, side_h,
    BITS: tl.constexpr, GROUP: tl.constexpr, SIZE: tl.constexpr, WIDTH: tl.constexpr, TOKENS: tl.constexpr,
    HEADS: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """The sum of a pair's share of the rows, by the weights of each query."""
    pair = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    first = part * share
    b, h = pair // HK, pair % HK
    c = tl.arange(0, BLOCK_C)
    g = tl.arange(0, HEADS)
    channel = c < WIDTH
    rows_of = (b * code_b + h * code_h, b * side_b + h * side_h)
    total = tl.zeros([HEADS, BLOCK_C], tl.float32)
    for start in range(first, min(first + share, count), BLOCK_T):
        t = start + tl.arange(0, BLOCK_T)
        inside = t < min(first + share, count)
        rows = restored_rows(
            codes + rows_of[0], scale + rows_of[1], zero + rows_of[1], t.to(tl.int64), inside, c, channel,
            BITS, GROUP, SIZE, WIDTH, TOKENS,
        )  # fmt: skip
        where = weights + pair * G * count + g.to(tl.int64)[:, None] * count + t[None, :]
        w = tl.load(where, mask=(g < G)[:, None] & inside[None, :], other=0.0).to(tl.float32)
        total = tl.dot(w, rows, total, input_precision="ieee")
    where = out + (pair * splits + part) * G * WIDTH + g[:, None] * WIDTH + c[None, :]
    tl.store(where, total, mask=(g < G)[:, None] & channel[None, :])


def _given(rows: PackedRows) -> Given:
    codes, *sides = (without_gaps(part) for part in (rows.codes, rows.scale, rows.zero))
    if sides[0].stride() != sides[1].stride():
        sides = [part.contiguous() for part in sides]
    strides = (*codes.stride()[:2], *sides[0].stride()[:2])
    size = bytes_of(rows.group, rows.bits)
    constants = {"BITS": rows.bits, "GROUP": rows.group, "SIZE": size, "WIDTH": rows.width, "TOKENS": rows.tokens}
    return Given((codes, *sides), strides, constants)


def launch_scores(q: Tensor, rows: PackedRows) -> Tensor:
    """Arguments and result as in ``scores_reference``."""
    return scores(packed_scores_fwd_kernel, q, rows, _given(rows))


def launch_sums(weights: Tensor, rows: PackedRows) -> Tensor:
    """Arguments and result as in ``sums_reference``."""
    return sums(packed_sums_fwd_kernel, weights, rows, _given(rows))
