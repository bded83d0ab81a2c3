"""Decode attention in plain torch as it runs on the CPU: no repeated keys, and one short product per flattened head."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch
from torch import Tensor

from tokred.kernels.column_scores.blocked import fast_bfloat16
from tokred.kernels.column_scores.reference import MASKED
from tokred.kernels.dispatch import accumulator_dtype

_FUSED = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu


def _matmul_dtype(q: Tensor, rows: int) -> torch.dtype:
    """The input's type where the device multiplies it fast: a CPU has no float16 product beyond one row."""
    if q.is_cuda or (q.dtype == torch.bfloat16 and fast_bfloat16()) or (q.dtype == torch.float16 and rows == 1):
        return q.dtype
    return accumulator_dtype(q.dtype)


def _attend(
    q: Tensor, k: Tensor, v: Tensor, seen: Tensor | None, scale: float, softcap: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Output, log-sum-exp and weights of ``q`` ``[..., G, D]`` over ``k`` ``[..., K, D]``; ``seen`` ``[..., 1, K]``."""
    dtype = accumulator_dtype(q.dtype)
    low = _matmul_dtype(q, q.shape[-2])
    s = (q.to(low) @ k.to(low).transpose(-1, -2)).to(dtype).mul_(scale)
    if softcap > 0:
        s.div_(softcap).tanh_().mul_(softcap)
    if seen is not None:
        # By arithmetic: filling by a bool mask is many times slower on the CPU than this addition.
        s.add_((~seen).to(dtype).mul_(MASKED))
    largest = s.amax(-1, keepdim=True)
    p = s.sub_(largest).exp_()
    total = p.sum(-1, keepdim=True)
    p.div_(total)
    lse = (largest + total.log_()).squeeze(-1)
    if seen is not None:
        alive = seen.any(-1)
        p.mul_(alive[..., None])
        lse = torch.where(alive, lse, -torch.inf)
    return (p.to(low) @ v.to(low)).to(q.dtype), lse, p


@torch.no_grad()
def decode_rectangular(
    q: Tensor, k: Tensor, v: Tensor, seen: Tensor | None, scale: float, softcap: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Arguments and results as in ``decode_reference``; the cache is not empty."""
    (b, h, d), hk = q.shape, k.shape[1]
    queries = q.reshape(b, hk, h // hk, d)
    out, lse, p = _attend(queries, k, v, None if seen is None else seen[:, :, None], scale, softcap)
    return out.reshape(b, h, v.shape[3]), lse.reshape(b, h), p.reshape(b, h, k.shape[2])


@torch.no_grad()
def decode_fused(q: Tensor, k: Tensor, v: Tensor, seen: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    """``decode_rectangular`` without weights and softcap, by the CPU's fused kernel.

    The query heads of a key/value head become rows of one query, so that no key is read twice.
    """
    (b, h, d), hk = q.shape, k.shape[1]
    mask = None if seen is None else torch.log(seen.to(q.dtype))  # 0 or -inf
    out, lse = _FUSED(
        q.reshape(b, hk, h // hk, d), k, v, attn_mask=None if mask is None else mask[:, :, None], scale=scale
    )
    if seen is not None:
        lse = lse.masked_fill(~seen.any(-1)[..., None], -torch.inf)
    return out.reshape(b, h, v.shape[3]), lse.reshape(b, h)


# Rows of a pair up to which the fused kernel is the faster one in bfloat16.
_FEW = 512


def fused_fits(q: Tensor, v: Tensor, softcap: float, rows: int) -> bool:
    """True where ``decode_fused`` runs and is the faster path, for about ``rows`` rows of each head."""
    fast = q.dtype in (torch.float32, torch.float64) or (q.dtype == torch.bfloat16 and rows <= _FEW and fast_bfloat16())
    return q.device.type == "cpu" and fast and softcap == 0 and q.shape[-1] == v.shape[-1]


def _runs(bounds: list[int]) -> Iterator[tuple[int, int, int]]:
    """Neighbours of equal length, which are one rectangle: first pair, the one behind the last, and rows of each."""
    first = 0
    for rows, run in itertools.groupby(stop - start for start, stop in itertools.pairwise(bounds)):
        end = first + len(list(run))
        yield first, end, rows
        first = end


@torch.no_grad()
def decode_flat(
    q: Tensor, k: Tensor, v: Tensor, offsets: Tensor, seen: Tensor | None, scale: float, softcap: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Arguments and results as in ``decode_flat_reference``, for tensors on the CPU, where offsets can be read."""
    (b, h, d), pairs = q.shape, offsets.shape[0] - 1
    g = b * h // pairs
    dtype = accumulator_dtype(q.dtype)
    queries = q.reshape(pairs, g, d)
    out = q.new_zeros(pairs, g, v.shape[1])
    lse = torch.full((pairs, g), -torch.inf, dtype=dtype)
    weights = torch.zeros(g, k.shape[0], dtype=dtype)
    bounds = offsets.tolist()
    for first, end, n in _runs(bounds):
        if n == 0:
            continue
        rows = slice(bounds[first], bounds[end])
        keys, values = k[rows].view(end - first, n, d), v[rows].view(end - first, n, -1)
        mask = None if seen is None else seen[rows].view(-1, 1, n)
        out[first:end], lse[first:end], p = _attend(queries[first:end], keys, values, mask, scale, softcap)
        weights[:, rows] = p.transpose(0, 1).flatten(1)
    return out.reshape(b, h, v.shape[1]), lse.reshape(b, h), weights


# From so many rows on a pair's rows are shared out among the threads; the fused kernel keeps to one for each pair.
_SHARED = 512


@torch.no_grad()
def decode_flat_fused(q: Tensor, k: Tensor, v: Tensor, offsets: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """``decode_flat`` without weights, mask and softcap, by the CPU's fused kernel: a call or two for each length."""
    (b, h, d), pairs, bounds = q.shape, offsets.shape[0] - 1, offsets.tolist()
    g, threads = b * h // pairs, torch.get_num_threads()
    queries = q.reshape(pairs, g, d)
    if threads > 1 and bounds[-1] - bounds[0] >= _SHARED * pairs:
        out, lse = _shared_out(queries, k, v, bounds, threads, scale)
    else:
        out, lse = q.new_zeros(pairs, g, d), torch.full((pairs, g), -torch.inf, dtype=accumulator_dtype(q.dtype))
        for first, end, n in _runs(bounds):
            if n:
                shape, rows = (1, end - first, n, d), slice(bounds[first], bounds[end])
                found = _FUSED(queries[None, first:end], k[rows].view(shape), v[rows].view(shape), scale=scale)
                out[first:end], lse[first:end] = found[0][0], found[1][0]
    return out.view(b, h, d), lse.view(b, h)


def _shared_out(
    q: Tensor, k: Tensor, v: Tensor, bounds: list[int], threads: int, scale: float
) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp of queries ``[pairs, G, D]``: rows even for the threads, and the rest."""
    pairs, g, d = q.shape
    sizes = []
    for start, stop in itertools.pairwise(bounds):
        even = (stop - start) // threads * threads
        sizes += [even, stop - start - even]
    rest = [bounds[0], *sizes, k.shape[0] - bounds[-1]]
    keys, values = torch.split_with_sizes(k[None, None], rest, 2), torch.split_with_sizes(v[None, None], rest, 2)
    queries = q.view(pairs, 1, 1, g, d).unbind()
    found = []
    for i, n in enumerate(sizes):
        query, part, key, value = queries[i // 2], 1 if i % 2 else threads, keys[i + 1], values[i + 1]
        if part > 1:
            query = query.expand(1, part, g, d)
            key, value = key.reshape(1, part, n // part, d), value.reshape(1, part, n // part, d)
        if n:
            found.append(_FUSED(query, key, value, scale=scale))
        else:
            nothing = torch.full((1, part, g), -torch.inf, dtype=accumulator_dtype(q.dtype))
            found.append((torch.zeros_like(query), nothing))
    out, lse = torch.cat([f[0] for f in found], 1), torch.cat([f[1] for f in found], 1)
    return _together(out.view(pairs, threads + 1, g, d), lse.view(pairs, threads + 1, g))


def _together(out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
    """Attention over all keys from that over parts of them, which are the second dimension."""
    largest = lse.amax(1, keepdim=True).clamp(min=MASKED)
    weight = (lse - largest).exp_()
    total = weight.sum(1, keepdim=True)
    share = weight / total.clamp(min=torch.finfo(total.dtype).tiny)
    return (out * share[..., None].to(out.dtype)).sum(1), (total.log() + largest).squeeze(1)
