"""``coded_scores`` and ``coded_sums``: attention over rows in codes that are no even steps, never unpacked as a whole.

On CUDA a Triton kernel reads the codes; on a CPU loops compiled by numba do (``pip install 'tokred[cpu]'``); else a
block of rows at a time is restored. Neither has a gradient.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tokred.kernels.coded_rows.reference import (
    BLOCK,
    BOOK,
    LARGEST,
    LEVELS,
    CodedRows,
    in_place,
    looked_up,
    restore_coded,
)
from tokred.kernels.coded_rows.registration import why_not_compiled
from tokred.kernels.dispatch import why_not
from tokred.kernels.packed_rows.registration import restoring_refusals
from tokred.kernels.rows import check_heads

__all__ = [
    "BLOCK",
    "BOOK",
    "LARGEST",
    "LEVELS",
    "CodedRows",
    "coded_scores",
    "coded_sums",
    "in_place",
    "looked_up",
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
    check_heads("q", q, rows.first, rows.width, "D")
    return _scores_op(q, *rows)  # type: ignore[no-any-return]


def why_not_kernel(q: Tensor) -> str | None:
    """Why the Triton kernels cannot run on queries ``[B, Hk, G, D]``; None: they can."""
    return why_not(q, lambda: restoring_refusals(q, q.shape[-1]))


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
    check_heads("weights", weights, rows.first, rows.count, "P")
    return _sums_op(weights, *rows)  # type: ignore[no-any-return]
