"""FastCache: the card's worked examples of groups, networks that make rows, what they learn, and models with them."""

from __future__ import annotations

import pytest
import torch

import tokred
from tokred import learn
from tokred.core.learned import Facts, Learned
from tokred.kv import CacheSite
from tokred.kv.grouping import Groups, Replace
from tokred.methods.kv.fastcache import Compressed, Compressor

pytest.importorskip("transformers")

from transformers import DynamicCache

from tests.kv.tiny import build, padded, prompt

SMALL = {"factor": 3, "image": 7, "residual": True}
GREEDY = {"max_new_tokens": 4, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}


def site(k: torch.Tensor, v: torch.Tensor, module: Compressor, **more) -> CacheSite:
    return CacheSite(q=k, k=k, v=v, learned=Learned(module.eval()), **more)


def identity(width: int, factor: int, parts=("text",)) -> Compressor:
    """Networks that give the last row of each group, where no number is negative."""
    made = Compressor(1, width, factor, parts, 0.4, residual=False)
    with torch.no_grad():
        for name, p in made.named_parameters():
            p.zero_() if name.endswith("bias") else p.copy_(torch.eye(width, p.shape[1]).roll(p.shape[1] - width, 1))
    return made


# ---------------------------------------------------------------- worked examples


@pytest.mark.parametrize(("n", "rows"), [(576, 116), (581, 117), (35, 7), (7, 3), (4, 4)])
def test_lengths(n, rows):
    assert Groups(5).rows(n) == rows == int(Groups(5).stays(n).sum())


def test_groups_lie_end_to_end_and_what_is_left_over_stays():
    rows = torch.arange(14.0).view(1, 1, 7, 2)
    module, seen = Compressor(1, 2, 3, ("text",), 0.4, residual=False).eval(), []
    module.layers[0]["text_keys"].register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    where = site(rows, rows, module)
    keys, _ = Compressed(Groups(3))._made(where, slice(None), None, 7)
    assert seen[0][0, 0].tolist() == [[0, 1, 2, 3, 4, 5], [6, 7, 8, 9, 10, 11]]
    assert keys.shape == (1, 1, 3, 2)
    assert keys[0, 0, -1].tolist() == [12, 13]


@torch.no_grad()
def test_networks_that_give_the_last_row_sample_by_strides():
    rows = torch.rand(2, 3, 7, 4)
    for factor, kept in ((1, list(range(7))), (3, [2, 5, 6])):
        keys, values = Compressed(Groups(factor))._made(site(rows, rows, identity(4, factor)), slice(None), None, 7)
        assert torch.equal(keys, rows[:, :, kept])
        assert torch.equal(values, rows[:, :, kept])


def test_image_and_text_share_no_group():
    assert Groups(3, image=4).stays(11).nonzero().view(-1).tolist() == [2, 3, 6, 9, 10]
    assert Groups(3, image=4, least=2).stays(11).nonzero().view(-1).tolist() == [0, 1, 2, 3, 6, 9, 10]
    assert Groups(3, image=20).rows(7) == 3  # a prompt that ends within the image


@torch.no_grad()
def test_groups_are_local_and_heads_alike():
    torch.manual_seed(0)
    rows = torch.randn(1, 2, 11, 4)
    module = Compressor(1, 4, 3, ("image", "text"), 0.4, residual=False)
    score = Compressed(Groups(3, image=4))
    before = score._made(site(rows, rows, module), slice(None), None, 11)[0]
    swapped = score._made(site(rows.flip(1), rows, module), slice(None), None, 11)[0]
    assert torch.equal(swapped.flip(1), before)
    for j, row in zip(range(11), [0, 0, 0, 1, 2, 2, 2, 3, 3, 3, 4], strict=True):
        other = rows.clone()
        other[:, :, j] += 1
        after = score._made(site(other, rows, module), slice(None), None, 11)[0]
        assert (after != before).any(-1)[0].any(0).nonzero().view(-1).tolist() == [row]


# ---------------------------------------------------------------- on a model


