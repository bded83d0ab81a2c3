# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"
"""Triton kernels: best match, top k, and the sum of a function, each in one pass over ``b`` with fused normalisation.

One program owns a block of rows of ``a`` and walks over blocks of rows of ``b``. A block of similarities lives in
registers: products with float32 accumulation, scaled by what the same loads say about the norms of ``b``. The norm of a
row of ``a`` changes no order, so it is applied once at the end. Where there are few programs, the walk is cut in splits
that are put together afterwards, lower indices first. Nothing is added by atomics: results are the same in every run.
"""

from __future__ import annotations

import triton
import triton.language as tl

METRICS = {"cosine": 0, "dot": 1, "distance": 2}
FUNCTIONS = {"elu": 0, "gaussian": 1, "identity": 2, "relu": 3, "count": 4}
_COSINE, _DOT, _DISTANCE = (tl.constexpr(value) for value in METRICS.values())
_ELU, _GAUSSIAN, _IDENTITY, _RELU, _COUNT = (tl.constexpr(value) for value in FUNCTIONS.values())
_FLOOR = tl.constexpr(1e-6)
_NEVER = tl.constexpr(2**31 - 1)

# Lengths change from layer to layer: a kernel per length would compile again in each.
_LENGTHS = ["NA", "NB", "inner", "tokens", "per_split"]


