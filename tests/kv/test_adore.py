"""ADORE: the card's worked examples, what a controller remembers, tokens that come back, training, and models."""

from __future__ import annotations

import json

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("transformers")

from transformers import DynamicCache

import tokred
from tests.kv.test_store_models import GREEDY, LOGITS
from tests.kv.tiny import build, padded, prompt
from tokred import kv, learn
from tokred.core.learned import Facts, Learned
from tokred.errors import MissingInputError, TokenStateError
from tokred.kv import CacheSite
from tokred.kv.release import Controller, judged, labels, lesson, returning
from tokred.kv.select import rows_of
from tokred.methods.kv.adore import Released
from tokred.patch import compose

SMALL = {"budget": 6, "rebuild": 2, "size": 8, "hidden": 8}
ALL = {**SMALL, "budget": 1, "rebuild": 99}


def schedule(m: int, rebuild: int) -> list[tuple[list[int], list[int], list[int]]]:
    """What comes back, is attended to and is kept at tokens 4, 5 and 6, by the parts of the policy."""
    sigmas = ([0.9, 0.2, 0.6, 0.4], [0.1, 0.8, 0.5, 0.3, 0.7], [0.3, 0.6, 0.9, 0.2, 0.1, 0.4])
    policy, cached, found = tokred.ADORE(budget=m, rebuild=rebuild), [0, 1, 2, 3], []
    for t, sigma in zip((4, 5, 6), sigmas, strict=True):
        importance = torch.tensor([[*sigma, 0.0]])
        released = torch.tensor([[j not in cached for j in range(t)]])
        back = returning(importance[:, :t], released, rebuild)
        came = [] if back is None else back[0][0].tolist()
        rows = sorted({*cached, *came, t})
        k = torch.zeros(1, 1, len(rows), 4)
        learned = Learned(shared={"importance": importance})
        slots = torch.tensor(rows, dtype=torch.int32)[None, None]
        where = CacheSite(k=k, v=k, positions=slots, seen=t + 1, learned=learned)
        step = policy.shrink(where, policy.parts.score(where), (m + 1,))
        cached = [rows[i] for i in rows_of(torch.zeros(1, 1, len(rows), dtype=torch.bool).scatter(
            2, step.representative, True), m + 1)[0][0, 0].tolist()]  # fmt: skip
        found.append((came, rows, cached))
    return found


# ---------------------------------------------------------------- worked examples


def test_a_schedule():
    assert schedule(2, 1) == [
        ([], [0, 1, 2, 3, 4], [0, 2, 4]),
        ([1], [0, 1, 2, 4, 5], [1, 4, 5]),
        ([2], [1, 2, 4, 5, 6], [1, 2, 6]),
    ]


def test_a_schedule_without_rebuilding():
    assert [kept for _, _, kept in schedule(2, 0)] == [[0, 2, 4], [2, 4, 5], [2, 5, 6]]


def test_the_loss_of_three_tokens():
    sigma, wanted = torch.tensor([[[2.0, -1, 0.5]]]), torch.tensor([[[True, False, False]]])
    every = torch.ones_like(wanted)
    assert sigma.sigmoid().flatten().tolist() == pytest.approx([0.880797, 0.268941, 0.622459], abs=1e-6)
    assert (judged(sigma, wanted, every, torch.ones(1, 1, 1)) / 3).item() == pytest.approx(0.471422, abs=1e-6)


# ---------------------------------------------------------------- laws


def test_what_is_remembered_is_what_all_tokens_at_once_leave():
    torch.manual_seed(0)
    made = Controller(6, 4, 5)
    x = torch.randn(2, 9, 6)
    whole, last = made.read(x)
    first, state = made.read(x[:, :5])
    rest, end = made.read(x[:, 5:], state)
    assert torch.allclose(torch.cat([first, rest], 1), whole, atol=1e-6)
    assert torch.allclose(end, last, atol=1e-6)
    # Padding is not read, wherever it stands.
    real = torch.tensor([[False, True, True, False, True], [True, True, False, False, False]])
    wide = torch.randn(2, 5, 6)
    states, last = made.read(wide, None, real)
    for i in range(2):
        alone, end = made.read(wide[i : i + 1, real[i]])
        assert torch.allclose(states[i, real[i]], alone[0], atol=1e-6)
        assert torch.allclose(last[i], end[0], atol=1e-6)
    none = made.read(wide, state, torch.zeros(2, 5, dtype=torch.bool))[1]
    assert torch.equal(none, state)
    with pytest.raises(ValueError, match="the controller takes 6 channels, and embeddings have 3"):
        made.read(x[..., :3])


