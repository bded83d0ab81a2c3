"""Attention itself: the host's own, and one with a mask and a bias for each key/value head."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor, nn

from tokred.adapters.contract import host_object, members, words
from tokred.errors import UnsupportedModelError

_SCALING, _DROPOUT = words.SCALE_OF_A_CALL.name, words.DROPOUT_OF_A_CALL.name


def stock(
    module: nn.Module,
    implementation: str,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Any,
    scaling: float | None,
    dropout: float,
    options: dict[str, Any],
    known: dict[tuple[str, str], Any] | None = None,
) -> tuple[Tensor, Tensor | None]:
    """The attention that the model had before the patch.

    Args:
        known: functions that were looked up before, by the Python module that defines ``module``'s class and by
            ``implementation``; takes the one that is looked up now.

    Raises:
        UnsupportedModelError: the host has no function of this name.
    """
    where = type(module).__module__
    # Looking it up goes through several tables of the host, which counts at every layer of a step of few rows.
    function = None if known is None else known.get((where, implementation))
    if function is None:
        eager = words.EAGER.part(sys.modules[where])
        function = members.INTERFACE.need(host_object("attention functions"))(implementation, eager)
        if function is None:
            raise UnsupportedModelError(f"{where} has no attention function {implementation!r}")
        if known is not None:
            known[where, implementation] = function
    out, weights = function(module, query, key, value, mask, **{_SCALING: scaling, _DROPOUT: dropout}, **options)
    return out, weights


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    bias: Tensor | None,
    scaling: float | None,
    softcap: float | None,
    dropout: float = 0.0,
    sinks: Tensor | None = None,
) -> Tensor:
    """Attention with a mask and a bias for each key/value head.

    Args:
        query: ``[B, H, Q, D]``.
        key, value: ``[B, Hk, K, D]``; heads that share one are folded or repeated.
        mask: bool ``[B or 1, Hk or 1, Q, K]``, or None.
        bias: ``[B, Hk, 1, K]`` added to the logits, or None.
        scaling: factor of the logits; None: ``D ** -0.5``.
        softcap: cap of the logits before the bias.
        dropout: of the weights.
        sinks: ``[H]`` logits that take part in every query's softmax and have no value, or None.

    Returns:
        ``[B, Q, H, D]``.
    """
    b, h, count, d = query.shape
    heads = key.shape[1]
    group = h // heads
    both: Tensor | None = mask
    if bias is not None:
        both = bias.to(query.dtype)
        if mask is not None:
            both = both.expand(b, heads, count, -1).masked_fill(~mask, -torch.inf)
    # With one query a head, the heads that share keys take the place of queries: no key is repeated or read twice.
    if count == 1:
        query = query.reshape(b, heads, group, d)
        sinks = None if sinks is None else sinks.view(1, heads, group, 1)
    elif group > 1:
        key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
        if both is not None and both.shape[1] > 1:
            both = both.repeat_interleave(group, 1)
    sinks = sinks.view(1, h, 1, 1) if sinks is not None and count > 1 else sinks
    # Torch's fused attention knows no cap, and no sinks.
    if softcap is None and sinks is None:
        out = nn.functional.scaled_dot_product_attention(
            query, key, value, attn_mask=both, dropout_p=dropout, scale=scaling
        )
    else:
        out = _eager(query, key, value, both, d**-0.5 if scaling is None else scaling, softcap, dropout, sinks)
    return out.reshape(b, h, count, value.shape[-1]).transpose(1, 2).contiguous()


def _eager(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scaling: float,
    softcap: float | None,
    dropout: float,
    sinks: Tensor | None,
) -> Tensor:
    dtype = torch.promote_types(query.dtype, torch.float32)
    logits = query.to(dtype) @ key.to(dtype).mT * scaling
    if softcap is not None:
        logits = torch.tanh(logits / softcap) * softcap
    if mask is not None:
        logits = logits.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else logits + mask
    if sinks is None:
        weights = logits.softmax(-1)
    else:
        weights = torch.cat([logits, sinks.to(dtype).expand(*logits.shape[:3], 1)], -1).softmax(-1)[..., :-1]
    weights = nn.functional.dropout(weights, dropout, training=dropout > 0)
    return (weights @ value.to(dtype)).to(query.dtype)
