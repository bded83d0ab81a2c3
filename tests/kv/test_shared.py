"""Layers that attend to the rows of an earlier layer: it decides, and they see the same rows at the same positions."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("transformers")

import tokred
from tests.kv.masked import check_beams, check_drafts, check_nothing_to_evict, check_rows_are_gone
from tests.kv.tiny import POLICIES, build, prompt
from tokred.adapters import find
from tokred.adapters.kv import attention
from tokred.kv.stores import KIVI, Half

NAMES = ["gemma4", pytest.param("gemma3n", marks=pytest.mark.hosts)]


pytestmark = pytest.mark.usefixtures("no_grad")


@pytest.fixture(params=NAMES)
def model(request):
    return build(request.param)


def test_the_last_layer_of_a_kind_before_the_readers_owns_the_rows(model):
    host = find(model, "cache")
    assert host.compressed == (1, 3)
    assert {i: (name, owner) for i, (name, _, owner) in host.readers.items()} == {5: ("model.layers.5.self_attn", 3)}
    assert "1 that read another's rows" in {r.method: r for r in tokred.supports(model)}["snapkv"].reason


def test_nothing_to_evict_changes_nothing(model):
    check_nothing_to_evict(model)


@pytest.mark.parametrize("layout", ["rectangle", "flat"])
def test_rows_that_are_gone_are_gone_for_the_readers_too(model, layout):
    cache = check_rows_are_gone(model, layout)
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
    check_drafts(model)


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
    check_beams(tokred.apply(model, "snapkv", budget=9, window=4))


def test_a_hard_limit_is_refused_as_readers_keep_rows_until_the_end():
    limited = tokred.make("limited", limit="1 MiB", chunk=16)
    with pytest.raises(tokred.MissingInputError, match=r"the bytes of all layers.*read another's rows keep them"):
        tokred.apply(build("gemma4"), limited)


def test_streams_side_by_side_are_no_stream():
    with pytest.raises(tokred.MissingInputError, match="stream"):
        tokred.apply(build("gemma3n"), "squeezeattention", budget=9)