def test_importance_is_a_network_on_both_states():
    made, states = Controller(6, 4, 5), torch.randn(2, 7, 4)
    pairs = torch.cat([states[:, -1:].expand(-1, 7, -1), states], -1)
    weight = torch.cat([made.now.weight, made.then.weight], 1)
    wanted = made.out(F.relu(F.linear(pairs, weight, made.now.bias)))[..., 0]
    assert torch.allclose(made.importance(states[:, -1:], made.then(states))[:, 0], wanted, atol=1e-6)


def test_the_most_important_of_the_released_come_back_and_ties_go_to_the_older():
    importance = torch.tensor([[0.5, 0.9, 0.5, 0.5], [0.1, 0.2, 0.3, 0.4]])
    released = torch.tensor([[True, False, True, True], [False, False, True, False]])
    index, meant = returning(importance, released, 2)
    assert index[0].tolist() == [0, 2]
    assert index[1, 0] == 2
    assert meant.tolist() == [[True, True], [True, False]]
    assert returning(importance, torch.zeros_like(released), 2) is None
    assert returning(importance, released, 0) is None


def test_labels_and_the_loss_by_hand():
    torch.manual_seed(0)
    n, made = 6, Controller(5, 4, 3)
    weights, past = torch.rand(2, n, n), torch.ones(1, n, n, dtype=torch.bool).tril(-1)
    wanted, counted, weight = labels(weights, past, 2)
    assert wanted.sum(-1).tolist() == [[0, 1, 2, 2, 2, 2]] * 2
    assert counted.sum(-1).tolist() == [[0, 0, 0, 3, 4, 5]] * 2
    assert weight[0, 3:, 0].tolist() == [0.5, 1.0, 1.5]
    assert labels(weights, past, 0.5)[0].sum(-1).tolist() == [[0, 1, 1, 2, 2, 3]] * 2
    states = made.read(torch.randn(2, n, 5))[0]
    sigma, terms = made.importance(states, made.then(states)), []
    for b in range(2):
        for t in range(3, n):
            best = weights[b, t, :t].topk(2).indices
            for j in range(t):
                p = sigma[b, t, j].sigmoid()
                terms.append(-(t - 2) / 2 * p.log() if j in best else -(1 - p).log())
    found = lesson(made, states, weights, past, 2)
    assert found.item() == pytest.approx(torch.stack(terms).mean().item(), rel=1e-5)
    with pytest.raises(ValueError, match="a text of 6 tokens teaches the controller nothing"):
        lesson(made, states, weights, past, 9)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"budget": 0}, r"budget, where it is no whole number of tokens, must lie in \(0, 1\], got 0"),
        ({"rebuild": -1}, "rebuild must be an integer of at least 0"),
        ({"size": 0}, "size must be an integer of at least 1"),
        ({"positives": 0}, "positives must be an integer of at least 1"),
        ({"budget": 3, "sinks": 4}, "a budget of 3 tokens cannot hold the 4 first ones"),
    ],
)
def test_bad_parameters(given, message):
    with pytest.raises(ValueError, match=message):
        tokred.make("adore", **given)


# ---------------------------------------------------------------- models


def held(cache, sample: int = 0, shift: int = 0) -> list[list[int]]:
    """Tokens that each layer holds; all heads hold the same."""
    found = []
    for layer in cache.layers:
        rows = [[p - shift for p in head if p < layer.seen] for head in layer.positions[sample].tolist()]
        assert rows[0] == rows[1] == sorted(set(rows[0]))
        found.append(rows[0])
    return found


@torch.no_grad()
@pytest.mark.parametrize(
    "family", ["llama", *(pytest.param(f, marks=pytest.mark.hosts) for f in ("qwen3", "gpt_neox"))]
)
def test_where_all_come_back_it_is_the_model_itself(family):
    """One token stays, and all others are rebuilt, each seeing all tokens before it."""
    model = build(family)
    ids, mask, _ = padded((24, 15, 2))
    plain = model.generate(ids, attention_mask=mask, **LOGITS)
    tokred.apply(model, "adore", **ALL)
    made = model.generate(ids, attention_mask=mask, **LOGITS)
    assert all(torch.allclose(a, c, atol=1e-4) for a, c in zip(made.logits, plain.logits, strict=True))
    assert {len(rows) for i in range(3) for rows in held(made.past_key_values, i)} == {2}
    tokred.apply(model, "adore", **{**ALL, "rebuild": 0})
    less = model.generate(ids, attention_mask=mask, **LOGITS)
    assert not torch.allclose(less.logits[-1], plain.logits[-1], atol=1e-3)
    tokred.apply(model, "adore", budget=1.0, size=8, hidden=8)
    every = model.generate(ids, attention_mask=mask, **LOGITS)
    assert all(map(torch.equal, every.logits, plain.logits))
    assert list(tokred.remove(model).state_dict()) == list(build(family).state_dict())


