"""Hybrids: layers with rows lose some, those with a state of one size stay as they are, and go back with snapshots."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("transformers")

import tokred
from tests.kv.masked import GREEDY, check_beams
from tests.kv.tiny import build, prompt

pytestmark = pytest.mark.usefixtures("no_grad")


def patched(name: str = "qwen3_5"):
    return tokred.apply(build(name), "snapkv", budget=9, window=4)


def test_the_report_counts_states_by_their_bytes():
    model = patched()
    cache = model.generate(prompt(20), return_dict_in_generate=True, **GREEDY).past_key_values
    rows = tokred.report(model).layers
    assert [row.rows for row in rows] == [0, 13, 0, 13]
    states = [x for i in (0, 2) for held in (cache.layers[i].conv_states, cache.layers[i].recurrent_states)
              for x in held.values()]  # fmt: skip
    assert rows[0].bytes + rows[2].bytes == sum(x.nbytes for x in states) > 0
    assert cache.nbytes == sum(row.bytes for row in rows)
    assert "2 without rows stay as they are" in {r.method: r for r in tokred.supports(model)}["snapkv"].reason


def test_a_snapshot_holds_states_that_are_written_in_place():
    model, cache = patched(), None
    cache = tokred.kv_cache(model)
    model(prompt(20), past_key_values=cache)
    before = cache.snapshot()
    first = [model(prompt(n, seed=n), past_key_values=cache).logits for n in (1, 3)]
    for _ in range(2):
        cache.restore(before)
        again = [model(prompt(n, seed=n), past_key_values=cache).logits for n in (1, 3)]
        assert all(torch.equal(a, b) for a, b in zip(again, first, strict=True))


def test_a_context_that_is_repeated_leaves_states_as_they_were():
    model, ids = build("qwen3_5"), prompt(20)
    plain = model(ids, use_cache=True).past_key_values
    tokred.apply(model, "kvzip", budget=0.5, chunk=9)
    cache = model(ids, use_cache=True).past_key_values
    assert cache.layers[1].keys.shape[2] < 20
    for i in (0, 2):
        assert torch.equal(cache.layers[i].recurrent_states[0], plain.layers[i].recurrent_states[0])


@pytest.mark.parametrize("name", ["qwen3_5", "lfm2"])
def test_a_crop_that_a_state_cannot_follow_leaves_all_layers(name):
    model = tokred.apply(build(name), "snapkv", budget=1.0)
    cache = tokred.kv_cache(model)
    model(prompt(20), past_key_values=cache)
    before = cache.snapshot()
    follows = model(prompt(1), past_key_values=cache).logits
    cache.restore(before)
    with pytest.raises(ValueError, match="cannot crop: "):
        cache.crop(-2)
    assert cache.get_seq_length() == 20
    assert torch.equal(model(prompt(1), past_key_values=cache).logits, follows)


def test_beams_and_padding():
    check_beams(patched())


def test_a_hard_limit_is_refused_as_states_are_not_counted_beforehand():
    model = build("qwen3_5")
    limited = tokred.make("limited", limit="1 MiB", chunk=16)
    with pytest.raises(tokred.MissingInputError, match=r"the bytes of all layers.*2 of its layers keep states"):
        tokred.apply(model, limited)
    row = {r.method: r for r in tokred.supports(model)}["limited"]
    assert not row.works
    assert "the bytes of all layers" in row.reason


def test_a_cache_of_a_class_of_its_own_is_refused():
    transformers = pytest.importorskip("transformers")
    if not hasattr(transformers, "MiniMaxForCausalLM"):
        pytest.skip("this transformers has no MiniMax")
    model = transformers.MiniMaxForCausalLM(transformers.MiniMaxConfig(
        vocab_size=60, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, head_dim=8, num_local_experts=2, layer_types=["linear_attention", "full_attention"],
    ))  # fmt: skip
    with pytest.raises(tokred.UnsupportedModelError, match="MiniMaxCache"):
        tokred.apply(model, "snapkv")
