"""Column statistics in plain torch with a bounded working set: the product on the CPU.

The weights are made block by block in one buffer that stays in the cache, so that the peak memory does not grow with
the number of queries and every pass over a block reads the cache. A softmax per block is cheaper here than a given
log-sum-exp: torch's softmax has a faster exponential than ``exp``.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from tokred.kernels.column_scores.reference import (
    MASKED,
    ColumnStatistics,
    Options,
    full_weight,
    key_bias,
    reduce_group,
)
from tokred.kernels.dispatch import accumulator_dtype

# Elements of a block: 2 MiB of float32 was the fastest of 1 to 16 MiB on a CPU with 2 MiB of L2 per core.
_BLOCK_ELEMENTS = 1 << 19
_MIN_ROWS = 16
# Rows of a block where positions matter: fewer rows skip more of the keys that they cannot see.
_MAX_ORDERED_ROWS = 256


class _Block(NamedTuple):
    """One step: samples, key/value heads and queries as half-open ranges, and the keys that these queries can see."""

    samples: slice
    heads: slice
    rows: slice
    keys: slice


class _Inputs(NamedTuple):
    q: Tensor  # [B, H, M, D]
    k: Tensor  # [B, Hk, N, D]
    weight: Tensor | None  # [B or 1, H or 1, M]
    lse: Tensor | None  # [B, H, M]
    per_key: Tensor | None  # [B, 1 or H, N]
    seen_before: Tensor | None  # [B, 1 or H, N + 1]: how many unmasked keys come before each position
    options: Options


@functools.cache
def fast_bfloat16() -> bool:
    """True on a CPU that multiplies bfloat16 in hardware."""
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def _ranges(total: int, step: int) -> list[slice]:
    """Cut ``total`` into near-equal parts of at most ``step``."""
    if total == 0:
        return []
    count = -(-total // step)
    step = -(-total // count)
    return [slice(i, min(i + step, total)) for i in range(0, total, step)]


def _visible_keys(rows: slice, m: int, n: int, options: Options) -> slice:
    """The span of keys that the queries ``rows`` can see at all."""
    first = max(0, n - m + rows.start - options.window + 1) if options.window > 0 else 0
    last = min(n, n - m + rows.stop) if options.causal else n
    return slice(min(first, n), max(last, 0))


def _plan(q: Tensor, k: Tensor, options: Options) -> Iterator[_Block]:
    """Cut the work into blocks of about ``_BLOCK_ELEMENTS`` weights: whole samples, then heads, then queries."""
    (b, h, m, _), (_, hk, n, _) = q.shape, k.shape
    samples = max(1, _BLOCK_ELEMENTS // max(h * m * n, 1))
    heads = max(1, _BLOCK_ELEMENTS // max(h // hk * m * n, 1))
    rows = max(_MIN_ROWS, _BLOCK_ELEMENTS // max(h // hk * n, 1))
    if options.causal or options.window > 0:
        rows = min(rows, _MAX_ORDERED_ROWS)
    for sample in _ranges(b, min(samples, b)):
        for head in _ranges(hk, min(heads, hk)):
            for row in _ranges(m, min(rows, m)):
                keys = _visible_keys(row, m, n, options)
                if keys.start < keys.stop:
                    yield _Block(sample, head, row, keys)


def _products(q: Tensor, k: Tensor, scale: float, buffer: Tensor) -> Tensor:
    """``scale * q k^T``, ``[b, hk, rows, n]`` in the accumulator's type, in ``buffer``."""
    b, hk, rows, _ = q.shape
    out = buffer[: b * hk * rows * k.shape[2]].view(b, hk, rows, k.shape[2])
    # Cut a [B, N, 3, H, D] projection at the batch: a product over both leading dimensions would copy all its keys.
    flat = b == 1 or (q.stride(0) == hk * q.stride(1) and k.stride(0) == hk * k.stride(1))
    for cut in [slice(0, b)] if flat else [slice(i, i + 1) for i in range(b)]:
        # Products of half precision would be rounded to it, and with them the choices that they lead to.
        part, qs, ks = out[cut].flatten(0, 1), q[cut].flatten(0, 1).to(out.dtype), k[cut].flatten(0, 1).to(out.dtype)
        torch.baddbmm(part, qs, ks.transpose(1, 2), beta=0, alpha=scale, out=part)
    return out


