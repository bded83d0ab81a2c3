"""``tokred::column_scores``, ``tokred::column_statistics`` and ``tokred::row_lse``: the operators behind the kernels.

Each runs its Triton kernel where that can run and else the blocked torch path. The public functions call them only for
the kernel: plain torch is left visible to the compiler.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tokred.kernels.column_scores.blocked import column_scores_blocked, column_statistics_blocked
from tokred.kernels.column_scores.reference import (
    Options,
    column_scores_reference,
    column_statistics_reference,
    row_lse_reference,
)
from tokred.kernels.dispatch import Refusal, accumulator_dtype, use_kernel

KERNEL_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
MAX_CHANNELS = 256
_TENSORS = "Tensor q, Tensor k, Tensor? weight, Tensor? lse, Tensor? bias, Tensor? key_mask, "
_SCALARS = "float scale, bool causal, int window, float softcap, str group"

_library = torch.library.Library("tokred", "FRAGMENT")  # type: ignore[no-untyped-call]
for _schema in (
    f"column_scores({_TENSORS}{_SCALARS}) -> Tensor",
    f"column_statistics({_TENSORS}{_SCALARS}) -> (Tensor, Tensor, Tensor, Tensor)",
    "row_lse(Tensor q, Tensor k, Tensor? bias, Tensor? key_mask, float scale, bool causal, int window, float softcap)"
    " -> Tensor",
):
    _library.define(_schema)  # type: ignore[no-untyped-call]


def refusals(q: Tensor, k: Tensor) -> list[Refusal]:
    """Why the kernels cannot run on these tensors, besides the device."""
    return [
        Refusal(q.dtype not in KERNEL_DTYPES, f"the kernel takes float16, bfloat16 and float32, not {q.dtype}"),
        Refusal(q.shape[3] > MAX_CHANNELS, f"{q.shape[3]} channels per head; the kernel takes up to {MAX_CHANNELS}"),
        Refusal(q.numel() == 0 or k.numel() == 0, "an input is empty"),
    ]


def _scores(
    q: Tensor, k: Tensor, weight: Tensor | None, lse: Tensor | None, bias: Tensor | None, key_mask: Tensor | None,
    scale: float, causal: bool, window: int, softcap: float, group: str,
) -> Tensor:  # fmt: skip
    options = Options(scale, causal, window, softcap, group)
    if not use_kernel("column_scores", q, lambda: refusals(q, k)):
        return column_scores_blocked(q, k, weight, lse, bias, key_mask, options)
    from tokred.kernels.column_scores.launch import launch_columns

    return launch_columns(q, k, weight, lse, bias, key_mask, options, statistics=False)[0]


def _statistics(
    q: Tensor, k: Tensor, weight: Tensor | None, lse: Tensor | None, bias: Tensor | None, key_mask: Tensor | None,
    scale: float, causal: bool, window: int, softcap: float, group: str,
) -> tuple[Tensor, ...]:  # fmt: skip
    options = Options(scale, causal, window, softcap, group)
    if not use_kernel("column_statistics", q, lambda: refusals(q, k)):
        return tuple(column_statistics_blocked(q, k, weight, lse, bias, key_mask, options))
    from tokred.kernels.column_scores.launch import launch_columns

    return tuple(launch_columns(q, k, weight, lse, bias, key_mask, options, statistics=True))


def _row_lse(
    q: Tensor, k: Tensor, bias: Tensor | None, key_mask: Tensor | None,
    scale: float, causal: bool, window: int, softcap: float,
) -> Tensor:  # fmt: skip
    options = Options(scale, causal, window, softcap, "none")
    if not use_kernel("row_lse", q, lambda: refusals(q, k)):
        return row_lse_reference(q, k, bias, key_mask, options)
    from tokred.kernels.column_scores.launch import launch_row_lse

    return launch_row_lse(q, k, bias, key_mask, options)


def _empty_columns(q: Tensor, k: Tensor, group: str) -> Tensor:
    heads = q.shape[1] if group == "none" else k.shape[1]
    return q.new_empty(q.shape[0], heads, k.shape[2], dtype=accumulator_dtype(q.dtype))


def _fake_scores(q: Tensor, k: Tensor, *rest: Any) -> Tensor:
    return _empty_columns(q, k, rest[-1])


def _fake_statistics(q: Tensor, k: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    return tuple(_empty_columns(q, k, rest[-1]) for _ in range(4))


def _fake_row_lse(q: Tensor, *rest: Any) -> Tensor:
    return q.new_empty(q.shape[:3], dtype=accumulator_dtype(q.dtype))


def _save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    tensors = [x if isinstance(x, Tensor) else None for x in inputs]
    ctx.save_for_backward(*tensors)
    ctx.others = tuple(None if isinstance(x, Tensor) else x for x in inputs)


def _sample(x: Tensor | None, i: int) -> Tensor | None:
    """Row ``i`` of the batch, where the tensor has one; a weight over queries alone belongs to all samples."""
    return x if x is None or x.dim() == 1 or x.shape[0] == 1 else x[i : i + 1]


def _recompute(ctx: Any, function: Any, grads: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
    """Gradients through ``function`` evaluated again, sample by sample: memory for one sample's weights."""
    saved = ctx.saved_tensors
    wanted = [i for i, x in enumerate(saved) if x is not None and ctx.needs_input_grad[i]]
    totals = {i: torch.zeros_like(saved[i]) for i in wanted}
    live = [i for i, g in enumerate(grads) if g is not None]
    for sample in range(saved[0].shape[0]):
        with torch.enable_grad():
            leaves = {i: _detached(_sample(saved[i], sample)) for i in wanted}
            arguments = [leaves.get(i, _sample(x, sample)) for i, x in enumerate(saved)]
            outputs = function(*(a if isinstance(a, Tensor) else o for a, o in zip(arguments, ctx.others, strict=True)))
        parts = torch.autograd.grad(
            [outputs[i] for i in live],
            [leaves[i] for i in wanted],
            [_sample(grads[i], sample) for i in live],
            allow_unused=True,
        )
        for i, part in zip(wanted, parts, strict=True):
            target = _sample(totals[i], sample)
            if part is not None and target is not None:
                target.add_(part)
    return tuple(totals.get(i) for i in range(len(saved)))