@torch.no_grad()
def test_nothing_removed_is_bit_equal():
    model, ids = build("llama"), prompt(23)
    plain = model.generate(ids, max_new_tokens=4, do_sample=False)
    tokred.apply(model, "fastcache", factor=1)
    assert torch.equal(model.generate(ids, max_new_tokens=4, do_sample=False), plain)
    assert list(tokred.remove(model).state_dict()) == list(build("llama").state_dict())


@torch.no_grad()
@pytest.mark.parametrize(
    "family", ["llama", *(pytest.param(f, marks=pytest.mark.hosts) for f in ("qwen3", "gemma2", "mixtral", "gpt_oss"))]
)
def test_what_follows_attends_to_the_rows_that_were_made(family):
    """As the unpatched model does over a cache of the same rows, at the positions that tokens have."""
    model, ids, more = build(family), prompt(24), prompt(3, seed=1)
    tokred.apply(model, "fastcache", factor=3, image=7)
    cache = tokred.kv_cache(model)
    model(ids, past_key_values=cache)
    kept = Groups(3, image=7).stays(24).nonzero().view(-1)
    full = [layer for layer in cache.layers if getattr(layer, "positions", None) is not None]
    assert all(layer.positions[0, 0].tolist() == kept.tolist() for layer in full)
    assert cache.get_seq_length() == 24
    if len(full) < len(cache.layers):  # layers with windows keep rows by other masks
        assert model(more, past_key_values=cache).logits.isfinite().all()
        return
    made = DynamicCache(config=model.config)
    for i, layer in enumerate(cache.layers):
        made.update(layer.keys.clone(), layer.values.clone(), i)
    ours = model(more, past_key_values=cache).logits
    tokred.remove(model)
    theirs = model(more, past_key_values=made, position_ids=torch.arange(24, 27)[None]).logits
    assert torch.allclose(ours, theirs, atol=1e-5)


@torch.no_grad()
def test_padding_chunks_and_beams():
    model = build("llama", torch.float64)
    tokred.apply(model, "fastcache", **SMALL)
    ids, mask, alone = padded((24, 15))
    both = model.generate(ids, attention_mask=mask, **GREEDY)
    for i, row in enumerate(alone):
        one = model.generate(row, **GREEDY)
        assert all((a[i] - c[0]).abs().max() < 1e-9 for a, c in zip(both.logits, one.logits, strict=True))
    parts = model.generate(alone[0], prefill_chunk_size=5, **GREEDY)
    one = model.generate(alone[0], **GREEDY)
    assert all((a - c).abs().max() < 1e-9 for a, c in zip(parts.logits, one.logits, strict=True))
    assert model.generate(ids, attention_mask=mask, num_beams=2, max_new_tokens=3).shape[0] == 2


@torch.no_grad()
def test_rows_that_were_made_are_saved(tmp_path):
    pytest.importorskip("safetensors")
    model, ids = build("llama"), prompt(24)
    tokred.apply(model, "fastcache", **SMALL)
    cache = tokred.kv_cache(model)
    model(ids, past_key_values=cache)
    tokred.save_cache(model, cache, tmp_path / "a.safetensors")
    again = tokred.load_cache(model, tmp_path / "a.safetensors")
    more = prompt(3, seed=1)
    one, two = (model(more, past_key_values=c).logits for c in (cache, again))
    assert torch.equal(one, two)


# ---------------------------------------------------------------- training