def _one_query(
    q: Tensor, k: Tensor, weight: Tensor | None, lse: Tensor | None, per_key: Tensor | None, options: Options
) -> Tensor:
    """The weighted attention row of a single query, the last position: as few operations as possible."""
    b, h, _, d = q.shape
    hk, n = k.shape[1], k.shape[2]
    buffer = torch.empty(b * h * n, dtype=accumulator_dtype(q.dtype), device=q.device)
    s = _products(q if h == hk else q.reshape(b, hk, h // hk, d), k, options.scale, buffer).view(b, h, n)
    if options.softcap > 0:
        s.div_(options.softcap).tanh_().mul_(options.softcap)
    if per_key is not None:
        s.add_(per_key)
    if lse is None:
        torch.softmax(s, -1, out=s)
        if per_key is not None:
            s.mul_((per_key > MASKED).any(-1, keepdim=True))
    else:
        s.sub_(lse.masked_fill(lse == -torch.inf, torch.inf)).exp_()
    rows = full_weight(weight)
    if rows is not None:
        s.mul_(rows)
    return reduce_group(s, hk, options.group)


def _mask_positions(s: Tensor, block: _Block, shift: int, options: Options) -> None:
    """Mask in ``s`` what the queries cannot see, in the two bands of columns that some of them see and others do not.

    Adds a float mask made by arithmetic: filling by a bool mask takes forty times as long as this addition.
    """
    first, stop = shift + block.rows.start, shift + block.rows.stop  # positions of these queries
    rows = torch.arange(stop - first, dtype=s.dtype, device=s.device)[:, None]
    if options.causal:
        begin = max(first + 1, block.keys.start)
        columns = torch.arange(begin - first, block.keys.stop - first, dtype=s.dtype, device=s.device)
        s[..., begin - block.keys.start :].add_((columns - rows).clamp_(0, 1).mul_(MASKED))
    if options.window > 0:
        end = min(stop - options.window, block.keys.stop)
        columns = torch.arange(block.keys.start - first, max(end, block.keys.start) - first, dtype=s.dtype)
        hidden = (rows - columns.to(s.device)).sub_(options.window - 1).clamp_(0, 1).mul_(MASKED)
        s[..., : columns.shape[0]].add_(hidden)


def _alive(x: _Inputs, block: _Block, heads: slice) -> Tensor | None:
    """Which queries of a block see a key, broadcastable to ``[b, heads, rows]``; None where all certainly do."""
    m, n = x.q.shape[2], x.k.shape[2]
    if x.seen_before is None and not (x.options.causal and m > n):
        return None
    positions = torch.arange(n - m + block.rows.start, n - m + block.rows.stop, device=x.q.device)
    stop = (positions + 1).clamp_(0, n) if x.options.causal else torch.full_like(positions, n)
    start = (positions - x.options.window + 1).clamp_(0, n) if x.options.window > 0 else torch.zeros_like(positions)
    if x.seen_before is None:
        return stop > start
    counts = x.seen_before[block.samples, heads if x.seen_before.shape[1] > 1 else slice(None)]
    return counts[..., stop] > counts[..., start]


def _weights(x: _Inputs, block: _Block, buffer: Tensor) -> tuple[Tensor, Tensor | None]:
    """Attention weights ``[b, heads * G, rows, keys]`` of a block, and which rows see a key (None: all do).

    Rows that see nothing hold arbitrary finite numbers.
    """
    (_, h, m, d), (_, hk, n, _) = x.q.shape, x.k.shape
    g = h // hk
    heads = slice(block.heads.start * g, block.heads.stop * g)
    q = x.q[block.samples, heads, block.rows]
    b, rows = q.shape[0], q.shape[2]
    s = _products(
        q.reshape(b, -1, g * rows, d) if g > 1 else q,
        x.k[block.samples, block.heads, block.keys],
        x.options.scale,
        buffer,
    ).view(b, -1, rows, block.keys.stop - block.keys.start)
    if x.options.softcap > 0:
        s.div_(x.options.softcap).tanh_().mul_(x.options.softcap)
    if x.per_key is not None:
        s.add_(x.per_key[block.samples, heads if x.per_key.shape[1] > 1 else slice(None), None, block.keys])
    _mask_positions(s, block, n - m, x.options)
    if x.lse is None:
        torch.softmax(s, -1, out=s)
        return s, _alive(x, block, heads)
    lse = x.lse[block.samples, heads, block.rows].to(s.dtype)
    return s.sub_(lse.masked_fill(lse == -torch.inf, torch.inf)[..., None]).exp_(), None


def _row_weight(x: _Inputs, block: _Block, p: Tensor, alive: Tensor | None) -> tuple[Tensor, Tensor]:
    """Weight of each query and of each query that counts, ``[b, heads, 1, rows]``."""
    ones = p.new_ones(p.shape[:-1])
    if alive is not None:
        ones = ones * alive
    if x.weight is None:
        return ones[:, :, None], ones[:, :, None]
    g = x.q.shape[1] // x.k.shape[1]
    heads = slice(block.heads.start * g, block.heads.stop * g) if x.weight.shape[1] > 1 else slice(None)
    samples = block.samples if x.weight.shape[0] > 1 else slice(None)
    return (ones * x.weight[samples, heads, block.rows].to(p.dtype))[:, :, None], ones[:, :, None]


def _target(out: Tensor, block: _Block, g: int) -> Tensor:
    return out[block.samples, block.heads.start * g : block.heads.stop * g, block.keys]


def _inputs(
    q: Tensor,
    k: Tensor,
    weight: Tensor | None,
    lse: Tensor | None,
    bias: Tensor | None,
    key_mask: Tensor | None,
    options: Options,
) -> tuple[_Inputs, list[_Block], Tensor]:
    """The inputs in canonical shapes, the plan, and the buffer that its largest block needs."""
    dtype = accumulator_dtype(q.dtype)
    per_key = key_bias(k, bias, key_mask, dtype)
    seen_before = None
    if per_key is not None:
        seen_before = torch.nn.functional.pad((per_key > MASKED).cumsum(-1, dtype=torch.int32), (1, 0))
    rows = full_weight(weight)
    rows = None if rows is None else rows.expand(-1, -1, q.shape[2])
    x = _Inputs(q, k, rows, lse, per_key, seen_before, options)
    plan = list(_plan(q, k, options))
    g = q.shape[1] // k.shape[1]
    largest = (
        max(
            ((y.samples.stop - y.samples.start) * (y.heads.stop - y.heads.start) * g)
            * ((y.rows.stop - y.rows.start) * (y.keys.stop - y.keys.start))
            for y in plan
        )
        if plan
        else 0
    )
    return x, plan, torch.empty(largest, dtype=dtype, device=q.device)


@torch.no_grad()
def column_scores_blocked(
    q: Tensor,
    k: Tensor,
    weight: Tensor | None,
    lse: Tensor | None,
    bias: Tensor | None,
    key_mask: Tensor | None,
    options: Options,
) -> Tensor:
    """The weighted column sum; arguments as in ``column_scores_reference``."""
    if q.shape[2] == 1 and options.window == 0:
        return _one_query(q, k, weight, lse, key_bias(k, bias, key_mask, accumulator_dtype(q.dtype)), options)
    x, plan, buffer = _inputs(q, k, weight, lse, bias, key_mask, options)
    g = q.shape[1] // k.shape[1]
    out = torch.zeros(q.shape[0], q.shape[1], k.shape[2], dtype=accumulator_dtype(q.dtype), device=q.device)
    for block in plan:
        p, alive = _weights(x, block, buffer)
        w, _ = _row_weight(x, block, p, alive)
        _target(out, block, g).add_((w @ p).squeeze(2))
    return reduce_group(out, k.shape[1], options.group)


@torch.no_grad()
def column_statistics_blocked(
    q: Tensor,
    k: Tensor,
    weight: Tensor | None,
    lse: Tensor | None,
    bias: Tensor | None,
    key_mask: Tensor | None,
    options: Options,
) -> ColumnStatistics:
    """All statistics; arguments as in ``column_statistics_reference``."""
    x, plan, buffer = _inputs(q, k, weight, lse, bias, key_mask, options)
    g = q.shape[1] // k.shape[1]
    shape = (q.shape[0], q.shape[1], k.shape[2])
    # Four tensors, not one that is cut: results of a registered operator may not share their memory.
    out = [torch.zeros(shape, dtype=accumulator_dtype(q.dtype), device=q.device) for _ in range(4)]
    total, squares, largest, entropy = out
    for block in plan:
        p, alive = _weights(x, block, buffer)
        if alive is not None:
            p.mul_(alive[..., None])
        w, ones = _row_weight(x, block, p, alive)
        _target(total, block, g).add_((w @ p).squeeze(2))
        view = _target(largest, block, g)
        torch.maximum(view, p.amax(2), out=view)
        _target(entropy, block, g).add_((ones @ torch.special.entr(p)).squeeze(2))
        _target(squares, block, g).add_((w @ p.square_()).squeeze(2))
    return ColumnStatistics(*(reduce_group(s, k.shape[1], options.group) for s in out))
