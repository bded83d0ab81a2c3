# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call, misc"
"""Loops over coded rows on a CPU, compiled by numba once and kept on disk. Needs the extra ``tokred[cpu]``.

A few rows at a time are restored in the first cache and multiplied with all queries of a head there. What a closure
holds are numbers alone, so that the compiled code is found on disk again; what they are is known when it is compiled.
"""

from __future__ import annotations

import functools

import numba
import numpy as np
import torch
from torch import Tensor

from tokred.kernels.coded_rows.reference import BOOK, LARGEST, LEVELS, CodedRows
from tokred.kernels.loops import by_pair, shares

# float16 as the upper bits of a float32 has an exponent that is 112 too small.
_EXPONENT = np.float32(2.0**112)
# Rows that are restored together.
_ROWS = 16
# How numbers that are left lie in memory: as float32, or as the bits of bfloat16 or float16.
_PLAIN, _BRAIN, _HALF = range(3)
_KINDS = {torch.bfloat16: _BRAIN, torch.float16: _HALF}


@numba.njit(fastmath=True, inline="always")
def _levels(codes, table, p, t, n, rows, width, bits, unit):
    """Restore ``n`` rows of levels."""
    size, mask = codes.shape[2], (1 << bits) - 1
    for k in range(n):
        if bits == 3:  # eight codes in a row take three bytes
            for c in range(width):
                at, shift = c // 8 * 3 + c % 8 * 3 // 8, c % 8 * 3 % 8
                byte = np.int32(codes[p, t + k, at])
                if shift > 5:
                    byte |= np.int32(codes[p, t + k, at + 1]) << 8
                rows[k, c] = table[(byte >> shift) & mask, 0]
        else:
            for m in range(8 // bits):
                for i in range(size):
                    if m * size + i < width:
                        rows[k, m * size + i] = table[(codes[p, t + k, i] >> (bits * m)) & mask, 0]
        if unit:
            total = np.float32(0.0)
            for c in range(width):
                total += rows[k, c] * rows[k, c]
            total = np.float32(1.0) / np.sqrt(total)
            for c in range(width):
                rows[k, c] *= total


@numba.njit(fastmath=True, inline="always")
def _book(codes, signs, table, p, t, n, rows, width, signed):
    """Restore ``n`` rows of entries of eight numbers."""
    for k in range(n):
        for g in range(width // 8):
            entry = codes[p, t + k, g]
            if signed:
                sign = np.int32(signs[p, t + k, g])
                for i in range(8):
                    rows[k, 8 * g + i] = table[entry, i] * np.float32(1 - 2 * ((sign >> i) & 1))
            else:
                for i in range(8):
                    rows[k, 8 * g + i] = table[entry, i]


@numba.njit(fastmath=True, inline="always")
def _largest(whole, halves, bits, places, p, t, n, rows, word, wide, width, kind):
    """Restore ``n`` rows of which some numbers are left; ``word`` is scratch, ``wide`` the same memory as float32."""
    for k in range(n):
        for c in range(width):
            rows[k, c] = np.float32(0.0)
        at = 0
        for i in range(bits.shape[2]):
            byte = bits[p, t + k, i]
            for j in range(places[byte, 8]):
                if kind == 0:
                    value = whole[p, t + k, at]
                elif kind == 1:
                    word[0] = np.int32(halves[p, t + k, at]) << 16
                    value = wide[0]
                else:
                    x = np.int32(halves[p, t + k, at])
                    word[0] = ((x & 0x8000) << 16) | ((x & 0x7FFF) << 13)
                    value = wide[0] * _EXPONENT
                rows[k, 8 * i + places[byte, j]] = value
                at += 1


@functools.cache
def _scores(form, width, bits, option, parallel):
    """Products of queries with rows of a form; ``option`` is what the form's function takes last."""

    @numba.njit(parallel=parallel, fastmath=True, cache=True, nogil=True)
    def run(q, codes, marks, whole, halves, table, places, factor, splits, out):
        pairs, heads, count = q.shape[0], q.shape[1], out.shape[2]
        share = (count + splits - 1) // splits
        for task in numba.prange(pairs * splits):
            p = task // splits
            begin = (task % splits) * share
            end = min(begin + share, count)
            word = np.empty(1, np.int32)
            wide = word.view(np.float32)
            rows = np.empty((_ROWS, width), np.float32)
            for t in range(begin, end, _ROWS):
                n = min(_ROWS, end - t)
                if form == 0:
                    _levels(codes, table, p, t, n, rows, width, bits, option)
                elif form == 1:
                    _book(codes, marks, table, p, t, n, rows, width, option)
                else:
                    _largest(whole, halves, marks, places, p, t, n, rows, word, wide, width, option)
                for h in range(heads):
                    for k in range(n):
                        total = np.float32(0.0)
                        for c in range(width):
                            total += q[p, h, c] * rows[k, c]
                        out[p, h, t + k] = total * factor[p, t + k]

    return run


@functools.cache
def _sums(form, width, bits, option, parallel):
    """Sums by weights of rows of a form, one for each share of the rows; arguments as for :func:`_scores`."""

    @numba.njit(parallel=parallel, fastmath=True, cache=True, nogil=True)
    def run(weights, codes, marks, whole, halves, table, places, factor, splits, out):
        pairs, heads, count = weights.shape[0], weights.shape[1], weights.shape[2]
        share = (count + splits - 1) // splits
        for task in numba.prange(pairs * splits):
            p, s = task // splits, task % splits
            begin = s * share
            end = min(begin + share, count)
            word = np.empty(1, np.int32)
            wide = word.view(np.float32)
            rows = np.empty((_ROWS, width), np.float32)
            total = np.zeros((heads, width), np.float32)
            for t in range(begin, end, _ROWS):
                n = min(_ROWS, end - t)
                if form == 0:
                    _levels(codes, table, p, t, n, rows, width, bits, option)
                elif form == 1:
                    _book(codes, marks, table, p, t, n, rows, width, option)
                else:
                    _largest(whole, halves, marks, places, p, t, n, rows, word, wide, width, option)
                for h in range(heads):
                    for k in range(n):
                        w = weights[p, h, t + k] * factor[p, t + k]
                        for c in range(width):
                            total[h, c] += w * rows[k, c]
            for h in range(heads):
                for c in range(width):
                    out[p, s, h, c] = total[h, c]

    return run


@functools.cache
def _places() -> np.ndarray:
    """``[256, 9]`` uint8: channels whose bits are set in a byte, the first in the highest, and how many."""
    table = np.zeros((256, 9), np.uint8)
    for byte in range(256):
        found = [i for i in range(8) if byte >> (7 - i) & 1]
        table[byte, : len(found)], table[byte, 8] = found, len(found)
    return table


def _option(rows: CodedRows) -> int:
    if rows.kind == LARGEST:
        return _KINDS.get(rows.first.dtype, _PLAIN)
    return int(rows.second.shape[3] > 0 if rows.kind == BOOK else rows.unit)


def _arrays(rows: CodedRows) -> tuple[np.ndarray, ...]:
    """Arguments of the loops; arrays of one number stand for what a form does not have."""
    byte, short, number = (torch.zeros(1, 1, 1, dtype=x) for x in (torch.uint8, torch.int16, torch.float32))
    codes, marks, whole, halves, table = byte, byte, number, short, number[0]
    if rows.kind == LARGEST:
        marks = by_pair(rows.second)
        if rows.first.dtype in _KINDS:
            halves = by_pair(rows.first.view(torch.int16))
        else:
            whole = by_pair(rows.first.float())
    else:
        codes, table = by_pair(rows.first), rows.table.reshape(len(rows.table), -1)
        marks = by_pair(rows.second) if rows.second.shape[3] else byte
    factor = rows.factor.float().flatten(0, 1).contiguous()
    given = [codes, marks, whole, halves, table.contiguous()]
    return (*(x.numpy() for x in given), _places(), factor.numpy())


def scores(q: Tensor, rows: CodedRows) -> Tensor:
    """``[B, Hk, G, P]`` float32; arguments as in ``scores_reference``."""
    b, heads, g, d = q.shape
    out, splits = torch.empty(b * heads, g, rows.count), shares(b * heads, -(-rows.count // _ROWS))
    run = _scores(rows.kind, d, rows.bits, _option(rows), splits > 0)
    run(q.float().reshape(b * heads, g, d).numpy(), *_arrays(rows), max(splits, 1), out.numpy())
    return out.view(b, heads, g, -1)


def sums(weights: Tensor, rows: CodedRows) -> Tensor:
    """``[B, Hk, G, D]`` float32; arguments as in ``sums_reference``."""
    b, heads, g, count = weights.shape
    splits = shares(b * heads, -(-count // _ROWS))
    run = _sums(rows.kind, rows.width, rows.bits, _option(rows), splits > 0)
    out = torch.empty(b * heads, max(splits, 1), g, rows.width)
    run(weights.float().reshape(b * heads, g, count).numpy(), *_arrays(rows), max(splits, 1), out.numpy())
    return out.sum(1).view(b, heads, g, rows.width)


assert (LEVELS, BOOK, LARGEST) == (0, 1, 2)  # as the loops have them
