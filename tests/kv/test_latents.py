"""Caches of latents: scores by queries that are carried to the rows, attention by keys that are made of them."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("transformers")

import tokred
from tests.kv.masked import GREEDY, check_beams, check_drafts, check_nothing_to_evict, check_rows_are_gone
from tests.kv.tiny import POLICIES, build, prompt
from tests.registered import examples
from tokred.adapters import find
from tokred.adapters.kv.latents import LatentSite, carried, expanded, read
from tokred.kv.stores import KIVI, Flat, Half, Rectangle
from tokred.methods.kv.h2o import ColumnSum

NAMES = ["deepseek_v3", pytest.param("deepseek_v2", marks=pytest.mark.hosts)]
RANK, ROTATED = 24, 8


pytestmark = pytest.mark.usefixtures("no_grad")


@pytest.fixture(params=NAMES)
def model(request):
    return build(request.param)


def test_a_carried_query_has_the_same_product_with_a_row_as_with_the_key_that_is_made_of_it():
    attention = build("deepseek_v3").model.layers[1].self_attn
    g = torch.Generator().manual_seed(0)
    q, latents, rotated = (torch.randn(*s, generator=g) for s in ((2, 4, 3, 20), (2, 1, 9, RANK), (2, 1, 9, ROTATED)))
    keys, values = expanded(attention, latents, rotated)
    assert keys.shape == (2, 4, 9, 20)
    assert values.shape == (2, 4, 9, 16)
    made, shown = read(latents, rotated)
    assert made.like.shape == (2, 1, 9, RANK + ROTATED)
    assert shown is latents
    torch.testing.assert_close(carried(attention, q, q.dtype) @ made.make().mT, q @ keys.mT, rtol=1e-4, atol=1e-4)


def test_rows_cost_what_is_held():
    site = LatentSite(q=torch.randn(1, 4, 2, 32), k=torch.randn(1, 1, 5, 32), v=torch.randn(1, 1, 5, 24), scale=1.0)
    site.price(Rectangle())
    assert site.row_bytes == (RANK + ROTATED) * 4 + 4


def test_a_policy_adds_up_what_the_models_own_attention_gave(model):
    ids, seen = prompt(20), []
    implementation = model.config._attn_implementation
    model.set_attn_implementation("eager")
    given = model(ids, output_attentions=True).attentions[1]
    model.set_attn_implementation(implementation)

    class Spy(ColumnSum):
        def observe(self, site):
            super().observe(site)
            seen.append(self(site))

    tokred.apply(model, "kv", score=Spy(), budget=9)
    model(ids, use_cache=True)
    found, expected = seen[1], given.sum((1, 2))[:, None]
    assert found.shape == (1, 1, 20)
    torch.testing.assert_close(found / found.sum(), expected / expected.sum(), rtol=1e-4, atol=1e-6)


def test_nothing_to_evict_changes_nothing(model):
    check_nothing_to_evict(model)


@pytest.mark.parametrize("layout", ["rectangle", "flat"])
def test_latents_that_are_gone_are_gone(model, layout):
    model.set_experts_implementation("eager")
    cache = check_rows_are_gone(model, layout)
    assert cache.layers[1].shelf.newest[0].shape[3] == RANK
    assert cache.layers[1].shelf.newest[1].shape[3] == ROTATED


@pytest.mark.parametrize("store", [Flat(), Half(), pytest.param(KIVI(bits=16), marks=pytest.mark.hosts)])
def test_stores_hold_rows_whose_halves_differ_in_width(store):
    model, ids = build("deepseek_v3"), prompt(20)
    tokred.apply(model, "snapkv", budget=9, window=4)
    plain = model.generate(ids, return_dict_in_generate=True, output_logits=True, **GREEDY).logits
    tokred.apply(model, "snapkv", budget=9, window=4, store=store)
    found = model.generate(ids, return_dict_in_generate=True, output_logits=True, **GREEDY).logits
    limit = 0.1 if isinstance(store, Half) else 1e-5
    assert all((a - b).abs().max() < limit * b.abs().max() for a, b in zip(found, plain, strict=True))


@pytest.mark.parametrize("name", list(POLICIES))
def test_policies_run_or_are_refused_for_what_latents_lack(name):
    model, ids = build("deepseek_v3"), prompt(24)
    works = {r.method: r.works for r in tokred.supports(model)}[name]
    if not works:
        with pytest.raises(tokred.MissingInputError, match="its cache holds latents"):
            tokred.apply(model, POLICIES[name])
        return
    tokred.apply(model, POLICIES[name])
    assert model.generate(ids, **GREEDY).shape == (1, 29)
    assert tokred.report(model).layers[-1].rows < 29


def test_drafts_in_the_prompts_forward():
    check_drafts(build("deepseek_v3"))


def test_beams(model):
    check_beams(tokred.apply(model, "snapkv", budget=9, window=4))


def test_stores_that_balance_channels_and_fates_that_rewrite_values_are_refused():
    model = build("deepseek_v3")
    works = {r.method: r.works for r in tokred.supports(model)}
    for name in ("mikv", "attention_matching", "criticalkv", "expected_attention"):
        assert not works[name]
        with pytest.raises(tokred.MissingInputError, match="of which each head makes keys and values of its own"):
            tokred.apply(model, tokred.make(name, **examples("cache").get(name, {})))
    assert find(model, "cache").model_facts().key_heads == 1
