"""The two exact ways to add a number per key to the logits of a fused attention: a mask, or one more channel."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional

from tokred.kernels.column_scores.reference import MASKED
from tokred.kernels.dispatch import accumulator_dtype

# What stands for -inf in the extra channel: its weight is exactly zero in float32, and no product of it is inf or NaN.
_CHANNEL_MASKED = -1e4
_CHANNEL_MULTIPLE = 8  # fused kernels want head sizes that are multiples of this


def size_bias(size: Tensor, dtype: torch.dtype) -> Tensor:
    """The bias of proportional attention: every key counts as often as it has original tokens.

    Args:
        size: how many original tokens each key stands for ``[B, N]``, not negative; 0 masks the key.
        dtype: type of the result, that of the queries for a mask.

    Returns:
        ``log(size)`` as ``[B, 1, 1, N]``, computed in float32 (float64 for float64); -inf for size 0.

    Source: Bolya et al., Token Merging, ICLR 2023, section 3.3.
    """
    return torch.log(size.to(accumulator_dtype(dtype))).to(dtype)[:, None, None]


def combined_bias(size: Tensor | None, bias: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """Log size and bias as one per-key term, ``[B, N]`` or ``[B, H, N]`` in the accumulator's type, or None."""
    total = accumulator_dtype(dtype)
    logs = None if size is None else torch.log(size.to(total))
    if bias is None:
        return logs
    extra = bias.to(total)
    if logs is None:
        return extra
    return extra + (logs if extra.dim() == 2 else logs[:, None])


def attention_mask(
    q: Tensor, k: Tensor, bias: Tensor | None, key_mask: Tensor | None, causal: bool
) -> tuple[Tensor | None, bool]:
    """Mask and ``is_causal`` of ``scaled_dot_product_attention`` for these options.

    Args:
        q: ``[B, H, M, D]``.
        k: ``[B, Hk, N, D]``.
        bias: per key, ``[B, N]`` or ``[B, H, N]``, or None.
        key_mask: ``[B, N]`` bool, or None.
        causal: as in ``attention``.

    Returns:
        A float mask of ``q``'s type that broadcasts to ``[B, H, M, N]``, or None, and its ``is_causal``.
    """
    m, n = q.shape[2], k.shape[2]
    causal = causal and m != 1  # the last position sees everything
    if bias is None and key_mask is None:
        if not causal or m == n:
            return None, causal
        total = q.new_zeros(1, 1, 1, n)
    elif bias is None:
        total = q.new_zeros(()).masked_fill(~key_mask, -torch.inf)[:, None, None]  # type: ignore[operator]
    else:
        total = (bias[:, None, None] if bias.dim() == 2 else bias[:, :, None]).to(q.dtype)
        if key_mask is not None:
            total = total.masked_fill(~key_mask[:, None, None], -torch.inf)
    if causal:
        rows = torch.arange(n - m, n, device=q.device)
        later = torch.arange(n, device=q.device) > rows[:, None]
        total = total.masked_fill(later, -torch.inf)
    return total, False


def channel_form(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor, key_mask: Tensor | None, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values whose plain attention at the same scale is the one with the bias.

    The new channel of a query holds a power of two near ``1 / scale``, that of a key its bias divided by this and by
    the scale. Half precision would round the bias; a second channel holds what the first one lost.

    Args:
        q: ``[B, H, M, D]``.
        k: ``[B, H, N, D]``; as many heads as ``q`` where the bias has heads.
        v: ``[B, H, N, E]``.
        bias: per key, ``[B, N]`` or ``[B, H, N]``, in float32 or float64.
        key_mask: ``[B, N]`` bool, or None.
        scale: factor on ``q . k``.

    Returns:
        The three with channels padded to a common multiple of 8; the first ``E`` channels of the output are the result.
    """
    factor = 2.0 ** round(math.log2(1.0 / scale))
    per_key = (
        bias if key_mask is None else bias.masked_fill(~key_mask if bias.dim() == 2 else ~key_mask[:, None], MASKED)
    )
    per_key = per_key.clamp(min=_CHANNEL_MASKED) / (scale * factor)
    per_key = (per_key[:, None] if per_key.dim() == 2 else per_key)[..., None]
    high = per_key.to(k.dtype)
    parts = [high]
    if k.dtype != per_key.dtype:
        parts.append((per_key - high).to(k.dtype))
    d, e, extra = q.shape[3], v.shape[3], len(parts)
    width = -(-max(d + extra, e) // _CHANNEL_MULTIPLE) * _CHANNEL_MULTIPLE
    ones = q.new_full((1, 1, 1, 1), factor).expand(*q.shape[:3], extra)
    added = torch.cat(parts, -1).expand(*k.shape[:3], extra)
    q = functional.pad(torch.cat([q, ones], -1), (0, width - d - extra))
    k = functional.pad(torch.cat([k, added], -1), (0, width - d - extra))
    return q, k, functional.pad(v, (0, width - e))
