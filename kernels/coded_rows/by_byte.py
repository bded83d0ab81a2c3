# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"
"""Loops over many rows of codes on a CPU that restore none of them, compiled by numba as those of ``cpu``.

What a byte of codes adds to a product depends on its place in a row and on its value alone. So for three queries at a
time a table of all of it is made, ``[places * 256, 4]``, whose last column adds up to a row's squared length; a row is
then a sum of entries, a byte each. Sums by weights go the other way: weights are added up by place and value, and
multiplied by what the values stand for in the end.
"""

from __future__ import annotations

import functools

import numba
import numpy as np

from tokred.kernels.loops import span

# Queries of a table; the fourth column is that of lengths.
_LANES = 3
# Rows from which on a table costs less than it saves.
LEAST = 1024


@numba.njit(fastmath=True, inline="always")
def _squared(found, size, width, per, step, apart):
    """``[places * 256]``: what a byte adds to the squared length of a row of ``width`` numbers."""
    squares = np.zeros(size * 256, np.float32)
    for i in range(size):
        for byte in range(256):
            for m in range(per):
                if step * i + apart * m < width:
                    squares[256 * i + byte] += found[byte, m] * found[byte, m]
    return squares


@functools.cache
def scores(size, width, per, step, apart, unit, parallel):
    """Products of queries ``[pairs, G, D]`` with rows of ``size`` bytes.

    ``per``: numbers of a byte. ``step``: channels from the first of them to the first of the next byte; ``apart``: from
    one of them to the next of the same byte. What the loops take as ``found`` is the numbers, ``[256, per]``.
    """

    @numba.njit(parallel=parallel, fastmath=True, cache=True, nogil=True)
    def run(q, codes, found, factor, splits, out):
        pairs, heads, count = q.shape[0], q.shape[1], out.shape[2]
        squares = _squared(found, size, width, per, step, apart)
        for task in numba.prange(pairs * splits):
            p, _, begin, end = span(task, splits, count)
            adds = np.zeros((size * 256, 4), np.float32)
            adds[:, 3] = squares
            for h in range(0, heads, _LANES):
                lanes = min(_LANES, heads - h)
                for i in range(size):
                    for byte in range(256):
                        for j in range(lanes):
                            total = np.float32(0.0)
                            for m in range(per):
                                if step * i + apart * m < width:
                                    total += q[p, h + j, step * i + apart * m] * found[byte, m]
                            adds[256 * i + byte, j] = total
                for t in range(begin, end):
                    first = second = third = length = np.float32(0.0)
                    for i in range(size):
                        at = 256 * i + np.int64(codes[p, t, i])
                        first += adds[at, 0]
                        second += adds[at, 1]
                        third += adds[at, 2]
                        length += adds[at, 3]
                    scale = factor[p, t] / np.sqrt(length) if unit else factor[p, t]
                    out[p, h, t] = first * scale
                    if lanes > 1:
                        out[p, h + 1, t] = second * scale
                    if lanes > 2:
                        out[p, h + 2, t] = third * scale

    return run


@functools.cache
def sums(size, width, per, step, apart, unit, parallel):
    """Sums by weights ``[pairs, G, P]``, one for each share of the rows; rows as for :func:`scores`."""

    @numba.njit(parallel=parallel, fastmath=True, cache=True, nogil=True)
    def run(weights, codes, found, factor, splits, out):
        pairs, heads, count = weights.shape[0], weights.shape[1], weights.shape[2]
        squares = _squared(found, size, width, per, step, apart)
        for task in numba.prange(pairs * splits):
            p, s, begin, end = span(task, splits, count)
            scale = np.empty(max(end - begin, 0), np.float32)
            for t in range(begin, end):
                scale[t - begin] = factor[p, t]
                if unit:
                    length = np.float32(0.0)
                    for i in range(size):
                        length += squares[256 * i + np.int64(codes[p, t, i])]
                    scale[t - begin] /= np.sqrt(length)
            added = np.empty((size * 256, 4), np.float32)
            for h in range(0, heads, _LANES):
                lanes = min(_LANES, heads - h)
                added[:] = np.float32(0.0)
                for t in range(begin, end):
                    first, second, third = weights[p, h, t] * scale[t - begin], np.float32(0.0), np.float32(0.0)
                    if lanes > 1:
                        second = weights[p, h + 1, t] * scale[t - begin]
                    if lanes > 2:
                        third = weights[p, h + 2, t] * scale[t - begin]
                    for i in range(size):
                        at = 256 * i + np.int64(codes[p, t, i])
                        added[at, 0] += first
                        added[at, 1] += second
                        added[at, 2] += third
                for j in range(lanes):
                    for i in range(size):
                        for m in range(per):
                            if step * i + apart * m < width:
                                total = np.float32(0.0)
                                for byte in range(256):
                                    total += added[256 * i + byte, j] * found[byte, m]
                                out[p, s, h + j, step * i + apart * m] = total

    return run
