"""Attention with a per-key bias in plain torch: the definition, with the whole matrix of weights in memory."""

from __future__ import annotations

import torch
from torch import Tensor

from tokred.kernels.column_scores.reference import Options, logits_reference


def attention_reference(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, key_mask: Tensor | None, scale: float, causal: bool
) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp of attention.

    Args:
        q: ``[B, H, M, D]``.
        k: ``[B, Hk, N, D]``.
        v: ``[B, Hk, N, E]``.
        bias: added to the logits per key, ``[B, N]`` or ``[B, H, N]``, or None.
        key_mask: ``[B, N]`` bool, true for visible keys, or None.
        scale: factor on ``q . k``.
        causal: query ``m`` sits at position ``N - M + m`` and sees no later key.

    Returns:
        Output ``[B, H, M, E]`` of the type of ``q``, zero in rows that see no key, and the log-sum-exp ``[B, H, M]`` in
        the accumulator's type, -inf in those rows.
    """
    logits, visible = logits_reference(q, k, bias, key_mask, Options(scale, causal, 0, 0.0, "none"))
    b, h, m, n = logits.shape
    hk = k.shape[1]
    p = torch.softmax(logits, -1)
    if visible is not None:
        p = p.masked_fill(~visible, 0.0)
        logits = logits.masked_fill(~visible, -torch.inf)
    values = v.to(p.dtype)[:, :, None]
    out = (p.reshape(b, hk, h // hk, m, n) @ values).reshape(b, h, m, v.shape[3])
    return out.to(q.dtype), torch.logsumexp(logits, -1)
