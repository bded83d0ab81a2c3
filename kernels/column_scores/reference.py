"""Column statistics of attention in plain torch: the definition, with the whole matrix of weights in memory.

For every key ``n``, statistics over the queries ``m`` of the attention weight ``p[m, n] = softmax_n(logits[m, n])``,
with ``logits = softcap(q . k * scale) + bias``. Runs on any device and in any float type, is differentiable, and is
what the other paths are tested against.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from tokred.kernels.dispatch import accumulator_dtype

GROUPS = ("none", "sum", "mean", "max")
# A bias at or below this masks its key. Finite, so that a softmax over masked keys alone has no NaN to clean up.
MASKED = -1e30


class ColumnStatistics(NamedTuple):
    """Statistics over the queries of the attention that each key receives, ``[B, H, N]`` or ``[B, Hk, N]`` each.

    Attributes:
        sum: weighted sum, ``sum_m w[m] p[m, n]``.
        sum_squares: weighted sum of squares, ``sum_m w[m] p[m, n] ** 2``.
        max: the largest ``p[m, n]``, whatever its weight; 0 where no query sees the key.
        entropy: ``-sum_m p[m, n] ln p[m, n]``, whatever the weights.
    """

    sum: Tensor
    sum_squares: Tensor
    max: Tensor
    entropy: Tensor


class Options(NamedTuple):
    """Options of this operator, the same for all its paths.

    Attributes:
        scale: factor on ``q . k``.
        causal: whether a query sees no key after its own position.
        window: a query sees keys at most ``window - 1`` positions back; 0 is no limit.
        softcap: logits become ``softcap * tanh(logits / softcap)``; 0 is none.
        group: how the query heads of one key/value head are reduced.
    """

    scale: float
    causal: bool
    window: int
    softcap: float
    group: str


def key_bias(k: Tensor, bias: Tensor | None, key_mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """Bias and key mask as one additive term, ``[B, 1 or H, N]`` with ``MASKED`` for masked keys, or None."""
    if bias is None and key_mask is None:
        return None
    if bias is None:
        zero = torch.zeros((), dtype=dtype, device=k.device)
        assert key_mask is not None
        return torch.where(key_mask, zero, MASKED)[:, None]
    total = bias.to(dtype).clamp(min=MASKED)
    total = total[:, None] if total.dim() == 2 else total
    return total if key_mask is None else total.masked_fill(~key_mask[:, None], MASKED)


def visibility(rows: Tensor, columns: Tensor, causal: bool, window: int) -> Tensor | None:
    """Which key positions ``columns`` ``[N]`` the query positions ``rows`` ``[M]`` see, bool ``[M, N]``; None: all."""
    # Compared directly: the differences would be an int64 matrix, eight times the size of the result.
    visible = columns <= rows[:, None] if causal else None
    if window > 0:
        near = columns > rows[:, None] - window
        visible = near if visible is None else visible & near
    return visible


def logits_reference(
    q: Tensor, k: Tensor, bias: Tensor | None, key_mask: Tensor | None, options: Options
) -> tuple[Tensor, Tensor | None]:
    """The attention logits, and which of them are visible.

    Args:
        q: ``[B, H, M, D]``.
        k: ``[B, Hk, N, D]``.
        bias: ``[B, N]`` or ``[B, H, N]``, or None.
        key_mask: ``[B, N]`` bool, true for visible keys, or None.
        options: scale, causal, window and softcap.

    Returns:
        Logits ``[B, H, M, N]`` with at most ``MASKED`` where masked, and a bool mask that broadcasts to them, or None
        when everything is visible.
    """
    dtype = accumulator_dtype(q.dtype)
    b, h, m, d = q.shape
    hk, n = k.shape[1], k.shape[2]
    q5 = q.to(dtype).reshape(b, hk, h // max(hk, 1), m, d)
    logits = (q5 @ k.to(dtype).transpose(-1, -2)[:, :, None]).reshape(b, h, m, n) * options.scale
    if options.softcap > 0:
        logits = torch.tanh(logits / options.softcap) * options.softcap
    per_key = key_bias(k, bias, key_mask, dtype)
    visible = None
    if per_key is not None:
        logits = logits + per_key[:, :, None]
        visible = per_key[:, :, None] > MASKED
    if options.causal or options.window > 0:
        columns = torch.arange(n, device=q.device)
        seen = visibility(torch.arange(n - m, n, device=q.device), columns, options.causal, options.window)
        assert seen is not None
        logits = logits.masked_fill(~seen, MASKED)
        visible = seen if visible is None else visible & seen
    return logits, visible


def row_lse_reference(q: Tensor, k: Tensor, bias: Tensor | None, key_mask: Tensor | None, options: Options) -> Tensor:
    """Log-sum-exp of every query's visible logits, ``[B, H, M]``; -inf where a query sees no key."""
    logits, visible = logits_reference(q, k, bias, key_mask, options)
    if visible is not None:
        logits = logits.masked_fill(~visible, -torch.inf)
    return torch.logsumexp(logits, -1)


