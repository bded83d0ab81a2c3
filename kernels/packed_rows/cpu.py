# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call, misc"
"""Loops over packed rows on a CPU, compiled by numba once and kept on disk. Needs the extra ``tokred[cpu]``.

A few rows at a time are unpacked into the first cache and multiplied with all queries of a head there; rows of a whole
cache are never in memory. Numbers of bits and sizes of groups are constants of the compiled code: so short inner loops
become a few vector operations only where their lengths are known.
"""

from __future__ import annotations

import functools

import numba
import numpy as np
import torch
from torch import Tensor

from tokred.kernels.loops import by_pair, shares, span
from tokred.kernels.packed_rows.reference import PackedRows, bytes_of

# float16 as the upper bits of a float32 has an exponent that is 112 too small.
_EXPONENT = np.float32(2.0**112)
# Rows that are restored together: for products, and for sums, a whole number of eights.
_ROWS, _TILE = 16, 32


@functools.cache
def _token_scores(bits, group, width, parallel):
    """Products of queries with rows whose groups run along tokens; scales are multiplied into the queries."""
    per, size, mask = 8 // bits, group * bits // 8, (1 << bits) - 1

    @numba.njit(parallel=parallel, fastmath=True, cache=True, nogil=True)
    def run(q, codes, scale, zero, units, splits, out):
        pairs, heads = q.shape[0], q.shape[1]
        for task in numba.prange(pairs * splits):
            p, _, begin, end = span(task, splits, units)
            halves = np.empty((2, width), np.int32)
            wide = halves.view(np.float32)
            scaled = np.empty((heads, width), np.float32)
            base = np.empty(heads, np.float32)
            rows = np.empty((per, width), np.float32)
            for u in range(begin, end):
                for c in range(width):
                    a, b = np.int32(scale[p, u, c]), np.int32(zero[p, u, c])
                    halves[0, c] = ((a & 0x8000) << 16) | ((a & 0x7FFF) << 13)
                    halves[1, c] = ((b & 0x8000) << 16) | ((b & 0x7FFF) << 13)
                for h in range(heads):
                    total = np.float32(0.0)
                    for c in range(width):
                        total += q[p, h, c] * (wide[1, c] * _EXPONENT)
                        scaled[h, c] = q[p, h, c] * (wide[0, c] * _EXPONENT)
                    base[h] = total
                for j in range(size):
                    for m in range(per):
                        for c in range(width):
                            rows[m, c] = np.float32((codes[p, u, j, c] >> (bits * m)) & mask)
                    for h in range(heads):
                        for m in range(per):
                            total = np.float32(0.0)
                            for c in range(width):
                                total += scaled[h, c] * rows[m, c]
                            out[p, h, u * group + m * size + j] = total + base[h]

    return run


# A global, not one made for each width: what a closure holds is part of the key of what is kept on disk, and that of a
# compiled function is another one in every process.
@numba.njit(fastmath=True, inline="always")
def _restore(codes, scale, zero, p, t, n, halves, wide, rows, bits, group, width):
    """Restore a few rows whose groups run along channels; ``halves`` is scratch, ``wide`` the same as float32."""
    per, size, mask, groups = 8 // bits, group * bits // 8, (1 << bits) - 1, width // group
    for k in range(n):
        for g in range(groups):
            a, b = np.int32(scale[p, t + k, g]), np.int32(zero[p, t + k, g])
            halves[0, k, g] = ((a & 0x8000) << 16) | ((a & 0x7FFF) << 13)
            halves[1, k, g] = ((b & 0x8000) << 16) | ((b & 0x7FFF) << 13)
    for k in range(n):
        for g in range(groups):
            a, b = wide[0, k, g] * _EXPONENT, wide[1, k, g] * _EXPONENT
            for m in range(per):
                for i in range(size):
                    code = np.float32((codes[p, t + k, g * size + i] >> (bits * m)) & mask)
                    rows[k, g * group + m * size + i] = code * a + b


@functools.cache
def _channel_scores(bits, group, width, parallel):
    """Products of queries with rows whose groups run along channels."""
    groups = width // group

    @numba.njit(parallel=parallel, fastmath=True, cache=True, nogil=True)
    def run(q, codes, scale, zero, count, splits, out):
        pairs, heads = q.shape[0], q.shape[1]
        for task in numba.prange(pairs * splits):
            p, _, begin, end = span(task, splits, count)
            halves = np.empty((2, _ROWS, groups), np.int32)
            wide = halves.view(np.float32)
            rows = np.empty((_ROWS, width), np.float32)
            for t in range(begin, end, _ROWS):
                n = min(_ROWS, end - t)
                _restore(codes, scale, zero, p, t, n, halves, wide, rows, bits, group, width)
                for h in range(heads):
                    for k in range(n):
                        total = np.float32(0.0)
                        for c in range(width):
                            total += q[p, h, c] * rows[k, c]
                        out[p, h, t + k] = total

    return run


