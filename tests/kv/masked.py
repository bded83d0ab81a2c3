"""The oracle: a model that keeps every key, and hides those that a policy has evicted."""

from __future__ import annotations

import copy

import torch
import transformers
from transformers.masking_utils import sdpa_mask

from tokred.kernels.decode_attention import SENTINEL


def masked_reference(model, evicted, first):
    """A copy of the model that keeps everything, and hides from queries at slot ``first`` and later the evicted keys.

    Args:
        evicted: for each layer ``[B, Hk, N]`` bool, or None.
        first: slot from which on keys are hidden.
    """
    copied = copy.deepcopy(model)

    def attention(module, q, k, v, mask, scaling=None, dropout=0.0, softcap=None, **kwargs):
        group, n, m = q.shape[1] // k.shape[1], k.shape[2], q.shape[2]
        logits = q @ k.repeat_interleave(group, 1).mT * scaling
        if softcap:
            logits = torch.tanh(logits / softcap) * softcap
        hidden = evicted[module.layer_idx]
        if hidden is not None:
            rows = torch.arange(n - m, n) >= first
            part = torch.zeros(hidden.shape[0], k.shape[1], m, n, dtype=torch.bool)
            part[..., : hidden.shape[-1]] = hidden[:, :, None] & rows[:, None]
            part = part.repeat_interleave(len(q) // len(hidden), 0)  # beams of a sample
            logits = logits.masked_fill(part.repeat_interleave(group, 1), -torch.inf)
        if mask is not None:
            logits = logits.masked_fill(~mask, -torch.inf)
        weights = logits.softmax(-1).nan_to_num(0.0)
        return (weights @ v.repeat_interleave(group, 1)).transpose(1, 2), None

    def mask_of(**arguments):
        return sdpa_mask(**{**arguments, "allow_is_causal_skip": False})

    transformers.AttentionInterface.register("kv_reference", attention)
    transformers.AttentionMaskInterface.register("kv_reference", mask_of)
    copied.config._attn_implementation_internal = "kv_reference"
    return copied


def evicted_rows(cache, n):
    """For each layer ``[B, Hk, n]`` bool: slots that no row holds any more; None for sliding layers."""
    found = []
    for layer in cache.layers:
        positions = getattr(layer, "positions", None)
        if positions is None:
            found.append(None)
            continue
        kept = torch.zeros(*positions.shape[:2], n + 1, dtype=torch.bool)
        kept.scatter_(2, torch.where(positions == SENTINEL, n, positions.long()), True)
        found.append(~kept[..., :n])
    return found
