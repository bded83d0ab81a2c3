"""TokenButler: the card's worked examples, the laws of what is foretold and chosen, training, and models."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from torch import Tensor

pytest.importorskip("transformers")

from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

import tokred
from tests.kv.test_store_models import GREEDY, LOGITS
from tests.kv.tiny import FAMILIES, build, padded, prompt
from tokred import learn
from tokred.core.learned import Facts
from tokred.errors import MissingInputError, TokredError
from tokred.kv import TokenButler
from tokred.kv.foresight import Foresight, Network, distance, inner_width, producers

SMALL = {"keep": 0.4, "sinks": 1, "size": 4, "hidden": 16}
MORE = (*FAMILIES[1:], "qwen3_5", "gemma4")
FACTS = Facts("llama", 4, 64, 2)


def visible(n: int) -> Tensor:
    return torch.ones(1, n, n, dtype=torch.bool).tril()


def sets(kept: Tensor) -> list[set[int]]:
    return [set(row.nonzero().view(-1).tolist()) for row in kept]


# ---------------------------------------------------------------- worked examples


def test_which_rows_are_kept():
    rows = [[0.9], [0.2, 0.8], [0.1, 0.5, 0.4], [0.3, 0.1, 0.4, 0.2]]
    # What stands ahead of a query is larger than all, and must not matter.
    foretold = torch.tensor([row + [9.0] * (4 - len(row)) for row in rows])[None, None]
    store = TokenButler(keep=0.6, sinks=1)
    assert [store.count(n) for n in (1, 2, 3, 4)] == [1, 2, 2, 3]
    kept = store.chosen(foretold, visible(4), torch.arange(4)[None], 1)
    assert sets(kept[0, 0]) == [{0}, {0, 1}, {0, 1, 2}, {0, 2, 3}]


def test_how_many_rows_are_kept():
    store = TokenButler(keep=0.5)
    assert [store.count(i + 1) for i in range(6)] == [1, 1, 2, 2, 3, 3]
    assert store.counts(torch.arange(1, 7)).tolist() == [1, 1, 2, 2, 3, 3]
    assert TokenButler(keep=3).counts(torch.tensor([0, 2, 3, 9])).tolist() == [0, 2, 3, 3]


def test_how_many_weights_there_are():
    made = TokenButler(hidden=16, size=4).module(FACTS)
    assert sum(p.numel() for p in made.parameters()) == 4768
    parts = {name: sum(p.numel() for p in m.parameters()) for name, m in made.networks["0"].named_children()}
    assert parts["narrow"] == 512
    assert parts["q"] + parts["k"] + parts["v"] == 192
    assert parts["norm"] == 16
    assert parts["up"] + parts["down"] == 1232
    assert parts["queries"] + parts["keys"] == 2816


# ---------------------------------------------------------------- laws


def test_ties_go_to_the_older_row_and_sinks_come_on_top():
    store = TokenButler(keep=2, sinks=1)
    kept = store.chosen(torch.zeros(1, 1, 4, 4), visible(4), torch.arange(4)[None], 1)
    assert sets(kept[0, 0]) == [{0}, {0, 1}, {0, 1}, {0, 1}]
    foretold = torch.arange(4.0).expand(1, 1, 4, 4)
    kept = store.chosen(foretold, visible(4), torch.arange(4)[None], 1)
    assert sets(kept[0, 0])[3] == {0, 2, 3}
    # The first slot is padding: the first token stands in the second.
    real = visible(4) & torch.tensor([False, True, True, True])
    kept = store.chosen(foretold, real, torch.tensor([[0, 0, 1, 2]]), 1)
    assert sets(kept[0, 0]) == [set(), {1}, {1, 2}, {1, 2, 3}]


def test_heads_of_a_group_choose_by_the_mean_of_their_softmax():
    store = TokenButler(keep=1, sinks=0, share="kv_group")
    foretold = torch.tensor([[4.0, 0, 3], [-9, 9.0, 8.9], [0, 5, 0], [0, 5, 0]]).view(1, 4, 1, 3)
    kept = store.chosen(foretold, torch.ones(1, 1, 3, dtype=torch.bool), torch.arange(3)[None], 2)
    shares = foretold[0, :, 0].softmax(-1).view(2, 2, 3).mean(1)
    assert sets(kept[0, :, 0]) == [{int(i)} for i in shares.argmax(-1)] == [{2}, {1}]
    assert sets(TokenButler(keep=1, sinks=0).chosen(foretold, torch.ones(1, 1, 3, dtype=torch.bool),
                torch.arange(3)[None], 2)[0, :, 0]) == [{0}, {1}, {1}, {1}]  # fmt: skip


@pytest.mark.parametrize("past", [0, 5])
def test_the_distance_is_the_mean_over_causal_pairs_and_so_are_its_gradients(past):
    torch.manual_seed(0)
    b, h, m, n = 2, 4, 7, 7 + past
    own, keys = torch.randn(b, h, m, 3, requires_grad=True), torch.randn(b, h, n, 3, requires_grad=True)
    q, k = torch.randn(b, h, m, 5), torch.randn(b, 2, n, 5)
    real = torch.ones(b, n, dtype=torch.bool)
    real[1, :3] = False
    for mask in (None, real):
        seen = torch.ones(m, n, dtype=torch.bool).tril(past)[None, None]
        seen = seen if mask is None else seen & mask[:, None, None] & mask[:, None, -m:, None]
        apart = own @ keys.mT - q @ k.repeat_interleave(2, 1).mT
        wanted = apart[seen.expand_as(apart)].square().mean()
        found = distance(own, keys, q, k, mask, tile=3)
        assert torch.allclose(found, wanted, rtol=1e-5)
        ours, theirs = (torch.autograd.grad(x, (own, keys)) for x in (3 * found, 3 * wanted))
        assert all(torch.allclose(a, c, atol=1e-5) for a, c in zip(ours, theirs, strict=True))
    # What is foretold exactly has no distance, whatever stands ahead.
    other = k.repeat_interleave(2, 1).clone()
    assert distance(q, other, q, k, tile=2).abs() < 1e-6
    other[:, :, -1] += 1
    assert distance(q[:, :, :-1], other[:, :, :-1], q[:, :, :-1], k[:, :, :-1], tile=2).abs() < 1e-6


def test_one_token_at_a_time_foretells_as_all_at_once():
    torch.manual_seed(0)
    network = Network(16, 2, 3, inner=8, size=4, hidden=8).eval()
    x, at = torch.randn(2, 9, 16), torch.arange(9)[None]
    whole = network(x, at)
    past, parts = None, []
    for start, stop in ((0, 4), (4, 5), (5, 9)):
        made = network(x[:, start:stop], at[:, start:stop], past)
        past = made.past if past is None else tuple(torch.cat(pair, 2) for pair in zip(past, made.past, strict=True))
        parts.append(made)
    for name in ("queries", "keys"):
        together = torch.cat([getattr(made, name) for made in parts], 3)
        assert torch.allclose(together, getattr(whole, name), atol=1e-5)
    # Positions are those of tokens: padding in front changes nothing behind it.
    ids = torch.cat([torch.randn(2, 3, 16), x], 1)
    real = torch.arange(12).expand(2, -1) >= 3
    made = network(ids, (real.long().cumsum(1) - 1).clamp(min=0), None, real)
    assert torch.allclose(made.keys[:, :, :, 3:], whole.keys, atol=1e-5)
    with pytest.raises(ValueError, match="the network takes 16 channels, and the attention is given 8"):
        network(x[..., :8], at)


def test_the_width_of_its_attention_fits_its_heads():
    assert inner_width(64, 2, 8) == 8
    assert inner_width(4096, 32, 8) == 512
    assert inner_width(48, 4, 8) == 8, "of 6, which four heads cannot share out in pairs"
    assert inner_width(576, 9, 8) == 72
    assert producers(5, 0) == {0: (1, 2, 3, 4)}
    assert producers(6, 2) == {0: (1,), 2: (3,), 4: (5,)}
    assert producers(7, 3) == {0: (1, 2), 3: (4, 5)}, "the last has nobody to foretell for"
    made = Foresight(Facts("m", 7, 16, 2), every=3, factor=8, size=4, hidden=8)
    assert made.count == 4
    assert {p.dtype for p in made.to(torch.bfloat16).half().parameters()} == {torch.float32}


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"keep": 0}, ValueError, r"keep, where it is no whole number of tokens, must lie in \(0, 1\], got 0"),
        ({"keep": 1.5}, ValueError, "must lie in"),
        ({"sinks": -1}, ValueError, "sinks must be an integer of at least 0"),
        ({"rf": 0}, ValueError, "rf must be above 0"),
        ({"size": 5}, ValueError, "size must be even, since channels turn in pairs, got 5"),
        ({"hidden": 0}, ValueError, "hidden must be an integer of at least 1"),
        ({"producer_every": 1}, ValueError, "producer_every must be at least 2, or 0"),
        ({"share": "all"}, ValueError, "share is 'all'; allowed are 'query', 'kv_group'"),
        ({"several": 1}, TypeError, "several must be True or False"),
    ],
)
def test_bad_parameters(given, error, message):
    with pytest.raises(error, match=message):
        tokred.make("tokenbutler", **given)


# ---------------------------------------------------------------- models


def foretold(model, ids: Tensor, keep: dict) -> dict[int, Tensor]:
    """For each layer but the first the logits ``[B, H, N, N]`` that the network foretells of a whole text."""
    network, noted = tokred.modules(model)["tokenbutler"].networks["0"], []
    handle = model.model.layers[0].self_attn.register_forward_pre_hook(
        lambda module, args, kwargs: noted.append(args[0] if args else kwargs["hidden_states"]), with_kwargs=True
    )
    model(ids)
    handle.remove()
    made = network(noted[0], torch.arange(ids.shape[1])[None])
    return {i + 1: made.queries[:, i] @ made.keys[:, i].mT / keep["size"] ** 0.5 for i in range(network.layers)}


@torch.no_grad()
@pytest.mark.parametrize("share", ["query", "kv_group"])
def test_decoding_attends_to_the_rows_of_a_mask_by_hand(share):
    """Each generated token, by the eager attention of the plain model under a mask of what the network foretells."""
    model, ids = build("llama"), prompt(24)
    given = {**SMALL, "share": share}
    tokred.apply(model, "tokenbutler", **given)
    made = model.generate(ids, **LOGITS)
    text = made.sequences
    logits, store = foretold(model, text[:, :-1], given), TokenButler(**given)
    n, alike = text.shape[1] - 1, 1 if share == "query" else 2
    kept = {
        i: store.chosen(x, visible(n), torch.arange(n)[None], 2).repeat_interleave(alike, 1) for i, x in logits.items()
    }
    tokred.remove(model)
    model.set_attn_implementation("eager")
    seen = visible(n)[:, None]

    def masked(layer):
        rule = seen.expand(1, 4, n, n).clone()
        if layer in kept:  # those of the prompt attend to everything
            rule[:, :, 24:] &= kept[layer][:, :, 24:]
        return torch.zeros(1, 4, n, n).masked_fill(~rule, -torch.inf)

    handles = [
        layer.self_attn.register_forward_pre_hook(
            lambda module, args, kwargs, i=i: (args, {**kwargs, "attention_mask": masked(i)}), with_kwargs=True
        )
        for i, layer in enumerate(model.model.layers)
    ]
    wanted = model(text[:, :-1], use_cache=False).logits[0, 23:]
    [h.remove() for h in handles]
    found = torch.cat(made.logits)
    assert torch.allclose(found, wanted, atol=1e-4)
    dense = model(text[:, :-1], use_cache=False).logits[0, 23:]
    assert not torch.allclose(found, dense, atol=1e-3)


@torch.no_grad()
def test_a_text_at_once_chooses_as_one_token_at_a_time():
    model, ids = build("llama"), prompt(20, 2)
    tokred.apply(model, "tokenbutler", several=True, **SMALL)
    whole, cache = model(ids).logits, tokred.kv_cache(model)
    parts = [model(ids[:, a:b], past_key_values=cache).logits for a, b in ((0, 7), (7, 8), (8, 20))]
    assert torch.allclose(torch.cat(parts, 1), whole, atol=1e-4)
    assert not torch.allclose(tokred.remove(model)(ids).logits, whole, atol=1e-3)


@torch.no_grad()
def test_a_search_that_keeps_all_is_dense_attention(monkeypatch):
    model = build("llama")
    ids, mask, _ = padded((24, 15))
    plain = model.generate(ids, attention_mask=mask, **LOGITS)
    tokred.apply(model, "tokenbutler", keep=1.0)
    assert all(map(torch.equal, model.generate(ids, attention_mask=mask, **LOGITS).logits, plain.logits))
    assert tokred.modules(model)["tokenbutler"].count == 2
    for share in ("query", "kv_group"):
        tokred.apply(model, "tokenbutler", **{**SMALL, "keep": 1, "sinks": 1 << 20, "several": True, "share": share})
        made = model.generate(ids, attention_mask=mask, **LOGITS)
        assert all(torch.allclose(a, c, atol=1e-4) for a, c in zip(made.logits, plain.logits, strict=True))
    assert list(tokred.remove(model).state_dict()) == list(build("llama").state_dict())


@torch.no_grad()
@pytest.mark.parametrize(
    "family",
    [
        "llama",
        "gemma2",
        "gpt_oss",
        *(pytest.param(f, marks=pytest.mark.hosts) for f in MORE),
    ],
)
def test_a_sample_is_answered_as_if_it_were_alone(family):
    """And with everything kept, as by the host itself: under a cap, and with logits that belong to no row."""
    model = build(family)
    ids, mask, alone = padded((29, 17, 6))
    plain = model.generate(ids, attention_mask=mask, **LOGITS)
    tokred.apply(model, "tokenbutler", **SMALL)
    together = model.generate(ids, attention_mask=mask, **LOGITS)
    for i, one in enumerate(alone):
        apart = model.generate(one, **LOGITS)
        assert all((a[0] - c[i]).abs().max() < 1e-4 for a, c in zip(apart.logits, together.logits, strict=True))
    assert torch.equal(together.logits[0], plain.logits[0]), "a prompt attends to everything"
    assert not torch.allclose(together.logits[-1][0], plain.logits[-1][0], atol=1e-3)
    tokred.apply(model, "tokenbutler", **{**SMALL, "keep": 1, "sinks": 99})
    every = model.generate(ids, attention_mask=mask, **LOGITS)
    assert all(torch.allclose(a, c, atol=1e-4) for a, c in zip(every.logits, plain.logits, strict=True))


@torch.no_grad()
def test_beams_turns_crops_drafts_files_and_half_precision(tmp_path):
    model = build("llama", torch.bfloat16)
    ids, mask, _ = padded((24, 15))
    tokred.apply(model, "tokenbutler", producer_every=2, **SMALL)
    assert {p.dtype for p in tokred.parameters(model)} == {torch.float32}
    assert model.generate(ids, attention_mask=mask, num_beams=3, **GREEDY).shape == (2, 30)
    assert model.generate(prompt(8).repeat(1, 3), prompt_lookup_num_tokens=3, **GREEDY).shape == (1, 30)
    model = build("llama")
    tokred.apply(model, "tokenbutler", **SMALL)
    cache, new = tokred.kv_cache(model), prompt(1, seed=4)
    model(prompt(24), past_key_values=cache)
    wanted = model(new, past_key_values=copy.deepcopy(cache)).logits
    kept = cache.snapshot()
    model(prompt(5, seed=6), past_key_values=cache)
    cache.crop(-5)
    assert torch.allclose(model(new, past_key_values=cache).logits, wanted, atol=1e-5)
    cache.restore(kept)
    path = tokred.save_cache(model, cache, tmp_path / "cache.safetensors")
    other = tokred.load_cache(model, path)
    assert other.nbytes <= cache.nbytes
    assert torch.equal(model(new, past_key_values=other).logits, wanted)
    assert torch.equal(model(new, past_key_values=cache).logits, wanted)
    row = 2 * 2 * 16 * 4  # keys and values of two heads, and foretold keys of four
    assert cache.layers[1].shelf.tensors
    assert all(layer.nbytes >= 25 * (row + 4 * 4 * 4) for layer in cache.layers[1:])


@torch.no_grad()
def test_what_does_not_go_is_refused():
    model = build("llama")
    with pytest.raises(ValueError, match="cannot hold rows in the store 'tokenbutler': eviction needs a store"):
        tokred.apply(model, "knorm", budget=9, store="tokenbutler")
    with pytest.raises(ValueError, match="has a network for all 3 layers, and where= leaves 1 of them"):
        tokred.apply(model, "tokenbutler", where=lambda name, module: "layers.1" in name)
    with pytest.raises(ValueError, match="has 1 whose rows it could choose from: take 'tokenselect'"):
        tokred.apply(build("llama", num_hidden_layers=1), "tokenbutler")
    with pytest.raises(MissingInputError, match="latents"):
        tokred.apply(build("deepseek_v3"), "tokenbutler")
    assert not tokred.patched(model)
    tokred.apply(model, tokred.KVPolicy(score="key_norm", budget=1.0, store=TokenButler(**SMALL)))
    assert model.generate(prompt(20), **GREEDY).shape == (1, 26)
    with pytest.raises(ValueError, match="searches rows that its network has read"):
        tokred.share_prefix(model, prompt(9))
    cache = tokred.kv_cache(model)
    model(prompt(9), past_key_values=cache)
    cache.layers[1].shelf.desk.notes.clear()
    with pytest.raises(TokredError, match="has not read all tokens of this cache"):
        cache.layers[1].append(torch.zeros(1, 2, 1, 16), torch.zeros(1, 2, 1, 16))


# ---------------------------------------------------------------- training


def test_the_loss_is_the_distance_from_the_models_logits():
    model, ids = build("llama"), prompt(20)
    seen = {}
    for layer in model.model.layers:
        layer.self_attn.register_forward_pre_hook(
            lambda module, args, kwargs: seen.update({module.layer_idx: (module, args, kwargs)}), with_kwargs=True
        )
    tokred.apply(model, "tokenbutler", **SMALL)
    module = tokred.modules(model)["tokenbutler"].train()
    for part in module.modules():
        if isinstance(part, torch.nn.Dropout):
            part.p = 0.0
    model(ids)
    terms = tokred.losses(model)
    losses = []
    with torch.no_grad():
        for layer, found in foretold(model, ids, SMALL).items():
            attention, args, kwargs = seen[layer]
            x = args[0] if args else kwargs["hidden_states"]
            q, k = (f(x).view(1, 20, -1, 16).transpose(1, 2) for f in (attention.q_proj, attention.k_proj))
            q, k = apply_rotary_pos_emb(q, k, *kwargs["position_embeddings"])
            true = q @ k.repeat_interleave(2, 1).mT / 4
            losses.append((found - true)[visible(20).expand_as(true[0])[None]].square().mean())
    assert terms["tokenbutler.distance"].item() == pytest.approx(torch.stack(losses).mean().item(), rel=1e-4)
    terms["tokenbutler.distance"].backward()
    assert all(p.grad is not None for p in module.parameters())
    assert all(p.grad is None for p in model.parameters())


def test_it_learns_by_its_recipe_and_is_saved(tmp_path):
    recipe = learn.recipe("tokenbutler")
    assert (recipe.lr, recipe.task, recipe.clip) == (0.0, 0.0, 20.0)
    model, texts = build("llama"), [prompt(24, seed=s) for s in range(4)]
    tokred.apply(model, "tokenbutler", **SMALL)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    given = {"method": "tokenbutler", "training": {"steps": 30, "lr": 0.0, "lr_method": 1e-2}, "losses": {"task": 0.0}}
    steps = learn.fit(
        model,
        ((texts[i % 4], texts[i % 4]) for i in range(30)),
        learn.recipe(given),
        modules=tokred.modules(model).values(),
        losses=tokred.losses,
    )
    first, last = (sum(s.loss for s in part) / 4 for part in (steps[:4], steps[-4:]))
    assert last < 0.7 * first
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    folder = tokred.save(model, tmp_path / "saved")
    assert json.loads((folder / "tokred.json").read_text())["methods"][0]["host"]["depth"] == 3
    other = tokred.apply(build("llama"), tokred.load(folder))
    found = [m.generate(texts[0], **LOGITS) for m in (model, other)]
    assert all(torch.equal(a, b) for a, b in zip(*(f.logits for f in found), strict=True))
    with pytest.raises(ValueError, match=r"were learned on .*LlamaModel of 3 layers, .*but this model is .*Qwen3Model"):
        tokred.apply(build("qwen3"), tokred.load(folder))
    tokred.modules(model)["tokenbutler"].train()
    with pytest.raises(ValueError, match="call the model with use_cache=True"):
        model(texts[0], use_cache=False)
