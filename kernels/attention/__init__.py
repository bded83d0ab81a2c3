"""Attention with a bias per key on fused kernels, with its log-sum-exp and with column scores.

Proportional attention adds ``log(size)`` to the logits of every key, which equals attending to ``size`` copies of it.
A mask does that but keeps CUDA from its flash kernel; one more channel does it there too.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from tokred.kernels.attention.bias import combined_bias, size_bias
from tokred.kernels.attention.registration import refusals
from tokred.kernels.attention.torch_path import FORMS, fused_attention, fused_attention_with_lse
from tokred.kernels.column_scores import column_scores
from tokred.kernels.column_scores.checks import check_bias, check_key_mask, check_query_key
from tokred.kernels.dispatch import traced, use_kernel, why_not

__all__ = [
    "AttentionResult",
    "AttentionScores",
    "attention",
    "attention_with_lse",
    "attention_with_scores",
    "size_bias",
    "why_not_kernel",
]

_attention_op = torch.ops.tokred.attention.default


class AttentionResult(NamedTuple):
    """Attention and what its softmax was divided by.

    Attributes:
        output: ``[B, H, M, E]`` of the type of the queries.
        lse: log-sum-exp of every query's logits ``[B, H, M]``, float32 (float64 for float64); -inf where a query sees
            no key. Carries no gradient.
    """

    output: Tensor
    lse: Tensor


class AttentionScores(NamedTuple):
    """Attention, its log-sum-exp and the attention that each key received.

    Attributes:
        output: ``[B, H, M, E]``.
        lse: ``[B, H, M]``; carries no gradient.
        scores: column scores ``[B, H, N]``, or ``[B, Hk, N]`` with a group reduction.
    """

    output: Tensor
    lse: Tensor
    scores: Tensor


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    size: Tensor | None = None,
    bias: Tensor | None = None,
    key_mask: Tensor | None = None,
    causal: bool = False,
    scale: float | None = None,
    form: str = "auto",
) -> Tensor:
    """Scaled dot-product attention whose keys count as often as they have original tokens.

    Args:
        q: queries ``[B, H, M, D]``.
        k: keys ``[B, Hk, N, D]``, ``H`` a multiple of ``Hk``.
        v: values ``[B, Hk, N, E]``.
        size: how many original tokens each key stands for ``[B, N]``; 0 masks the key. None: no size, plain attention.
        bias: added to the logits per key, ``[B, N]`` or ``[B, H, N]``; -inf masks the key.
        key_mask: bool ``[B, N]``, true for visible keys.
        causal: query ``m`` sits at position ``N - M + m`` and sees no later key.
        scale: factor on ``q . k``; None is ``D ** -0.5``.
        form: "mask" passes the bias as a mask, "channel" as one more channel of queries and keys, exact on any fused
            kernel; "auto" takes the mask on the CPU and for short sequences, the channel on CUDA for long ones.

    Returns:
        ``[B, H, M, E]`` of the type of ``q``; zero in rows that see no key.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: an argument has the wrong shape, device or value.

    Source: Bolya et al., Token Merging, ICLR 2023, section 3.3; the channel form is ours.
    """
    per_key, scale = _prepare(q, k, v, size, bias, key_mask, scale)
    if form not in FORMS:
        raise ValueError(f"form must be one of {', '.join(FORMS)}, got {form!r}")
    return fused_attention(q, k, v, per_key, key_mask, scale, causal, form)


def attention_with_lse(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    size: Tensor | None = None,
    bias: Tensor | None = None,
    key_mask: Tensor | None = None,
    causal: bool = False,
    scale: float | None = None,
) -> AttentionResult:
    """Attention and its log-sum-exp, which ``column_scores`` takes.

    The CPU's fused kernel returns it; so does CUDA's flash kernel, which takes no bias, so that our Triton kernel runs
    where there is one. With gradients on CUDA the output comes from torch and the log-sum-exp from ``row_lse``.

    Args:
        q: queries ``[B, H, M, D]``.
        k: keys ``[B, Hk, N, D]``.
        v: values ``[B, Hk, N, E]``.
        size: see ``attention``, as everything below.
        bias: per key.
        key_mask: visible keys.
        causal: whether queries see later keys.
        scale: factor on ``q . k``.

    Returns:
        Output and log-sum-exp.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: an argument has the wrong shape, device or value.
    """
    per_key, scale = _prepare(q, k, v, size, bias, key_mask, scale)
    return _with_lse(q, k, v, per_key, key_mask, scale, causal)


def attention_with_scores(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    weight: Tensor | None = None,
    *,
    size: Tensor | None = None,
    bias: Tensor | None = None,
    key_mask: Tensor | None = None,
    causal: bool = False,
    scale: float | None = None,
    group: str = "none",
) -> AttentionScores:
    """Attention and how much of it each key received, with the log-sum-exp of the first handed to the second.

    Where only a few queries count, calling ``attention_with_lse`` and then ``column_scores`` on those queries and
    their part of the log-sum-exp is cheaper than a weight that is zero for the rest.

    Args:
        q: queries ``[B, H, M, D]``.
        k: keys ``[B, Hk, N, D]``.
        v: values ``[B, Hk, N, E]``.
        weight: per query, broadcastable to ``[M]``, ``[B, M]`` or ``[B, H, M]``; None is ones.
        size: see ``attention``, as everything below.
        bias: per key.
        key_mask: visible keys.
        causal: whether queries see later keys.
        scale: factor on ``q . k``.
        group: reduction of the scores over the query heads of each key/value head.

    Returns:
        Output, log-sum-exp and scores.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: an argument has the wrong shape, device or value.
    """
    per_key, scale = _prepare(q, k, v, size, bias, key_mask, scale)
    output, lse = _with_lse(q, k, v, per_key, key_mask, scale, causal)
    # The log-sum-exp has no gradient, so the scores need their own where they are to have the right one. On the CPU a
    # softmax of each block is faster than the exponential that a given log-sum-exp asks for.
    own = q.device.type == "cpu" or traced() or (torch.is_grad_enabled() and (q.requires_grad or k.requires_grad))
    scores = column_scores(
        q,
        k,
        weight,
        lse=None if own else lse,
        scale=scale,
        bias=per_key,
        key_mask=key_mask,
        causal=causal,
        group=group,
    )
    return AttentionScores(output, lse, scores)


def why_not_kernel(q: Tensor, k: Tensor, v: Tensor, *, bias: Tensor | None = None) -> str | None:
    """The reason for which ``attention_with_lse`` would not run our Triton kernel, or None if it would."""
    return why_not(q, lambda: refusals(q, k, v, bias))


def _with_lse(
    q: Tensor, k: Tensor, v: Tensor, per_key: Tensor | None, key_mask: Tensor | None, scale: float, causal: bool
) -> AttentionResult:
    if use_kernel("attention_with_lse", q, lambda: refusals(q, k, v, per_key)):
        return AttentionResult(*_attention_op(q, k, v, per_key, key_mask, scale, causal))
    return AttentionResult(*fused_attention_with_lse(q, k, v, per_key, key_mask, scale, causal))


def _prepare(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    size: Tensor | None,
    bias: Tensor | None,
    key_mask: Tensor | None,
    scale: float | None,
) -> tuple[Tensor | None, float]:
    """Check the arguments; the per-key bias with the log size in it, and the scale."""
    check_query_key(q, k)
    b, h, _, d = q.shape
    n = k.shape[2]
    if v.dim() != 4 or any(v.shape[i] != k.shape[i] for i in range(3)):
        raise ValueError(f"v must be [B, Hk, N, E] = {[*k.shape[:3], 'E']}, got {list(v.shape)}")
    if v.dtype != q.dtype:
        raise TypeError(f"v must have the type of q, {q.dtype}, got {v.dtype}")
    if v.device != q.device:
        raise ValueError(f"v is on {v.device}, q on {q.device}")
    if size is not None:
        if size.dim() != 2 or size.shape[0] != b or size.shape[1] != n:
            raise ValueError(f"size must be [B, N] = [{b}, {n}], got {list(size.shape)}")
        if size.device != q.device:
            raise ValueError(f"size is on {size.device}, q on {q.device}")
    check_bias(bias, b, h, n, q.device)
    check_key_mask(key_mask, b, n, q.device)
    return combined_bias(size, bias, q.dtype), d**-0.5 if scale is None else float(scale)
