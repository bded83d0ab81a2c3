# mypy: disable-error-code="no-untyped-call, untyped-decorator"
"""The registered operators behind the row merges: ``tokred::merge_rows`` and ``tokred::merge_rows_norm``.

Each runs its Triton kernel where that can run and else the torch path. The public functions call them only for the
kernel: plain torch is left visible to the compiler. Un-merging is ``tokred::gather_rows``, every merge's gradient
``tokred::segment_sum``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tokred.kernels.dispatch import Refusal, use_kernel
from tokred.kernels.gather_rows import registration as gather_registration
from tokred.kernels.merge_rows import reference

_WHOLE_ROW_LIMIT = 8192
_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_LINEAR = ("mean", "sum", "keep")

_library = torch.library.Library("tokred", "FRAGMENT")
_ROWS = "Tensor x, Tensor representative, Tensor source, Tensor target, Tensor? size, Tensor? weight, str mode"
_library.define(f"merge_rows({_ROWS}) -> Tensor")
_library.define(
    f"merge_rows_norm({_ROWS}, Tensor? norm_weight, Tensor? norm_bias, float eps) -> (Tensor, Tensor)",
)


def _segment_sum(x: Tensor, keys: Tensor, slots: Tensor | None, coefficients: Tensor | None, rows: int) -> Tensor:
    found: Tensor = gather_registration.segment_sum_op(x, keys, slots, coefficients, rows)
    return found


def refusals(x: Tensor, size: Tensor | None, weight: Tensor | None, mode: str, *, norm: bool = False) -> list[Refusal]:
    """Why the kernel cannot run for these arguments, besides the device.

    Args:
        x: the rows.
        size: their sizes.
        weight: their weights.
        mode: how they are combined.
        norm: whether a LayerNorm is fused.
    """
    recording = torch.is_grad_enabled()
    learned = recording and any(t is not None and t.requires_grad for t in (size, weight))
    curved = recording and x.requires_grad and mode not in _LINEAR
    wide = (norm or mode == "mlerp") and x.shape[-1] > _WHOLE_ROW_LIMIT
    return [
        Refusal(x.dtype not in _DTYPES, f"the kernel takes float16, bfloat16 and float32, not {x.dtype}"),
        Refusal(x.numel() == 0, "the input is empty"),
        Refusal(learned, "gradients of sizes and weights are torch's"),
        Refusal(curved, f"the gradient of mode {mode!r} is torch's"),
        Refusal(wide, f"{x.shape[-1]} channels; with a norm over them the kernel takes up to {_WHOLE_ROW_LIMIT}"),
    ]


def size_refusals(size: Tensor | None) -> list[Refusal]:
    """Why the sums of sizes cannot run a kernel, besides the device."""
    learned = size is not None and size.requires_grad and torch.is_grad_enabled()
    return [Refusal(learned, "gradients of sizes are torch's")]


def _merge(
    x: Tensor, representative: Tensor, source: Tensor, target: Tensor, size: Tensor | None, weight: Tensor | None,
    mode: str,
) -> Tensor:  # fmt: skip
    if not use_kernel("merge_rows", x, lambda: refusals(x, size, weight, mode)):
        return reference.merge_rows(x, representative, source, target, size, weight, mode)
    from tokred.kernels.merge_rows.triton import launch

    return launch(x, representative, source, target, size, weight, mode)[0]


def _merge_norm(
    x: Tensor, representative: Tensor, source: Tensor, target: Tensor, size: Tensor | None, weight: Tensor | None,
    mode: str, norm_weight: Tensor | None, norm_bias: Tensor | None, eps: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    if not use_kernel("merge_rows_norm", x, lambda: refusals(x, size, weight, mode, norm=True)):
        merged = reference.merge_rows(x, representative, source, target, size, weight, mode)
        return merged, reference.layer_norm(merged, norm_weight, norm_bias, eps)
    from tokred.kernels.merge_rows.triton import launch

    norm = (norm_weight, norm_bias, eps)
    merged, normed = launch(x, representative, source, target, size, weight, mode, norm)
    if normed is None:
        raise RuntimeError("the launcher was asked for a norm and gave none")
    return merged, normed


_library.impl("merge_rows", _merge, "CompositeExplicitAutograd")
_library.impl("merge_rows_norm", _merge_norm, "CompositeExplicitAutograd")


@torch.library.register_fake("tokred::merge_rows")
def _(x: Tensor, representative: Tensor, *_: Any) -> Tensor:
    return x.new_empty(x.shape[0], representative.shape[1], x.shape[2])


@torch.library.register_fake("tokred::merge_rows_norm")
def _(x: Tensor, representative: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    shape = (x.shape[0], representative.shape[1], x.shape[2])
    return x.new_empty(shape), x.new_empty(shape)


def slot_totals(gain: Tensor | None, representative: Tensor, source: Tensor, target: Tensor) -> Tensor:
    """Sum of the gains of each slot's members ``(B, M)`` in a fixed order; ``gain`` is ``(B, N)``, or None for ones."""
    if gain is None:
        ones = torch.ones(*target.shape, 1, dtype=torch.float32, device=target.device)
        return 1.0 + _segment_sum(ones, target, None, None, representative.shape[1]).squeeze(-1)
    added = _segment_sum(gain.unsqueeze(-1), target, source, None, representative.shape[1])
    return gain.gather(1, representative) + added.squeeze(-1)


