"""CacheBlend: worked examples of its arithmetic, and laws of blended caches on tiny models."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

from transformers import DynamicCache

import tokred
from tests.kv.tiny import build, prompt
from tokred.adapters.kv.reuse.blend import join
from tokred.adapters.kv.reuse.chunks import Chunk
from tokred.errors import UnsupportedModelError
from tokred.kv.blend import Blend, chosen, count_of, deviation, moved, visible

GREEDY = {"max_new_tokens": 3, "do_sample": False, "eos_token_id": None}
LOGITS = {"return_dict_in_generate": True, "output_logits": True, **GREEDY}
QUESTION = prompt(6, seed=9)


pytestmark = pytest.mark.usefixtures("no_grad")


@pytest.fixture(scope="module")
def chunks(built):
    store = tokred.ChunkStore(built)
    return [store.add(prompt(n, seed=n)) for n in (7, 9, 11)]


def dense(model, ids) -> Any:
    """A cache of all tokens, computed together."""
    cache = DynamicCache(config=model.config)
    model.model(ids, **tokred.cache_kwargs(cache), use_cache=True)
    return cache


def close(a, b, least=1e-5) -> bool:
    return all(
        torch.allclose(x.keys, y.keys, atol=least) and torch.allclose(x.values, y.values, atol=least)
        for x, y in zip(a.layers, b.layers, strict=True)
    )


def equal(a, b) -> bool:
    return all(
        torch.equal(x.keys, y.keys) and torch.equal(x.values, y.values) for x, y in zip(a.layers, b.layers, strict=True)
    )


# ------------------------------------------------------------------ worked examples


def table(angle: float) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.full((1, 2), math.cos(angle)), torch.full((1, 2), math.sin(angle))


@pytest.mark.parametrize("factor", [1.0, 1.3])
def test_a_move(factor):
    one, four = ((factor * c, factor * s) for c, s in (table(1.0), table(4.0)))
    start = torch.tensor([[1.0, 2.0]])
    turned = lambda t, angle: t * math.cos(angle) + torch.tensor([[-t[0, 1], t[0, 0]]]) * math.sin(angle)  # noqa: E731
    found = moved(factor * turned(start, 1.0), one, four)
    assert torch.allclose(found, factor * torch.tensor([[0.859961, -2.06409]]), atol=1e-5)


def test_six_tokens():
    fresh = torch.tensor([[0, 0], [0.1, 0], [1, 1], [0, 0.3], [0.5, 0], [0, 0]])[None, None]
    found = deviation([fresh], [torch.zeros_like(fresh)])
    assert torch.allclose(found, torch.tensor([0, 0.01, 2, 0.09, 0.25, 0]))
    stored = torch.tensor([True] * 5 + [False])
    assert chosen(found, stored, count_of(0.5, 5)).tolist() == [2, 4, 5]
    assert chosen(torch.ones(6), stored, 2).tolist() == [0, 1, 5]  # of equals the lower position


def test_what_recomputed_rows_see():
    assert visible(torch.tensor([2, 4, 5]), 6).sum(-1).tolist() == [3, 5, 6]
    assert visible(torch.tensor([2, 4, 5]), 6, 2).int().tolist() == [
        [0, 1, 1, 0, 0, 0], [0, 0, 0, 1, 1, 0], [0, 0, 0, 0, 1, 1],
    ]  # fmt: skip


def test_how_many():
    assert count_of(0.15, 900) == 135  # the suffix of 100 of 1,000 tokens comes on top
    assert count_of(0.29, 100) == 29  # and not 28, which rounding down a product of floats gives
    assert count_of(1.0, 7) == 7


# ------------------------------------------------------------------ laws


@pytest.mark.parametrize("policy", [None, "snapkv"])
def test_everything_recomputed_is_dense(model, chunks, policy):
    if policy:
        tokred.apply(model, policy, budget=1.0)
    made = tokred.blend(model, chunks, recompute=1.0)
    if policy:
        tokred.remove(model)
    assert equal(made.cache, dense(model, made.ids))
    assert [len(r) for r in made.rows] == [27] * 3
    assert made.share == 1.0


HOSTS = ["qwen3", "gemma3", "gemma2", pytest.param("phi3", marks=pytest.mark.hosts)]
HOSTS += [
    pytest.param(n, marks=pytest.mark.hosts) for n in ("qwen2", "mistral", "gemma", "granite", "mixtral", "olmo2")
]


@pytest.mark.parametrize("family", HOSTS)
def test_everything_recomputed_is_dense_elsewhere(family):
    model = build(family)
    store = tokred.ChunkStore(model)
    parts = [store.add(prompt(n, seed=n)) for n in (12, 9)]
    made = tokred.blend(model, parts, recompute=1.0)
    assert equal(made.cache, dense(model, made.ids))
    # And in the form of a mask, when one token is not.
    some = tokred.blend(model, parts, recompute=0.96)
    assert len(some.rows[1]) == 20
    whole = torch.cat([made.ids, QUESTION], 1)
    found = model.generate(whole, **tokred.cache_kwargs(some.cache), **LOGITS)
    wanted = model.generate(whole, **LOGITS)
    assert torch.allclose(torch.stack(found.logits), torch.stack(wanted.logits), atol=0.2)
    assert tokred.blend(model, parts).share < 0.6


def test_one_chunk_at_the_front_is_dense(model, chunks):
    made = tokred.blend(model, chunks[:1])
    assert made.share == 0.0
    assert equal(made.cache, dense(model, chunks[0].ids))
    # Ordinary prefix caching: what follows is computed, and what stands is exact.
    for share in (0.0, 0.3):
        made = tokred.blend(model, [chunks[0], QUESTION], recompute=share)
        assert close(made.cache, dense(model, made.ids))
        assert [len(r) for r in made.rows] == [13, 6 + int(7 * share), 6 + int(7 * share)]


def test_moved_keys_of_layer_0_are_the_models_own(model, chunks):
    made = tokred.blend(model, chunks, recompute=0.0)
    own = dense(model, made.ids)
    assert made.share == 0.0
    assert torch.allclose(made.cache.layers[0].keys, own.layers[0].keys, atol=1e-5)
    assert torch.allclose(made.cache.layers[0].values, own.layers[0].values, atol=1e-5)
    assert not close(made.cache, own, 1e-2)  # deeper rows have seen less than they should


def test_far_positions_are_met():
    model = build("llama", max_position_embeddings=8192)
    store = tokred.ChunkStore(model)
    made = tokred.blend(model, [store.add(prompt(4000)), store.add(prompt(5, seed=2))], recompute=0.0)
    alone = model.model(
        prompt(5, seed=2), position_ids=torch.arange(4000, 4005)[None], use_cache=True
    ).past_key_values  # fmt: skip
    assert torch.allclose(made.cache.layers[0].keys[:, :, 4000:], alone.layers[0].keys, atol=1e-5)


def test_more_recomputed_is_nearer(model, chunks):
    own = dense(model, tokred.blend(model, chunks).ids)
    gaps = []
    for share in (0.0, 0.3, 0.6, 1.0):
        cache = tokred.blend(model, chunks, recompute=share).cache
        gaps.append(sum(float((x.values - y.values).norm()) for x, y in zip(cache.layers, own.layers, strict=True)))
    assert gaps == sorted(gaps, reverse=True)
    assert gaps[-1] == 0


def test_what_deviates_most_is_chosen(model, chunks):
    made = tokred.blend(model, chunks, recompute=0.25)
    own = dense(model, made.ids)
    stored = tokred.blend(model, chunks, recompute=0.0).cache
    gap = deviation([own.layers[1].keys], [stored.layers[1].keys])
    best = gap.topk(6).indices.sort().values
    assert torch.equal(made.rows[1], best)
    assert torch.equal(made.rows[2], best)
    # Rows of the check layer are exact, those that have not been chosen are the stored ones.
    assert torch.allclose(made.cache.layers[1].keys[:, :, best], own.layers[1].keys[:, :, best], atol=1e-5)
    others = torch.tensor([i for i in range(27) if i not in best.tolist()])
    assert torch.equal(made.cache.layers[2].keys[:, :, others], stored.layers[2].keys[:, :, others])
    values = tokred.blend(model, chunks, recompute=0.25, measure="value")
    gap = deviation([own.layers[1].values], [stored.layers[1].values])
    assert torch.equal(values.rows[1], gap.topk(6).indices.sort().values)


def test_recomputed_rows_see_no_future(model, chunks):
    """Another last chunk changes nothing before it, where the same rows are chosen."""
    other = tokred.ChunkStore(model).add(prompt(11, seed=5))
    one, two = (tokred.blend(model, [*chunks[:2], QUESTION, last], recompute=0.0) for last in (chunks[2], other))
    assert all(
        torch.equal(x.keys[:, :, :22], y.keys[:, :, :22])
        for x, y in zip(one.cache.layers, two.cache.layers, strict=True)
    )


def test_missing_tokens_are_always_computed(model, chunks):
    separator = torch.tensor([5, 6])
    made = tokred.blend(model, [chunks[0], separator, chunks[1], separator, QUESTION], recompute=0.25)
    assert made.ids.shape == (1, 26)
    missing = [7, 8, *range(18, 26)]
    assert set(missing) <= set(made.rows[1].tolist())
    assert len(made.rows[1]) == count_of(0.25, 16) + len(missing)


def test_gradual_filtering(model, chunks):
    made = tokred.blend(model, [*chunks, QUESTION], recompute=(0.5, 0.2), check_layers=(1, 2))
    assert [len(r) for r in made.rows] == [33, 13 + 6, 5 + 6]
    assert set(made.rows[2].tolist()) < set(made.rows[1].tolist())
    whole = tokred.blend(model, chunks, recompute=(1.0, 1.0), check_layers=(1, 2))
    assert equal(whole.cache, dense(model, whole.ids))


def test_fresh_rows_at_the_check(model, chunks):
    mixed, fresh = (tokred.blend(model, chunks, recompute=0.4, fresh_at_check=f) for f in (False, True))
    own, at = dense(model, mixed.ids), mixed.rows[2]
    gaps = [float((c.cache.layers[2].keys - own.layers[2].keys)[:, :, at].norm()) for c in (mixed, fresh)]
    assert gaps[1] < 1e-4 < gaps[0]  # what layer 1 gives is exact, where it has seen what it would have
    assert equal(type(mixed)(mixed.cache, mixed.ids, ()).cache, mixed.cache)
    assert torch.equal(mixed.cache.layers[1].keys, fresh.cache.layers[1].keys)


def test_eager_attention(chunks, model):
    other = build("llama")
    other.set_attn_implementation("eager")
    one, two = (tokred.blend(m, chunks, recompute=0.4) for m in (model, other))
    assert close(one.cache, two.cache)


# ------------------------------------------------------------------ generation, policies, files


def test_generation_goes_on(model, chunks):
    made = tokred.blend(model, chunks, recompute=1.0)
    ids = torch.cat([made.ids, QUESTION], 1)
    found = model.generate(ids, **tokred.cache_kwargs(made.cache), **LOGITS)
    wanted = model.generate(ids, **LOGITS)
    assert torch.allclose(torch.stack(found.logits), torch.stack(wanted.logits), atol=1e-5)
    assert torch.equal(found.sequences, wanted.sequences)


@pytest.mark.parametrize(
    ("name", "options"), [("snapkv", {"budget": 9, "window": 4, "pool": 3}), ("knorm", {"budget": 9})]
)
def test_a_policy_acts_on_what_was_blended(model, chunks, name, options):
    tokred.apply(model, name, **options)
    made = tokred.blend(model, chunks, recompute=1.0)
    assert made.cache.layer_rows()[0].rows == 27
    ids = torch.cat([made.ids, QUESTION], 1)
    one = model.generate(ids, **tokred.cache_kwargs(made.cache), **LOGITS)
    assert made.cache.layer_rows()[0].rows == 9 + 2
    # The same prompt in two forwards.
    cache = tokred.kv_cache(model, prompt=33)
    model(made.ids, **tokred.cache_kwargs(cache))
    two = model.generate(ids, **tokred.cache_kwargs(cache), **LOGITS)
    assert torch.allclose(torch.stack(one.logits), torch.stack(two.logits), atol=1e-5)


@pytest.mark.parametrize("name", ["h2o", "kvzip", "mikv"])
def test_policies_that_would_have_had_to_look(model, chunks, name):
    tokred.apply(model, name, **({"budget": 9} if name != "mikv" else {}))
    with pytest.raises(ValueError, match="most tokens of a blend are not computed"):
        tokred.blend(model, chunks)


def test_chunks_in_a_folder(model, tmp_path):
    pytest.importorskip("safetensors")
    store = tokred.ChunkStore(model, tmp_path)
    first = store.add(prompt(7))
    assert store.add(prompt(7)[0]) is first
    assert len(store) == len(list(tmp_path.iterdir())) == 1
    assert store.nbytes == first.nbytes == 7 * 3 * 2 * 2 * 16 * 4
    again = tokred.ChunkStore(model, tmp_path)
    model.model.forward, whole = None, model.model.forward  # nothing is computed
    try:
        second = again.add(prompt(7))
    finally:
        model.model.forward = whole
        del model.model.forward
    assert all(
        torch.equal(x, y) for a, b in zip(first.rows, second.rows, strict=True) for x, y in zip(a, b, strict=True)
    )
    with pytest.raises(ValueError, match="another model"):
        tokred.ChunkStore(build("llama", seed=1), tmp_path).add(prompt(7))
    with pytest.raises(ValueError, match="holds a chunk, and no cache"):
        tokred.load_cache(model, next(tmp_path.iterdir()))


def test_chunks_behind_a_prefix(model, tmp_path):
    """The prefix in front, the first chunk is exact where it stands; others move by as much less."""
    pytest.importorskip("safetensors")
    head = torch.tensor([7, 8, 9])
    store = tokred.ChunkStore(model, tmp_path, behind=head)
    parts = [store.prefix, *(store.add(prompt(n, seed=n)) for n in (7, 9))]
    assert [p.first for p in parts] == [0, 3, 3]
    made = tokred.blend(model, parts, recompute=0.0)
    own = dense(model, made.ids)
    assert made.ids[0, :3].tolist() == [7, 8, 9]
    assert torch.allclose(made.cache.layers[0].keys, own.layers[0].keys, atol=1e-5)
    first = [(x.keys[:, :, :10], y.keys[:, :, :10]) for x, y in zip(made.cache.layers, own.layers, strict=True)]
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in first)
    assert equal(tokred.blend(model, parts, recompute=1.0).cache, own)
    alone = tokred.blend(model, parts[1:2], recompute=1.0)  # not where it was computed
    assert equal(alone.cache, dense(model, alone.ids))
    # The same tokens without the prefix are another chunk, in the folder too.
    assert tokred.ChunkStore(model, tmp_path).add(prompt(7, seed=7)).first == 0
    again = tokred.ChunkStore(model, tmp_path, behind=head).add(prompt(7, seed=7))
    assert again.first == 3
    assert torch.equal(again.rows[1][0], parts[1].rows[1][0])
    assert len(list(tmp_path.iterdir())) == 4


# ------------------------------------------------------------------ bad input


def test_what_is_refused(model, chunks):
    with pytest.raises(ValueError, match="part 1 was computed by another model"):
        tokred.blend(model, [chunks[0], tokred.ChunkStore(build("llama", seed=1)).add(prompt(5))])
    with pytest.raises(ValueError, match="parts holds no chunk"):
        tokred.blend(model, [prompt(5)])
    with pytest.raises(ValueError, match="parts holds no chunk"):
        tokred.blend(model, [])
    with pytest.raises(ValueError, match=r"part 1 must be .* of one sample, got \(2, 5\)"):
        tokred.blend(model, [chunks[0], prompt(5, b=2)])
    with pytest.raises(TypeError, match="part 0 must be a tensor of token ids, got str"):
        tokred.blend(model, ["text"])
    with pytest.raises(ValueError, match=r"names layer 3, and the model has 3"):
        tokred.blend(model, chunks, check_layers=(3,))
    with pytest.raises(ValueError, match="check_layers"):
        tokred.blend(model, chunks, check_layers=(0,))
    with pytest.raises(ValueError, match="one for each of the 1 check layers"):
        tokred.blend(model, chunks, recompute=(0.3, 0.2))
    with pytest.raises(ValueError, match="none larger than the one before"):
        tokred.blend(model, chunks, recompute=(0.2, 0.3), check_layers=(1, 2))
    with pytest.raises(ValueError, match="recompute"):
        tokred.blend(model, chunks, recompute=1.5)
    with pytest.raises(ValueError, match="measure is 'keys'"):
        tokred.blend(model, chunks, measure="keys")
    with pytest.raises(ValueError, match=r"part 1 does not know which of its tokens .* against=text"):
        tokred.blend(model, chunks, measure="foreseen")
    with pytest.raises(ValueError, match="leave check_layers and fresh_at_check as they are"):
        tokred.blend(model, chunks, measure="foreseen", check_layers=(2,))
    with pytest.raises(TypeError, match="got a Linear"):
        tokred.ChunkStore(torch.nn.Linear(1, 1))


def test_models_whose_caches_cannot_be_joined(chunks):
    with pytest.raises(UnsupportedModelError, match="keep other things than rows"):
        tokred.ChunkStore(build("qwen3_next"))
    with pytest.raises(UnsupportedModelError, match="latents"):
        tokred.ChunkStore(build("deepseek_v3"))
    bare = {"no_rope_layers": [1, 0, 1]}
    for family, options in (("smollm3", bare), ("cohere", {})):  # layers without rotation, and pairs
        model = build(family, **options)
        store = tokred.ChunkStore(model)
        parts = [store.add(prompt(5)), store.add(prompt(6))]
        with pytest.raises(UnsupportedModelError, match="cannot be moved"):
            tokred.blend(model, parts)
        assert tokred.blend(model, parts[:1]).cache.get_seq_length() == 5  # which moves nothing


def test_keys_that_are_not_what_the_model_makes(model, chunks):
    wrong = Chunk(chunks[1].ids, tuple((2 * k, v) for k, v in chunks[1].rows), chunks[1].model)
    with pytest.raises(UnsupportedModelError, match="not those that it makes"):
        tokred.blend(model, [chunks[0], wrong])
    assert not any(m._forward_pre_hooks for m in model.modules())  # nothing is left on the model


def test_training_is_refused(chunks):
    with pytest.raises(ValueError, match=r"call model.eval"):
        join(build("llama").train(), chunks, Blend())
