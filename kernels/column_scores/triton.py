# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"
"""Triton kernels of the column statistics: the log-sum-exp of query rows, and statistics down the key columns.

The second kernel has one program per block of keys, which it keeps while it goes over all queries that can see them:
no atomics, the same result every time. Its tile of logits is keys x queries, so that the sum over queries stays within
a thread and a warp, and one exponential per element is the bound. Head sizes that are no power of two are cut into two
powers of two (80 = 64 + 16) instead of padded to the next one.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
MASKED = tl.constexpr(-1e30)
INF = tl.constexpr(float("inf"))


@triton.jit
def load_rows(
    base, offsets, row_mask, stride, D: tl.constexpr, START: tl.constexpr, BLOCK: tl.constexpr, UPCAST: tl.constexpr
):
    """Channels ``START .. START + BLOCK`` of the rows at ``base + offsets``: a tile ``[rows, BLOCK]``, zero outside."""
    c = START + tl.arange(0, BLOCK)
    pointers = base + offsets[:, None] + c[None, :] * stride
    if START + BLOCK > D:
        tile = tl.load(pointers, mask=row_mask[:, None] & (c < D)[None, :], other=0.0)
    else:
        tile = tl.load(pointers, mask=row_mask[:, None], other=0.0)
    if UPCAST:  # the interpreter has no product of bfloat16
        tile = tile.to(tl.float32)
    return tile


@triton.jit
def products(a1, a2, b1, b2, SECOND: tl.constexpr, PRECISION: tl.constexpr):
    """``a b^T`` in float32 over one or two groups of channels."""
    s = tl.dot(a1, tl.trans(b1), input_precision=PRECISION)
    if SECOND:
        s = tl.dot(a2, tl.trans(b2), s, input_precision=PRECISION)
    return s


@triton.jit
def to_log2(s, scale, softcap, SOFTCAP: tl.constexpr):
    """Logits from products, in units of log2; ``tanh x = 1 - 2 / (exp(2 x) + 1)``."""
    if SOFTCAP:
        inner = s * (scale / softcap)
        return (softcap * LOG2E) * (1.0 - 2.0 / (tl.exp2(inner * (2.0 * LOG2E)) + 1.0))
    return s * (scale * LOG2E)


@triton.jit
def key_bias_log2(bias, mask, n, inside, stride_bias, stride_mask, HAS_BIAS: tl.constexpr, HAS_MASK: tl.constexpr):
    """Bias and mask of a block of keys as one term in units of log2; -inf where masked or outside."""
    term = tl.where(inside, 0.0, -INF)
    if HAS_BIAS:
        value = tl.load(bias + n.to(tl.int64) * stride_bias, mask=inside, other=0.0).to(tl.float32)
        term += tl.where(value > MASKED, value * LOG2E, -INF)
    if HAS_MASK:
        seen = tl.load(mask + n.to(tl.int64) * stride_mask, mask=inside, other=0)
        term = tl.where(seen != 0, term, -INF)
    return term


@triton.jit(do_not_specialize=["M", "N", "G", "row_blocks", "chunk", "window"])
def row_lse_fwd_kernel(
    q, k, bias, key_mask, out,
    M, N, G, HK, row_blocks, splits, chunk, window, scale, softcap,
    q_b, q_h, q_m, q_d, k_b, k_h, k_n, k_d, bias_b, bias_h, bias_n, mask_b, mask_n, out_s,
    D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_MASK: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Log-sum-exp of rows of logits over one chunk of keys, ``out[split, b, h, m]``.

    The query heads of a key/value head are rows of one matrix: row ``r`` is head ``r // M``, query ``r % M``.
    """
    pid = tl.program_id(0)
    block = pid % row_blocks
    rest = pid // row_blocks
    split = rest % splits
    rest = rest // splits
    hk = rest % HK
    b = (rest // HK).to(tl.int64)
    first = block * BLOCK_M
    r = first + tl.arange(0, BLOCK_M)
    row_mask = r < G * M
    group = r // M
    m = r - group * M
    head = hk * G + group
    base_q = q + b * q_b
    offsets = head.to(tl.int64) * q_h + m.to(tl.int64) * q_m
    q1 = load_rows(base_q, offsets, row_mask, q_d, D, 0, D1, UPCAST)
    q2 = q1
    if D2 > 0:
        q2 = load_rows(base_q, offsets, row_mask, q_d, D, D1, D2, UPCAST)
    position = N - M + m
    begin = split * chunk
    stop = tl.minimum(begin + chunk, N)
    last = tl.minimum(first + BLOCK_M, G * M) - 1
    one_head = first // M == last // M
    if CAUSAL:
        # A block that holds the end of one head and the begin of the next needs the keys of the last query.
        stop = tl.minimum(stop, N - M + tl.where(one_head, last % M, M - 1) + 1)
    if WINDOW:
        lowest = N - M + tl.where(one_head, first % M, 0) - window + 1
        begin = tl.maximum(begin, lowest // BLOCK_N * BLOCK_N)
    largest = tl.full([BLOCK_M], -INF, tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    local = tl.arange(0, BLOCK_N)
    base_k = k + b * k_b + hk.to(tl.int64) * k_h
    for start in range(begin, stop, BLOCK_N):
        n = start + local
        inside = n < stop
        tile = base_k + tl.cast(start, tl.int64) * k_n
        k1 = load_rows(tile, local * k_n, inside, k_d, D, 0, D1, UPCAST)
        k2 = k1
        if D2 > 0:
            k2 = load_rows(tile, local * k_n, inside, k_d, D, D1, D2, UPCAST)
        x = to_log2(products(q1, q2, k1, k2, D2 > 0, PRECISION), scale, softcap, SOFTCAP)
        if HAS_BIAS:
            # Per head: rows of one block may belong to different heads.
            where = bias + b * bias_b + head.to(tl.int64)[:, None] * bias_h + n.to(tl.int64)[None, :] * bias_n
            value = tl.load(where, mask=row_mask[:, None] & inside[None, :], other=0.0).to(tl.float32)
            x += tl.where(value > MASKED, value * LOG2E, -INF)
        x += key_bias_log2(bias, key_mask + b * mask_b, n, inside, 0, mask_n, False, HAS_MASK)[None, :]
        if CAUSAL:
            x = tl.where(n[None, :] <= position[:, None], x, -INF)
        if WINDOW:
            x = tl.where(position[:, None] - n[None, :] < window, x, -INF)
        new = tl.maximum(largest, tl.max(x, 1))
        shift = tl.where(new == -INF, 0.0, new)
        total = total * tl.exp2(largest - shift) + tl.sum(tl.exp2(x - shift[:, None]), 1)
        largest = new
    lse = tl.where(total > 0.0, (largest + tl.log2(tl.where(total > 0.0, total, 1.0))) * LN2, -INF)
    place = (b * (HK * G) + head).to(tl.int64) * M + m
    tl.store(out + tl.cast(split, tl.int64) * out_s + place, lse, mask=row_mask)


@triton.jit(do_not_specialize=["splits", "count"])
def combine_lse_fwd_kernel(partial, out, splits, count, BLOCK: tl.constexpr):
    """Log-sum-exp over the first dimension of ``partial`` ``[splits, count]``."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = i < count
    largest = tl.full([BLOCK], -INF, tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    for split in range(splits):
        x = tl.load(partial + tl.cast(split, tl.int64) * count + i, mask=inside, other=-INF) * LOG2E
        new = tl.maximum(largest, x)
        shift = tl.where(new == -INF, 0.0, new)
        total = total * tl.exp2(largest - shift) + tl.exp2(x - shift)
        largest = new
    tl.store(
        out + i, tl.where(total > 0.0, (largest + tl.log2(tl.where(total > 0.0, total, 1.0))) * LN2, -INF), mask=inside
    )


@triton.jit
def grouped(total, value, REDUCE: tl.constexpr):
    """One more query head's value in the reduction over the group: 1 is a sum, 2 a maximum."""
    if REDUCE == 2:
        return tl.maximum(total, value)
    return total + value


@triton.jit(do_not_specialize=["M", "N", "G", "window"])
def columns_fwd_kernel(
    q, k, weight, lse, bias, key_mask, out_sum, out_squares, out_max, out_entropy,
    M, N, G, HK, key_blocks, window, scale, softcap, factor,
    q_b, q_h, q_m, q_d, k_b, k_h, k_n, k_d, w_b, w_h, w_m, l_b, l_h, l_m, bias_b, bias_h, bias_n, mask_b, mask_n,
    D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_MASK: tl.constexpr, HAS_WEIGHT: tl.constexpr,
    STATISTICS: tl.constexpr, REDUCE: tl.constexpr, FOLD: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Statistics over the queries for one block of keys of one key/value head.

    REDUCE is the group reduction (0 none, 1 sum times ``factor``, 2 maximum). FOLD takes the query heads as rows of one
    matrix, for few queries; otherwise they come one after the other.
    """
    pid = tl.program_id(0)
    first = (pid % key_blocks) * BLOCK_N
    hk = pid // key_blocks % HK
    b = (pid // key_blocks // HK).to(tl.int64)
    local_n = tl.arange(0, BLOCK_N)
    n = first + local_n
    inside = n < N
    base_k = k + b * k_b + hk.to(tl.int64) * k_h + first.to(tl.int64) * k_n
    k1 = load_rows(base_k, local_n * k_n, inside, k_d, D, 0, D1, UPCAST)
    k2 = k1
    if D2 > 0:
        k2 = load_rows(base_k, local_n * k_n, inside, k_d, D, D1, D2, UPCAST)
    rows = M
    heads = G
    begin = 0
    if FOLD:
        rows = G * M
        heads = 1
    elif CAUSAL:
        begin = tl.maximum(first - (N - M), 0) // BLOCK_M * BLOCK_M
    if WINDOW and not FOLD:
        rows = tl.minimum(rows, tl.minimum(first + BLOCK_N, N) - 1 + window - (N - M))
    local = tl.arange(0, BLOCK_M)
    initial = -INF if REDUCE == 2 else 0.0
    g_sum = tl.full([BLOCK_N], initial, tl.float32)
    g_squares = tl.full([BLOCK_N], initial, tl.float32)
    g_max = tl.full([BLOCK_N], initial, tl.float32)
    g_entropy = tl.full([BLOCK_N], initial, tl.float32)
    for g in range(heads):
        head = tl.cast(hk * G + g, tl.int64)
        term = key_bias_log2(
            bias + b * bias_b + head * bias_h, key_mask + b * mask_b, n, inside, bias_n, mask_n, HAS_BIAS, HAS_MASK
        )
        total = tl.zeros([BLOCK_N], tl.float32)
        squares = tl.zeros([BLOCK_N], tl.float32)
        largest = tl.zeros([BLOCK_N], tl.float32)
        entropy = tl.zeros([BLOCK_N], tl.float32)
        base_q = q + b * q_b + head * q_h
        base_l = lse + b * l_b + head * l_h
        base_w = weight + b * w_b + head * w_h
        for start in range(begin, rows, BLOCK_M):
            r = start + local
            row_mask = r < rows
            m = r
            if FOLD:
                group = (r // M).to(tl.int64)
                m = r % M
                offsets = group * q_h + m * q_m
                at_l = group * l_h + m * l_m
                at_w = group * w_h + m * w_m
                tile = base_q
            else:
                offsets = local * q_m
                at_l = m.to(tl.int64) * l_m
                at_w = m.to(tl.int64) * w_m
                tile = base_q + tl.cast(start, tl.int64) * q_m
            q1 = load_rows(tile, offsets, row_mask, q_d, D, 0, D1, UPCAST)
            q2 = q1
            if D2 > 0:
                q2 = load_rows(tile, offsets, row_mask, q_d, D, D1, D2, UPCAST)
            # Rows outside, and rows that see nothing, get +inf: all their weights become zero without a mask.
            row_lse = tl.load(base_l + at_l, mask=row_mask, other=INF).to(tl.float32) * LOG2E
            row_lse = tl.where(row_lse == -INF, INF, row_lse)
            x = to_log2(products(k1, k2, q1, q2, D2 > 0, PRECISION), scale, softcap, SOFTCAP)
            if HAS_BIAS and FOLD:
                where = bias + b * bias_b + (head + group)[None, :] * bias_h + n.to(tl.int64)[:, None] * bias_n
                value = tl.load(where, mask=inside[:, None] & row_mask[None, :], other=0.0).to(tl.float32)
                x += tl.where(value > MASKED, value * LOG2E, -INF)
                if HAS_MASK:
                    masked = key_bias_log2(bias, key_mask + b * mask_b, n, inside, 0, mask_n, False, HAS_MASK)
                    x += masked[:, None]
            elif HAS_BIAS or HAS_MASK:
                x += term[:, None]
            if CAUSAL:
                x = tl.where(n[:, None] <= (N - M + m)[None, :], x, -INF)
            if WINDOW:
                x = tl.where((N - M + m)[None, :] - n[:, None] < window, x, -INF)
            x -= row_lse[None, :]
            p = tl.exp2(x)
            weighted = p
            if HAS_WEIGHT:
                weighted = p * tl.load(base_w + at_w, mask=row_mask, other=0.0).to(tl.float32)[None, :]
            total += tl.sum(weighted, 1)
            if STATISTICS:
                squares += tl.sum(weighted * p, 1)
                largest = tl.maximum(largest, tl.max(p, 1))
                # p ln p from the logarithm that is at hand, which is -inf where p is zero.
                entropy -= tl.sum(p * tl.maximum(x, MASKED), 1) * LN2
        if REDUCE == 0:
            at = (b * (HK * G) + head) * N + n
            tl.store(out_sum + at, total, mask=inside)
            if STATISTICS:
                tl.store(out_squares + at, squares, mask=inside)
                tl.store(out_max + at, largest, mask=inside)
                tl.store(out_entropy + at, entropy, mask=inside)
        else:
            g_sum = grouped(g_sum, total, REDUCE)
            if STATISTICS:
                g_squares = grouped(g_squares, squares, REDUCE)
                g_max = grouped(g_max, largest, REDUCE)
                g_entropy = grouped(g_entropy, entropy, REDUCE)
    if REDUCE > 0:
        at = (b * HK + hk) * N + n
        tl.store(out_sum + at, g_sum * factor, mask=inside)
        if STATISTICS:
            tl.store(out_squares + at, g_squares * factor, mask=inside)
            tl.store(out_max + at, g_max * factor, mask=inside)
            tl.store(out_entropy + at, g_entropy * factor, mask=inside)
