"""Cache layers, adoption of the caller's cache, and everything that is refused."""

from __future__ import annotations

import copy
import gc
import pickle

import pytest
import torch

pytest.importorskip("transformers")

import transformers

import tokred
from tests.kv.tiny import POLICIES, SMALL, Scatter, build, padded, prompt
from tokred.adapters.kv.cache import TokCache
from tokred.adapters.kv.masks import MaskSpec

GREEDY = {"max_new_tokens": 5, "do_sample": False}


pytestmark = pytest.mark.usefixtures("no_grad")


@pytest.fixture
def model():
    return build("llama")


def filled(model, n: int = 20, b: int = 1):
    cache = tokred.kv_cache(model)
    model(prompt(n, b), past_key_values=cache)
    return cache


# ---------------------------------------------------------------- masks


def test_mask_examples():
    """Rows that hold slots 0, 3 and 7; two tokens come at 9 and 10."""
    from transformers.masking_utils import causal_mask_function

    positions = torch.tensor([[[0, 3, 7, 9, 10]]], dtype=torch.int32)

    def seen(mask, **more):
        spec = MaskSpec({"mask_function": causal_mask_function, "attention_mask": mask, **more})
        return spec.visible(9, 2, positions, False)[0, 0].int().tolist()

    assert seen(None) == [[1, 1, 1, 1, 0], [1, 1, 1, 1, 1]]
    mask = torch.ones(1, 11, dtype=torch.bool)
    mask[0, 0] = False
    assert seen(mask) == [[0, 1, 1, 1, 0], [0, 1, 1, 1, 1]]


def test_overlays_of_the_model_are_honoured_on_compressed_rows():
    from transformers.masking_utils import and_masks, causal_mask_function

    even = lambda b, h, q, k: k % 2 == 1  # noqa: E731
    spec = MaskSpec({"mask_function": and_masks(causal_mask_function, even), "attention_mask": None})
    positions = torch.tensor([[[0, 3, 7, 9, 10]]], dtype=torch.int32)
    assert spec.visible(9, 2, positions, False)[0, 0].int().tolist() == [[0, 1, 1, 1, 0], [0, 1, 1, 1, 0]]


# ---------------------------------------------------------------- samples


def test_reorder_repeat_and_select(model):
    tokred.apply(model, Scatter(8))
    ids, mask, _ = padded((20, 11, 16))
    cache = tokred.kv_cache(model)
    model(ids, attention_mask=mask, past_key_values=cache)
    before = copy.deepcopy(cache.layers[1])
    cache.reorder_cache(torch.tensor([2, 0, 0]))
    now = cache.layers[1]
    assert torch.equal(now.keys, before.keys[[2, 0, 0]])
    assert torch.equal(now.positions, before.positions[[2, 0, 0]])
    assert now.clock.lengths == (16, 20, 20)
    cache.batch_repeat_interleave(2)
    assert torch.equal(now.values, before.values[[2, 2, 0, 0, 0, 0]])
    assert now.clock.lengths == (16, 16, 20, 20, 20, 20)
    cache.batch_select_indices(torch.tensor([0, 3]))
    assert torch.equal(now.positions, before.positions[[2, 0]])
    assert now.clock.lengths == (16, 20)


def test_state_of_a_policy_follows_the_samples(model):
    tokred.apply(model, "h2o", budget=9)
    cache = tokred.kv_cache(model)
    model(prompt(20, 3), past_key_values=cache)
    mass = cache.layers[0].rows["mass"]
    cache.reorder_cache(torch.tensor([1, 1, 0]))
    assert torch.equal(cache.layers[0].rows["mass"], mass[[1, 1, 0]])


def test_reset(model):
    tokred.apply(model, "snapkv", budget=9, window=4)
    cache = filled(model)
    expected = cache.layers[0].keys
    cache.reset()
    assert cache.get_seq_length() == 0
    assert cache.nbytes == 0
    model(prompt(20), past_key_values=cache)
    assert torch.equal(cache.layers[0].keys, expected)
    assert cache.layers[0].keys.shape[2] == 9


# ---------------------------------------------------------------- crop


