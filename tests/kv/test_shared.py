"""Layers that attend to the rows of an earlier layer: it decides, and they see the same rows at the same positions."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("transformers")

import tokred
from tests.kv.masked import farthest
from tests.kv.tiny import POLICIES, Scatter, build, padded, prompt
from tokred.adapters import find
from tokred.adapters.kv import attention
from tokred.kv.stores import KIVI, Half

GREEDY = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None}
NAMES = ["gemma4", pytest.param("gemma3n", marks=pytest.mark.hosts)]


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


@pytest.fixture(params=NAMES)
def model(request):
    return build(request.param)


def test_the_last_layer_of_a_kind_before_the_readers_owns_the_rows(model):
    host = find(model, "cache")
    assert host.compressed == (1, 3)
    assert {i: (name, owner) for i, (name, _, owner) in host.readers.items()} == {5: ("model.layers.5.self_attn", 3)}
    assert "1 that read another's rows" in {r.method: r for r in tokred.supports(model)}["snapkv"].reason


def test_nothing_to_evict_changes_nothing(model):
    ids, mask, _ = padded((21, 13))
    plain = model(ids, attention_mask=mask).logits
    made = model.generate(ids, attention_mask=mask, **GREEDY)
    tokred.apply(model, "snapkv", budget=1.0)
    assert torch.equal(model(ids, attention_mask=mask).logits, plain)
    assert torch.equal(model.generate(ids, attention_mask=mask, **GREEDY), made)
    tokred.remove(model)
    assert torch.equal(model(ids, attention_mask=mask).logits, plain)


@pytest.mark.parametrize("layout", ["rectangle", "flat"])
def test_rows_that_are_gone_are_gone_for_the_readers_too(model, layout):
    ids, mask, _ = padded((29, 17))
    tokred.apply(model, Scatter(9))
    cache = tokred.kv_cache(model, layout=layout)
    logits = model(ids, attention_mask=mask, past_key_values=cache).logits
    steps = [prompt(n, 2, seed=5 + n) for n in (1, 4, 1)]  # a second turn among them
    ours, theirs = farthest(model, cache, logits, ids, mask, steps)
    assert ours < 3 * theirs + 1e-6
    assert all(layer.lent is None for layer in cache.layers if hasattr(layer, "lent"))


@pytest.mark.parametrize("name", ["h2o", "zeromerge"])
def test_rows_that_leave_at_every_step_leave_the_readers_one_forward_later(name, monkeypatch):
    """Each step is the same as that of a model whose readers attend to what the owner attended to."""
    model, seen = build("gemma4"), []
    tokred.apply(model, POLICIES[name])
    over = attention._over
    monkeypatch.setattr(attention, "_over", lambda call, rows, *rest: (
        seen.append((call.module.layer_idx, rest[1].clone(), rows.slots)), over(call, rows, *rest))[1])  # fmt: skip
    cache = tokred.kv_cache(model)
    for n in (20, 1, 1, 3, 1):
        seen.clear()
        model(prompt(n, seed=n), past_key_values=cache)
        found = {i: rest for i, *rest in seen}
        assert torch.equal(found[5][0], found[3][0])
        assert found[3][1] is None is found[5][1] or torch.equal(found[5][1], found[3][1])


def test_drafts_in_the_prompts_forward_see_what_is_left(model):
    ids = prompt(10).repeat(1, 3)
    tokred.apply(model, "snapkv", budget=9, window=4)
    assert torch.equal(model.generate(ids, prompt_lookup_num_tokens=3, **GREEDY), model.generate(ids, **GREEDY))


def test_a_context_is_repeated_over_shared_rows():
    model, ids = build("gemma4"), prompt(20)
    tokred.apply(model, "kvzip", budget=0.5, chunk=9)
    assert model(ids).logits.isfinite().all()
    assert [row.rows for row in tokred.report(model).layers][3] < 20


@pytest.mark.parametrize(
    "store", [Half(), pytest.param(KIVI(residual_length=4, group_size=4), marks=pytest.mark.hosts)]
)
def test_rows_in_another_form_are_lent_as_they_are_read(store, monkeypatch):
    model, seen = build("gemma4"), []
    tokred.apply(model, "snapkv", budget=9, window=4, store=store)
    borrow = attention._borrow
    monkeypatch.setattr(attention, "_borrow", lambda call, layer, query: (
        seen.append((layer.lent[-1].keys, layer.keys)), borrow(call, layer, query))[1])  # fmt: skip
    cache = tokred.kv_cache(model)
    for n in (20, 1, 1):
        model(prompt(n, seed=n), past_key_values=cache)
    assert [lent.shape[2] for lent, _ in seen] == [20, 10, 11]
    for lent, held in seen[1:]:
        assert torch.equal(lent[:, :, :4], held[:, :, :4])


def test_beams(model):
    tokred.apply(model, "snapkv", budget=9, window=4)
    ids, mask, alone = padded((21, 13))
    made = model.generate(ids, attention_mask=mask, num_beams=2, **GREEDY)
    assert torch.equal(made[0], model.generate(alone[0], num_beams=2, **GREEDY)[0])
    assert torch.equal(made[1, 8:], model.generate(alone[1], num_beams=2, **GREEDY)[0])


def test_a_hard_limit_is_refused_as_readers_keep_rows_until_the_end():
    limited = tokred.make("limited", limit="1 MiB", chunk=16)
    with pytest.raises(tokred.MissingInputError, match=r"the bytes of all layers.*read another's rows keep them"):
        tokred.apply(build("gemma4"), limited)


def test_streams_side_by_side_are_no_stream():
    with pytest.raises(tokred.MissingInputError, match="stream"):
        tokred.apply(build("gemma3n"), "squeezeattention", budget=9)