@functools.cache
def _channel_sums(bits, group, width, parallel):
    """Sums by weights of rows whose groups run along channels; one for each share of the rows.

    Codes that stand in the same place of their bytes are restored together, so that all inner loops run over bytes that
    lie side by side: a group alone has too few. Sums are put in the order of the channels at the end.
    """
    per, mask, groups = 8 // bits, (1 << bits) - 1, width // group
    size, line = group * bits // 8, width * bits // 8  # bytes of a group, and of a row

    @numba.njit(parallel=parallel, fastmath=True, cache=True, nogil=True)
    def run(weights, codes, scale, zero, count, splits, out):
        pairs, heads = weights.shape[0], weights.shape[1]
        for task in numba.prange(pairs * splits):
            p, s, begin, end = span(task, splits, count)
            halves = np.empty((2, _TILE * groups), np.int32)
            wide = halves.view(np.float32)
            steps, lows = np.zeros(_TILE * line, np.float32), np.zeros(_TILE * line, np.float32)
            rows = np.zeros((per, _TILE * line), np.float32)
            some = np.zeros(_TILE, np.float32)
            total = np.zeros((heads, per, line), np.float32)
            for t in range(begin, end, _TILE):
                n = min(_TILE, end - t)
                found = codes[p, t : t + n].reshape(-1)
                scales, zeros = scale[p, t : t + n].reshape(-1), zero[p, t : t + n].reshape(-1)
                for j in range(n * groups):
                    a, b = np.int32(scales[j]), np.int32(zeros[j])
                    halves[0, j] = ((a & 0x8000) << 16) | ((a & 0x7FFF) << 13)
                    halves[1, j] = ((b & 0x8000) << 16) | ((b & 0x7FFF) << 13)
                for j in range(n * groups):
                    a, b = wide[0, j] * _EXPONENT, wide[1, j] * _EXPONENT
                    x, y = steps[j * size : (j + 1) * size], lows[j * size : (j + 1) * size]
                    for i in range(size):
                        x[i] = a
                    for i in range(size):
                        y[i] = b
                for m in range(per):
                    made = rows[m]
                    for j in range(n * line):
                        made[j] = np.float32((found[j] >> (bits * m)) & mask) * steps[j] + lows[j]
                for h in range(heads):
                    # Rows that an earlier tile left behind the last one count nothing.
                    for k in range(n):
                        some[k] = weights[p, h, t + k]
                    for k in range(n, _TILE):
                        some[k] = 0.0
                    for m in range(per):
                        sums = total[h, m]
                        # Eight rows at a time: a sum is read and written once for them.
                        for k in range(0, _TILE, 8):
                            w0, w1, w2, w3 = some[k], some[k + 1], some[k + 2], some[k + 3]
                            w4, w5, w6, w7 = some[k + 4], some[k + 5], some[k + 6], some[k + 7]
                            r = rows[m, k * line : (k + 8) * line]
                            for i in range(line):
                                sums[i] += (
                                    (w0 * r[i] + w1 * r[i + line]) + (w2 * r[i + 2 * line] + w3 * r[i + 3 * line])
                                ) + (
                                    (w4 * r[i + 4 * line] + w5 * r[i + 5 * line])
                                    + (w6 * r[i + 6 * line] + w7 * r[i + 7 * line])
                                )
            for h in range(heads):
                for g in range(groups):
                    for m in range(per):
                        for i in range(size):
                            out[p, s, h, g * group + m * size + i] = total[h, m, g * size + i]

    return run


def scores(q: Tensor, rows: PackedRows) -> Tensor:
    """``[B, Hk, G, P]`` float32; arguments as in ``scores_reference``."""
    b, heads, g, d = q.shape
    out = torch.empty(b * heads, g, rows.count)
    units = rows.codes.shape[2]
    splits = shares(b * heads, units)
    run = (_token_scores if rows.tokens else _channel_scores)(rows.bits, rows.group, d, splits > 0)
    run(q.float().reshape(b * heads, g, d).numpy(), *_arrays(rows), units, max(splits, 1), out.numpy())
    return out.view(b, heads, g, -1)


def sums(weights: Tensor, rows: PackedRows) -> Tensor:
    """``[B, Hk, G, D]`` float32; arguments as in ``sums_reference``."""
    b, heads, g, count = weights.shape
    splits, d = shares(b * heads, count), rows.width
    run = _channel_sums(rows.bits, rows.group, d, splits > 0)
    out = torch.empty(b * heads, max(splits, 1), g, d)
    given = weights.float().reshape(b * heads, g, count).numpy()
    run(given, *_arrays(rows), count, max(splits, 1), out.numpy())
    return out.sum(1).view(b, heads, g, d)


def _arrays(rows: PackedRows) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Codes and the bits of scales and zeros as arrays of pairs."""
    codes = rows.codes if rows.tokens else rows.codes.flatten(3)
    assert codes.shape[-2 if rows.tokens else -1] or not bytes_of(rows.group, rows.bits)
    halves = (x.view(torch.int16) for x in (rows.scale, rows.zero))
    return tuple(by_pair(x).numpy() for x in (codes, *halves))  # type: ignore[return-value]