def test_crop_takes_the_newest_tokens_back(model):
    tokred.apply(model, "snapkv", budget=9, window=4)
    cache = filled(model)
    model(prompt(5, seed=2), past_key_values=cache)
    cache.crop(-3)
    assert cache.get_seq_length() == 22
    assert {layer.keys.shape[2] for layer in cache.layers} == {11}
    logits = model(prompt(1, seed=3), past_key_values=cache).logits
    other = filled(model)
    model(prompt(5, seed=2)[:, :2], past_key_values=other)
    assert torch.allclose(model(prompt(1, seed=3), past_key_values=other).logits, logits, atol=1e-5)


def test_what_cannot_be_cropped_is_refused_and_left(model):
    tokred.apply(model, "snapkv", budget=9, window=4)
    cache = filled(model)
    with pytest.raises(ValueError, match="rows were evicted"):
        cache.crop(-1)
    with pytest.raises(ValueError, match="minus the number"):
        cache.crop(4)
    with pytest.raises(ValueError, match="cannot remove 30 tokens"):
        cache.crop(-30)
    assert cache.get_seq_length() == 20
    tokred.apply(model, "h2o", budget=90)
    counting = filled(model)
    with pytest.raises(ValueError, match="has counted the attention"):
        counting.crop(-1)


def test_crop_of_mixed_layers_is_all_or_nothing():
    model = build("gemma3")
    tokred.apply(model, "snapkv", budget=6, window=4)
    cache = tokred.kv_cache(model)
    model(prompt(7), past_key_values=cache)
    with pytest.raises(ValueError, match="rows were evicted"):
        cache.crop(-2)
    assert [layer.get_seq_length() for layer in cache.layers] == [7] * 4


# ---------------------------------------------------------------- the caller's cache


def test_an_empty_cache_of_the_caller_is_used(model):
    ids = prompt(20)
    tokred.apply(model, "snapkv", budget=9, window=4)
    expected = model.generate(ids, **GREEDY)
    for made in (transformers.DynamicCache(), transformers.DynamicCache(config=model.config)):
        given = made
        assert torch.equal(model.generate(ids, past_key_values=given, **GREEDY), expected)
        assert isinstance(given, TokCache)
        assert isinstance(given, transformers.DynamicCache)
        assert given.get_seq_length() == 24
        assert given.layers[0].keys.shape[2] == 9 + 4
    given = transformers.DynamicCache()
    out = model(ids, past_key_values=given)
    assert out.past_key_values is given
    assert given.layers[0].keys.shape[2] == 9


def test_without_a_cache_nothing_changes(model):
    ids = prompt(20)
    plain, made = model(ids, use_cache=False).logits, model.generate(ids, use_cache=False, **GREEDY)
    tokred.apply(model, "snapkv", budget=9, window=4)
    assert torch.equal(model(ids, use_cache=False).logits, plain)
    assert torch.equal(model.generate(ids, use_cache=False, **GREEDY), made)


def test_plain_forwards_use_the_policy(model):
    tokred.apply(model, "snapkv", budget=9, window=4)
    out = model(prompt(20))
    assert out.past_key_values.layers[0].keys.shape[2] == 9
    assert out.past_key_values.get_seq_length() == 20


def static(model):
    return transformers.StaticCache(config=model.config, max_cache_len=64)


def offloaded(model):
    cache = transformers.DynamicCache(config=model.config)
    cache.offloading = True
    return cache


def full(model):
    cache = transformers.DynamicCache(config=model.config)
    model(prompt(5), past_key_values=cache)
    return cache


@pytest.mark.parametrize(
    ("make", "error", "match"),
    [
        (static, TypeError, "cannot be evicted from a StaticCache"),
        (offloaded, TypeError, "DynamicCache that offloads"),
        (full, ValueError, "holds 5 tokens that snapkv has not seen"),
        (lambda m: ((1, 2),), TypeError, "cannot be evicted from a 'tuple'"),
    ],
)
def test_caches_that_are_refused_stay_as_they_were(model, make, error, match):
    given = make(model)
    kind, layers = type(given), copy.copy(getattr(given, "layers", None))
    tokred.apply(model, "snapkv", budget=9, window=4)
    for call in (lambda: model(prompt(20), past_key_values=given),
                 lambda: model.generate(prompt(20), past_key_values=given, **GREEDY)):  # fmt: skip
        with pytest.raises(error, match=match):
            call()
        assert type(given) is kind
        assert getattr(given, "layers", None) == layers
    assert model.generate(prompt(20), **GREEDY).shape == (1, 25), "the model works on"