@triton.jit
def _program(NA, inner, SPLITS: tl.constexpr, BLOCK_M: tl.constexpr):
    """The rows of this program, its split, and its place in the two batch dimensions."""
    pid = tl.program_id(0)
    tiles = tl.cdiv(NA, BLOCK_M)
    rest = pid // tiles
    batch = (rest // SPLITS).to(tl.int64)
    rows = (pid % tiles) * BLOCK_M + tl.arange(0, BLOCK_M)
    return rows, rest % SPLITS, batch, batch // inner, batch % inner


@triton.jit
def _rows(index, n, group, positions, mask, stride, HAS_POSITIONS: tl.constexpr, HAS_MASK: tl.constexpr):
    """Where the rows at ``index`` lie, and which of them take part."""
    valid = index < n
    row = index.to(tl.int64)
    if HAS_POSITIONS:
        row = tl.load(positions + group * n + index, mask=valid, other=-1)
        valid = valid & (row >= 0)
        row = tl.maximum(row, 0)
    if HAS_MASK:
        valid = valid & (tl.load(mask + row * stride, mask=valid, other=0) != 0)
    return row, valid


@triton.jit
def _tile(x, row, valid, d, D, stride_n, stride_d, UPCAST: tl.constexpr):
    tile = tl.load(x + row[:, None] * stride_n + d[None, :] * stride_d, mask=valid[:, None] & (d < D)[None, :], other=0)
    if UPCAST:
        tile = tile.to(tl.float32)  # the interpreter cannot multiply bfloat16
    return tile


@triton.jit
def _square(tile):
    wide = tile.to(tl.float32)
    return tl.sum(wide * wide, axis=1)


@triton.jit
def _own(a, row, valid, D, a_n, a_d, UPCAST: tl.constexpr, ONE_CHUNK: tl.constexpr, BLOCK_D: tl.constexpr):
    """The program's rows of ``a`` (their last chunk, where they are read in several) and their squared norms."""
    d = tl.arange(0, BLOCK_D).to(tl.int64)
    tile = _tile(a, row, valid, d, D, a_n, a_d, UPCAST)
    square = _square(tile)
    if not ONE_CHUNK:
        for start in range(BLOCK_D, D, BLOCK_D):
            square += _square(_tile(a, row, valid, start + d, D, a_n, a_d, UPCAST))
    return tile, square


@triton.jit
def _ranks(
    own, a, a_row, a_valid, b, b_row, b_valid, b_square, D, a_n, a_d, b_n, b_d,
    METRIC: tl.constexpr, HAS_SQUARE: tl.constexpr, UPCAST: tl.constexpr, ONE_CHUNK: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """A block ``(BLOCK_M, BLOCK_N)`` of ``a.b/|b|``, ``a.b`` or ``2 a.b - |b|^2``: similarity but for ``_finish``."""
    d = tl.arange(0, BLOCK_D).to(tl.int64)
    square = tl.zeros([BLOCK_N], tl.float32)
    if ONE_CHUNK:
        tile = _tile(b, b_row, b_valid, d, D, b_n, b_d, UPCAST)
        product = tl.dot(own, tl.trans(tile), input_precision="ieee")
        if METRIC != _DOT and not HAS_SQUARE:
            square = _square(tile)
    else:
        product = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for start in range(0, D, BLOCK_D):
            left = _tile(a, a_row, a_valid, start + d, D, a_n, a_d, UPCAST)
            tile = _tile(b, b_row, b_valid, start + d, D, b_n, b_d, UPCAST)
            product = tl.dot(left, tl.trans(tile), product, input_precision="ieee")
            if METRIC != _DOT and not HAS_SQUARE:
                square += _square(tile)
    if METRIC != _DOT and HAS_SQUARE:
        square = tl.load(b_square + b_row, mask=b_valid, other=0)
    if METRIC == _COSINE:
        product = product * (1.0 / tl.maximum(tl.sqrt_rn(square), _FLOOR))[None, :]
    if METRIC == _DISTANCE:
        product = 2 * product - square[None, :]
    return product


@triton.jit
def _finish(rank, square, METRIC: tl.constexpr):
    """Similarities from ranks, with the squared norms of ``a`` in the same shape."""
    if METRIC == _COSINE:
        rank = rank / tl.maximum(tl.sqrt_rn(square), _FLOOR)
    if METRIC == _DISTANCE:
        rank = -tl.sqrt_rn(tl.maximum(square - rank, 0.0))
    return rank


@triton.jit
def _first_largest(rank, columns):
    """Largest value of each row and the lowest column that has it; cheaper than a reduction over pairs."""
    largest = tl.max(rank, axis=1)
    return largest, tl.min(tl.where(rank == largest[:, None], columns[None, :], _NEVER), axis=1)


@triton.jit
def _answer(column, found, b_positions, group, NB, HAS_POSITIONS: tl.constexpr):
    """The index to store: a position of ``b`` where rows are grouped, 0 where there is no partner."""
    column = tl.where(found, column, 0)
    if HAS_POSITIONS:
        return tl.load(b_positions + group * NB + column, mask=found, other=0)
    return column.to(tl.int64)


@triton.jit(do_not_specialize=_LENGTHS)
def best_match_fwd_kernel(
    a, b, a_mask, b_mask, a_positions, b_positions, b_square, score, index,
    NA, NB, D, inner, tokens, per_split,
    a_outer, a_inner, a_n, a_d, b_outer, b_inner, b_n, b_d,
    am_outer, am_inner, am_n, bm_outer, bm_inner, bm_n, batches,
    METRIC: tl.constexpr, EXCLUDE_SELF: tl.constexpr, HAS_POSITIONS: tl.constexpr, HAS_A_MASK: tl.constexpr,
    HAS_B_MASK: tl.constexpr, HAS_SQUARE: tl.constexpr, UPCAST: tl.constexpr, SPLITS: tl.constexpr,
    ONE_CHUNK: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Best column of each row, per split: ``score`` and ``index`` are ``(SPLITS, batches, NA)``."""
    rows, split, batch, outer, group = _program(NA, inner, SPLITS, BLOCK_M)
    a_mask += outer * am_outer + group * am_inner
    b_mask += outer * bm_outer + group * bm_inner
    a += outer * a_outer + group * a_inner
    b += outer * b_outer + group * b_inner
    b_square += (outer if HAS_POSITIONS else batch) * tokens
    a_row, a_valid = _rows(rows, NA, group, a_positions, a_mask, am_n, HAS_POSITIONS, HAS_A_MASK)
    own, square = _own(a, a_row, a_valid, D, a_n, a_d, UPCAST, ONE_CHUNK, BLOCK_D)
    best = tl.full([BLOCK_M], float("-inf"), tl.float32)
    best_column = tl.zeros([BLOCK_M], tl.int32)
    end = tl.minimum((split + 1) * per_split, NB)
    for start in range(split * per_split, end, BLOCK_N):
        columns = start + tl.arange(0, BLOCK_N)
        b_row, b_valid = _rows(columns, NB, group, b_positions, b_mask, bm_n, HAS_POSITIONS, HAS_B_MASK)
        b_valid = b_valid & (columns < end)
        rank = _ranks(
            own, a, a_row, a_valid, b, b_row, b_valid, b_square, D, a_n, a_d, b_n, b_d,
            METRIC, HAS_SQUARE, UPCAST, ONE_CHUNK, BLOCK_M, BLOCK_N, BLOCK_D,
        )  # fmt: skip
        takes_part = b_valid[None, :]
        if EXCLUDE_SELF:
            takes_part = takes_part & (columns[None, :] != rows[:, None])
        largest, column = _first_largest(tl.where(takes_part, rank, float("-inf")), columns)
        better = largest > best  # strictly: an equal score further right does not replace the one found
        best = tl.where(better, largest, best)
        best_column = tl.where(better, column, best_column)
    found = a_valid & (best > float("-inf"))
    best = tl.where(found, _finish(best, square, METRIC), float("-inf"))
    at = (split * batches + batch) * NA + rows
    tl.store(score + at, best, mask=rows < NA)
    tl.store(index + at, _answer(best_column, found, b_positions, group, NB, HAS_POSITIONS), mask=rows < NA)


@triton.jit
def _insert(rank, columns, values, taken, slots, BLOCK_M: tl.constexpr):
    """Move the largest columns of a block into the unordered lists ``values`` and ``taken`` while they belong there."""
    largest, column = _first_largest(rank, columns)
    lowest = tl.min(values, axis=1)
    while tl.max((largest > lowest).to(tl.int32), axis=0) > 0:
        # Of equal lowest values the one with the highest column leaves; slots that hold the same column are empty.
        last = tl.max(tl.where(values == lowest[:, None], taken, -1), axis=1)
        leaves = (values == lowest[:, None]) & (taken == last[:, None]) & (largest > lowest)[:, None]
        values = tl.where(leaves, largest[:, None], values)
        taken = tl.where(leaves, column[:, None], taken)
        rank = tl.where(columns[None, :] == column[:, None], float("-inf"), rank)
        largest, column = _first_largest(rank, columns)
        lowest = tl.min(values, axis=1)
    return values, taken


@triton.jit(do_not_specialize=_LENGTHS)
def topk_fwd_kernel(
    a, b, a_mask, b_mask, a_positions, b_positions, b_square, score, index,
    NA, NB, D, inner, tokens, per_split,
    a_outer, a_inner, a_n, a_d, b_outer, b_inner, b_n, b_d,
    am_outer, am_inner, am_n, bm_outer, bm_inner, bm_n, batches,
    METRIC: tl.constexpr, EXCLUDE_SELF: tl.constexpr, HAS_POSITIONS: tl.constexpr, HAS_A_MASK: tl.constexpr,
    HAS_B_MASK: tl.constexpr, HAS_SQUARE: tl.constexpr, UPCAST: tl.constexpr, SPLITS: tl.constexpr,
    ONE_CHUNK: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    K: tl.constexpr, SLOTS: tl.constexpr,
):  # fmt: skip
    """The ``K`` best columns of each row in order: ``score`` and ``index`` are ``(batches, NA, K)``; one split."""
    rows, _, batch, outer, group = _program(NA, inner, SPLITS, BLOCK_M)
    a_mask += outer * am_outer + group * am_inner
    b_mask += outer * bm_outer + group * bm_inner
    a += outer * a_outer + group * a_inner
    b += outer * b_outer + group * b_inner
    b_square += (outer if HAS_POSITIONS else batch) * tokens
    a_row, a_valid = _rows(rows, NA, group, a_positions, a_mask, am_n, HAS_POSITIONS, HAS_A_MASK)
    own, square = _own(a, a_row, a_valid, D, a_n, a_d, UPCAST, ONE_CHUNK, BLOCK_D)
    slots = tl.arange(0, SLOTS)
    # Slots beyond K hold +inf and never leave; they are passed over when the list is read.
    values = tl.where((slots < K)[None, :], float("-inf"), float("inf")) + tl.zeros([BLOCK_M, SLOTS], tl.float32)
    taken = (slots + (_NEVER - SLOTS))[None, :] + tl.zeros([BLOCK_M, SLOTS], tl.int32)
    for start in range(0, NB, BLOCK_N):
        columns = start + tl.arange(0, BLOCK_N)
        b_row, b_valid = _rows(columns, NB, group, b_positions, b_mask, bm_n, HAS_POSITIONS, HAS_B_MASK)
        rank = _ranks(
            own, a, a_row, a_valid, b, b_row, b_valid, b_square, D, a_n, a_d, b_n, b_d,
            METRIC, HAS_SQUARE, UPCAST, ONE_CHUNK, BLOCK_M, BLOCK_N, BLOCK_D,
        )  # fmt: skip
        takes_part = b_valid[None, :] & a_valid[:, None]
        if EXCLUDE_SELF:
            takes_part = takes_part & (columns[None, :] != rows[:, None])
        rank = tl.where(takes_part, rank, float("-inf"))
        values, taken = _insert(rank, columns, values, taken, slots, BLOCK_M)
    values = tl.where((slots < K)[None, :], values, float("-inf"))
    for place in range(K):
        best = tl.max(values, axis=1)
        column = tl.min(tl.where(values == best[:, None], taken, _NEVER), axis=1)
        values = tl.where(taken == column[:, None], float("-inf"), values)
        found = best > float("-inf")
        at = (batch * NA + rows) * K + place
        tl.store(score + at, tl.where(found, _finish(best, square, METRIC), float("-inf")), mask=rows < NA)
        tl.store(index + at, _answer(column, found, b_positions, group, NB, HAS_POSITIONS), mask=rows < NA)


@triton.jit
def _transform(s, margin, alpha, FUNCTION: tl.constexpr):
    """The function under the sum; the normal density without its constant factor."""
    if FUNCTION == _ELU:
        s -= margin
        s = tl.where(s > 0, s, alpha * (tl.exp(tl.minimum(s, 0.0)) - 1))
    elif FUNCTION == _GAUSSIAN:
        u = (1 - s) / (1 - margin)
        s = tl.exp(-0.5 * u * u)
    elif FUNCTION == _IDENTITY:
        s -= margin
    elif FUNCTION == _RELU:
        s = tl.maximum(s - margin, 0.0)
    else:
        s = (s >= margin).to(tl.float32)
    return s


@triton.jit(do_not_specialize=[*_LENGTHS, "margin", "alpha"])
def row_sum_fwd_kernel(
    a, b, a_mask, b_mask, a_positions, b_positions, b_square, out,
    NA, NB, D, inner, tokens, per_split,
    a_outer, a_inner, a_n, a_d, b_outer, b_inner, b_n, b_d,
    am_outer, am_inner, am_n, bm_outer, bm_inner, bm_n, batches, margin, alpha,
    METRIC: tl.constexpr, FUNCTION: tl.constexpr, HAS_POSITIONS: tl.constexpr, HAS_A_MASK: tl.constexpr,
    HAS_B_MASK: tl.constexpr, HAS_SQUARE: tl.constexpr, UPCAST: tl.constexpr, SPLITS: tl.constexpr,
    ONE_CHUNK: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Sum of a function of each row's similarities, per split: ``out`` is ``(SPLITS, batches, NA)``."""
    rows, split, batch, outer, group = _program(NA, inner, SPLITS, BLOCK_M)
    a_mask += outer * am_outer + group * am_inner
    b_mask += outer * bm_outer + group * bm_inner
    a += outer * a_outer + group * a_inner
    b += outer * b_outer + group * b_inner
    b_square += (outer if HAS_POSITIONS else batch) * tokens
    a_row, a_valid = _rows(rows, NA, group, a_positions, a_mask, am_n, HAS_POSITIONS, HAS_A_MASK)
    own, square = _own(a, a_row, a_valid, D, a_n, a_d, UPCAST, ONE_CHUNK, BLOCK_D)
    total = tl.zeros([BLOCK_M], tl.float32)
    end = tl.minimum((split + 1) * per_split, NB)
    for start in range(split * per_split, end, BLOCK_N):
        columns = start + tl.arange(0, BLOCK_N)
        b_row, b_valid = _rows(columns, NB, group, b_positions, b_mask, bm_n, HAS_POSITIONS, HAS_B_MASK)
        b_valid = b_valid & (columns < end)
        rank = _ranks(
            own, a, a_row, a_valid, b, b_row, b_valid, b_square, D, a_n, a_d, b_n, b_d,
            METRIC, HAS_SQUARE, UPCAST, ONE_CHUNK, BLOCK_M, BLOCK_N, BLOCK_D,
        )  # fmt: skip
        values = _transform(_finish(rank, square[:, None], METRIC), margin, alpha, FUNCTION)
        total += tl.sum(tl.where(b_valid[None, :], values, 0.0), axis=1)
    at = (split * batches + batch) * NA + rows
    tl.store(out + at, tl.where(a_valid, total, 0.0), mask=rows < NA)


@triton.jit(do_not_specialize=["N"])
def row_square_kernel(
    x, out, N, D, inner, x_outer, x_inner, x_n, x_d, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Squared norms of all rows, ``(outer * inner, N)``: read once where many programs would each recompute them."""
    pid = tl.program_id(0)
    tiles = tl.cdiv(N, BLOCK_N)
    batch = (pid // tiles).to(tl.int64)
    rows = (pid % tiles) * BLOCK_N + tl.arange(0, BLOCK_N)
    x += (batch // inner) * x_outer + (batch % inner) * x_inner
    d = tl.arange(0, BLOCK_D).to(tl.int64)
    square = tl.zeros([BLOCK_N], tl.float32)
    for start in range(0, D, BLOCK_D):
        square += _square(_tile(x, rows.to(tl.int64), rows < N, start + d, D, x_n, x_d, False))
    tl.store(out + batch * N + rows, square, mask=rows < N)
