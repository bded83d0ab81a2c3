# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call, misc"
"""Loops over coded rows on a CPU, compiled by numba once and kept on disk. Needs the extra ``tokred[cpu]``.

A few rows at a time are restored in the first cache and multiplied with all queries of a head there. Codes are looked
up a byte at a time, in a table of all that a byte may stand for, and numbers are moved in pairs: so restored, the
numbers of a byte lie side by side, an order that queries are brought into and sums out of. What a closure holds are
numbers alone, so that the compiled code is found on disk again; what they are is known when it is compiled.
"""

from __future__ import annotations

import functools
from typing import Any

import numba
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from tokred.kernels.coded_rows import by_byte
from tokred.kernels.coded_rows.reference import BOOK, LARGEST, LEVELS, CodedRows
from tokred.kernels.loops import by_pair, shares, span
from tokred.kernels.packed_rows.reference import unpack

# float16 as the upper bits of a float32 has an exponent that is 112 too small.
_EXPONENT = np.float32(2.0**112)
# Rows that are restored together.
_ROWS = 16
# How numbers that are left lie in memory: as float32, or as the bits of bfloat16 or float16.
_PLAIN, _BRAIN, _HALF = range(3)
_KINDS = {torch.bfloat16: _BRAIN, torch.float16: _HALF}


@numba.njit(fastmath=True, inline="always")
def _of_bytes(table, bits):
    """Numbers that each byte of codes stands for, or each six bits of codes of three, side by side."""
    per = 2 if bits == 3 else 8 // bits
    found = np.zeros((64 if bits == 3 else 256, max(per, 2)), np.float32)
    for byte in range(found.shape[0]):
        for m in range(per):
            found[byte, m] = table[(byte >> (bits * m)) & ((1 << bits) - 1), 0]
    return found


