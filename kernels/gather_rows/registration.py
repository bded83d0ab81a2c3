# mypy: disable-error-code="no-untyped-call, untyped-decorator"
"""The registered operators behind the row gathers: ``tokred::gather_rows``, ``segment_sum`` and the cache's two.

Each runs its Triton kernel where that can run and else the torch path. The public functions call them only for the
kernel: plain torch is left visible to the compiler.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tokred.kernels.dispatch import Refusal, use_kernel
from tokred.kernels.gather_rows import reference

_library = torch.library.Library("tokred", "FRAGMENT")
_library.define("gather_rows(Tensor x, Tensor index, bool or_zero) -> Tensor")
_library.define("segment_sum(Tensor x, Tensor keys, Tensor? slots, Tensor? coefficients, int rows) -> Tensor")
_CACHE = "Tensor keys, Tensor values, Tensor positions, Tensor index"
_library.define(f"gather_cache({_CACHE}) -> (Tensor, Tensor, Tensor)")
_library.define(
    f"gather_cache_out({_CACHE}, Tensor(a!) out_keys, Tensor(b!) out_values, Tensor(c!) out_positions) -> ()"
)
_library.define("gather_cache_(Tensor(a!) keys, Tensor(b!) values, Tensor(c!) positions, Tensor index) -> ()")
segment_sum_op = torch.ops.tokred.segment_sum.default


def refusals(x: Tensor, *, in_place: bool = False, gradients: bool = True) -> list[Refusal]:
    """Why the kernels cannot run on rows like ``x``, besides the device.

    Args:
        x: the rows.
        in_place: whether they are moved within ``x``.
        gradients: whether the operator has a gradient.
    """
    recorded = x.requires_grad and torch.is_grad_enabled()
    return [
        Refusal(x.is_complex() or x.is_sparse, f"the kernel takes dense real tensors, not {x.dtype}"),
        Refusal(x.numel() == 0, "the input is empty"),
        Refusal(x.dtype == torch.float64 and recorded, "gradients in float64 are summed by torch"),
        Refusal(in_place and x.stride(-1) != 1, "moving rows in place needs contiguous channels"),
        Refusal(not gradients and recorded, "the compaction of a cache has a gradient only in torch"),
    ]


def cache_refusals(keys: Tensor, values: Tensor, *, in_place: bool = False) -> list[Refusal]:
    """Why the kernels cannot run on this cache, besides the device."""
    widest = max(keys.shape[-1], values.shape[-1])
    return [
        *refusals(keys, in_place=in_place, gradients=False),
        *refusals(values, in_place=in_place, gradients=False),
        Refusal(widest > 1024, f"{widest} channels per head; the kernel takes up to 1024"),
    ]


def sum_refusals(x: Tensor) -> list[Refusal]:
    """Why the segmented sum cannot run its kernel, besides the device."""
    found = x.dtype not in (torch.float16, torch.bfloat16, torch.float32)
    return [Refusal(found, f"the kernel sums float16, bfloat16 and float32, not {x.dtype}"), *refusals(x)]


def _gather(x: Tensor, index: Tensor, or_zero: bool) -> Tensor:
    if use_kernel("gather_rows", x, lambda: refusals(x)):
        from tokred.kernels.gather_rows.triton import launch_gather

        return launch_gather(x, index, or_zero)
    return reference.gather_rows_or_zero(x, index) if or_zero else reference.gather_rows(x, index)


def _segment_sum(x: Tensor, keys: Tensor, slots: Tensor | None, coefficients: Tensor | None, rows: int) -> Tensor:
    if use_kernel("segment_sum", x, lambda: sum_refusals(x)):
        from tokred.kernels.gather_rows.triton import launch_segment_sum

        return launch_segment_sum(x, keys, slots, coefficients, rows)
    return reference.segment_sum(x, keys, slots, coefficients, rows)


def _cache(keys: Tensor, values: Tensor, positions: Tensor, index: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    out = _fresh(keys, values, positions, index)
    _cache_out(keys, values, positions, index, *out)
    return out


def _cache_out(
    keys: Tensor, values: Tensor, positions: Tensor, index: Tensor,
    out_keys: Tensor, out_values: Tensor, out_positions: Tensor,
) -> None:  # fmt: skip
    out = (out_keys, out_values, out_positions)
    if use_kernel("gather_cache", keys, lambda: cache_refusals(keys, values)):
        from tokred.kernels.gather_rows.triton import launch_gather_cache

        launch_gather_cache(keys, values, positions, index, out)
        return
    reference.gather_cache_out(keys, values, positions, index, out)


def _cache_in_place(keys: Tensor, values: Tensor, positions: Tensor, index: Tensor) -> None:
    if use_kernel("gather_cache_", keys, lambda: cache_refusals(keys, values, in_place=True)):
        from tokred.kernels.gather_rows.triton import launch_compact_cache

        launch_compact_cache(keys, values, positions, index)
        return
    reference.gather_cache_(keys, values, positions, index)


for _name, _function in (
    ("gather_rows", _gather),
    ("segment_sum", _segment_sum),
    ("gather_cache", _cache),
    ("gather_cache_out", _cache_out),
    ("gather_cache_", _cache_in_place),
):
    _library.impl(_name, _function, "CompositeExplicitAutograd")


def _fresh(keys: Tensor, values: Tensor, positions: Tensor, index: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return (
        keys.new_empty(*index.shape, keys.shape[-1]),
        values.new_empty(*index.shape, values.shape[-1]),
        positions.new_empty(index.shape),
    )


@torch.library.register_fake("tokred::gather_rows")
def _(x: Tensor, index: Tensor, or_zero: bool) -> Tensor:
    return x.new_empty(*x.shape[:-2], index.shape[-1], x.shape[-1])


@torch.library.register_fake("tokred::segment_sum")
def _(x: Tensor, keys: Tensor, slots: Tensor | None, coefficients: Tensor | None, rows: int) -> Tensor:
    return x.new_empty(x.shape[0], rows, x.shape[-1])


torch.library.register_fake("tokred::gather_cache", _fresh)


@torch.library.register_fake("tokred::gather_cache_out")
def _(*_: Any) -> None:
    return None


@torch.library.register_fake("tokred::gather_cache_")
def _(*_: Any) -> None:
    return None


def _save_gather(ctx: Any, inputs: tuple[Tensor, Tensor, bool], output: Tensor) -> None:
    x, index, _ = inputs
    ctx.save_for_backward(index)
    ctx.shape = x.shape


def _gather_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    (index,) = ctx.saved_tensors
    *lead, n, channels = ctx.shape
    if len(lead) == 2:
        index = (index.unsqueeze(1) if index.ndim == 2 else index).expand(*lead, -1).reshape(-1, index.shape[-1])
    flat = grad.reshape(index.shape[0], index.shape[-1], channels)
    summed = segment_sum_op(flat, index, None, None, n)
    return summed.view(*lead, n, channels), None, None


def _save_sum(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, keys, slots, coefficients, _ = inputs
    ctx.save_for_backward(keys, slots, coefficients)
    ctx.length = x.shape[1]


def _sum_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    keys, slots, coefficients = ctx.saved_tensors
    if slots is None:
        slots = torch.arange(ctx.length, device=keys.device).expand_as(keys)
    left_out = keys < 0
    back = torch.where(left_out, -1, slots)
    found = segment_sum_op(grad, back, keys.clamp(min=0), coefficients, ctx.length)
    return found, None, None, None, None


torch.library.register_autograd("tokred::gather_rows", _gather_backward, setup_context=_save_gather)
torch.library.register_autograd("tokred::segment_sum", _sum_backward, setup_context=_save_sum)
