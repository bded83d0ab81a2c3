# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"
"""Triton kernels over coded rows: codes are read, rows are restored in registers, and never written.

A program takes a share of the rows of one (sample, key/value head) pair, a tile at a time.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from tokred.kernels.coded_rows.reference import CodedRows
from tokred.kernels.packed_rows.launch import Given, scores, sums, without_gaps


@triton.jit
def looked_up_rows(
    first, second, table, factor, t, inside, c, channel,
    KIND: tl.constexpr, WIDTH: tl.constexpr, BITS: tl.constexpr, UNIT: tl.constexpr, SIGNED: tl.constexpr,
    SIZE: tl.constexpr, MARKS: tl.constexpr,
):  # fmt: skip
    """Float32 rows ``[T, C]`` of one pair: tokens ``t``, channels ``c``; other arguments as in ``CodedRows``."""
    both = inside[:, None] & channel[None, :]
    if KIND == 2:
        mark = tl.load(second + t[:, None] * MARKS + (c // 8)[None, :], mask=both, other=0).to(tl.int32)
        bit = (mark >> (7 - c % 8)[None, :]) & 1
        place = tl.cumsum(bit, 1) - 1
        rows = tl.load(first + t[:, None] * SIZE + place, mask=both & (bit == 1), other=0.0).to(tl.float32)
    elif KIND == 1:
        entry = tl.load(first + t[:, None] * SIZE + (c // 8)[None, :], mask=both, other=0).to(tl.int32)
        rows = tl.load(table + entry * 8 + (c % 8)[None, :], mask=both, other=0.0)
        if SIGNED:
            sign = tl.load(second + t[:, None] * MARKS + (c // 8)[None, :], mask=both, other=0).to(tl.int32)
            rows = tl.where((sign >> (c % 8)[None, :]) & 1 == 1, -rows, rows)
    else:
        if BITS == 3:
            at, shift = c // 8 * 3 + c % 8 * 3 // 8, c % 8 * 3 % 8
            code = tl.load(first + t[:, None] * SIZE + at[None, :], mask=both, other=0).to(tl.int32)
            more = both & (shift > 5)[None, :]
            code = code | (tl.load(first + t[:, None] * SIZE + at[None, :] + 1, mask=more, other=0).to(tl.int32) << 8)
        else:
            at, shift = c % SIZE, c // SIZE * BITS
            code = tl.load(first + t[:, None] * SIZE + at[None, :], mask=both, other=0).to(tl.int32)
        code = (code >> shift[None, :]) & ((1 << BITS) - 1)
        rows = tl.load(table + code, mask=both, other=0.0)
        if UNIT:
            length = tl.sqrt(tl.sum(rows * rows, 1))
            rows = rows / tl.where(inside, length, 1.0)[:, None]
    return rows * tl.load(factor + t, mask=inside, other=0.0)[:, None]


@triton.jit(do_not_specialize=["count", "share"])
def coded_scores_fwd_kernel(
    q, first, second, table, factor, out, HK, G, count, share, first_b, first_h, second_b, second_h,
    KIND: tl.constexpr, WIDTH: tl.constexpr, BITS: tl.constexpr, UNIT: tl.constexpr, SIGNED: tl.constexpr,
    SIZE: tl.constexpr, MARKS: tl.constexpr, HEADS: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """Products of the queries of a pair with its share of the rows."""
    pair = tl.program_id(0).to(tl.int64)
    begin = tl.program_id(1) * share
    b, h = pair // HK, pair % HK
    c = tl.arange(0, BLOCK_C)
    g = tl.arange(0, HEADS)
    channel = c < WIDTH
    query = tl.load(
        q + pair * G * WIDTH + g[:, None] * WIDTH + c[None, :], mask=(g < G)[:, None] & channel[None, :], other=0.0
    ).to(tl.float32)
    for start in range(begin, min(begin + share, count), BLOCK_T):
        t = start + tl.arange(0, BLOCK_T)
        inside = t < min(begin + share, count)
        rows = looked_up_rows(
            first + b * first_b + h * first_h, second + b * second_b + h * second_h, table, factor + pair * count,
            t.to(tl.int64), inside, c, channel, KIND, WIDTH, BITS, UNIT, SIGNED, SIZE, MARKS,
        )  # fmt: skip
        found = tl.dot(query, tl.trans(rows), input_precision="ieee")
        where = out + pair * G * count + g.to(tl.int64)[:, None] * count + t[None, :]
        tl.store(where, found, mask=(g < G)[:, None] & inside[None, :])


@triton.jit(do_not_specialize=["count", "share"])
def coded_sums_fwd_kernel(
    weights, first, second, table, factor, out, HK, G, count, share, splits, first_b, first_h, second_b, second_h,
    KIND: tl.constexpr, WIDTH: tl.constexpr, BITS: tl.constexpr, UNIT: tl.constexpr, SIGNED: tl.constexpr,
    SIZE: tl.constexpr, MARKS: tl.constexpr, HEADS: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """The sum of a pair's share of the rows, by the weights of each query."""
    pair = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    begin = part * share
    b, h = pair // HK, pair % HK
    c = tl.arange(0, BLOCK_C)
    g = tl.arange(0, HEADS)
    channel = c < WIDTH
    total = tl.zeros([HEADS, BLOCK_C], tl.float32)
    for start in range(begin, min(begin + share, count), BLOCK_T):
        t = start + tl.arange(0, BLOCK_T)
        inside = t < min(begin + share, count)
        rows = looked_up_rows(
            first + b * first_b + h * first_h, second + b * second_b + h * second_h, table, factor + pair * count,
            t.to(tl.int64), inside, c, channel, KIND, WIDTH, BITS, UNIT, SIGNED, SIZE, MARKS,
        )  # fmt: skip
        where = weights + pair * G * count + g.to(tl.int64)[:, None] * count + t[None, :]
        w = tl.load(where, mask=(g < G)[:, None] & inside[None, :], other=0.0).to(tl.float32)
        total = tl.dot(w, rows, total, input_precision="ieee")
    where = out + (pair * splits + part) * G * WIDTH + g[:, None] * WIDTH + c[None, :]
    tl.store(where, total, mask=(g < G)[:, None] & channel[None, :])


def _given(rows: CodedRows) -> Given:
    signed = rows.second.shape[3] > 0
    first, second = without_gaps(rows.first), without_gaps(rows.second) if signed else rows.first
    parts = (first, second, rows.table.contiguous(), rows.factor.float().contiguous())
    strides = (*first.stride()[:2], *second.stride()[:2])
    constants = {
        "KIND": rows.kind, "WIDTH": rows.width, "BITS": rows.bits, "UNIT": rows.unit, "SIGNED": signed,
        "SIZE": rows.first.shape[3], "MARKS": max(1, rows.second.shape[3]),
    }  # fmt: skip
    return Given(parts, strides, constants)


def launch_scores(q: Tensor, rows: CodedRows) -> Tensor:
    """Arguments and result as in ``scores_reference``."""
    return scores(coded_scores_fwd_kernel, q, rows, _given(rows))


def launch_sums(weights: Tensor, rows: CodedRows) -> Tensor:
    """Arguments and result as in ``sums_reference``."""
    return sums(coded_sums_fwd_kernel, weights, rows, _given(rows))
