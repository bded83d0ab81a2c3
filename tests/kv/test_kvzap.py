"""KVzap: the card's worked example of KVzip+, a network beside the model, and what it learns."""

from __future__ import annotations

import json
import math

import pytest
import torch
from torch import nn

import tokred
from tests.kv.test_kvzip import _Fed, span
from tests.kv.test_scores import PROJECTION, close, site
from tokred import learn
from tokred.core.learned import Facts, Learned
from tokred.kernels.decode_attention import SENTINEL
from tokred.kv import CacheSite, Foretold, Reconstruction
from tokred.kv.repeat import REPEATED, Probe, Repeats
from tokred.kv.values import value_lengths
from tokred.methods.kv.kvzap import FORETOLD, Surrogate

pytest.importorskip("transformers")

from tests.kv.masked import farthest
from tests.kv.tiny import FAMILIES, build, padded, prompt

SMALL = {"tau": 0.0, "recent": 4, "sinks": 1, "every": 2, "hidden": 8}


# ---------------------------------------------------------------- KVzip+


def test_worked_example_of_the_targets():
    """Sinks: position 0; piece: 1 to 3; tokens 4 and 5 repeat it, made of vectors of length 2 and a half."""
    whole = site()
    probe = Probe(Repeats(chunk=3, sinks=1, plus=True), recorded=4)
    probe.piece = _Fed((span(1, 2, 3),), (span(),), (), 2)
    made_of = torch.tensor([[[2.0, 0, 0], [0, 0.3, 0.4]]])
    # The example writes the matrix of each head the other way round.
    probe.see(site(q=whole.q[:, :, 4:], hidden=made_of, projection=lambda: torch.tensor(PROJECTION).float().T))
    four = CacheSite(k=whole.k[:, :, :4], v=whole.v[:, :, :4])
    found = probe.scores(0, four, None)
    close(found[..., 1:], [1.055289, 0.844699, 0.866911])
    close(found[..., 1:].log(), [0.053815, -0.168774, -0.142819])
    assert found[..., 0] == math.inf


