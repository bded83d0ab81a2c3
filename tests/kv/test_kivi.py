"""Models whose caches are held in few bits: with any policy, and with all that may happen to a cache."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("transformers")

import transformers

import tokred
from tests.kv.test_store_models import GREEDY, LOGITS, NAMES, course, policies
from tests.kv.tiny import Scatter, build, padded, prompt
from tokred.kv import KIVI
from tokred.kv.stores.codecs import Affine

HELD = {"group_size": 4, "residual_length": 8}


pytestmark = pytest.mark.usefixtures("no_grad")


@pytest.fixture(autouse=True)
def uncompiled(monkeypatch):
    """Queries are answered from codes, as where a kernel runs, but in plain torch."""
    monkeypatch.setenv("TOKRED_KERNELS", "torch")
    monkeypatch.setattr(Affine, "why_slow", lambda self, query: None)


def test_nothing_rounded_is_the_model_itself(model):
    ids, mask, _ = padded((29, 17))
    plain = model.generate(ids, attention_mask=mask, **LOGITS)
    tokred.apply(model, "kivi", bits=16, **HELD)
    found = model.generate(ids, attention_mask=mask, **LOGITS)
    assert torch.equal(found.sequences, plain.sequences)
    assert all(map(torch.equal, found.logits, plain.logits))
    cache = found.past_key_values
    assert all(layer.shelf._sides[0].encoded == 32 for layer in cache.layers)


@pytest.mark.parametrize("name", NAMES)
def test_every_policy_with_nothing_rounded(model, name):
    """Codes, evicted rows among them and encoding anew: the same rows as in a rectangle, bit for bit."""
    found = []
    for store in (KIVI(16, **HELD), "rectangle"):
        tokred.apply(model, policies(store)[name])
        found.append(course(model, tokred.kv_cache(model), prompt(29), None, lambda cache: None))
    assert all((a - c).abs().max() < 2e-5 for a, c in zip(*found, strict=True))


@pytest.mark.parametrize("batch", ["one", "padded"])
@pytest.mark.parametrize("name", ["snapkv", "h2o", "zeromerge", "adakv"])
def test_every_policy_in_eight_bits(model, name, batch):
    ids, mask, _ = padded((29, 17)) if batch == "padded" else (prompt(29), None, None)
    found = []
    for store in (KIVI(8, **HELD), "rectangle"):
        tokred.apply(model, policies(store)[name])
        cache = tokred.kv_cache(model)
        found.append(course(model, cache, ids, mask, lambda cache: None))
    real = slice(None) if mask is None else mask.bool()
    assert torch.equal(found[0][0][real], found[1][0][real]), "a prompt attends before its rows are rounded"
    assert all(a.isfinite().all() for a in found[0])
    # What is judged by rounded keys may keep other rows where scores nearly tie.
    assert (found[0][-1] - found[1][-1]).abs().max() < 0.3


def test_few_bits_are_a_dense_cache_that_is_rounded_by_hand(model):
    """Without eviction: keys by channel, values by token, at the steps at which the card says so."""
    k_code, v_code = Affine(2, 4, tokens=True), Affine(2, 4)
    dense, marks, theirs = transformers.DynamicCache(config=model.config), [0, 0], []
    tokens = [prompt(29), *(prompt(1, seed=i) for i in range(5)), prompt(4, seed=9)]
    for ids in tokens:
        theirs.append(model(ids, past_key_values=dense).logits)
        n = dense.get_seq_length()
        ends = n // 8 * 8, max(0, n - 8)
        for layer in dense.layers:
            for i, (name, code) in enumerate((("keys", k_code), ("values", v_code))):
                old = getattr(layer, name)
                part = old[:, :, marks[i] : ends[i]]
                if part.shape[2]:
                    new = code.decode(code.encode(part, None), torch.float32)
                    setattr(layer, name, torch.cat([old[:, :, : marks[i]], new, old[:, :, ends[i] :]], 2))
        marks = list(ends)
    tokred.apply(model, "kivi", **HELD)
    cache = tokred.kv_cache(model)
    for ids, wanted in zip(tokens, theirs, strict=True):
        assert (model(ids, past_key_values=cache).logits - wanted).abs().max() < 1e-4


def test_beams_second_turns_and_many_questions(model):
    ids, mask, _ = padded((22, 14))
    for given in ({"method": "kivi", "bits": 4, **HELD}, {"method": "snapkv", "budget": 12, "store": KIVI(4, **HELD)}):
        tokred.apply(model, given.pop("method"), **given, **({"window": 4} if "budget" in given else {}))
        made = model.generate(ids, attention_mask=mask, num_beams=3, **GREEDY)
        assert made.shape == (2, 28)
        context = prompt(26, 2)
        cache = tokred.kv_cache(model)
        model(context, past_key_values=cache)
        kept, held = cache.snapshot(), cache.nbytes
        longer = torch.cat([context, prompt(4, 2, seed=5)], 1)
        first = model.generate(longer, past_key_values=cache, **LOGITS).logits
        cache.restore(kept)
        assert cache.nbytes == held
        again = model.generate(longer, past_key_values=cache, **LOGITS).logits
        assert all(map(torch.equal, again, first))
        tokred.remove(model)


def test_crops_and_drafts(model):
    tokred.apply(model, "kivi", bits=8, **HELD)
    ids = prompt(6).repeat(1, 4)
    drafted = model.generate(ids, prompt_lookup_num_tokens=3, **GREEDY)
    assert drafted.shape == (1, 30)
    cache = tokred.kv_cache(model)
    model(prompt(29), past_key_values=cache)
    model(prompt(7, seed=2), past_key_values=cache)
    cache.crop(-5)
    assert cache.get_seq_length() == 31
    a = model(prompt(1, seed=3), past_key_values=cache).logits
    dense = transformers.DynamicCache(config=model.config)
    tokred.remove(model)
    model(prompt(29), past_key_values=dense)
    model(prompt(7, seed=2)[:, :2], past_key_values=dense)
    assert (model(prompt(1, seed=3), past_key_values=dense).logits - a).abs().max() < 0.1


def test_uneven_heads_and_layers(model):
    ids, mask, _ = padded((24, 15))
    for store in (KIVI(8, **HELD), KIVI(3, **HELD)):
        tokred.apply(model, Scatter(10))
        policy = tokred.KVPolicy("key_norm", tokred.kv.Adaptive(9), when=tokred.kv.When(every=1), store=store)
        tokred.apply(model, policy)
        assert model.generate(ids, attention_mask=mask, num_beams=2, **GREEDY).shape == (2, 30)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    model = build("llama", dtype)
    tokred.apply(model, "kivi", bits=4, **HELD)
    found = model.generate(prompt(30), **LOGITS)
    assert all(x.isfinite().all() for x in found.logits)
    assert found.past_key_values.layers[0].keys.dtype == dtype


def test_bytes_of_a_long_prompt(model):
    tokred.apply(model, "kivi")
    cache = tokred.kv_cache(model)
    model(prompt(448), past_key_values=cache)
    rows = cache.layer_rows()
    assert [r.rows for r in rows] == [448] * 3
    # Two bits in groups of 32 for keys, of 16 (a whole head) for values; 64 keys and 128 values in full.
    codes = 2 * (384 * 16 * 3 + 320 * 16 * 4) // 8
    assert [r.bytes for r in rows] == [codes + 2 * (64 + 128) * 16 * 4] * 3
    assert rows[0].dense_bytes == 2 * 2 * 448 * 16 * 4


def test_what_does_not_go_together_is_refused(model):
    with pytest.raises(ValueError, match="cannot hold a limit: it evicts nothing; give its store to one that does"):
        tokred.Limited("kivi")
    with pytest.raises(ValueError, match="bits must be one of"):
        tokred.KIVI(bits=5.5)
    assert tokred.KIVI(bits=4).parts.store == KIVI(4)


@pytest.mark.hosts
@pytest.mark.parametrize("family", ["qwen3", "mistral", "gemma3", "phi3", "gpt_neox", "gemma2"])
def test_hosts(family):
    model = build(family)
    plain = model.generate(prompt(29), **LOGITS)
    tokred.apply(model, "kivi", bits=16, **HELD)
    found = model.generate(prompt(29), **LOGITS)
    assert all((a - b).abs().max() < 1e-5 for a, b in zip(found.logits, plain.logits, strict=True))
    tokred.apply(model, "kivi", bits=8, **HELD)
    near = model.generate(prompt(29), **LOGITS)
    assert (near.logits[0] - plain.logits[0]).abs().max() < 1e-5
    assert (near.logits[1] - plain.logits[1]).abs().max() < 0.3
