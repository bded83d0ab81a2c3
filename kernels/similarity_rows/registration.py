# mypy: disable-error-code="no-untyped-call, untyped-decorator"
"""The registered operators ``tokred::similarity_top`` and ``tokred::similarity_total``.

Each runs its Triton kernel where that can run and else the torch path. The public functions call them only for the
kernel: plain torch is left visible to the compiler. Rows are ``(B, G, N, D)``; with positions ``(G, n)`` they are
``(B, 1, N, D)``, and rows are compared inside their group.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tokred.kernels.dispatch import Refusal, accumulator_dtype, use_kernel
from tokred.kernels.similarity_rows import gradients, torch_path
from tokred.kernels.similarity_rows.windows import gather_mask, gather_rows, to_positions

_library = torch.library.Library("tokred", "FRAGMENT")
_ROWS = "Tensor? a_mask, Tensor? b_mask, bool exclude_self, Tensor? a_positions, Tensor? b_positions"
_library.define(f"similarity_top(Tensor a, Tensor b, int k, str metric, {_ROWS}) -> (Tensor, Tensor)")
_library.define(
    "similarity_total(Tensor a, Tensor b, str function, float margin, float alpha, str metric, Tensor? a_mask, "
    "Tensor? b_mask, Tensor? a_positions, Tensor? b_positions) -> Tensor"
)

_KERNEL_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
Masks = tuple[Tensor | None, Tensor | None]


def refusals(a: Tensor, b: Tensor) -> list[Refusal]:
    """Why the kernels cannot run on these rows, besides the device."""
    return [
        Refusal(a.dtype not in _KERNEL_DTYPES, f"the kernel takes float16, bfloat16 and float32, not {a.dtype}"),
        Refusal(a.numel() == 0 or b.numel() == 0, "there is nothing to compare"),
    ]


def _plain(
    a: Tensor, b: Tensor, masks: Masks, a_positions: Tensor | None, b_positions: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, tuple[int, int]]:
    """Rows and masks with groups gathered and both batch dimensions in one, and what these were."""
    a_mask, b_mask = masks
    if a_positions is not None and b_positions is not None:
        a, b = gather_rows(a.squeeze(1), a_positions), gather_rows(b.squeeze(1), b_positions)
        a_mask = gather_mask(None if a_mask is None else a_mask.squeeze(1), a_positions, True)
        b_mask = gather_mask(None if b_mask is None else b_mask.squeeze(1), b_positions, True)
    a_mask = None if a_mask is None else a_mask.expand(a.shape[:-1]).flatten(0, 1)
    b_mask = None if b_mask is None else b_mask.expand(b.shape[:-1]).flatten(0, 1)
    return a.flatten(0, 1), b.flatten(0, 1), a_mask, b_mask, (a.shape[0], a.shape[1])


def _top(
    a: Tensor, b: Tensor, k: int, metric: str, a_mask: Tensor | None, b_mask: Tensor | None, exclude_self: bool,
    a_positions: Tensor | None, b_positions: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    if use_kernel("similarity_top", a, lambda: refusals(a, b)):
        from tokred.kernels.similarity_rows import launch

        inputs = launch.Inputs(a, b, metric, a_mask, b_mask, a_positions, b_positions)
        return launch.top(inputs, k, exclude_self)
    x, y, x_mask, y_mask, batch = _plain(a, b, (a_mask, b_mask), a_positions, b_positions)
    score, index = torch_path.top(x, y, k, metric, x_mask, y_mask, exclude_self)
    score, index = score.view(*batch, x.shape[1], k), index.view(*batch, x.shape[1], k)
    if b_positions is not None:
        index = to_positions(index, b_positions).masked_fill_(score == -torch.inf, 0)
    return score, index


def _total(
    a: Tensor, b: Tensor, function: str, margin: float, alpha: float, metric: str, a_mask: Tensor | None,
    b_mask: Tensor | None, a_positions: Tensor | None, b_positions: Tensor | None,
) -> Tensor:  # fmt: skip
    if use_kernel("similarity_total", a, lambda: refusals(a, b)):
        from tokred.kernels.similarity_rows import launch

        inputs = launch.Inputs(a, b, metric, a_mask, b_mask, a_positions, b_positions)
        return launch.total(inputs, function, margin, alpha)
    x, y, x_mask, y_mask, batch = _plain(a, b, (a_mask, b_mask), a_positions, b_positions)
    return torch_path.total(x, y, function, margin, alpha, metric, x_mask, y_mask).view(*batch, x.shape[1])


_library.impl("similarity_top", _top, "CompositeExplicitAutograd")
_library.impl("similarity_total", _total, "CompositeExplicitAutograd")


def _shape(a: Tensor, a_positions: Tensor | None) -> tuple[int, int, int]:
    inner = a.shape[1:3] if a_positions is None else a_positions.shape
    return a.shape[0], inner[0], inner[1]


@torch.library.register_fake("tokred::similarity_top")
def _(a: Tensor, b: Tensor, k: int, *args: Any) -> tuple[Tensor, Tensor]:
    shape = (*_shape(a, args[4]), k)
    return a.new_empty(shape, dtype=accumulator_dtype(a.dtype)), a.new_empty(shape, dtype=torch.int64)


@torch.library.register_fake("tokred::similarity_total")
def _(a: Tensor, b: Tensor, *args: Any) -> Tensor:
    return a.new_empty(_shape(a, args[6]), dtype=accumulator_dtype(a.dtype))


def _check_ungrouped(positions: Tensor | None) -> None:
    if positions is not None:
        raise NotImplementedError("with positions the operator has no gradient; gather the groups first")


def _top_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    a, b, _, metric, _, _, _, a_positions, _ = inputs
    ctx.metric = metric
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(a, b, *output, a_positions)


def _top_backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    a, b, score, index, a_positions = ctx.saved_tensors
    _check_ungrouped(a_positions)
    grad, x, y, score, index = (t.flatten(0, 1) for t in (grad, a, b, score, index))
    da, db = gradients.top_backward(grad, x, y, score, index, ctx.metric)
    return da.view(a.shape), db.view(b.shape), None, None, None, None, None, None, None


def _total_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    a, b, *options, a_mask, b_mask, a_positions, _ = inputs
    ctx.options = options
    ctx.save_for_backward(a, b, a_mask, b_mask, a_positions)


def _total_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    a, b, a_mask, b_mask, a_positions = ctx.saved_tensors
    _check_ungrouped(a_positions)
    function, margin, alpha, metric = ctx.options
    x_mask, y_mask = (None if m is None else m.flatten(0, 1) for m in (a_mask, b_mask))
    grad, x, y = (t.flatten(0, 1) for t in (grad, a, b))
    da, db = gradients.total_backward(grad, x, y, function, margin, alpha, metric, x_mask, y_mask)
    return da.view(a.shape), db.view(b.shape), None, None, None, None, None, None, None, None


torch.library.register_autograd("tokred::similarity_top", _top_backward, setup_context=_top_setup)
torch.library.register_autograd("tokred::similarity_total", _total_backward, setup_context=_total_setup)

similarity_top_op = torch.ops.tokred.similarity_top.default
similarity_total_op = torch.ops.tokred.similarity_total.default
