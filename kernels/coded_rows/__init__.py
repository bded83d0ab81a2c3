"""``coded_scores`` and ``coded_sums``: attention over rows in codes that are no even steps, never unpacked as a whole.

On CUDA a Triton kernel reads the codes; on a CPU loops compiled by numba do (``pip install 'tokred[cpu]'``); else a
block of rows at a time is restored. Neither has a gradient.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tokred.kernels.coded_rows import registration
from tokred.kernels.coded_rows.reference import BLOCK, BOOK, LARGEST, LEVELS, CodedRows, restore_coded
from tokred.kernels.coded_rows.registration import refusals, why_not_compiled
from tokred.kernels.dispatch import why_not

__all__ = [
    "BLOCK",
    "BOOK",
    "LARGEST",
    "LEVELS",
    "CodedRows",
    "coded_scores",
    "coded_sums",
    "registration",
    "restore_coded",
    "why_not_compiled",
    "why_not_kernel",
]

_scores_op = torch.ops.tokred.coded_scores.default
_sums_op = torch.ops.tokred.coded_sums.default


def coded_scores(q: Tensor, rows: CodedRows) -> Tensor:
    """Products of queries with all rows.

    Args:
        q: ``[B, Hk, G, D]``.
        rows: ``P`` of each head.

    Returns:
        ``[B, Hk, G, P]`` float32.

    Raises:
        ValueError: shapes do not fit.
    """
    _check(q, rows, rows.width, "q", "D")
    return _scores_op(q, *rows)  # type: ignore[no-any-return]


def why_not_kernel(q: Tensor) -> str | None:
    """Why the Triton kernels cannot run on queries ``[B, Hk, G, D]``; None: they can."""
    return why_not(q, lambda: refusals(q, q.shape[-1]))


def coded_sums(weights: Tensor, rows: CodedRows) -> Tensor:
    """Sums of all rows by weights.

    Args:
        weights: ``[B, Hk, G, P]``.
        rows: ``P`` of each head.

    Returns:
        ``[B, Hk, G, D]`` float32.

    Raises:
        ValueError: shapes do not fit.
    """
    _check(weights, rows, rows.count, "weights", "P")
    return _sums_op(weights, *rows)  # type: ignore[no-any-return]


def _check(x: Tensor, rows: CodedRows, last: int, name: str, letter: str) -> None:
    b, heads = rows.first.shape[:2]
    if x.ndim != 4 or x.shape[:2] != (b, heads) or x.shape[3] != last:
        raise ValueError(f"{name} must be [B, Hk, G, {letter}] = [{b}, {heads}, G, {last}], got {list(x.shape)}")
