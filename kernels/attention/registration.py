"""``tokred::attention``: output and log-sum-exp from one Triton kernel, for biases that CUDA's flash kernel refuses."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tokred.kernels.attention.reference import attention_reference
from tokred.kernels.attention.torch_path import fused_attention_with_lse
from tokred.kernels.dispatch import Refusal, accumulator_dtype, use_kernel

KERNEL_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
MAX_CHANNELS = 256

_library = torch.library.Library("tokred", "FRAGMENT")  # type: ignore[no-untyped-call]
_library.define(  # type: ignore[no-untyped-call]
    "attention(Tensor q, Tensor k, Tensor v, Tensor? bias, Tensor? key_mask, float scale, bool causal)"
    " -> (Tensor, Tensor)"
)


def refusals(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> list[Refusal]:
    """Why the kernel cannot run on these tensors, besides the device."""
    tracked = any(t is not None and t.requires_grad for t in (q, k, v, bias))
    return [
        Refusal(q.dtype not in KERNEL_DTYPES, f"the kernel takes float16, bfloat16 and float32, not {q.dtype}"),
        Refusal(q.shape[3] > MAX_CHANNELS, f"{q.shape[3]} channels per head; the kernel takes up to {MAX_CHANNELS}"),
        Refusal(q.shape[3] != v.shape[3], "the values have another number of channels than the queries"),
        Refusal(q.numel() == 0 or k.numel() == 0, "an input is empty"),
        Refusal(
            tracked and torch.is_grad_enabled(),
            "gradients are asked for, which torch's kernels give without recomputing",
        ),
    ]


def _attention(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, key_mask: Tensor | None, scale: float, causal: bool
) -> tuple[Tensor, Tensor]:
    if not use_kernel("attention_with_lse", q, lambda: refusals(q, k, v, bias)):
        # Copies: fused kernels may return a view, and results of an operator own their memory.
        out, lse = fused_attention_with_lse(q, k, v, bias, key_mask, scale, causal)
        return out.contiguous(), lse.contiguous()
    from tokred.kernels.attention.triton import launch_attention

    return launch_attention(q, k, v, bias, key_mask, scale, causal)


def _fake(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    lse = q.new_empty(q.shape[:3], dtype=accumulator_dtype(q.dtype))
    return q.new_empty(*q.shape[:3], v.shape[3]), lse


def _save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    q, k, v, bias, key_mask, ctx.scale, ctx.causal = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(q, k, v, bias, key_mask)


def _backward(ctx: Any, grad: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    """Gradients through the definition, evaluated again."""
    *inputs, key_mask = ctx.saved_tensors
    wanted = [i for i, x in enumerate(inputs) if x is not None and ctx.needs_input_grad[i]]
    with torch.enable_grad():
        leaves: list[Any] = [x if x is None else x.detach().requires_grad_(i in wanted) for i, x in enumerate(inputs)]
        q, k, v, bias = leaves
        out, _lse = attention_reference(q, k, v, bias, key_mask, ctx.scale, ctx.causal)
    grads = torch.autograd.grad(out, [leaves[i] for i in wanted], grad, allow_unused=True)
    found = dict(zip(wanted, grads, strict=True))
    return (*(found.get(i) for i in range(4)), None, None, None)


_library.impl("attention", _attention, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
torch.library.register_fake("tokred::attention", _fake)
torch.library.register_autograd("tokred::attention", _backward, setup_context=_save)