def test_the_lengths_of_values_in_blocks_and_by_hand(monkeypatch):
    torch.manual_seed(0)
    v, weight = torch.randn(2, 2, 7, 4), torch.randn(12, 16)
    where = CacheSite(k=v, v=v, projection=lambda: weight)
    heads = weight.view(12, 4, 4)
    by_hand = torch.stack([(v[:, h // 2] @ heads[:, h].mT).norm(dim=-1) for h in range(4)], 1)
    assert torch.allclose(value_lengths(where), by_hand, atol=1e-5)
    monkeypatch.setattr("tokred.kv.repeat._BLOCK", 2)
    q, x = torch.randn(2, 4, 5, 4), torch.randn(2, 5, 12)
    probe = Probe(Repeats(chunk=5, sinks=1, plus=True), recorded=2)
    probe.piece = _Fed((span(0, 1),) * 2, (span(),) * 2, (), 5)
    probe.see(CacheSite(q=q, k=v, v=v, projection=lambda: weight, hidden=x, layer=0))
    # Sinks stand before what is repeated; here the one sink is repeated too, as rows 0 and 1.
    rows = [0, 0, 1, 2, 3, 4, 5, 6]
    logits = q @ v[:, :, rows].repeat_interleave(2, 1).mT / 2
    hidden = torch.arange(8) > torch.arange(3, 8)[:, None]
    weights = logits.masked_fill(hidden, -torch.inf).softmax(-1)[..., 1:3] / x.norm(dim=-1)[:, None, :, None]
    expected = (weights.amax(2) * by_hand[..., :2]).view(2, 2, 2, 2).amax(2)
    assert torch.allclose(probe.best[0], expected, atol=1e-5)


@torch.no_grad()
def test_kvzip_plus_is_a_policy():
    model = build("llama")
    kept = []
    for norm in ("none", "plus"):
        tokred.apply(model, "kvzip", budget=0.5, chunk=9, sinks=2, norm=norm)
        cache = tokred.kv_cache(model)
        model(prompt(24), past_key_values=cache)
        kept.append([layer.positions.tolist() for layer in cache.layers])
    assert kept[0] != kept[1]
    assert sum(len(h) for layer in kept[1] for h in layer[0]) >= 72
    with pytest.raises(ValueError, match="norm is 'l2'; allowed are 'none', 'plus'"):
        Reconstruction(norm="l2")


# ---------------------------------------------------------------- the network


@pytest.mark.parametrize(("network", "count"), [("mlp", 3 * (48 * 8 + 8 + 8 * 2 + 2)), ("linear", 3 * (48 * 2 + 2))])
def test_a_network_for_every_layer(network, count):
    made = Foretold(network, hidden=8).module(Facts("llama", 3, 48, 4, key_heads=2))
    assert sum(p.numel() for p in made.parameters()) == count
    assert made(1, torch.randn(2, 5, 48)).shape == (2, 2, 5)
    again = Foretold(network, hidden=8).module(Facts("llama", 3, 48, 4, key_heads=2))
    assert torch.equal(again(1, torch.ones(1, 1, 48)), made(1, torch.ones(1, 1, 48)))
    assert {p.dtype for p in made.to(torch.bfloat16).half().parameters()} == {torch.float32}


def test_rows_are_scored_once():
    made, score = Surrogate(1, 3, 2, 0), Foretold("linear")
    x, rows = torch.randn(1, 6, 3), {}
    for first, last in ((0, 4), (4, 5), (5, 6)):
        k = torch.zeros(1, 2, last, 4)
        where = CacheSite(q=k, k=k, v=k, rows=rows, hidden=x[:, first:last], learned=Learned(made.eval()))
        score.observe(where)
        rows = {FORETOLD: torch.nn.functional.pad(where.rows[FORETOLD], (0, 1))}  # room for the next
    assert torch.allclose(score(where), made(0, x))


# ---------------------------------------------------------------- on a model


def held(cache, sample=0, shift=0):
    return [
        [[p - shift for p in head if p != SENTINEL] for head in layer.positions[sample].tolist()]
        for layer in cache.layers
        if getattr(layer, "positions", None) is not None
    ]


@torch.no_grad()
def test_nothing_removed_is_bit_equal():
    model, ids = build("llama"), prompt(23)
    plain = model.generate(ids, max_new_tokens=4, do_sample=False)
    tokred.apply(model, "kvzap", **{**SMALL, "tau": -math.inf})
    assert torch.equal(model.generate(ids, max_new_tokens=4, do_sample=False), plain)
    assert list(tokred.remove(model).state_dict()) == list(build("llama").state_dict())


@torch.no_grad()
@pytest.mark.parametrize(
    "family", [FAMILIES[0], *(pytest.param(f, marks=pytest.mark.hosts) for f in (*FAMILIES[1:], "gemma2"))]
)
@pytest.mark.parametrize("batch", ["one", "padded"])
def test_evicting_equals_masking(family, batch):
    model = build(family)
    ids, mask, _ = padded((29, 17, 6)) if batch == "padded" else (prompt(29), None, None)
    tokred.apply(model, "kvzap", **{**SMALL, "every": 0, "turns": False})
    cache = tokred.kv_cache(model)
    logits = model(ids, attention_mask=mask, past_key_values=cache).logits
    assert any(len(h) < 29 for layer in held(cache, 0) for h in layer), "something has been evicted"
    ours, rounding = farthest(model, cache, logits, ids, mask, [prompt(m, len(ids), seed=20 + m) for m in (1, 3, 1)])
    assert ours < 2 * rounding < 1e-5


@torch.no_grad()
def test_padding_batches_chunks_and_the_time_of_judging_change_nothing():
    model = build("llama", torch.float64)
    tokred.apply(model, "kvzap", **SMALL)
    ids, mask, alone = padded((24, 15))
    options = {"max_new_tokens": 5, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    both = model.generate(ids, attention_mask=mask, **options)
    for i, row in enumerate(alone):
        one = model.generate(row, **options)
        assert held(both.past_key_values, i, 24 - row.shape[1]) == held(one.past_key_values)
        assert all((a[i] - c[0]).abs().max() < 1e-9 for a, c in zip(both.logits, one.logits, strict=True))
    whole = held(one.past_key_values)
    parts = model.generate(alone[1], prefill_chunk_size=4, **options)
    # Later chunks see fewer rows, so that layers above the first make other states of them.
    assert held(parts.past_key_values)[0] == whole[0]
    module = tokred.modules(model)["kvzap"]
    for every in (1, 4):
        tokred.apply(model, "kvzap", **{**SMALL, "every": every}, module=module)
        made = model.generate(alone[1], **options)
        assert held(made.past_key_values)[0] == whole[0]
    more = tokred.apply(model, "kvzap", **{**SMALL, "tau": 0.2}, module=module).generate(alone[1], **options)
    for ours, theirs in zip(held(more.past_key_values)[0], whole[0], strict=True):
        assert set(ours) < set(theirs), "a higher threshold keeps a part of them"


@torch.no_grad()
def test_beams_and_half_precision():
    model = build("llama", torch.bfloat16)
    tokred.apply(model, "kvzap", **SMALL)
    ids, mask, _ = padded((22, 14))
    made = model.generate(ids, attention_mask=mask, num_beams=3, max_new_tokens=5, do_sample=False)
    assert made.shape[0] == 2
    assert {p.dtype for p in tokred.parameters(model)} == {torch.float32}
    with pytest.raises(ValueError, match="take back tokens"):
        model.generate(ids[:1], prompt_lookup_num_tokens=3, max_new_tokens=4)


# ---------------------------------------------------------------- training


def heard(model, seen: dict) -> list:
    """Hooks that note each attention module, and what it is given, by layer."""

    def note(module, args, kwargs) -> None:
        seen.setdefault(module.layer_idx, (module, args[0] if args else kwargs["hidden_states"]))

    return [layer.self_attn.register_forward_pre_hook(note, with_kwargs=True) for layer in model.model.layers]


def targets(model, ids) -> dict[int, torch.Tensor]:
    """For each layer the KVzip+ scores ``[Hk, N]``, by eager attention of the plain model, the text said twice."""
    seen: dict[int, tuple] = {}
    model.set_attn_implementation("eager")
    twice = torch.cat([ids, ids], 1)
    handles = heard(model, seen)
    with torch.no_grad():
        attentions = model(twice, output_attentions=True, use_cache=False).attentions
    found, n = {}, ids.shape[1]
    for i, weights in enumerate(attentions):
        module, x = seen[i][0], seen[i][1][0]
        v = module.v_proj(x[:n]).view(n, 2, -1).repeat_interleave(2, 1).transpose(0, 1)
        wide = torch.einsum("hnd,hdc->hnc", v, module.o_proj.weight.T.reshape(4, -1, module.o_proj.weight.shape[0]))
        weighed = weights[0, :, n:, :n] / x[n:].norm(dim=-1)[None, :, None] * wide.norm(dim=-1)[:, None]
        found[i] = weighed.amax(1).view(2, 2, n).amax(1)
    for handle in handles:
        handle.remove()
    model.set_attn_implementation("sdpa")
    return found


def test_the_loss_is_the_distance_from_the_whole_attention():
    model, ids = build("llama"), prompt(20)
    wanted = targets(model, ids)
    tokred.apply(model, "kvzap", **{**SMALL, "sinks": 0})
    module = tokred.modules(model)["kvzap"].train()
    seen = {}
    handles = heard(model, seen)
    model(ids)
    terms = tokred.losses(model)
    by_hand = torch.stack([(module(i, seen[i][1])[0] - wanted[i].log()).square().mean() for i in range(3)]).mean()
    assert terms["kvzap.distance"].item() == pytest.approx(by_hand.item(), rel=1e-4)
    terms["kvzap.distance"].backward()
    assert all(p.grad is not None for p in module.parameters())
    assert all(p.grad is None for p in model.parameters())
    [h.remove() for h in handles]


def test_without_a_cache_or_with_some_layers_nothing_is_learned():
    model, ids = build("llama"), prompt(20)
    tokred.apply(model, "kvzap", **SMALL)
    tokred.modules(model)["kvzap"].train()
    with pytest.raises(ValueError, match="call the model with use_cache=True"):
        model(ids, use_cache=False)
    with pytest.raises(ValueError, match="has a network for all 3 layers, and where= leaves 1 of them"):
        tokred.apply(model, "kvzap", **SMALL, where=lambda name, module: "layers.1" in name)


def test_it_learns_by_its_recipe_and_is_saved(tmp_path):
    model, texts = build("llama"), [prompt(24, seed=s) for s in range(4)]
    tokred.apply(model, "kvzap", **SMALL)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    given = {"method": "kvzap", "training": {"steps": 40, "lr": 0.0, "lr_method": 1e-2}, "losses": {"task": 0.0}}
    steps = learn.fit(
        model,
        ((texts[i % 4], texts[i % 4]) for i in range(40)),
        learn.recipe(given),
        modules=tokred.modules(model).values(),
        losses=tokred.losses,
    )
    first, last = (sum(s.loss for s in part) / 4 for part in (steps[:4], steps[-4:]))
    assert last < 0.5 * first
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    model(texts[0])
    with pytest.raises(tokred.NothingRecordedError, match="none in training"):
        tokred.losses(model)

    folder = tokred.save(model, tmp_path / "saved")
    assert json.loads((folder / "tokred.json").read_text())["methods"][0]["host"]["key_heads"] == 2
    other = tokred.apply(build("llama"), tokred.load(folder))
    found = [m.generate(texts[0], max_new_tokens=3, do_sample=False, output_logits=True, return_dict_in_generate=True)
             for m in (model, other)]  # fmt: skip
    assert all(torch.equal(a, b) for a, b in zip(*(f.logits for f in found), strict=True))
    with pytest.raises(ValueError, match=r"were learned on .*LlamaModel of 3 layers, .*but this model is .*Qwen3Model"):
        tokred.apply(build("qwen3"), tokred.load(folder))


def test_the_recipe_is_known():
    assert learn.recipe("kvzap").lr == 0.0
    assert isinstance(tokred.make("kvzap").module(Facts("llama", 1, 8, 2)), nn.Module)
    assert REPEATED  # the lessons are KVzip's