def test_caches_belong_to_one_policy(model):
    tokred.apply(model, "snapkv", budget=9, window=4)
    cache = filled(model)
    rows = cache.layers[0].keys
    tokred.apply(model, "snapkv", budget=10, window=4)
    with pytest.raises(ValueError, match="the cache belongs to"):
        model(prompt(1), past_key_values=cache)
    tokred.remove(model)
    with pytest.raises(tokred.TokenStateError, match="is not patched"):
        model(prompt(1), past_key_values=cache)
    assert cache.layers[0].keys is rows


@pytest.mark.parametrize("kind", ["static", "offloaded", "quantized"])
def test_cache_implementations_that_are_refused(model, kind):
    tokred.apply(model, "snapkv", budget=9, window=4)
    with pytest.raises(ValueError, match=f"cache_implementation='{kind}'"):
        model.generate(prompt(20), cache_implementation=kind, **GREEDY)


def test_a_cache_that_grows_can_be_asked_for_by_name(model):
    """Transformers refused the policy's cache beside the wish for one."""
    tokred.apply(model, "snapkv", budget=8, window=4)
    expected = model.generate(prompt(20), **GREEDY)
    assert torch.equal(model.generate(prompt(20), cache_implementation="dynamic", **GREEDY), expected)


def test_masks_that_are_refused(model):
    tokred.apply(model, "snapkv", budget=9, window=4)
    cache = filled(model)
    rows = cache.layers[0].keys
    with pytest.raises(ValueError, match=r"give attention_mask as \[B, L\]"):
        model(prompt(2), attention_mask=torch.ones(1, 1, 2, 22, dtype=torch.bool), past_key_values=cache)
    with pytest.raises(ValueError, match="give the mask of all 22"):
        model(prompt(2), attention_mask=torch.ones(1, 2, dtype=torch.long), past_key_values=cache)
    assert cache.layers[0].keys is rows
    assert cache.get_seq_length() == 20


# ---------------------------------------------------------------- models


def test_models_that_are_refused():
    t = transformers
    by_hand = t.BloomForCausalLM(t.BloomConfig(vocab_size=60, hidden_size=16, n_layer=1, n_head=2))
    with pytest.raises(tokred.UnsupportedModelError, match="no attention back-end"):
        tokred.apply(by_hand, "snapkv")
    windowed = t.MistralForCausalLM(t.MistralConfig(**SMALL, sliding_window=8))
    with pytest.raises(tokred.UnsupportedModelError, match="all of its layers have a sliding window"):
        tokred.apply(windowed, "snapkv")
    whisper = t.T5ForConditionalGeneration(
        t.T5Config(vocab_size=60, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    )
    with pytest.raises(tokred.UnsupportedModelError, match="adds a bias by distance to its logits"):
        tokred.apply(whisper, "snapkv")
    bert = t.BertModel(t.BertConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32))
    with pytest.raises(tokred.MissingInputError, match="offers only stage 'block'"):
        tokred.apply(bert, "snapkv")
    for refused in (windowed, whisper, bert):
        assert not any(m._forward_pre_hooks for m in refused.modules())


def test_models_that_share_a_configuration(model):
    other = transformers.LlamaForCausalLM(model.config).eval()
    assert other.config is model.config
    ids = prompt(20)
    plain = other.generate(ids, **GREEDY)
    tokred.apply(model, "snapkv", budget=9, window=4)
    assert torch.equal(other.generate(ids, **GREEDY), plain), "only the patched one has a policy"
    tokred.apply(other, "snapkv", budget=1.0)
    assert torch.equal(other.generate(ids, **GREEDY), plain)
    tokred.remove(model)
    with pytest.raises(tokred.TokenStateError, match="ran without the policy"):
        other.generate(ids, **GREEDY)
    assert torch.equal(tokred.remove(other).generate(ids, **GREEDY), plain)


def test_an_attention_that_is_switched_afterwards_is_noticed(model):
    tokred.apply(model, "snapkv", budget=9, window=4)
    model.set_attn_implementation("eager")
    with pytest.raises(tokred.TokenStateError, match="ran without the policy"):
        model(prompt(20))


