"""Column scores: how much attention every key receives, without the matrix of attention weights.

``column_scores(q, k, w)`` is ``s[n] = sum_m w[m] softmax_n(q_m . k_n * scale + bias)``: one-hot weights at the class
token give its row of attention, ones give what H2O accumulates, the last queries give SnapKV's window scores.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tokred.kernels.column_scores.blocked import column_scores_blocked, column_statistics_blocked
from tokred.kernels.column_scores.checks import check
from tokred.kernels.column_scores.power import column_power_blocked, column_power_reference, iterate
from tokred.kernels.column_scores.reference import (
    ColumnStatistics,
    Options,
    column_scores_reference,
    column_statistics_reference,
    full_weight,
    row_lse_reference,
)
from tokred.kernels.column_scores.registration import refusals
from tokred.kernels.dispatch import accumulator_dtype, traced, use_kernel, why_not, without_autocast

__all__ = ["ColumnStatistics", "column_power", "column_scores", "column_statistics", "row_lse", "why_not_kernel"]

_scores_op = torch.ops.tokred.column_scores.default
_statistics_op = torch.ops.tokred.column_statistics.default
_row_lse_op = torch.ops.tokred.row_lse.default


def column_scores(
    q: Tensor,
    k: Tensor,
    weight: Tensor | None = None,
    *,
    lse: Tensor | None = None,
    scale: float | None = None,
    bias: Tensor | None = None,
    key_mask: Tensor | None = None,
    causal: bool = False,
    window: int | None = None,
    softcap: float | None = None,
    group: str = "none",
) -> Tensor:
    """Sum the attention that each key receives, weighted by query.

    The logits are ``q . k * scale``, capped if asked, plus the bias; the queries are the last ``M`` of ``N`` positions
    where positions matter. Query rows that see no key contribute zero.

    Args:
        q: queries ``[B, H, M, D]``.
        k: keys ``[B, Hk, N, D]``, ``H`` a multiple of ``Hk``.
        weight: per query, broadcastable to ``[M]``, ``[B, M]`` or ``[B, H, M]``; None is ones.
        lse: log-sum-exp of every query's logits ``[B, H, M]``, as a fused attention gives it; None computes it.
        scale: factor on ``q . k``; None is ``D ** -0.5``.
        bias: added to the logits per key, ``[B, N]`` or ``[B, H, N]``, such as the log of token sizes; -inf (or any
            value up to -1e30) masks the key.
        key_mask: bool ``[B, N]``, true for visible keys.
        causal: query ``m`` sits at position ``N - M + m`` and sees no later key.
        window: query sees keys with ``query position - key position < window``; None is no limit.
        softcap: logits become ``softcap * tanh(logits / softcap)`` before the bias.
        group: reduction over the query heads of each key/value head: "none", "sum", "mean" or "max".

    Returns:
        ``[B, H, N]``, or ``[B, Hk, N]`` with a group reduction, in float32 (float64 for float64 inputs).

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: an argument has the wrong shape, device or value.

    Source: two passes over log-sum-exp as in FlashAttention's backward; Dao et al., NeurIPS 2022.
    """
    options = check(q, k, weight, lse, bias, key_mask, scale, causal, window, softcap, group)
    if use_kernel("column_scores", q, lambda: refusals(q, k)):
        return _scores_op(q, k, weight, lse, bias, key_mask, *options)  # type: ignore[no-any-return]
    run = column_scores_reference if _plain(q, k, weight, lse, bias) else column_scores_blocked
    with without_autocast(q):
        return run(q, k, weight, lse, bias, key_mask, options)


def column_statistics(
    q: Tensor,
    k: Tensor,
    weight: Tensor | None = None,
    *,
    lse: Tensor | None = None,
    scale: float | None = None,
    bias: Tensor | None = None,
    key_mask: Tensor | None = None,
    causal: bool = False,
    window: int | None = None,
    softcap: float | None = None,
    group: str = "none",
) -> ColumnStatistics:
    """Sum, sum of squares, maximum and entropy of the attention that each key receives, in one pass.

    The variance over the queries follows from the first two: ``(sum_squares - sum ** 2 / M) / (M - 1)``.

    Args:
        q: queries ``[B, H, M, D]``.
        k: keys ``[B, Hk, N, D]``.
        weight: per query, for the sum and the sum of squares; the other two do not read it.
        lse: see ``column_scores``, as everything below.
        scale: factor on ``q . k``.
        bias: per key.
        key_mask: visible keys.
        causal: whether queries see later keys.
        window: how far back queries see.
        softcap: cap of the logits.
        group: applied to each of the four statistics.

    Returns:
        Four tensors ``[B, H, N]``, or ``[B, Hk, N]`` with a group reduction.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: an argument has the wrong shape, device or value.
    """
    options = check(q, k, weight, lse, bias, key_mask, scale, causal, window, softcap, group)
    if use_kernel("column_statistics", q, lambda: refusals(q, k)):
        return ColumnStatistics(*_statistics_op(q, k, weight, lse, bias, key_mask, *options))
    run = column_statistics_reference if _plain(q, k, weight, lse, bias) else column_statistics_blocked
    with without_autocast(q):
        return run(q, k, weight, lse, bias, key_mask, options)


def column_power(
    q: Tensor,
    k: Tensor,
    start: Tensor,
    rounds: int,
    *,
    tolerance: float = 0.0,
    scale: float | None = None,
    bias: Tensor | None = None,
    key_mask: Tensor | None = None,
) -> Tensor:
    """Column scores weighted by the scores before, ``rounds`` times: page rank on the graph of attention.

    Each head's scores settle by themselves: once a round changes them by less than ``tolerance``, summed over the
    tokens, they stay as they are. On a CPU no rounds are run after the last head has settled; elsewhere looking would
    wait for the device, so they are run and not used.

    Args:
        q: queries ``[B, H, N, D]``.
        k: keys ``[B, Hk, N, D]``.
        start: scores to begin with, broadcastable to ``[N]``, ``[B, N]`` or ``[B, H, N]``. Those of masked tokens
            should be 0: whatever the others have in sum, they keep.
        rounds: how often.
        tolerance: see above; 0 runs all rounds.
        scale: see ``column_scores``, as everything below.
        bias: per key.
        key_mask: visible keys.

    Returns:
        ``[B, H, N]`` in float32 (float64 for float64 inputs).

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: an argument has the wrong shape, device or value, or there are not as many queries as keys.
    """
    options = check(q, k, start, None, bias, key_mask, scale, False, None, None, "none")
    if q.shape[2] != k.shape[2]:
        raise ValueError(f"page rank needs as many queries as keys, got {q.shape[2]} and {k.shape[2]}")
    if rounds < 0 or tolerance < 0:
        raise ValueError(f"rounds and tolerance must not be negative, got {rounds} and {tolerance}")
    rows = full_weight(start)
    assert rows is not None
    s = rows.to(accumulator_dtype(q.dtype)).expand(q.shape[0], q.shape[1], q.shape[2])
    if use_kernel("column_power", q, lambda: refusals(q, k)):
        lse = _row_lse_op(q, k, bias, key_mask, *options[:4])
        return iterate(lambda s: _scores_op(q, k, s, lse, bias, key_mask, *options), s, rounds, tolerance, look=False)
    run = column_power_reference if _plain(q, k, start, bias) else column_power_blocked
    with without_autocast(q):
        return run(q, k, s, rounds, tolerance, bias, key_mask, options)


def row_lse(
    q: Tensor,
    k: Tensor,
    *,
    scale: float | None = None,
    bias: Tensor | None = None,
    key_mask: Tensor | None = None,
    causal: bool = False,
    window: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    """Log-sum-exp of every query's logits: the first pass of ``column_scores``, to be shared by several calls.

    Args:
        q: queries ``[B, H, M, D]``.
        k: keys ``[B, Hk, N, D]``.
        scale: see ``column_scores``, as everything below.
        bias: per key.
        key_mask: visible keys.
        causal: whether queries see later keys.
        window: how far back queries see.
        softcap: cap of the logits.

    Returns:
        ``[B, H, M]`` in float32 (float64 for float64 inputs); -inf where a query sees no key.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: an argument has the wrong shape, device or value.
    """
    options: Options = check(q, k, None, None, bias, key_mask, scale, causal, window, softcap, "none")
    if use_kernel("row_lse", q, lambda: refusals(q, k)):
        return _row_lse_op(q, k, bias, key_mask, *options[:4])  # type: ignore[no-any-return]
    with without_autocast(q):
        return row_lse_reference(q, k, bias, key_mask, options)


def why_not_kernel(q: Tensor, k: Tensor) -> str | None:
    """The reason for which these tensors would not reach the Triton kernel, or None if they would."""
    return why_not(q, lambda: refusals(q, k))


def _plain(*tensors: Tensor | None) -> bool:
    """True where the compiler or autograd must see plain operations instead of work in a reused buffer."""
    if traced():
        return True
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