def _spread(
    grad: Tensor, representative: Tensor, source: Tensor, target: Tensor, size: Tensor | None, weight: Tensor | None,
    mode: str, n: int,
) -> Tensor:  # fmt: skip
    """The transpose of a merge that is linear in the rows: each row takes its share of its slot's gradient."""
    if mode == "keep":
        return _segment_sum(grad, representative, None, None, n)
    slot = target.clamp(min=0)
    numbers = torch.arange(representative.shape[1], device=grad.device).expand_as(representative)
    keys = torch.cat([representative, torch.where(target < 0, -1, source)], 1)
    slots = torch.cat([numbers, slot], 1)
    gain = weight if size is None or mode == "sum" else (size if weight is None else size * weight)
    gain = None if gain is None else gain.float()
    shares = None
    if mode == "mean":
        total = slot_totals(gain, representative, source, target)
        tiny = torch.finfo(torch.float32).tiny
        own, come = (1.0, 1.0) if gain is None else (gain.gather(1, representative), gain.gather(1, source))
        # A slot whose members all weigh nothing is its representative.
        shares = torch.cat([torch.where(total > 0, own / total, 1.0), come / total.gather(1, slot).clamp(min=tiny)], 1)
    elif gain is not None:
        shares = torch.cat([gain.gather(1, representative), gain.gather(1, source)], 1)
    return _segment_sum(grad, keys, slots, shares, n)


def _recompute(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """Gradients of rows, sizes and weights through the torch path, evaluated again."""
    x, representative, source, target, size, weight = ctx.saved_tensors[:6]
    with torch.enable_grad():
        leaves = {
            place: t.detach().requires_grad_()
            for place, t in ((0, x), (4, size), (5, weight))
            if t is not None and ctx.needs_input_grad[place]
        }
        rows, sizes, weights = leaves.get(0, x), leaves.get(4, size), leaves.get(5, weight)
        out = reference.merge_rows(rows, representative, source, target, sizes, weights, ctx.mode)
    found = dict(zip(leaves, torch.autograd.grad(out, list(leaves.values()), grad, allow_unused=True), strict=True))
    return found.get(0), None, None, None, found.get(4), found.get(5)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    x, representative, source, target, size, weight, ctx.mode, *norm = inputs
    ctx.again = ctx.mode not in _LINEAR or ctx.needs_input_grad[4] or ctx.needs_input_grad[5]
    ctx.length = x.shape[1]
    saved = [x if ctx.again else None, representative, source, target, size, weight]
    if norm:
        norm_weight, norm_bias, ctx.eps = norm
        saved += [output[0], norm_weight, norm_bias]
    ctx.save_for_backward(*saved)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return (*_rows_backward(ctx, grad), None)


def _rows_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    if ctx.again:
        return _recompute(ctx, grad)
    _, representative, source, target, size, weight = ctx.saved_tensors[:6]
    found = _spread(grad, representative, source, target, size, weight, ctx.mode, ctx.length)
    return found, None, None, None, None, None


def _norm_backward(ctx: Any, grad: Tensor, grad_normed: Tensor) -> tuple[Tensor | None, ...]:
    merged, weight, bias = ctx.saved_tensors[6:]
    channels = [merged.shape[-1]]
    scale, shift = (None if t is None else t.to(merged.dtype) for t in (weight, bias))
    _, mean, rstd = torch.ops.aten.native_layer_norm(merged, channels, scale, shift, ctx.eps)
    wanted = [True, weight is not None, bias is not None]
    through, grad_weight, grad_bias = torch.ops.aten.native_layer_norm_backward(
        grad_normed.contiguous(), merged, channels, mean, rstd, scale, shift, wanted
    )
    grad_weight = None if weight is None else grad_weight.to(weight.dtype)
    grad_bias = None if bias is None else grad_bias.to(bias.dtype)
    return (*_rows_backward(ctx, grad + through), None, grad_weight, grad_bias, None)


torch.library.register_autograd("tokred::merge_rows", _backward, setup_context=_save)
torch.library.register_autograd("tokred::merge_rows_norm", _norm_backward, setup_context=_save)