def test_a_pickled_model_runs_in_another_process(model, tmp_path):
    import subprocess
    import sys

    tokred.apply(model, "snapkv", budget=9, window=4)
    expected = model.generate(prompt(20), **GREEDY)
    torch.save((model, prompt(20), expected), tmp_path / "model.pt")
    code = (
        "import sys, torch; model, ids, expected = torch.load(sys.argv[1], weights_only=False); "
        "print(torch.equal(model.generate(ids, max_new_tokens=5, do_sample=False), expected))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "model.pt")],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.stdout.strip() == "True", done.stderr


def test_a_forward_that_breaks_off_is_noticed(model):
    tokred.apply(model, "snapkv", budget=9, window=4)
    cache = filled(model)
    kept = cache.snapshot()

    def stop(module, args):
        raise KeyboardInterrupt

    handle = model.model.layers[1].mlp.register_forward_pre_hook(stop)
    with pytest.raises(KeyboardInterrupt):
        model(prompt(2), past_key_values=cache)
    handle.remove()
    with pytest.raises(tokred.TokenStateError, match="a forward broke off"):
        model(prompt(2), past_key_values=cache)
    cache.restore(kept)
    assert model(prompt(2), past_key_values=cache).logits.isfinite().all()
    assert cache.get_seq_length() == 22


OTHERS = {
    "Qwen2": {}, "Phi3": {}, "Cohere": {}, "Granite": {}, "Olmo2": {}, "Mixtral": {"num_local_experts": 2}, "Gemma": {},
    "Starcoder2": {"sliding_window": None}, "OPT": {"ffn_dim": 32, "word_embed_proj_dim": 48}, "Persimmon": {},
    "GPTNeoX": {}, "GPT2": {"n_embd": 48, "n_layer": 3, "n_head": 4},
}  # fmt: skip


@pytest.mark.parametrize("name", OTHERS)
def test_other_families(name):
    shape = {k: v for k, v in SMALL.items() if k != "head_dim"}
    config = getattr(transformers, f"{name}Config")(**{**shape, **OTHERS[name]})
    torch.manual_seed(0)
    cls = getattr(transformers, f"{name}ForCausalLM", None) or transformers.GPT2LMHeadModel
    model, ids = cls(config).eval(), prompt(20)
    plain = model.generate(ids, **GREEDY)
    tokred.apply(model, "snapkv", budget=1.0)
    assert torch.equal(model.generate(ids, **GREEDY), plain)
    for policy in ("snapkv", "h2o"):
        tokred.apply(model, policy, budget=9, **({"window": 4} if policy == "snapkv" else {}))
        out = model.generate(ids, return_dict_in_generate=True, **GREEDY)
        assert {layer.keys.shape[2] for layer in out.past_key_values.layers} == {13 if policy == "snapkv" else 9}
    assert torch.equal(tokred.remove(model).generate(ids, **GREEDY), plain)


def test_gradients_are_those_of_the_plain_model(model):
    ids = prompt(20)
    with torch.enable_grad():
        model.train()
        model(ids, labels=ids).loss.backward()
        expected = [p.grad.clone() for p in model.parameters()]
        model.zero_grad()
        tokred.apply(model, "snapkv", budget=9, window=4)
        model(ids, labels=ids).loss.backward()
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), expected, strict=True))


def test_methods_of_other_stages(model):
    timm = pytest.importorskip("timm")
    with pytest.raises(tokred.UnsupportedModelError):
        tokred.apply(model, "tome", r=2)
    vit = timm.create_model("test_vit")
    with pytest.raises(tokred.MissingInputError, match="offers only stage 'block'"):
        tokred.apply(vit, "snapkv")
    with pytest.raises(ValueError, match="one method a stage"):
        tokred.apply(model, [tokred.SnapKV(), tokred.H2O()])
    assert tokred.apply(model, [tokred.SnapKV(budget=9, window=4)]) is model


def test_supports_and_missing_inputs(model):
    rows = {row.method: row for row in tokred.supports(model)}
    assert all(rows[name].works for name in POLICIES)
    assert "cache of 3 layers" in rows["snapkv"].reason
    assert not rows["tome"].works
    gpt2 = transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=60, n_embd=32, n_layer=2, n_head=2)).eval()
    rows = {row.method: row for row in tokred.supports(gpt2)}
    assert rows["snapkv"].works
    assert rows["expected_attention"].reason.startswith("needs rope")
    with pytest.raises(tokred.MissingInputError, match=r"reads .*rope"):
        tokred.apply(gpt2, "expected_attention")
    plain = gpt2.generate(prompt(20) % 60, **GREEDY)
    tokred.apply(gpt2, "snapkv", budget=1.0)
    assert torch.equal(gpt2.generate(prompt(20) % 60, **GREEDY), plain)
    gemma = {row.method: row for row in tokred.supports(build("gemma3"))}
    assert "2 sliding-window layers stay" in gemma["snapkv"].reason


