"""Soft decisions in the forward: attention whose keys are weighed by a gate, and decisions drawn with a gradient."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from tokred.kernels.dispatch import without_autocast


def gated_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gate: Tensor,
    *,
    mask: Tensor | None = None,
    scale: float | None = None,
    dropout: float = 0.0,
    eps: float = 1e-6,
) -> Tensor:
    """Attention that sees each key as far as its gate is open; a token always sees itself.

    With ``G`` the gate of each key, one on the diagonal, the weights are
    ``(exp(S - max S) G + eps / N) / (sum(exp(S - max S) G) + eps)``, in float32 (float64 stays). The maximum counts
    keys whose gate is not closed (ours; the released code counts all, so that ``eps`` can outweigh what is seen).

    Args:
        q: ``(B, H, N, D)``.
        k, v: ``(B, Hk, N, D)``; each of the ``Hk`` heads serves ``H / Hk`` queries.
        gate: ``(B, N)`` in 0..1, differentiable.
        mask: what attention adds to the logits, or True where it sees, any shape that expands to ``(B, H, N, N)``.
        scale: of the logits; None: ``D ** -0.5``.
        dropout: share of the weights that are dropped.
        eps: keeps rows defined whose gates are all closed; keys that the mask hides get nothing of it.

    Returns:
        ``(B, H, N, D)`` of ``v``'s type.

    Raises:
        ValueError: ``gate`` does not have one entry a key.

    Source: Rao et al., DynamicViT, NeurIPS 2021, section 3.3, and its released code for ``eps``.
    """
    b, h, n, d = q.shape
    if tuple(gate.shape) != (b, k.shape[2]):
        raise ValueError(f"gate must be {(b, k.shape[2])}, one entry a key, got {tuple(gate.shape)}")
    dtype = torch.promote_types(q.dtype, torch.float32)
    if k.shape[1] != h:
        k, v = k.repeat_interleave(h // k.shape[1], 1), v.repeat_interleave(h // v.shape[1], 1)
    with without_autocast(q):
        logits = q.to(dtype) @ k.to(dtype).mT * (d**-0.5 if scale is None else scale)
        if mask is not None:
            added = mask.to(dtype) if mask.dtype != torch.bool else logits.new_zeros(()).where(mask, -torch.inf)
            logits = logits + added
        open_ = gate.to(dtype)[:, None, None, :]
        own = torch.eye(n, k.shape[2], dtype=dtype, device=q.device)
        open_ = open_ + (1 - open_) * own
        high = logits.detach().amax(-1, keepdim=True)
        high = high.where(high > -torch.inf, 0.0)
        weight = (logits - high).exp() * open_
        # Beside a closed key of a high logit the others are small, and eps has to be small beside them.
        seen = weight.detach().where(open_ > 0, 0.0).amax(-1, keepdim=True).clamp_min(1e-30)
        least = eps * seen
        each = least / k.shape[2] if mask is None else least / k.shape[2] * (logits > -torch.inf)
        weight = (weight + each) / (weight.sum(-1, keepdim=True) + least)
        if dropout > 0:
            weight = F.dropout(weight, dropout)
        return (weight @ v.to(dtype)).to(v.dtype)


def gumbel_keep(log_keep: Tensor, *, tau: float = 1.0, hard: bool = True) -> Tensor:
    """Draw whether tokens stay, with a gradient: Gumbel-Softmax over two logits.

    Args:
        log_keep: ``(..., 2)`` log-probabilities, the first of staying, the second of going.
        tau: temperature: the lower, the nearer a soft draw is to 0 or 1.
        hard: 0 or 1 in the forward, the soft draw in the backward.

    Returns:
        ``(...)`` float32.

    Source: Jang et al., Categorical Reparameterization with Gumbel-Softmax, ICLR 2017.
    """
    drawn: Tensor = F.gumbel_softmax(log_keep.float(), tau=tau, hard=hard, dim=-1)
    return drawn[..., 0]
