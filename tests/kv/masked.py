"""The oracle: a model that keeps every key, and hides those that a policy has evicted."""

from __future__ import annotations

import copy

import torch
import transformers
from transformers.masking_utils import sdpa_mask

import tokred
from tests.kv.tiny import Scatter, padded, prompt
from tokred.adapters import find
from tokred.kernels.decode_attention import SENTINEL


def masked_reference(model, evicted, first):
    """A copy of the model that keeps everything, and hides from queries at slot ``first`` and later the evicted keys.

    Args:
        evicted: for each layer ``[B, Hk, N]`` bool, or None.
        first: slot from which on keys are hidden.
    """
    copied = copy.deepcopy(model)
    readers = {i: owner for i, (_, _, owner) in find(model, "cache").readers.items()}

    def attention(module, q, k, v, mask, scaling=None, dropout=0.0, softcap=None, **kwargs):
        group, n, m = q.shape[1] // k.shape[1], k.shape[2], q.shape[2]
        logits = q @ k.repeat_interleave(group, 1).mT * scaling
        if softcap:
            logits = torch.tanh(logits / softcap) * softcap
        index = readers.get(module.layer_idx, module.layer_idx)
        hidden = evicted[index] if index < len(evicted) else None  # some releases leave readers of windows off
        if hidden is not None:
            rows = torch.arange(n - m, n) >= first
            part = torch.zeros(hidden.shape[0], k.shape[1], m, n, dtype=torch.bool)
            part[..., : hidden.shape[-1]] = hidden[:, :, None] & rows[:, None]
            part = part.repeat_interleave(len(q) // len(hidden), 0)  # beams of a sample
            logits = logits.masked_fill(part.repeat_interleave(group, 1), -torch.inf)
        if mask is not None:
            logits = logits.masked_fill(~mask, -torch.inf)
        sinks = getattr(module, "sinks", None)
        if sinks is not None:
            logits = torch.cat([logits, sinks.view(1, -1, 1, 1).expand(*logits.shape[:3], 1)], -1)
        weights = logits.softmax(-1).nan_to_num(0.0)[..., : v.shape[2]]
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


def farthest(model, cache, logits, ids, mask, steps):
    """How far two runs are at most from hiding in float64 what was evicted: what rounding alone does is the second's.

    Args:
        cache: after the prompt, of which the policy evicts nothing afterwards.
        logits: ``[B, N, V]`` of the patched model for the prompt.
        ids, mask: of the prompt, ``[B, N]``; the mask may be None.
        steps: tokens ``[B, M]`` of the forwards that follow.

    Returns:
        The patched model's largest distance, and that of the reference in the model's own precision.
    """
    n, evicted = ids.shape[1], evicted_rows(cache, ids.shape[1])
    plain = tokred.remove(copy.deepcopy(model))
    runs = [[masked_reference(plain, evicted, n), None], [masked_reference(plain.double(), evicted, n), None]]
    worst = [0.0, 0.0]
    for step in (ids, *steps):
        if step is not ids:
            mask = None if mask is None else torch.cat([mask, torch.ones_like(step)], 1)
            logits = model(step, attention_mask=mask, past_key_values=cache).logits
        found = []
        for run in runs:
            out = run[0](step, attention_mask=mask, past_key_values=run[1], use_cache=True)
            run[1] = out.past_key_values
            found.append(out.logits)
        real = slice(None) if mask is None else mask[:, -step.shape[1] :].bool()
        for i, one in enumerate((logits, found[0])):
            worst[i] = max(worst[i], float((one - found[1])[real].abs().max()))
    return worst


GREEDY = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None}


def check_nothing_to_evict(model):
    """With nothing to evict logits and tokens are those of the model, and after removal too."""
    ids, mask, _ = padded((21, 13))
    plain = model(ids, attention_mask=mask).logits
    made = model.generate(ids, attention_mask=mask, **GREEDY)
    tokred.apply(model, "snapkv", budget=1.0)
    assert torch.equal(model(ids, attention_mask=mask).logits, plain)
    assert torch.equal(model.generate(ids, attention_mask=mask, **GREEDY), made)
    tokred.remove(model)
    assert torch.equal(model(ids, attention_mask=mask).logits, plain)


def check_rows_are_gone(model, layout):
    """Evicted rows are as if they were hidden, in steps and in a second turn; the cache, for more."""
    ids, mask, _ = padded((29, 17))
    tokred.apply(model, Scatter(9))
    cache = tokred.kv_cache(model, layout=layout)
    logits = model(ids, attention_mask=mask, past_key_values=cache).logits
    steps = [prompt(n, 2, seed=5 + n) for n in (1, 4, 1)]  # a second turn among them
    ours, theirs = farthest(model, cache, logits, ids, mask, steps)
    assert ours < 3 * theirs + 1e-6
    return cache


def check_drafts(model):
    """Drafts in the prompt's forward change nothing."""
    ids = prompt(10).repeat(1, 3)
    tokred.apply(model, "snapkv", budget=9, window=4)
    assert torch.equal(model.generate(ids, prompt_lookup_num_tokens=3, **GREEDY), model.generate(ids, **GREEDY))


def check_beams(model):
    """Beams of a padded batch are those of each sample alone; the patch is the model's own."""
    ids, mask, alone = padded((21, 13))
    made = model.generate(ids, attention_mask=mask, num_beams=2, **GREEDY)
    assert torch.equal(made[0], model.generate(alone[0], num_beams=2, **GREEDY)[0])
    assert torch.equal(made[1, 8:], model.generate(alone[1], num_beams=2, **GREEDY)[0])
