# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"
"""Triton kernel of attention with a bias per key: output and log-sum-exp in one pass, and its launcher."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from tokred.kernels import dispatch
from tokred.kernels.column_scores.launch import Shape, channel_blocks, choose, exact_rows, precision, upcast
from tokred.kernels.column_scores.triton import key_bias_log2, load_rows, products

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
INF = tl.constexpr(float("inf"))


@triton.jit(do_not_specialize=["M", "N", "row_blocks"])
def attention_fwd_kernel(
    q, k, v, bias, key_mask, out, lse,
    M, N, H, GROUP, row_blocks, scale,
    q_b, q_h, q_m, q_d, k_b, k_h, k_n, k_d, v_b, v_h, v_n, v_d, bias_b, bias_h, bias_n, mask_b, mask_n,
    out_b, out_h, out_m,
    D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, CAUSAL: tl.constexpr, HAS_BIAS: tl.constexpr,
    HAS_MASK: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One block of queries of one head over all keys that it sees; rows that see none become zero."""
    pid = tl.program_id(0)
    first = (pid % row_blocks) * BLOCK_M
    head = (pid // row_blocks % H).to(tl.int64)
    b = (pid // row_blocks // H).to(tl.int64)
    kv_head = head // GROUP
    local_m = tl.arange(0, BLOCK_M)
    m = first + local_m
    row_mask = m < M
    base_q = q + b * q_b + head * q_h + tl.cast(first, tl.int64) * q_m
    q1 = load_rows(base_q, local_m * q_m, row_mask, q_d, D, 0, D1, UPCAST)
    q2 = q1
    acc1 = tl.zeros([BLOCK_M, D1], tl.float32)
    acc2 = tl.zeros([BLOCK_M, D2 if D2 > 0 else 16], tl.float32)
    if D2 > 0:
        q2 = load_rows(base_q, local_m * q_m, row_mask, q_d, D, D1, D2, UPCAST)
    position = N - M + m
    stop = N
    if CAUSAL:
        stop = tl.minimum(N, N - M + first + BLOCK_M)
    largest = tl.full([BLOCK_M], -INF, tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    local = tl.arange(0, BLOCK_N)
    base_k = k + b * k_b + kv_head * k_h
    base_v = v + b * v_b + kv_head * v_h
    for start in range(0, stop, BLOCK_N):
        n = start + local
        inside = n < stop
        tile_k = base_k + tl.cast(start, tl.int64) * k_n
        tile_v = base_v + tl.cast(start, tl.int64) * v_n
        k1 = load_rows(tile_k, local * k_n, inside, k_d, D, 0, D1, UPCAST)
        k2 = k1
        if D2 > 0:
            k2 = load_rows(tile_k, local * k_n, inside, k_d, D, D1, D2, UPCAST)
        term = key_bias_log2(
            bias + b * bias_b + head * bias_h, key_mask + b * mask_b, n, inside, bias_n, mask_n, HAS_BIAS, HAS_MASK
        )
        x = products(q1, q2, k1, k2, D2 > 0, PRECISION) * (scale * LOG2E) + term[None, :]
        if CAUSAL:
            x = tl.where(n[None, :] <= position[:, None], x, -INF)
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
    alive = total > 0.0
    safe = tl.where(alive, total, 1.0)
    base = out + b * out_b + head * out_h + m.to(tl.int64)[:, None] * out_m
    c = tl.arange(0, D1)
    value = (acc1 / safe[:, None]).to(out.dtype.element_ty)
    tl.store(base + c[None, :], value, mask=row_mask[:, None] & (c < D)[None, :])
    if D2 > 0:
        c = D1 + tl.arange(0, D2)
        value = (acc2 / safe[:, None]).to(out.dtype.element_ty)
        tl.store(base + c[None, :], value, mask=row_mask[:, None] & (c < D)[None, :])
    row_lse = tl.where(alive, (largest + tl.log2(safe)) * LN2, -INF)
    tl.store(lse + (b * H + head) * M + m, row_lse, mask=row_mask)


def _shapes(m: int, d: int, dtype: torch.dtype) -> list[Shape]:
    rows = max(16, min(128, triton.next_power_of_2(m)))
    if dtype == torch.float32:
        return [Shape(exact_rows(m), 64 if d <= 64 else 32, 4, 2)] if d <= 128 else [Shape(16, 32, 4, 2)]
    if d <= 128:
        return [Shape(rows, 64, 8 if rows > 64 else 4, 3), Shape(rows, 128, 8, 2), Shape(min(rows, 64), 64, 4, 3)]
    return [Shape(rows, 64, 8, 2), Shape(min(rows, 64), 64, 4, 2)]


def launch_attention(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, mask: Tensor | None, scale: float, causal: bool
) -> tuple[Tensor, Tensor]:
    """Output ``[B, H, M, D]`` and log-sum-exp ``[B, H, M]`` float32.

    Arguments as in ``attention_reference``.
    """
    b, h, m, d = q.shape
    hk, n = k.shape[1], k.shape[2]
    out = torch.empty(b, h, m, d, dtype=q.dtype, device=q.device)
    lse = torch.empty(b, h, m, dtype=torch.float32, device=q.device)
    first, second = channel_blocks(d)
    strides = (0, 0, 0)
    if bias is not None:
        strides = (bias.stride(0), 0, bias.stride(1)) if bias.dim() == 2 else bias.stride()  # type: ignore[assignment]

    def launch(s: Shape) -> None:
        blocks = triton.cdiv(m, s.rows)
        attention_fwd_kernel[(blocks * h * b,)](
            q, k, v, q if bias is None else bias, q if mask is None else mask.view(torch.uint8), out, lse,
            m, n, h, h // hk, blocks, scale,
            *q.stride(), *k.stride(), *v.stride(), *strides, *((0, 0) if mask is None else mask.stride()),
            *out.stride()[:3],
            D=d, D1=first, D2=second, CAUSAL=causal and m > 1, HAS_BIAS=bias is not None, HAS_MASK=mask is not None,
            PRECISION=precision(q.dtype), UPCAST=upcast(q.dtype),
            BLOCK_M=s.rows, BLOCK_N=s.keys, num_warps=s.warps, num_stages=s.stages,
        )  # fmt: skip

    key = (q.dtype, d, h, causal, dispatch.round_up_bucket(m), dispatch.round_up_bucket(n), q.device)
    launch(choose("attention", _shapes(m, d, q.dtype), key, launch))
    return out, lse