def test_the_loss_is_the_distance_of_what_is_read():
    """By hand, from queries of a plain model that is given the text twice."""
    model, ids = build("llama"), prompt(20)
    seen = {}
    handles = [
        layer.self_attn.q_proj.register_forward_hook(lambda m, a, out, i=i: seen.setdefault(i, out))
        for i, layer in enumerate(model.model.layers)
    ]
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    with torch.no_grad():
        full = model(torch.cat([ids, ids], 1), use_cache=True).past_key_values
    [h.remove() for h in handles]
    tokred.apply(model, "fastcache", factor=3, dropout=0.0)
    module = tokred.modules(model)["fastcache"].train()
    total, (cos, sin) = [], model.model.rotary_emb(torch.zeros(1, 1, 1), torch.arange(20, 40)[None])
    for i, layer in enumerate(full.layers):
        q = seen[i][:, 20:].view(1, 20, 4, -1).transpose(1, 2)
        q = apply_rotary_pos_emb(q, q, cos, sin)[0]
        k, v = layer.keys[:, :, :20], layer.values[:, :, :20]
        less = [
            torch.cat([module(i, name, x[:, :, :18]), x[:, :, 18:]], 2)
            for name, x in (("text_keys", k), ("text_values", v))
        ]
        read = []
        for keys, values in ((k, v), less):
            logits = q @ keys.repeat_interleave(2, 1).mT * q.shape[-1] ** -0.5
            read.append((logits.softmax(-1) @ values.repeat_interleave(2, 1), logits.logsumexp(-1)))
        (wanted, mass), (found, own) = read
        total.append((found - wanted).square().mean() / wanted.square().mean() + (own - mass).square().mean())
    model(ids)
    terms = tokred.losses(model)
    assert terms["fastcache.distance"].item() == pytest.approx(torch.stack(total).mean().item(), rel=1e-4)
    terms["fastcache.distance"].backward()
    assert all(p.grad is not None for p in module.parameters())
    assert all(p.grad is None for p in model.parameters())


def test_it_learns_by_its_recipe_and_is_saved(tmp_path):
    model, texts = build("llama"), [prompt(24, seed=s) for s in range(2)]
    tokred.apply(model, "fastcache", factor=3, dropout=0.0)
    recipe = learn.recipe("fastcache")
    assert recipe.lr == 0.0
    given = {"method": "fastcache", "training": {"steps": 60, "lr": 0.0, "lr_method": 1e-2}, "losses": {"task": 0.0}}
    steps = learn.fit(
        model,
        ((texts[i % 2], texts[i % 2]) for i in range(60)),
        learn.recipe(given),
        modules=tokred.modules(model).values(),
        losses=tokred.losses,
    )
    first, last = (sum(s.loss for s in part) / 4 for part in (steps[:4], steps[-4:]))
    assert last < 0.5 * first
    folder = tokred.save(model, tmp_path / "saved")
    other = tokred.apply(build("llama"), tokred.load(folder))
    found = [m.generate(texts[0], **GREEDY) for m in (model, other)]
    assert all(torch.equal(a, b) for a, b in zip(*(f.logits for f in found), strict=True))
    with pytest.raises(ValueError, match=r"were learned on .*LlamaModel of 3 layers, .*but this model is .*Qwen3Model"):
        tokred.apply(build("qwen3"), tokred.load(folder))


# ---------------------------------------------------------------- bad input


def test_what_is_refused():
    for given, why in (
        ({"factor": 0}, "factor"), ({"image": -1}, "image"), ({"least": 0}, "least"), ({"dropout": 1.5}, "dropout"),
        ({"residual": 1}, "residual"), ({"queries": 0}, "queries"),
    ):  # fmt: skip
        with pytest.raises((TypeError, ValueError), match=why):
            tokred.make("fastcache", **given)
    model = build("llama")
    with pytest.raises(ValueError, match="store that can hold other values than came"):
        tokred.apply(model, "fastcache", store="kivi")
    with pytest.raises(ValueError, match="choose factor="):
        tokred.make("fastcache").parts.budget.of(64)
    tokred.apply(model, "kv", score="key_norm", budget=0.5, fate=Replace())
    with pytest.raises(tokred.MissingInputError, match="use 'fastcache'"):
        model(prompt(12), use_cache=True)
    with pytest.raises(ValueError, match="has a network for all 3 layers, and where= leaves 1 of them"):
        tokred.apply(model, "fastcache", where=lambda name, module: "layers.1" in name)
    with pytest.raises(ValueError, match="heads of x are not of one width"):
        tokred.make("fastcache").module(Facts("x", 3, 48, 4))
