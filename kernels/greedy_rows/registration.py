# mypy: disable-error-code="no-untyped-call, untyped-decorator"
"""The registered operators ``tokred::farthest_rows`` and ``tokred::determinant_rows``; neither has a gradient."""

from __future__ import annotations

import torch
from torch import Tensor

from tokred.kernels.dispatch import Refusal, use_kernel
from tokred.kernels.greedy_rows import reference

# A program holds a row.
WIDEST = 4096

_library = torch.library.Library("tokred", "FRAGMENT")
_library.define("farthest_rows(Tensor distance, Tensor first, int n) -> Tensor")
_library.define("determinant_rows(Tensor kernel, Tensor gains, Tensor least, int n) -> (Tensor, Tensor)")


def refusals(x: Tensor) -> list[Refusal]:
    """Why the kernels cannot run on a matrix like ``x``, besides the device."""
    return [
        Refusal(x.dtype != torch.float32, f"the kernel works in float32, not {x.dtype}"),
        Refusal(x.shape[-1] > WIDEST, f"rows of {x.shape[-1]} are longer than the {WIDEST} that a program holds"),
        Refusal(x.numel() == 0, "the input is empty"),
    ]


def _farthest(distance: Tensor, first: Tensor, n: int) -> Tensor:
    if use_kernel("farthest_rows", distance, lambda: refusals(distance)):
        from tokred.kernels.greedy_rows.triton import launch_farthest

        return launch_farthest(distance, first, n)
    return reference.farthest_rows(distance, first, n)


def _determinant(kernel: Tensor, gains: Tensor, least: Tensor, n: int) -> tuple[Tensor, Tensor]:
    if use_kernel("determinant_rows", kernel, lambda: refusals(kernel)):
        from tokred.kernels.greedy_rows.triton import launch_determinant

        return launch_determinant(kernel, gains, least, n)
    return reference.determinant_rows(kernel, gains, least, n)


_library.impl("farthest_rows", _farthest, "CompositeExplicitAutograd")
_library.impl("determinant_rows", _determinant, "CompositeExplicitAutograd")


@torch.library.register_fake("tokred::farthest_rows")
def _(distance: Tensor, first: Tensor, n: int) -> Tensor:
    return distance.new_empty(distance.shape[0], n, dtype=torch.int64)


@torch.library.register_fake("tokred::determinant_rows")
def _(kernel: Tensor, gains: Tensor, least: Tensor, n: int) -> tuple[Tensor, Tensor]:
    shape = (kernel.shape[0], n)
    return kernel.new_empty(shape, dtype=torch.int64), kernel.new_empty(shape)
