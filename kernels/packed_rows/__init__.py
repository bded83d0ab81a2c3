"""``packed_scores`` and ``packed_sums``: attention over rows in few bits, which are never unpacked as a whole.

A query's logits are one, what it takes of the values the other; a softmax stands between. On CUDA a Triton kernel
reads the bytes; on a CPU loops compiled by numba do (``pip install 'tokred[cpu]'``); else all rows are restored first.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tokred.kernels.dispatch import why_not
from tokred.kernels.packed_rows.reference import PackedRows, bytes_of, pack, restore, unpack
from tokred.kernels.packed_rows.registration import refusals, why_not_loops
from tokred.kernels.rows import check_heads

__all__ = [
    "PackedRows",
    "bytes_of",
    "pack",
    "packed_scores",
    "packed_sums",
    "restore",
    "unpack",
    "why_not_kernel",
    "why_not_packed",
]

_scores_op = torch.ops.tokred.packed_scores.default
_sums_op = torch.ops.tokred.packed_sums.default


def packed_scores(q: Tensor, rows: PackedRows) -> Tensor:
    """Products of queries with all rows.

    Args:
        q: ``[B, Hk, G, D]``.
        rows: ``P`` of each head.

    Returns:
        ``[B, Hk, G, P]`` float32.

    Raises:
        ValueError: shapes do not fit.
    """
    check_heads("q", q, rows.codes, rows.width, "D")
    return _scores_op(q, *rows)  # type: ignore[no-any-return]


def packed_sums(weights: Tensor, rows: PackedRows) -> Tensor:
    """Sums of all rows by weights.

    Args:
        weights: ``[B, Hk, G, P]``.
        rows: ``P`` of each head.

    Returns:
        ``[B, Hk, G, D]`` float32.

    Raises:
        ValueError: shapes do not fit.
    """
    check_heads("weights", weights, rows.codes, rows.count, "P")
    return _sums_op(weights, *rows)  # type: ignore[no-any-return]


def why_not_kernel(q: Tensor, bits: int = 2, group: int = 32) -> str | None:
    """Why a query ``[..., D]`` would not reach the Triton kernels; None: it would."""
    return why_not(q, lambda: refusals(q, bits, group, q.shape[-1]))


def why_not_packed(q: Tensor, bits: int, group: int) -> str | None:
    """Why a query ``[..., D]`` over such rows is answered only after all are restored; None: it is not."""
    loops = why_not_loops(q, bits, group)
    return None if loops is None else (why_not_kernel(q, bits, group) and loops)
