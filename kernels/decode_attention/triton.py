# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"
"""Triton kernels of decode attention, split over the keys: partial results of chunks, their combination, the weights.

The rows of a (sample, key/value head) pair are cut into chunks, one program each; in the flattened layout every program
finds its pair and chunk from the offsets, so that nothing about the lengths has to be known on the host. All query
heads of the pair are rows of one matrix: keys and values are read once. Every result is owned by one program.
"""

from __future__ import annotations

import triton
import triton.language as tl

from tokred.kernels.column_scores.triton import load_rows, products, to_log2

LN2 = tl.constexpr(0.6931471805599453)
INF = tl.constexpr(float("inf"))


@triton.jit
def flat_chunk(offsets, pairs, chunk, tile, PAIRS: tl.constexpr):
    """Pair, first row and end of chunk ``tile`` of a flattened cache; every pair has a chunk, even without rows."""
    i = tl.arange(0, PAIRS)
    valid = i < pairs
    start = tl.load(offsets + i, mask=valid, other=0)
    stop = tl.load(offsets + i + 1, mask=valid, other=0)
    count = tl.where(valid, tl.maximum((stop - start + chunk - 1) // chunk, 1), 0)
    pair = tl.sum((valid & (tl.cumsum(count, 0) <= tile)).to(tl.int32), 0)
    before = tl.sum(tl.where(i < pair, count, 0), 0)
    begin = tl.sum(tl.where(i == pair, start, 0), 0) + (tile - before) * chunk
    return pair, begin, tl.minimum(begin + chunk, tl.sum(tl.where(i == pair, stop, 0), 0))


@triton.jit
def visible(
    n, inside, positions, query_position, last, key_mask, length,
    HAS_POSITIONS: tl.constexpr, HAS_QUERY: tl.constexpr, HAS_MASK: tl.constexpr, p_n, mask_n,
):  # fmt: skip
    """Which slots ``n`` the query sees; the pointers are those of the sample (and head)."""
    seen = inside
    if HAS_POSITIONS:
        limit = last
        if HAS_QUERY:
            limit = tl.minimum(tl.load(query_position), last)
        at = tl.load(positions + n * p_n, mask=inside, other=0)
        seen = seen & (at <= limit)
        if HAS_MASK:
            within = seen & (at < length)
            value = tl.load(key_mask + at.to(tl.int64) * mask_n, mask=within, other=1)
            seen = seen & (value != 0)
    elif HAS_MASK:
        seen = seen & (tl.load(key_mask + n * mask_n, mask=inside, other=0) != 0)
    return seen


@triton.jit(do_not_specialize=["pairs", "splits", "chunk", "rows", "last", "length"])
def decode_fwd_kernel(
    q, k, v, offsets, positions, query_position, key_mask, partial, partial_lse, weights,
    pairs, HK, G, splits, chunk, rows, last, length, scale, softcap,
    q_b, q_h, q_d, k_b, k_h, k_n, k_d, v_b, v_h, v_n, v_d, p_b, p_h, p_n, qp_b, mask_b, mask_n, w_p, w_g,
    D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, FLAT: tl.constexpr, PAIRS: tl.constexpr,
    HAS_POSITIONS: tl.constexpr, HAS_QUERY: tl.constexpr, HAS_MASK: tl.constexpr, SOFTCAP: tl.constexpr,
    WEIGHTS: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr, HEADS: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One chunk: its output and log-sum-exp (base 2), and its logits (base 2) where the weights should be."""
    tile = tl.program_id(0)
    if FLAT:
        pair, begin, stop = flat_chunk(offsets, pairs, chunk, tile, PAIRS)
    else:
        pair = tile // splits
        begin = (tile % splits) * chunk
        stop = tl.minimum(begin + chunk, rows)
    b = (pair // HK).to(tl.int64)
    hk = (pair % HK).to(tl.int64)
    g = tl.arange(0, HEADS)
    # Programs beyond the last chunk of a flattened cache have a pair that does not exist and nothing to do.
    row_mask = g < tl.where(pair < pairs, G, 0)
    base_q = q + b * q_b + hk * G * q_h
    q1 = load_rows(base_q, g * q_h, row_mask, q_d, D, 0, D1, UPCAST)
    q2 = q1
    acc1 = tl.zeros([HEADS, D1], tl.float32)
    acc2 = tl.zeros([HEADS, D2 if D2 > 0 else 16], tl.float32)
    if D2 > 0:
        q2 = load_rows(base_q, g * q_h, row_mask, q_d, D, D1, D2, UPCAST)
    largest = tl.full([HEADS], -INF, tl.float32)
    total = tl.zeros([HEADS], tl.float32)
    local = tl.arange(0, BLOCK_N)
    for start in range(begin, stop, BLOCK_N):
        n = start + local
        inside = n < stop
        tile_k = k + b * k_b + hk * k_h + tl.cast(start, tl.int64) * k_n
        tile_v = v + b * v_b + hk * v_h + tl.cast(start, tl.int64) * v_n
        k1 = load_rows(tile_k, local * k_n, inside, k_d, D, 0, D1, UPCAST)
        k2 = k1
        if D2 > 0:
            k2 = load_rows(tile_k, local * k_n, inside, k_d, D, D1, D2, UPCAST)
        seen = visible(
            n.to(tl.int64), inside, positions + b * p_b + hk * p_h, query_position + b * qp_b, last,
            key_mask + b * mask_b, length, HAS_POSITIONS, HAS_QUERY, HAS_MASK, p_n, mask_n,
        )  # fmt: skip
        x = to_log2(products(q1, q2, k1, k2, D2 > 0, PRECISION), scale, softcap, SOFTCAP)
        x = tl.where(seen[None, :], x, -INF)
        if WEIGHTS:
            where = weights + pair.to(tl.int64) * w_p + g.to(tl.int64)[:, None] * w_g + n.to(tl.int64)[None, :]
            tl.store(where, x, mask=row_mask[:, None] & inside[None, :])
        new = tl.maximum(largest, tl.max(x, 1))
        shift = tl.where(new == -INF, 0.0, new)
        decay = tl.exp2(largest - shift)
        p = tl.exp2(x - shift[:, None])
        total = total * decay + tl.sum(p, 1)
        largest = new
        v1 = load_rows(tile_v, local * v_n, inside, v_d, D, 0, D1, UPCAST)
        acc1 = tl.dot(p.to(v1.dtype), v1, acc1 * decay[:, None], input_precision=PRECISION)
        if D2 > 0:
            v2 = load_rows(tile_v, local * v_n, inside, v_d, D, D1, D2, UPCAST)
            acc2 = tl.dot(p.to(v2.dtype), v2, acc2 * decay[:, None], input_precision=PRECISION)
    safe = tl.where(total > 0.0, total, 1.0)
    at = tl.cast(tile, tl.int64) * G + g
    tl.store(partial_lse + at, tl.where(total > 0.0, largest + tl.log2(safe), -INF), mask=row_mask)
    c = tl.arange(0, D1)
    tl.store(partial + at[:, None] * D + c[None, :], acc1 / safe[:, None], mask=row_mask[:, None] & (c < D)[None, :])
    if D2 > 0:
        c = D1 + tl.arange(0, D2)
        inside_c = row_mask[:, None] & (c < D)[None, :]
        tl.store(partial + at[:, None] * D + c[None, :], acc2 / safe[:, None], mask=inside_c)


@triton.jit(do_not_specialize=["pairs", "splits", "chunk"])
def decode_combine_fwd_kernel(
    partial, partial_lse, offsets, out, lse, pairs, G, splits, chunk,
    D: tl.constexpr, BLOCK_D: tl.constexpr, FLAT: tl.constexpr, PAIRS: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """Output and log-sum-exp of one query head from the chunks of its pair."""
    row = tl.program_id(0)  # pair * G + g: also the row of the outputs
    pair = row // G
    g = row % G
    if FLAT:
        i = tl.arange(0, PAIRS)
        valid = i < pairs
        length = tl.load(offsets + i + 1, mask=valid, other=0) - tl.load(offsets + i, mask=valid, other=0)
        counts = tl.where(valid, tl.maximum((length + chunk - 1) // chunk, 1), 0)
        first = tl.sum(tl.where(i < pair, counts, 0), 0)
        count = tl.sum(tl.where(i == pair, counts, 0), 0)
    else:
        first = pair * splits
        count = splits
    c = tl.arange(0, BLOCK_D)
    acc = tl.zeros([BLOCK_D], tl.float32)
    largest = -INF
    total = 0.0
    for start in range(0, count, BLOCK_S):
        s = start + tl.arange(0, BLOCK_S)
        at = (first + s).to(tl.int64) * G + g
        part = tl.load(partial_lse + at, mask=s < count, other=-INF)
        rows = tl.load(partial + at[:, None] * D + c[None, :], mask=(s < count)[:, None] & (c < D)[None, :], other=0.0)
        new = tl.maximum(largest, tl.max(part, 0))
        shift = tl.where(new == -INF, 0.0, new)
        decay = tl.exp2(largest - shift)
        p = tl.exp2(part - shift)
        total = total * decay + tl.sum(p, 0)
        acc = acc * decay + tl.sum(p[:, None] * rows, 0)
        largest = new
    safe = tl.where(total > 0.0, total, 1.0)
    tl.store(out + tl.cast(row, tl.int64) * D + c, (acc / safe).to(out.dtype.element_ty), mask=c < D)
    tl.store(lse + row, tl.where(total > 0.0, (largest + tl.log2(safe)) * LN2, -INF))


@triton.jit(do_not_specialize=["pairs", "splits", "chunk", "rows"])
def decode_weights_fwd_kernel(
    weights, lse, offsets, pairs, G, splits, chunk, rows, w_p, w_g,
    FLAT: tl.constexpr, PAIRS: tl.constexpr, HEADS: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Turn the logits (base 2) of one chunk into weights, in place."""
    tile = tl.program_id(0)
    if FLAT:
        pair, begin, stop = flat_chunk(offsets, pairs, chunk, tile, PAIRS)
    else:
        pair = tile // splits
        begin = (tile % splits) * chunk
        stop = tl.minimum(begin + chunk, rows)
    g = tl.arange(0, HEADS)
    row_mask = g < tl.where(pair < pairs, G, 0)
    row_lse = tl.load(lse + pair * G + g, mask=row_mask, other=INF) / LN2
    row_lse = tl.where(row_lse == -INF, INF, row_lse)
    for start in range(begin, stop, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        where = weights + pair.to(tl.int64) * w_p + g.to(tl.int64)[:, None] * w_g + n.to(tl.int64)[None, :]
        inside = row_mask[:, None] & (n < stop)[None, :]
        x = tl.load(where, mask=inside, other=-INF)
        tl.store(where, tl.exp2(x - row_lse[:, None]), mask=inside)