@numba.njit(fastmath=True, inline="always")
def _levels(codes, found, pairs, p, t, n, rows, wide, scale, width, bits, unit):
    """Restore ``n`` rows of levels, those of a byte side by side; ``scale`` gets what brings each to length one."""
    size = codes.shape[2]
    for k in range(n):
        given, into = codes[p, t + k], wide[k]
        if bits == 3:  # eight codes in a row take three bytes
            for g in range(size // 3):
                word = np.int32(given[3 * g]) | (np.int32(given[3 * g + 1]) << 8) | (np.int32(given[3 * g + 2]) << 16)
                for i in range(4):
                    into[4 * g + i] = pairs[(word >> (6 * i)) & 63, 0]
        elif bits == 8:
            for i in range(size):
                rows[k, i] = found[given[i], 0]
        else:
            for i in range(size):
                byte = given[i]
                for j in range(4 // bits):
                    into[4 // bits * i + j] = pairs[byte, j]
    if unit:  # apart: what was just stored in pieces is slow to be loaded as a whole
        for k in range(n):
            total = np.float32(0.0)
            if bits == 3 or bits == 8 or 8 // bits * size == width:
                for c in range(width):
                    total += rows[k, c] * rows[k, c]
            else:
                for i in range(size):
                    for m in range(8 // bits):
                        if m * size + i < width:
                            total += rows[k, 8 // bits * i + m] * rows[k, 8 // bits * i + m]
            scale[k] *= np.float32(1.0) / np.sqrt(total)


@numba.njit(fastmath=True, inline="always")
def _book(codes, signs, pairs, turned, p, t, n, wide, width, signed):
    """Restore ``n`` rows of entries of eight numbers, two at a time; ``turned`` has the bits of signs of a byte."""
    for k in range(n):
        for g in range(width // 8):
            entry = codes[p, t + k, g]
            if signed:
                sign = signs[p, t + k, g]
                for i in range(4):
                    wide[k, 4 * g + i] = pairs[entry, i] ^ turned[sign, i]
            else:
                for i in range(4):
                    wide[k, 4 * g + i] = pairs[entry, i]


@numba.njit(fastmath=True, inline="always")
def _largest(whole, halves, marks, places, p, t, n, rows, left, words, kind):
    """Restore ``n`` rows of which some numbers are left.

    ``left`` is scratch that begins with a zero, which all channels take that have no number; ``words`` the same memory.
    """
    for k in range(n):
        if kind == 0:
            for j in range(whole.shape[2]):
                left[1 + j] = whole[p, t + k, j]
        elif kind == 1:
            for j in range(halves.shape[2]):
                words[1 + j] = np.int32(halves[p, t + k, j]) << 16
        else:
            for j in range(halves.shape[2]):
                x = np.int32(halves[p, t + k, j])
                words[1 + j] = ((x & 0x8000) << 16) | ((x & 0x7FFF) << 13)
            for j in range(halves.shape[2]):
                left[1 + j] *= _EXPONENT
        at, given, into = np.int32(1), marks[p, t + k], rows[k]
        for i in range(marks.shape[2]):
            byte = given[i]
            for j in range(8):
                into[8 * i + j] = left[max(np.int32(0), at + places[byte, j])]
            at += places[byte, 8]


@numba.njit(fastmath=True, inline="always")
def _restored(
    form, codes, marks, whole, halves, found, pairs, turned, places, factor, p, t, n, rows, wide, scale, left, words,
    width, bits, option,
):  # fmt: skip
    """Restore ``n`` rows of any form, and what each is multiplied by."""
    for k in range(n):
        scale[k] = factor[p, t + k]
    if form == 0:
        _levels(codes, found, pairs, p, t, n, rows, wide, scale, width, bits, option)
    elif form == 1:
        _book(codes, marks, pairs, turned, p, t, n, wide, width, option)
    else:
        _largest(whole, halves, marks, places, p, t, n, rows, left, words, option)


@functools.cache
def _scores(form, width, bits, option, columns, parallel):
    """Products of queries with rows of a form.

    ``option``: what the form's function takes last. ``columns``: numbers of a restored row, an even number.
    """

    @numba.njit(parallel=parallel, fastmath=True, cache=True, nogil=True)
    def run(q, codes, marks, whole, halves, table, places, turned, factor, splits, out):
        pairs, heads, count = q.shape[0], q.shape[1], out.shape[2]
        found = _of_bytes(table, bits) if form == 0 else table
        two = found.view(np.int64)
        for task in numba.prange(pairs * splits):
            p, _, begin, end = span(task, splits, count)
            wide = np.zeros((_ROWS, columns // 2), np.int64)
            rows = wide.view(np.float32)
            scale, line = np.empty(_ROWS, np.float32), np.empty(_ROWS, np.float32)
            words = np.zeros(columns + 9, np.int32)
            left = words.view(np.float32)
            for t in range(begin, end, _ROWS):
                n = min(_ROWS, end - t)
                _restored(form, codes, marks, whole, halves, found, two, turned, places, factor, p, t, n, rows, wide,
                          scale, left, words, width, bits, option)  # fmt: skip
                for h in range(heads):
                    for k in range(0, _ROWS, 4):
                        first = second = third = fourth = np.float32(0.0)
                        for c in range(columns):
                            x = q[p, h, c]
                            first += x * rows[k, c]
                            second += x * rows[k + 1, c]
                            third += x * rows[k + 2, c]
                            fourth += x * rows[k + 3, c]
                        line[k], line[k + 1], line[k + 2], line[k + 3] = first, second, third, fourth
                    for k in range(n):
                        out[p, h, t + k] = line[k] * scale[k]

    return run


@functools.cache
def _sums(form, width, bits, option, columns, parallel):
    """Sums by weights of rows of a form, one for each share of the rows; arguments as for :func:`_scores`."""

    @numba.njit(parallel=parallel, fastmath=True, cache=True, nogil=True)
    def run(weights, codes, marks, whole, halves, table, places, turned, factor, splits, out):
        pairs, heads, count = weights.shape[0], weights.shape[1], weights.shape[2]
        found = _of_bytes(table, bits) if form == 0 else table
        two = found.view(np.int64)
        for task in numba.prange(pairs * splits):
            p, s, begin, end = span(task, splits, count)
            wide = np.zeros((_ROWS, columns // 2), np.int64)
            rows = wide.view(np.float32)
            scale, line = np.empty(_ROWS, np.float32), np.empty(_ROWS, np.float32)
            words = np.zeros(columns + 9, np.int32)
            left = words.view(np.float32)
            total = np.zeros((heads, columns), np.float32)
            for t in range(begin, end, _ROWS):
                n = min(_ROWS, end - t)
                _restored(form, codes, marks, whole, halves, found, two, turned, places, factor, p, t, n, rows, wide,
                          scale, left, words, width, bits, option)  # fmt: skip
                for h in range(heads):
                    for k in range(n):
                        line[k] = weights[p, h, t + k] * scale[k]
                    for k in range(n, _ROWS):
                        line[k] = np.float32(0.0)
                    for k in range(0, _ROWS, 4):
                        first, second, third, fourth = line[k], line[k + 1], line[k + 2], line[k + 3]
                        for c in range(columns):
                            total[h, c] += (
                                first * rows[k, c]
                                + second * rows[k + 1, c]
                                + third * rows[k + 2, c]
                                + fourth * rows[k + 3, c]
                            )
            for h in range(heads):
                for c in range(columns):
                    out[p, s, h, c] = total[h, c]

    return run


@functools.cache
def _places() -> np.ndarray:
    """``[256, 9]`` int32: of each channel whose bit is set in a byte, the first in the highest, how many are before it,
    of the others a number below all; and how many are set."""
    table = np.full((256, 9), -(1 << 20), np.int32)
    for byte in range(256):
        found = [i for i in range(8) if byte >> (7 - i) & 1]
        table[byte, found], table[byte, 8] = range(len(found)), len(found)
    return table


@functools.cache
def _turned() -> np.ndarray:
    """``[256, 4]`` int64: the sign bits of two float32 numbers each, that the bits of a byte turn."""
    bits = np.arange(256)[:, None] >> np.arange(8) & 1
    return (bits.astype(np.uint32) << 31).view(np.int64)


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
    if rows.kind != BOOK:  # pairs of its numbers are never read
        table = table[:, :1] if rows.kind == LEVELS else torch.zeros(1, 2)
    given = [codes, marks, whole, halves, table.contiguous()]
    return (*(x.numpy() for x in given), _places(), _turned(), factor.numpy())


@functools.cache
def _order(size: int, width: int, per: int) -> Tensor:
    """Of each number of a restored row its channel, or ``width`` where it is none; an even number of them.

    ``per``: numbers of a byte that lie side by side, of which channels are ``size`` apart.
    """
    found = torch.arange(size * per).view(per, size).mT.flatten().clamp(max=width)
    return F.pad(found, (0, len(found) % 2), value=width)


def _channels(rows: CodedRows) -> Tensor:
    if rows.kind == LEVELS and rows.bits != 3:
        return _order(rows.first.shape[3], rows.width, 8 // rows.bits)
    return _order(-(-rows.width // 8) * 8, rows.width, 1)


@functools.cache
def _codes(bits: int) -> Tensor:
    """``[256, 8 / bits]`` int64: the codes in each byte."""
    return unpack(torch.arange(256).to(torch.uint8)[:, None], bits, -1, 8 // bits).long()


def _never_restored(rows: CodedRows, splits: int) -> bool:
    """True of so many rows that what a byte adds is looked up; a byte has to stand for the same always."""
    whole = rows.bits in (1, 2, 4) if rows.kind == LEVELS else rows.kind == BOOK and not rows.second.shape[3]
    return whole and rows.count // max(splits, 1) >= by_byte.LEAST


def _by_byte(make: Any, x: Tensor, rows: CodedRows, splits: int, out: Tensor) -> None:
    size, found = rows.first.shape[3], rows.table
    if rows.kind == LEVELS:
        found = rows.table[_codes(rows.bits)]
    step, apart = (1, size) if rows.kind == LEVELS else (8, 1)
    run = make(size, rows.width, found.shape[1], step, apart, int(rows.unit and rows.kind == LEVELS), splits > 0)
    codes, factor = by_pair(rows.first), rows.factor.float().flatten(0, 1).contiguous()
    run(x.numpy(), codes.numpy(), found.contiguous().numpy(), factor.numpy(), max(splits, 1), out.numpy())


def scores(q: Tensor, rows: CodedRows) -> Tensor:
    """``[B, Hk, G, P]`` float32; arguments as in ``scores_reference``."""
    b, heads, g, d = q.shape
    out, splits = torch.empty(b * heads, g, rows.count), shares(b * heads, -(-rows.count // _ROWS))
    asked = q.float().reshape(b * heads, g, d).contiguous()
    if _never_restored(rows, splits):
        _by_byte(by_byte.scores, asked, rows, splits, out)
        return out.view(b, heads, g, -1)
    order = _channels(rows)
    run = _scores(rows.kind, d, rows.bits, _option(rows), len(order), splits > 0)
    asked = F.pad(asked, (0, 1)).index_select(-1, order)
    run(asked.numpy(), *_arrays(rows), max(splits, 1), out.numpy())
    return out.view(b, heads, g, -1)


def sums(weights: Tensor, rows: CodedRows) -> Tensor:
    """``[B, Hk, G, D]`` float32; arguments as in ``sums_reference``."""
    b, heads, g, count = weights.shape
    splits = shares(b * heads, -(-count // _ROWS))
    given = weights.float().reshape(b * heads, g, count).contiguous()
    if _never_restored(rows, splits):
        out = torch.empty(b * heads, max(splits, 1), g, rows.width)
        _by_byte(by_byte.sums, given, rows, splits, out)
        return out.sum(1).view(b, heads, g, rows.width)
    order = _channels(rows)
    run = _sums(rows.kind, rows.width, rows.bits, _option(rows), len(order), splits > 0)
    out = torch.empty(b * heads, max(splits, 1), g, len(order))
    run(given.numpy(), *_arrays(rows), max(splits, 1), out.numpy())
    found = out.new_empty(b * heads, g, rows.width + 1).index_copy_(-1, order, out.sum(1))
    return found[..., : rows.width].reshape(b, heads, g, rows.width)


assert (LEVELS, BOOK, LARGEST) == (0, 1, 2)  # as the loops have them
