"""Launchers of the column statistics' Triton kernels: shapes, grids and launch configurations."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from tokred.kernels import dispatch
from tokred.kernels.column_scores.reference import Options, full_weight
from tokred.kernels.column_scores.triton import columns_fwd_kernel, combine_lse_fwd_kernel, row_lse_fwd_kernel

# Up to this many queries the query heads of a group become rows of one matrix: one pipelined loop instead of several.
_FOLD_QUERIES = 512
_COMBINE_BLOCK = 256


class Shape(NamedTuple):
    """A launch configuration: block sizes over queries and keys, warps, and stages of the software pipeline."""

    rows: int
    keys: int
    warps: int
    stages: int


_tuned: dict[tuple[Any, ...], Shape] = {}


def channel_blocks(d: int) -> tuple[int, int]:
    """Head channels as one or two powers of two of at least 16 that cover them: 64 -> (64, 0), 80 -> (64, 16)."""
    whole = max(16, 1 << (d.bit_length() - 1))
    rest = d - whole
    if rest <= 0:
        return whole, 0
    second = max(16, triton.next_power_of_2(rest))
    # Two halves of one power of two are that power of two: one product instead of two.
    return (whole * 2, 0) if second == whole else (whole, second)


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """How many programs run side by side at least; under the interpreter a small number that still splits."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


def precision(dtype: torch.dtype) -> str:
    """How float32 is multiplied: three TF32 products, as exact as float32, unless the user allowed a single one.

    Exact float32 products do not run on tensor cores, and tiles of these sizes spill all registers there.
    """
    return "tf32" if dtype == torch.float32 and torch.backends.cuda.matmul.allow_tf32 else "tf32x3"


def upcast(dtype: torch.dtype) -> bool:
    """True where tiles must become float32 before a product: the interpreter has none in bfloat16."""
    return dtype == torch.bfloat16 and dispatch.interpreting()


def choose(name: str, shapes: list[Shape], key: tuple[Any, ...], launch: Callable[[Shape], None]) -> Shape:
    """The first shape, or with ``TOKRED_AUTOTUNE=1`` the fastest one for this key, timed once."""
    if not dispatch.autotune() or dispatch.interpreting():
        return shapes[0]
    full = (name, *key)
    if full not in _tuned:
        _tuned[full] = min(shapes, key=lambda shape: _time(launch, shape))
    return _tuned[full]


def _time(launch: Callable[[Shape], None], shape: Shape) -> float:
    try:
        return float(triton.testing.do_bench(lambda: launch(shape), warmup=5, rep=20))
    except triton.runtime.errors.OutOfResources:
        return float("inf")


def _bias_strides(bias: Tensor | None) -> tuple[int, int, int]:
    if bias is None:
        return 0, 0, 0
    return (bias.stride(0), 0, bias.stride(1)) if bias.dim() == 2 else (bias.stride(0), bias.stride(1), bias.stride(2))


def _common(q: Tensor, k: Tensor, bias: Tensor | None, mask: Tensor | None, options: Options) -> dict[str, Any]:
    """Arguments that both kernels take under the same names."""
    first, second = channel_blocks(q.shape[3])
    return {
        "D": q.shape[3],
        "D1": first,
        "D2": second,
        "CAUSAL": options.causal and q.shape[2] > 1,
        "WINDOW": options.window > 0,
        "SOFTCAP": options.softcap > 0,
        "HAS_BIAS": bias is not None,
        "HAS_MASK": mask is not None,
        "PRECISION": precision(q.dtype),
        "UPCAST": upcast(q.dtype),
    }


def exact_rows(rows: int) -> int:
    """Rows of a float32 tile: with 32 of them and four warps the three TF32 products do not run on tensor cores."""
    return 16 if rows <= 16 else 64


def _row_shapes(rows: int, d: int, dtype: torch.dtype) -> list[Shape]:
    small = max(16, min(64, triton.next_power_of_2(rows)))
    if dtype == torch.float32:  # tiles twice as large, in three products: less of them fits
        rows = exact_rows(rows)
        return [Shape(rows, 64, 4 if d <= 64 or rows == 16 else 8, 2)] if d <= 128 else [Shape(16, 32, 4, 2)]
    if rows <= 64:
        return [Shape(small, 128 if d <= 128 else 64, 4, 3), Shape(small, 64, 4, 4)]
    if d <= 64:
        return [Shape(128, 64, 4, 3), Shape(128, 128, 8, 3), Shape(64, 128, 4, 3)]
    return [Shape(128, 64, 8, 3), Shape(128, 128, 8, 2), Shape(64, 64, 4, 3)]


