"""FastKV: the card's numbers, the propagation's law, and both stages together."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("transformers")

import tokred
from tests.kv.tiny import build, padded, prompt
from tests.vlm import oracle
from tokred.analysis.tsp_layer import choose_tsp_layer
from tokred.core.attention import Attention
from tokred.kv.pooling import pooled_columns
from tokred.methods.vlm.fastkv import FastKV, FastKVPropagation, propagation_scores
from tokred.vlm.in_llm import LayerSite

RECEIVED = torch.tensor(
    [
        [0.30, 0.10, 0.05, 0.20, 0.05, 0.10],
        [0.10, 0.40, 0.05, 0.05, 0.10, 0.05],
        [0.05, 0.05, 0.50, 0.05, 0.10, 0.05],
        [0.20, 0.05, 0.05, 0.05, 0.05, 0.40],
    ]
)[None]


def test_worked_scores():
    grouped = pooled_columns(RECEIVED, 3, "max").view(1, 2, 2, 6).sum(2)[0]
    torch.testing.assert_close(grouped[0], torch.tensor([0.70, 0.70, 0.60, 0.30, 0.30, 0.20]))
    torch.testing.assert_close(grouped[1], torch.tensor([0.25, 0.70, 0.55, 0.55, 0.50, 0.50]))
    total = propagation_scores(RECEIVED, 3, "max")[0]
    torch.testing.assert_close(total, torch.tensor([0.95, 1.40, 1.15, 0.85, 0.80, 0.70]))
    total = propagation_scores(RECEIVED, 3, "avg")[0]
    torch.testing.assert_close(total, torch.tensor([0.416667, 0.633333, 0.533333, 0.433333, 0.416667, 0.3]))


@pytest.mark.parametrize(("pooling", "chosen"), [("max", [0, 1, 2]), ("avg", [1, 2, 3])])
def test_worked_propagation(pooling, chosen):
    class Given(Attention):
        def columns(self, weight=None, rows=None, group="none"):
            assert rows == slice(6, 8)
            return torch.cat([RECEIVED / 2, torch.rand(1, 4, 2)], 2)

    method = FastKV(window=2, pool=3, pooling=pooling, tsp_len=5, cap=4, tsp_layer=0)
    heads = Given(torch.zeros(1, 4, 8, 2), torch.zeros(1, 2, 8, 2), causal=True)
    site = LayerSite(x=torch.zeros(1, 8, 4), before=heads, layer=1, depth=3)
    step = FastKVPropagation(method).reduce(site)
    assert step.representative.tolist() == [[*chosen, 6, 7]]


@pytest.mark.parametrize(("n", "early", "on", "late"), [(1000, 100, 200, 100), (131072, 13107, 26214, 13107)])
def test_sizes(n, early, on, late):
    method = FastKV(mode="proportional", retain=0.1, tsp_rate=0.2)
    assert method.stored(n, late=False) == early
    assert method.propagated(n) == on
    assert method.stored(on, late=True) == late
    assert FastKV(mode="proportional", retain=0.5, tsp_rate=0.2).stored(200, late=True) == 200
    assert FastKV().last_whole(32) == 15


@pytest.mark.parametrize("family", ["llama", "qwen3", "mistral"])
def test_propagation_equals_masking(family):
    model = build(family, num_hidden_layers=4)
    ids, mask, _ = padded((40, 29, 35))
    method = FastKVPropagation(FastKV(window=4, tsp_len=14, tsp_layer=1))
    layers = model.model.layers
    _, keeps = oracle.agree(model, layers, method, {"input_ids": ids, "attention_mask": mask})
    assert list(keeps) == [2]
    assert keeps[2].sum(1).tolist() == [14, 14, 14]
    assert keeps[2][:, -4:].all()


def test_both_stages_and_rows_alone():
    model = build("llama", num_hidden_layers=4)
    ids, mask, alone = padded((40, 29, 35))
    stock = oracle.generate(model, {"input_ids": ids, "attention_mask": mask})
    tokred.apply(model, "fastkv", window=4, cap=64, tsp_len=64, tsp_layer=1)
    kept = oracle.generate(model, {"input_ids": ids, "attention_mask": mask})
    assert all(torch.equal(a, b) for a, b in zip(stock.logits, kept.logits, strict=True))
    tokred.apply(model, "fastkv", window=4, cap=12, tsp_len=20, tsp_layer=1)
    out = oracle.generate(model, {"input_ids": ids, "attention_mask": mask}, max_new_tokens=6)
    rows = tokred.report(model)
    assert [row.columns for row in rows.layers] == [40, 40, 20, 20]
    for i, one in enumerate(alone):
        row = oracle.generate(model, {"input_ids": one.view(1, -1)}, max_new_tokens=6)
        for a, b in zip(out.logits, row.logits, strict=True):
            torch.testing.assert_close(a[i], b[0], rtol=1e-4, atol=1e-4)
    cache = out.past_key_values
    # Five of the six new tokens have been fed.
    assert [layer.keys.shape[2] for layer in cache.layers] == [17, 17, 17, 17]
    assert [layer.seen for layer in cache.layers] == [45, 45, 25, 25]
    assert cache.get_seq_length() == 45
    beams = oracle.generate(model, {"input_ids": ids, "attention_mask": mask}, num_beams=2)
    assert beams.sequences.shape == (3, 45)
    again = oracle.generate(model, {"input_ids": ids, "attention_mask": mask}, max_new_tokens=6)
    assert torch.equal(again.sequences, out.sequences)  # state is the cache's, not the module's
    tokred.remove(model)
    assert torch.equal(oracle.generate(model, {"input_ids": ids, "attention_mask": mask}).sequences, stock.sequences)


def test_last_output_of_the_next_layer_equals_the_masked_run():
    model = build("llama", num_hidden_layers=4)
    ids = prompt(40)
    seen = {}
    handle = model.model.layers[2].register_forward_hook(lambda m, a, o: seen.update(y=o))
    tokred.apply(model, FastKVPropagation(FastKV(window=4, tsp_len=14, tsp_layer=1)))
    cache = model(ids, use_cache=True).past_key_values
    ours, keeps = seen["y"][0, -1], oracle.kept(cache, 40)
    tokred.remove(model)
    with oracle.masked(model.model.layers, keeps, None):
        model(ids)
    handle.remove()
    torch.testing.assert_close(ours, seen["y"][0, -1], rtol=1e-5, atol=1e-5)


def test_second_turn_and_drafts():
    model = build("llama", num_hidden_layers=4)
    ids = prompt(30)
    ids[0, -8:] = torch.tensor([7, 8, 9, 11, 7, 8, 9, 11])
    tokred.apply(model, "fastkv", window=4, cap=12, tsp_len=20, tsp_layer=1)
    plain = oracle.generate(model, {"input_ids": ids}, max_new_tokens=8)
    drafted = oracle.generate(model, {"input_ids": ids}, max_new_tokens=8, prompt_lookup_num_tokens=3)
    assert plain.sequences.tolist() == drafted.sequences.tolist()
    cache = plain.past_key_values
    more = torch.cat([plain.sequences, prompt(5, seed=3)], 1)
    longer = oracle.generate(model, {"input_ids": more, "past_key_values": cache})
    assert longer.past_key_values.get_seq_length() == more.shape[1] + 4


def test_choosing_the_layer():
    model = build("llama", num_hidden_layers=4)
    found = choose_tsp_layer(model, [prompt(40)], tol=10.0, method=FastKV(window=4, tsp_len=12))
    assert [one.layer for one in found.distances] == [0, 1, 2]
    assert found.layer == 0
    assert choose_tsp_layer(model, [prompt(40)], tol=1e-9, method=FastKV(window=4, tsp_len=12)).layer == 2
    assert choose_tsp_layer(model, [prompt(10)], tol=1e-9, method=FastKV(window=4, tsp_len=12)).layer == 0
    with pytest.raises(ValueError, match="positive"):
        choose_tsp_layer(model, [prompt(10)], tol=0)
    with pytest.raises(ValueError, match="prompt"):
        choose_tsp_layer(model, [])


@pytest.mark.parametrize(
    ("parameters", "match"),
    [
        ({"window": 0}, "window"),
        ({"pool": 4}, "odd"),
        ({"cap": 8}, "cap"),
        ({"tsp_len": 8}, "tsp_len"),
        ({"retain": 0.0}, "retain"),
        ({"mode": "some"}, "mode"),
        ({"tsp_layer": -2}, "tsp_layer"),
    ],
)
def test_bad_parameters(parameters, match):
    with pytest.raises(ValueError, match=match):
        FastKV(**parameters)


def test_bad_calls():
    model = build("llama", num_hidden_layers=4)
    with pytest.raises(ValueError, match="0 to 2"):
        tokred.apply(model, "fastkv", tsp_layer=3)
    assert not any(k.startswith("_tokred") for m in model.modules() for k in m.__dict__)
    tokred.apply(model, "fastkv", tsp_layer=1, tsp_len=9, cap=9)
    with pytest.raises(ValueError, match="labels"):
        model(prompt(20), labels=prompt(20))
    tokred.remove(model)
