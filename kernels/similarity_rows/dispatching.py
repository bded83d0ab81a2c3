"""Which path a checked call takes, and its shapes on the way there and back."""

from __future__ import annotations

import torch
from torch import Tensor

from tokred.kernels import dispatch
from tokred.kernels.similarity_rows import torch_path
from tokred.kernels.similarity_rows.checks import Call
from tokred.kernels.similarity_rows.gradients import Top, Total
from tokred.kernels.similarity_rows.registration import refusals, similarity_top_op, similarity_total_op
from tokred.kernels.similarity_rows.windows import to_positions

Operands = tuple[Tensor, Tensor, Tensor | None, Tensor | None]


def why_not(a: Tensor, b: Tensor) -> str | None:
    """Why rows like these do not take the kernel here, or None if they can."""
    return dispatch.why_not(a, lambda: refusals(a, b))


def _use_kernel(call: Call) -> bool:
    return dispatch.use_kernel("similarity_rows", call.a, lambda: refusals(call.a, call.b))


def _needs_grad(call: Call) -> bool:
    return torch.is_grad_enabled() and (call.a.requires_grad or call.b.requires_grad)


def _flat(call: Call) -> Operands:
    """Rows ``(B, N, D)`` and masks ``(B, N)`` with all leading dimensions in one."""
    a, b, a_mask, b_mask = call.a, call.b, call.a_mask, call.b_mask
    if a is b:
        b = b.view_as(b)  # the compiler refuses the same tensor twice in an autograd.Function
    if a.dim() == 3:
        return a, b, a_mask, b_mask
    if a_mask is not None:
        a_mask = a_mask.flatten(0, -2)
    if b_mask is not None:
        b_mask = b_mask.flatten(0, -2)
    return a.flatten(0, -3), b.flatten(0, -3), a_mask, b_mask


def _paired(call: Call) -> Operands:
    """Rows ``(B, G, N, D)`` and masks ``(B, G, N)``, as the kernels take them: views wherever strides allow it."""

    def two(x: Tensor | None, trailing: int) -> Tensor | None:
        if x is None:
            return None
        leading = x.dim() - trailing
        return x.unsqueeze(1) if leading == 1 else x if leading == 2 else x.flatten(0, leading - 2)

    a, b = two(call.a, 2), two(call.b, 2)
    assert a is not None
    assert b is not None
    return a, b, two(call.a_mask, 1), two(call.b_mask, 1)


def top(call: Call, k: int) -> tuple[Tensor, Tensor]:
    """Scores and indices ``(..., Na, k)`` of a checked call."""
    grad = _needs_grad(call)
    if _use_kernel(call):
        # Without a gradient the kernel reads the rows of a group where they lie; the gradient wants them gathered.
        inner = call.gathered() if grad else call
        a, b, a_mask, b_mask = _paired(inner)
        positions = (None, None) if inner.windows is None else inner.windows[:2]
        score, index = similarity_top_op(a, b, k, call.metric, a_mask, b_mask, call.exclude_self, *positions)
    else:
        inner = call.gathered()
        a, b, a_mask, b_mask = _flat(inner)
        run = Top.apply if grad else torch_path.top
        score, index = run(a, b, k, call.metric, a_mask, b_mask, call.exclude_self)
    if score.dim() != 3 or call.windows is not None or call.a.dim() > 3:
        shape = call.result_shape()
        score, index = score.view(*shape, k), index.view(*shape, k)
    if call.windows is not None and inner.windows is None:
        index = to_positions(index, call.windows.b).masked_fill_(score.detach() == -torch.inf, 0)
    return score, index


def total(call: Call, function: str, margin: float, alpha: float) -> Tensor:
    """Sums ``(..., Na)`` of a checked call."""
    grad = _needs_grad(call) and function != "count"
    result: Tensor
    if _use_kernel(call):
        inner = call.gathered() if grad else call
        a, b, a_mask, b_mask = _paired(inner)
        positions = (None, None) if inner.windows is None else inner.windows[:2]
        result = similarity_total_op(a, b, function, margin, alpha, call.metric, a_mask, b_mask, *positions)
    else:
        a, b, a_mask, b_mask = _flat(call.gathered())
        run = Total.apply if grad else torch_path.total
        result = run(a, b, function, margin, alpha, call.metric, a_mask, b_mask)
    return result.view(call.result_shape())