def weights_reference(
    q: Tensor, k: Tensor, lse: Tensor | None, bias: Tensor | None, key_mask: Tensor | None, options: Options
) -> Tensor:
    """The attention weights ``[B, H, M, N]``; zero in rows that see no key."""
    logits, visible = logits_reference(q, k, bias, key_mask, options)
    if lse is None:
        p = torch.softmax(logits, -1)
    else:
        safe = lse.to(logits.dtype).masked_fill(lse == -torch.inf, torch.inf)
        p = torch.exp(logits - safe[..., None])
    return p if visible is None else p.masked_fill(~visible, 0.0)


def reduce_group(values: Tensor, hk: int, group: str) -> Tensor:
    """``[B, H, N]`` to ``[B, Hk, N]`` over the query heads of each key/value head, or as it is for "none"."""
    if group == "none":
        return values
    grouped = values.reshape(values.shape[0], hk, values.shape[1] // hk, values.shape[2])
    if group == "sum":
        return grouped.sum(2)
    return grouped.mean(2) if group == "mean" else grouped.amax(2)


def full_weight(weight: Tensor | None) -> Tensor | None:
    """The query weights as ``[B or 1, H or 1, M]``."""
    if weight is None:
        return None
    return weight[None, None] if weight.dim() == 1 else weight[:, None] if weight.dim() == 2 else weight


def column_scores_reference(
    q: Tensor,
    k: Tensor,
    weight: Tensor | None,
    lse: Tensor | None,
    bias: Tensor | None,
    key_mask: Tensor | None,
    options: Options,
) -> Tensor:
    """The weighted column sum alone; arguments and result as in ``column_scores``, all options given."""
    p = weights_reference(q, k, lse, bias, key_mask, options)
    w = full_weight(weight)
    total = p.sum(-2) if w is None else (p * w.to(p.dtype)[..., None]).sum(-2)
    return reduce_group(total, k.shape[1], options.group)


def column_statistics_reference(
    q: Tensor,
    k: Tensor,
    weight: Tensor | None,
    lse: Tensor | None,
    bias: Tensor | None,
    key_mask: Tensor | None,
    options: Options,
) -> ColumnStatistics:
    """All statistics; arguments and result as in ``column_statistics``, all options given."""
    p = weights_reference(q, k, lse, bias, key_mask, options)
    w = full_weight(weight)
    weighted = p if w is None else p * w.to(p.dtype)[..., None]
    # log(0) would make the gradient of p log p NaN; 1 in its place gives 0 for both.
    log_p = torch.log(torch.where(p > 0, p, 1.0))
    largest = p.amax(-2) if p.shape[-2] else p.sum(-2)
    per_head = (weighted.sum(-2), (weighted * p).sum(-2), largest, -(p * log_p).sum(-2))
    return ColumnStatistics(*(reduce_group(s, k.shape[1], options.group) for s in per_head))
