"""The benchmark's shortcut: a cache filled from a prompt that was read once is the cache that would have read it."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("transformers")

import tokred
from benchmarks.kv import feed as kv_prompt
from tests.kv.tiny import build

POLICIES = {
    "snapkv": {"window": 4},
    "h2o": {},
    "tova": {},
    "keyformer": {},
    "zeromerge": {},
    "adakv": {"score": tokred.kv.Window(4)},
    "criticalkv": {"score": tokred.kv.Window(4)},
    "cake": {"window": 4},
    "squeezeattention": {},
    "observed_attention": {},
    "expected_attention": {},
    "kvzip": {"chunk": 16},
    "knorm": {},
    "keydiff": {},
    "lagkv": {"lag": 5},
    "random_evict": {},
}


@pytest.mark.parametrize("name", POLICIES)
def test_a_prompt_read_once_fills_the_same_cache(name):
    model = build("llama")
    ids = torch.randint(3, 97, (2, 40), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[1, :7] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    # The stream of the whole text is recorded, so squeezeattention is compared on the whole of it.
    n = 40 if name == "squeezeattention" else 33
    prompt, logits = kv_prompt.read(model, ids, mask, logits=1)
    with torch.no_grad():
        dense = model(ids, attention_mask=mask, position_ids=positions).logits[:, -1:]
    torch.testing.assert_close(logits, dense, rtol=1e-5, atol=1e-5)
    for budget in (0.5, 0.3):
        with tokred.applied(model, name, budget=budget, **POLICIES[name]), torch.no_grad():
            filled = prompt.fill(tokred.kv_cache(model), n - 4, rest=4)
            assert [r.rows for r in prompt.fill(tokred.kv_cache(model), n).layer_rows()] == [
                r.rows for r in filled.layer_rows()
            ]
            real = tokred.kv_cache(model)
            model(ids[:, :n], attention_mask=mask[:, :n], position_ids=positions[:, :n], past_key_values=real)
            assert [r.rows for r in filled.layer_rows()] == [r.rows for r in real.layer_rows()]
            for a, b in zip(filled.layers, real.layers, strict=True):
                assert (a.positions is None) == (b.positions is None)
                if a.positions is not None:
                    assert torch.equal(a.positions, b.positions)
                torch.testing.assert_close(a.keys, b.keys, rtol=1e-5, atol=1e-5)
            step = torch.full((2, 1), 5)
            grown = torch.cat([mask[:, :n], torch.ones_like(step)], 1)
            given = {"attention_mask": grown, "position_ids": positions[:, n - 1 : n] + 1}
            after = [model(step, past_key_values=cache, **given).logits for cache in (filled, real)]
            torch.testing.assert_close(*after, rtol=1e-4, atol=1e-4)