def _detached(x: Tensor | None) -> Tensor:
    assert x is not None
    return x.detach().requires_grad_()


def _scores_backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    def again(q: Any, k: Any, weight: Any, lse: Any, bias: Any, key_mask: Any, *options: Any) -> tuple[Tensor, ...]:
        return (column_scores_reference(q, k, weight, lse, bias, key_mask, Options(*options)),)

    return _recompute(ctx, again, grads)


def _statistics_backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    def again(q: Any, k: Any, weight: Any, lse: Any, bias: Any, key_mask: Any, *options: Any) -> tuple[Tensor, ...]:
        return column_statistics_reference(q, k, weight, lse, bias, key_mask, Options(*options))

    return _recompute(ctx, again, grads)


def _row_lse_backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    def again(q: Any, k: Any, bias: Any, key_mask: Any, *options: Any) -> tuple[Tensor, ...]:
        scale, causal, window, softcap = options
        return (row_lse_reference(q, k, bias, key_mask, Options(scale, causal, window, softcap, "none")),)

    return _recompute(ctx, again, grads)


for _name, _function, _fake, _backward in (
    ("column_scores", _scores, _fake_scores, _scores_backward),
    ("column_statistics", _statistics, _fake_statistics, _statistics_backward),
    ("row_lse", _row_lse, _fake_row_lse, _row_lse_backward),
):
    _library.impl(_name, _function, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
    torch.library.register_fake(f"tokred::{_name}", _fake)
    torch.library.register_autograd(f"tokred::{_name}", _backward, setup_context=_save)
