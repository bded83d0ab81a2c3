"""Which path a checked call takes, and its shapes on the way there and back."""

from __future__ import annotations

import torch
from torch import Tensor

from tokred.kernels import dispatch
from tokred.kernels.similarity_rows import torch_path
from tokred.kernels.similarity_rows.checks import Call
from tokred.kernels.similarity_rows.gradients import Top, Total
from tokred.kernels.similarity_rows.windows import to_positions


def refusals(a: Tensor) -> list[dispatch.Refusal]:
    """Why the kernel cannot run on such rows."""
    return [
        dispatch.Refusal(a.dtype == torch.float64, "float64 is the torch path's; the kernel accumulates in float32"),
        dispatch.Refusal(a.shape[-1] == 0, "the rows have no channels"),
        dispatch.Refusal(a.numel() == 0, "there are no rows to compare"),
    ]


def why_not(a: Tensor) -> str | None:
    """Why rows like ``a`` do not take the kernel here, or None if they can."""
    return dispatch.why_not(a, lambda: refusals(a))


def _needs_grad(call: Call) -> bool:
    return torch.is_grad_enabled() and (call.a.requires_grad or call.b.requires_grad)


def _flat(call: Call) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
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


def top(call: Call, k: int) -> tuple[Tensor, Tensor]:
    """Scores and indices ``(..., Na, k)`` of a checked call."""
    inner = call.gathered()
    a, b, a_mask, b_mask = _flat(inner)
    run = Top.apply if _needs_grad(inner) else torch_path.top
    score, index = run(a, b, k, call.metric, a_mask, b_mask, call.exclude_self)
    if inner.a.dim() > 3:
        score, index = (x.view(*inner.a.shape[:-1], k) for x in (score, index))
    if call.windows is not None:
        index = to_positions(index, call.windows.b).masked_fill_(score.detach() == -torch.inf, 0)
    return score, index


def total(call: Call, function: str, margin: float, alpha: float) -> Tensor:
    """Sums ``(..., Na)`` of a checked call."""
    inner = call.gathered()
    a, b, a_mask, b_mask = _flat(inner)
    run = Total.apply if _needs_grad(inner) and function != "count" else torch_path.total
    result: Tensor = run(a, b, function, margin, alpha, call.metric, a_mask, b_mask)
    return result.view(inner.a.shape[:-1]) if inner.a.dim() > 3 else result