@torch.no_grad()
def test_each_token_sees_what_is_held_and_what_comes_back():
    """Step by step, by the plain model under masks by hand; rebuilt tokens are computed anew from what they see."""
    model, ids = build("llama"), prompt(12)
    tokred.apply(model, "adore", **SMALL)
    module = tokred.modules(model)["adore"]
    text = model.generate(ids, **GREEDY)
    states = module.read(model.get_input_embeddings()(text))[0]
    cache, then = tokred.kv_cache(model, prompt=12), module.then(states)
    ours = [model(ids, past_key_values=cache).logits[:, -1]]
    plain = build("llama")
    rows = [(layer.keys, layer.values) for layer in cache.layers]
    kept = held(cache)[0]
    sigma = module.importance(states[:, 11:12], then[:, :12])[0, 0]
    assert kept == sorted([*sigma[:11].topk(6).indices.tolist(), 11])
    for t in range(12, 17):
        ours.append(model(text[:, t : t + 1], past_key_values=cache).logits[:, -1])
        sigma = module.importance(states[:, t : t + 1], then[:, :t])[0, 0]
        free = torch.tensor([j for j in range(t) if j not in kept])
        came = sorted(free[sigma[free].topk(2).indices].tolist())
        new, there = torch.tensor([*came, t]), torch.tensor([*kept, *came, t])
        seen = there[None, :] <= new[:, None]
        again = DynamicCache()
        for i, (k, v) in enumerate(rows):
            again.update(k, v, i)
        found = plain(
            text[:, new], position_ids=new[None], past_key_values=again,
            attention_mask=torch.zeros(1, 1, *seen.shape).masked_fill(~seen, -torch.inf),
        )  # fmt: skip
        assert torch.allclose(found.logits[:, -1], ours[-1], atol=1e-4)
        best = sorted(there[:-1].tolist(), key=lambda j: (-float(sigma[j]), j))[:6]
        place = [i for i, j in enumerate(there.tolist()) if j in {*best, t}]
        order = sorted(place, key=lambda i: int(there[i]))
        rows = [(layer.keys[:, :, order], layer.values[:, :, order]) for layer in again.layers]
        kept = sorted([*best, t])
        assert held(cache) == [kept] * 3
        assert all(torch.allclose(layer.keys, k, atol=1e-5) for layer, (k, _) in zip(cache.layers, rows, strict=True))


@torch.no_grad()
def test_a_sample_is_answered_as_if_it_were_alone_also_in_beams_and_half_precision():
    model = build("llama", torch.float64)
    tokred.apply(model, "adore", **SMALL)
    ids, mask, alone = padded((24, 15, 4))
    both = model.generate(ids, attention_mask=mask, **LOGITS)
    for i, row in enumerate(alone):
        one = model.generate(row, **LOGITS)
        assert held(both.past_key_values, i, 24 - row.shape[1]) == held(one.past_key_values)
        assert all((a[i] - c[0]).abs().max() < 1e-9 for a, c in zip(both.logits, one.logits, strict=True))
    beams = model.generate(ids, attention_mask=mask, num_beams=3, **GREEDY)
    for i, row in enumerate(alone):
        one = model.generate(row, num_beams=3, **GREEDY)
        assert torch.equal(beams[i, 24:], one[0, row.shape[1] :])
    low = tokred.apply(build("llama", torch.bfloat16), "adore", **SMALL)
    assert low.generate(ids, attention_mask=mask, **GREEDY).shape == (3, 30)
    assert {p.dtype for p in tokred.parameters(low)} == {torch.float32}


@torch.no_grad()
def test_turns_chunks_files_and_embeddings(tmp_path):
    model = build("llama")
    tokred.apply(model, "adore", **SMALL)
    ids, options = prompt(20), {**GREEDY}
    whole = model.generate(ids, **options)
    assert torch.equal(model.generate(ids, prefill_chunk_size=6, **options), whole)
    given = {"inputs_embeds": model.get_input_embeddings()(ids)}
    assert torch.equal(model.generate(**given, **options), whole[:, 20:])
    cache, new = tokred.kv_cache(model), prompt(3, seed=4)
    model(ids, past_key_values=cache)
    model(new[:, :1], past_key_values=cache)
    path = tokred.save_cache(model, cache, tmp_path / "cache.safetensors")
    kept, other = cache.snapshot(), tokred.load_cache(model, path)
    wanted = [model(part, past_key_values=cache).logits for part in (new, new[:, :1])]
    assert {len(rows) for rows in held(cache)} == {7}
    assert all(torch.equal(model(p, past_key_values=other).logits, w)
               for p, w in zip((new, new[:, :1]), wanted, strict=True))  # fmt: skip
    cache.restore(kept)
    assert torch.equal(model(new, past_key_values=cache).logits, wanted[0])
    cache.layers[0].notes["context"] = cache.layers[0].notes["context"][:, :-1]
    with pytest.raises(TokenStateError, match="has judged other tokens than its layers have seen"):
        model(new[:, :1], past_key_values=cache)