def test_where_restricts_the_layers(model):
    tokred.apply(model, "snapkv", budget=9, window=4, where=lambda name, module: "layers.0" not in name)
    cache = filled(model)
    assert [layer.keys.shape[2] for layer in cache.layers] == [20, 9, 9]
    assert model(prompt(1), past_key_values=cache).logits.isfinite().all()
    with pytest.raises(ValueError, match="selects none"):
        tokred.apply(model, "snapkv", where=lambda name, module: False)
    with pytest.raises(ValueError, match="expose is for methods of blocks"):
        tokred.apply(model, "snapkv", expose="all")


def test_report_of_the_cache_that_ran_last_even_when_it_is_gone(model):
    tokred.apply(model, "snapkv", budget=9, window=4)
    first, second = filled(model, 20), filled(model, 30)
    model(prompt(1), past_key_values=first)
    rows = first.layer_rows()
    assert tokred.report(model).layers == rows
    del second  # not the last one
    gc.collect()
    twin, thawed = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
    del first
    gc.collect()
    for each in (model, twin, thawed):
        assert tokred.report(each).layers == rows
    model(prompt(12), use_cache=True)  # a cache of the model's own, which nobody holds on to
    gc.collect()
    assert [(r.seen, r.rows) for r in tokred.report(model).layers] == [(12, 9)] * 3
    other = copy.deepcopy(filled(model, 15))  # a cache that no patched model made
    model(prompt(1), past_key_values=other)
    rows = other.layer_rows()
    del other
    gc.collect()
    assert tokred.report(model).layers == rows


def test_report_trace_and_flops(model):
    tokred.apply(model, "snapkv", budget=9, window=4)
    with pytest.raises(tokred.NothingRecordedError, match="run one forward"):
        tokred.report(model)
    cache = filled(model)
    found = tokred.report(model)
    assert [(r.seen, r.rows) for r in found.layers] == [(20, 9)] * 3
    assert found.bytes == cache.nbytes
    assert found.dense_bytes == 3 * 2 * 20 * 2 * 16 * 4
    assert "20" in str(found)
    with pytest.raises(tokred.NothingRecordedError, match="stage 'cache'"):
        tokred.trace(model)
    with pytest.raises(ValueError, match=r"tokred\.report"):
        tokred.flops(model, "snapkv", (1, 20))
    tokred.remove(model)
    with pytest.raises(tokred.NothingRecordedError, match="no policy"):
        tokred.kv_cache(model)


def test_memory_is_really_freed(model):
    tokred.apply(model, "snapkv", budget=9, window=4)
    cache = filled(model, 200)
    for layer in cache.layers:
        assert layer.keys.untyped_storage().nbytes() == 9 * 2 * 16 * 4
        assert not layer.rows
        assert not layer.notes


@pytest.mark.parametrize("name", ["adore", "h2o"])
def test_one_model_in_several_threads(name):
    """What layers leave for each other in a forward is of that forward."""
    from concurrent.futures import ThreadPoolExecutor

    model = tokred.apply(build("llama"), name, budget=12)
    prompts = [prompt(20 + 7 * i, seed=i) for i in range(4)]

    def generate(ids):
        with torch.no_grad():
            return model.generate(ids, **GREEDY)

    expected = [generate(ids) for ids in prompts]
    with ThreadPoolExecutor(4) as pool:
        for found in (pool.map(generate, prompts) for _ in range(3)):
            assert all(map(torch.equal, found, expected))


def test_two_models_in_two_threads_do_not_meet():
    import threading

    models = [build("llama", seed=i) for i in range(2)]
    for i, m in enumerate(models):
        tokred.apply(m, "squeezeattention", budget=9 + i, sinks=2)
    expected = [m.generate(prompt(20), **GREEDY) for m in models]
    failures: list[int] = []

    def run(i: int) -> None:
        with torch.no_grad():
            for _ in range(5):
                if not torch.equal(models[i].generate(prompt(20), **GREEDY), expected[i]):
                    failures.append(i)

    threads = [threading.Thread(target=run, args=(i,)) for i in range(2)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not failures