def launch_row_lse(q: Tensor, k: Tensor, bias: Tensor | None, mask: Tensor | None, options: Options) -> Tensor:
    """Log-sum-exp of every query's logits, ``[B, H, M]`` float32; arguments as in ``row_lse_reference``."""
    b, h, m, d = q.shape
    hk, n = k.shape[1], k.shape[2]
    group = h // hk
    out = torch.empty(b, h, m, dtype=torch.float32, device=q.device)
    constants = _common(q, k, bias, mask, options)
    # Absent tensors still need a pointer; the kernel never reads it.
    mask8 = q if mask is None else mask.view(torch.uint8)
    shape = _row_shapes(group * m, d, q.dtype)

    def launch(s: Shape) -> None:
        blocks = triton.cdiv(group * m, s.rows)
        # Few rows over many keys: cut the keys until every multiprocessor has two programs.
        wanted = triton.cdiv(2 * multiprocessors(q.device), blocks * hk * b)
        chunk = max(triton.cdiv(triton.cdiv(n, wanted), s.keys), 4) * s.keys
        splits = triton.cdiv(n, chunk)
        partial = out if splits == 1 else torch.empty(splits, b, h, m, dtype=torch.float32, device=q.device)
        row_lse_fwd_kernel[(blocks * splits * hk * b,)](
            q, k, q if bias is None else bias, mask8, partial,
            m, n, group, hk, blocks, splits, chunk, options.window, options.scale, options.softcap,
            *q.stride(), *k.stride(), *_bias_strides(bias), *((0, 0) if mask is None else mask.stride()), out.numel(),
            **constants, BLOCK_M=s.rows, BLOCK_N=s.keys, num_warps=s.warps, num_stages=s.stages,
        )  # fmt: skip
        if splits > 1:
            combine_lse_fwd_kernel[(triton.cdiv(out.numel(), _COMBINE_BLOCK),)](
                partial, out, splits, out.numel(), BLOCK=_COMBINE_BLOCK
            )

    key = (q.dtype, d, hk, dispatch.round_up_bucket(group * m), dispatch.round_up_bucket(n), q.device)
    launch(choose("row_lse", shape, key, launch))
    return out


def _column_shapes(rows: int, d: int, dtype: torch.dtype) -> list[Shape]:
    few = max(16, min(64, triton.next_power_of_2(rows)))
    if dtype == torch.float32:
        if d <= 64:
            return [Shape(few, 64, 4, 2), Shape(few, 128, 4, 2)]
        return [Shape(min(few, 32), 64, 4 if d <= 128 else 8, 2)]
    if d <= 64:
        return [Shape(few, 128, 4, 3), Shape(few, 64, 4, 3), Shape(few, 128, 8, 3), Shape(max(few // 2, 16), 128, 4, 4)]
    return [Shape(few, 128, 8, 3), Shape(few, 64, 4, 3), Shape(few, 128, 4, 2)]


def launch_columns(
    q: Tensor,
    k: Tensor,
    weight: Tensor | None,
    lse: Tensor | None,
    bias: Tensor | None,
    mask: Tensor | None,
    options: Options,
    *,
    statistics: bool,
) -> list[Tensor]:
    """The sum, or all four statistics, float32; arguments as in ``column_scores_reference``."""
    b, h, m, d = q.shape
    hk, n = k.shape[1], k.shape[2]
    group = h // hk
    if lse is None:
        lse = launch_row_lse(q, k, bias, mask, options)
    rows = full_weight(weight)
    rows = q if rows is None else rows.expand(b, h, m)
    heads = h if options.group == "none" else hk
    outs = [torch.empty(b, heads, n, dtype=torch.float32, device=q.device) for _ in range(4 if statistics else 1)]
    reduce = {"none": 0, "sum": 1, "mean": 1, "max": 2}[options.group]
    fold = reduce == 1 and not statistics and group > 1 and m <= _FOLD_QUERIES
    constants = _common(q, k, bias, mask, options)
    mask8 = q if mask is None else mask.view(torch.uint8)
    pointers = outs if statistics else outs * 4

    def launch(s: Shape) -> None:
        blocks = triton.cdiv(n, s.keys)
        columns_fwd_kernel[(blocks * hk * b,)](
            q, k, rows, lse, q if bias is None else bias, mask8, *pointers,
            m, n, group, hk, blocks, options.window, options.scale, options.softcap,
            1.0 / group if options.group == "mean" else 1.0,
            *q.stride(), *k.stride(), *((0, 0, 0) if weight is None else rows.stride()), *lse.stride(),
            *_bias_strides(bias), *((0, 0) if mask is None else mask.stride()),
            **constants, HAS_WEIGHT=weight is not None, STATISTICS=statistics, REDUCE=reduce, FOLD=fold,
            BLOCK_M=s.rows, BLOCK_N=s.keys, num_warps=s.warps, num_stages=s.stages,
        )  # fmt: skip

    total = group * m if fold else m
    key = (q.dtype, d, hk, statistics, reduce, dispatch.round_up_bucket(total), dispatch.round_up_bucket(n), q.device)
    launch(choose("columns", _column_shapes(total, d, q.dtype), key, launch))
    return outs