@torch.no_grad()
def test_what_does_not_go_is_refused():
    for family in ("gemma3", "deepseek_v3", "qwen3_5", "gemma4"):
        with pytest.raises(MissingInputError, match=r"every layer keeps rows of all|its cache holds latents"):
            tokred.apply(build(family), "adore")
    model = build("llama")
    with pytest.raises(ValueError, match="has a network for all 3 layers"):
        tokred.apply(model, "adore", where=lambda name, module: "layers.1" in name)
    with pytest.raises(ValueError, match="the score needs a store that can take back rows"):
        tokred.apply(model, tokred.KVPolicy(score=Released(), budget=9))
    with pytest.raises(ValueError, match="have to hold the same ones: take Uniform and Evict"):
        tokred.apply(model, tokred.KVPolicy(score=Released(), budget=kv.Pyramid(9, window=1), store="rectangle"))
    with pytest.raises(ValueError, match="for which a limit has no room"):
        tokred.Limited("adore")
    tokred.apply(model, "adore", **SMALL)
    with pytest.raises(ValueError, match="take back tokens"):
        model.generate(prompt(9), prompt_lookup_num_tokens=3, max_new_tokens=4)
    with pytest.raises(ValueError, match="goes on evicting"):
        tokred.share_prefix(model, prompt(9))
    with pytest.raises(ValueError, match="reads what goes through the layers"):
        tokred.blend(model, [prompt(9)])
    with pytest.raises(
        ValueError, match="'fastv' removes tokens between layers, and 'adore' has tokens computed again"
    ):
        compose([tokred.make("adore"), tokred.make("fastv")])


# ---------------------------------------------------------------- training


def test_its_labels_are_the_largest_weights_of_the_whole_attention():
    model, ids = build("llama"), prompt(16)
    model.set_attn_implementation("eager")
    with torch.no_grad():
        weights = torch.stack(model(ids, output_attentions=True, use_cache=False).attentions).mean((0, 2))
    model.set_attn_implementation("sdpa")
    tokred.apply(model, "adore", **SMALL)
    module = tokred.modules(model)["adore"].train()
    model(ids)
    terms = tokred.losses(model)
    past = torch.ones(1, 16, 16, dtype=torch.bool).tril(-1)
    states = module.read(model.get_input_embeddings()(ids).detach())[0]
    assert terms["adore.labels"].item() == pytest.approx(lesson(module, states, weights, past, 6).item(), rel=1e-4)
    terms["adore.labels"].backward()
    assert all(p.grad is not None for p in module.parameters())
    assert all(p.grad is None for p in model.parameters())


def test_it_learns_by_its_recipe_and_is_saved(tmp_path):
    assert learn.recipe("adore").task == 0.0
    assert isinstance(Released(size=3, hidden=4).module(Facts("llama", 1, 8, 2)), Controller)
    model, texts = build("llama"), [prompt(24, seed=s) for s in range(4)]
    tokred.apply(model, "adore", **{**SMALL, "size": 16, "hidden": 16})
    given = {"method": "adore", "training": {"steps": 50, "lr": 0.0, "lr_method": 3e-2}, "losses": {"task": 0.0}}
    steps = learn.fit(
        model,
        ((texts[i % 4], texts[i % 4]) for i in range(50)),
        learn.recipe(given),
        modules=tokred.modules(model).values(),
        losses=tokred.losses,
    )
    first, last = (sum(s.loss for s in part) / 4 for part in (steps[:4], steps[-4:]))
    assert last < 0.9 * first
    folder = tokred.save(model, tmp_path / "saved")
    assert json.loads((folder / "tokred.json").read_text())["methods"][0]["host"]["width"] == 48
    other = tokred.apply(build("llama"), tokred.load(folder))
    found = [m.generate(texts[0], **LOGITS) for m in (model, other)]
    assert all(torch.equal(a, b) for a, b in zip(*(f.logits for f in found), strict=True))
    with pytest.raises(ValueError, match=r"were learned on .*LlamaModel of 3 layers"):
        tokred.apply(build("qwen3"), tokred.load(folder))
