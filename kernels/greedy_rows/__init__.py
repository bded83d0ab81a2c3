"""``farthest_rows`` and ``determinant_rows``: rows of a matrix that are picked one by one, in one launch.

Each pick depends on all before it, so plain torch needs several small launches a pick, which on a GPU cost more than
the work. Equal values go to the lower row. Neither has a gradient.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from tokred.kernels.dispatch import use_kernel, why_not
from tokred.kernels.greedy_rows import reference
from tokred.kernels.greedy_rows.reference import determinant_steps
from tokred.kernels.greedy_rows.registration import refusals

__all__ = ["DeterminantRows", "determinant_rows", "determinant_steps", "farthest_rows", "why_not_kernel"]

_farthest_op = torch.ops.tokred.farthest_rows.default
_determinant_op = torch.ops.tokred.determinant_rows.default


class DeterminantRows(NamedTuple):
    """Picks ``(B, n)`` int64 in their order, and what each multiplied the determinant with ``(B, n)``."""

    picks: Tensor
    gain: Tensor


def farthest_rows(distance: Tensor, first: Tensor, n: int) -> Tensor:
    """Pick rows, each the one whose smallest distance to the picks before it is largest.

    Args:
        distance: ``(B, N, N)`` float, minus infinity on the diagonal, so that no row is picked twice.
        first: ``(B,)`` int64, the first pick.
        n: how many, 1 to ``N``.

    Returns:
        ``(B, n)`` int64, in the order of the picks.

    Raises:
        ValueError: the matrix is not square, or ``n`` is out of range.
    """
    _check(distance, n)
    if use_kernel("farthest_rows", distance, lambda: refusals(distance)):
        return _farthest_op(distance, first, n)  # type: ignore[no-any-return]
    return reference.farthest_rows(distance, first, n)


def determinant_rows(kernel: Tensor, gains: Tensor, least: Tensor, n: int) -> DeterminantRows:
    """Pick rows, each the one that multiplies the determinant of the kernel among the picks most.

    Args:
        kernel: ``(B, N, N)`` float, symmetric and positive semi-definite.
        gains: ``(B, N)``, its diagonal.
        least: ``(B, N)``, gains that are no larger count as none.
        n: how many, 1 to ``N``.

    Raises:
        ValueError: the matrix is not square, or ``n`` is out of range.
    """
    _check(kernel, n)
    if use_kernel("determinant_rows", kernel, lambda: refusals(kernel)):
        return DeterminantRows(*_determinant_op(kernel, gains, least, n))
    return DeterminantRows(*reference.determinant_rows(kernel, gains, least, n))


def why_not_kernel(x: Tensor) -> str | None:
    """Why a matrix like ``x`` takes the torch path; None: it does not."""
    return why_not(x, lambda: refusals(x))


def _check(x: Tensor, n: int) -> None:
    if x.ndim != 3 or x.shape[1] != x.shape[2] or not 1 <= n <= x.shape[1]:
        raise ValueError(f"the matrix must be (B, N, N) with 1 <= n <= N, got {tuple(x.shape)} and n = {n}")
