"""Laws of the cache on every family: nothing removed is bit-equal, anything evicted equals masking it."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch

pytest.importorskip("transformers")

import transformers

import tokred
from tests.kinds import CACHES, each
from tests.kv.masked import farthest
from tests.kv.tiny import FAMILIES, POLICIES, Scatter, build, llava, padded, prompt
from tokred.adapters.tiny.kv import FAMILIES as EVERY
from tokred.kernels.decode_attention import SENTINEL

GREEDY = {"max_new_tokens": 6, "do_sample": False}


pytestmark = pytest.mark.usefixtures("no_grad")


@pytest.fixture(scope="module", params=each([*FAMILIES, "qwen3_5", "olmo_hybrid", "lfm2"], CACHES))
def model(request):
    return build(request.param)


@pytest.fixture(autouse=True)
def unpatched(request):
    yield
    if "model" in request.fixturenames:
        tokred.remove(request.getfixturevalue("model"))


# ---------------------------------------------------------------- nothing removed


@pytest.mark.parametrize("batch", ["one", "padded"])
@pytest.mark.parametrize("name", ["snapkv", "h2o"])
def test_keep_all_is_bit_equal(model, name, batch):
    ids, mask, _ = padded((23, 11)) if batch == "padded" else (prompt(23), None, None)
    more = prompt(5, len(ids), seed=9)
    longer = None if mask is None else torch.cat([mask, torch.ones_like(more)], 1)

    def run():
        out = model(ids, attention_mask=mask, use_cache=True)
        second = model(more, attention_mask=longer, past_key_values=out.past_key_values)
        made = model.generate(ids, attention_mask=mask, **GREEDY)
        return out.logits, second.logits, made

    plain = run()
    for options in ({"budget": 1.0}, {"budget": 1000}):
        tokred.apply(model, name, **options)
        for ours, theirs in zip(run(), plain, strict=True):
            assert torch.equal(ours, theirs)
    tokred.remove(model)
    for again, theirs in zip(run(), plain, strict=True):
        assert torch.equal(again, theirs)


def test_softcapped_eager_model_keeps_its_attention():
    model, ids = build("gemma2"), prompt(23)
    plain = model(ids, use_cache=True).logits
    tokred.apply(model, "snapkv", budget=1.0)
    assert torch.equal(model(ids, use_cache=True).logits, plain)
    tokred.remove(model)
    assert model.config._attn_implementation == "eager"


# ---------------------------------------------------------------- evicting is masking


STEPS = (1, 1, 4, 1)


def evicting(model, batch):
    """Largest distances of :func:`farthest`, of a model under a policy that evicts by chance."""
    ids, mask, _ = padded((29, 17, 6)) if batch == "padded" else (prompt(29), None, None)
    if any("experts" in name for name, _ in model.named_modules()):
        model.set_experts_implementation("eager")  # torch's grouped products know no float64
    tokred.apply(model, Scatter(10))
    cache = tokred.kv_cache(model)
    logits = model(ids, attention_mask=mask, past_key_values=cache).logits
    held = [layer.keys.shape[2] for layer in cache.layers if hasattr(layer, "positions")]
    assert held == [13, 16, 19][: len(held)]
    return farthest(model, cache, logits, ids, mask, [prompt(m, len(ids), seed=20 + m) for m in STEPS])


@pytest.mark.parametrize("batch", ["one", "padded"])
@pytest.mark.parametrize("family", each(EVERY, CACHES))
def test_evicting_any_rows_equals_masking_them(family, batch):
    ours, rounding = evicting(build(family), batch)
    assert ours < 2 * rounding < 1e-5


# Gemma 2's own attention takes its softmax in float32.
@pytest.mark.parametrize("batch", ["one", "padded"])
@pytest.mark.parametrize("family", each([f for f in EVERY if f != "gemma2"], CACHES))
def test_in_double_precision_evicting_equals_masking_to_the_last_digits(family, batch):
    assert evicting(build(family, torch.float64), batch)[0] < 1e-12


def test_a_model_that_does_not_say_that_its_attention_can_be_exchanged_is_tried():
    model = build("qwen3_5")
    assert not model._supports_attention_backend
    assert {r.method: r.works for r in tokred.supports(model)}["snapkv"]


# ---------------------------------------------------------------- batches and padding


@pytest.mark.parametrize("name", [*POLICIES, "scatter"])
def test_padded_rows_equal_the_same_prompt_alone(name):
    model = build("llama")
    policy = Scatter(10) if name == "scatter" else POLICIES[name]
    if name == "squeezeattention":
        pytest.skip("one budget for the batch: a mean over its samples")
    tokred.apply(model, policy)
    ids, mask, alone = padded((31, 20, 7))
    # Keys of one token at two places have one norm but for rounding: no token comes twice, so that none are tied.
    options = {"max_new_tokens": 8, "do_sample": False, "no_repeat_ngram_size": 1}
    options |= {"return_dict_in_generate": True, "output_logits": True}
    made = model.generate(ids, attention_mask=mask, **options)
    for i, row in enumerate(alone):
        one = model.generate(row, **options)
        for a, c in zip(made.logits, one.logits, strict=False):
            assert (a[i] - c[0]).abs().max() < 2e-5, (name, i)
        for ours, theirs in zip(made.past_key_values.layers, one.past_key_values.layers, strict=True):
            if ours.positions is not None and theirs.positions is not None:
                shift = ids.shape[1] - row.shape[1]
                a, c = ours.positions[i], theirs.positions[0]
                for head in range(a.shape[0]):
                    kept = [p - shift for p in a[head].tolist() if p != SENTINEL]
                    assert kept == [p for p in c[head].tolist() if p != SENTINEL], (name, i, head)


def test_padding_goes_before_any_real_token():
    model = build("llama")
    ids, mask, _ = padded((31, 12))
    tokred.apply(model, "knorm", budget=14)
    cache = tokred.kv_cache(model)
    model(ids, attention_mask=mask, past_key_values=cache)
    for layer in cache.layers:
        kept = layer.positions[1]
        assert ((kept >= 31 - 12) | (kept == SENTINEL)).all()
        assert ((kept != SENTINEL).sum(-1) == 12).all()


@pytest.mark.parametrize("name", list(POLICIES))
def test_permuting_the_batch_permutes_the_result(name):
    model = build("llama")
    tokred.apply(model, POLICIES[name])
    ids, order = prompt(21, 3), torch.tensor([2, 0, 1])
    a = model.generate(ids, return_dict_in_generate=True, output_logits=True, **GREEDY).logits
    c = model.generate(ids[order], return_dict_in_generate=True, output_logits=True, **GREEDY).logits
    assert all((x[order] - y).abs().max() < 1e-5 for x, y in zip(a, c, strict=True))


# ---------------------------------------------------------------- positions, precision, the model itself


def test_the_first_forward_after_compression_sees_one_token_at_its_true_position(model):
    seen = []

    def note(module, args, kwargs):
        positions = kwargs.get("position_ids", args[1] if len(args) > 1 else None)
        found = (args[0].shape[1], [*dict.fromkeys(positions.flatten().tolist())])  # on each of its axes
        if not seen or seen[-1] != found:  # Gemma rotates twice a forward
            seen.append(found)

    tokred.apply(model, Scatter(10))
    handle = model.model.rotary_emb.register_forward_pre_hook(note, with_kwargs=True)
    try:
        cache = tokred.kv_cache(model)
        ids = prompt(29)
        model(ids, past_key_values=cache)
        longer = torch.cat([ids, prompt(1, seed=3)], 1)
        model.generate(longer, past_key_values=cache, max_new_tokens=2, do_sample=False)
    finally:
        handle.remove()
    assert seen[1] == (1, [29])
    assert seen[2] == (1, [30])
    assert cache.get_seq_length() == 31


def test_the_number_of_rows_is_that_of_the_budget(model):
    ids = prompt(30)
    for name, rows in (("snapkv", 9), ("h2o", 9), ("tova", 9)):
        tokred.apply(model, POLICIES[name])
        out = model.generate(ids, return_dict_in_generate=True, **GREEDY)
        grown = rows + (5 if name == "snapkv" else 0)
        layers = zip(tokred.report(model).layers, out.past_key_values.layers, strict=True)
        full = [r.rows for r, layer in layers if hasattr(layer, "positions")]
        assert set(full) == {grown}, name


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["snapkv", "h2o", "zeromerge", "keyformer", "expected_attention", "adakv"])
def test_half_precision(name, dtype):
    model = build("llama", dtype)
    tokred.apply(model, POLICIES[name])
    ids, mask, _ = padded((23, 9))
    out = model.generate(ids, attention_mask=mask, return_dict_in_generate=True, output_logits=True, **GREEDY)
    assert all(x.isfinite().all() for x in out.logits)
    assert out.past_key_values.layers[0].keys.dtype == dtype


def test_the_model_is_as_it_was_after_remove(model):
    ids = prompt(12)
    plain = model(ids).logits
    before = repr(model), type(model), dict(model.__dict__), [len(m._forward_pre_hooks) for m in model.modules()]
    keys = list(model.state_dict())
    tokred.apply(model, "snapkv", budget=8, window=4)
    assert list(model.state_dict()) == keys
    assert repr(model) == before[0]
    model(ids)
    tokred.remove(model)
    after = repr(model), type(model), dict(model.__dict__), [len(m._forward_pre_hooks) for m in model.modules()]
    assert after[0] == before[0]
    assert after[1] is before[1]
    assert after[2].keys() == before[2].keys()
    assert after[3] == before[3]
    assert not any(m._forward_pre_hooks_with_kwargs or m._forward_hooks for m in model.modules())
    assert model.config._attn_implementation == "sdpa"
    assert torch.equal(model(ids).logits, plain)


def test_patched_models_copy_and_pickle():
    model, ids = build("llama"), prompt(30)
    tokred.apply(model, POLICIES["snapkv"])
    expected = model.generate(ids, **GREEDY)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other.generate(ids, **GREEDY), expected)
        tokred.remove(other)
        assert other.config._attn_implementation == "sdpa"
    assert model.config._attn_implementation == "tokred:sdpa"


def test_a_patched_model_is_saved_as_the_plain_one(tmp_path):
    model, ids = build("llama"), prompt(20)
    plain = model(ids).logits
    tokred.apply(model, POLICIES["snapkv"])
    model.save_pretrained(tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert type(loaded) is transformers.LlamaForCausalLM
    assert loaded.config._attn_implementation == "sdpa"
    assert torch.equal(loaded(ids).logits, plain)


def test_the_language_model_inside_a_vlm():
    model, ids = llava(), prompt(26)
    ids[:, 2:6] = 96
    pixels = torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    plain = model.generate(ids, pixel_values=pixels, **GREEDY)
    assert {r.method: r.works for r in tokred.supports(model)}["snapkv"]
    tokred.apply(model, "snapkv", budget=1.0)
    assert torch.equal(model.generate(ids, pixel_values=pixels, **GREEDY), plain)
    tokred.apply(model, "snapkv", budget=8, window=4)
    out = model.generate(ids, pixel_values=pixels, return_dict_in_generate=True, **GREEDY)
    assert {layer.keys.shape[2] for layer in out.past_key_values.layers} == {8 + 5}
    assert model.config.vision_config._attn_implementation == "sdpa", "the vision tower is not touched"
    assert model(ids, pixel_values=pixels).past_key_values.layers[0].keys.shape[2] == 8, "plain forwards too"
    tokred.remove(model)
    assert torch.equal(model.generate(ids, pixel_values=pixels, **GREEDY), plain)
