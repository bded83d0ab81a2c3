"""Sliding layers whose window is shorter than the prompt: it counts the tokens of the whole conversation, those that
left too, so that dropping equals masking here as well."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
import transformers as t

import tokred
from tests.kv.tiny import build as text_model
from tests.kv.tiny import prompt as text_prompt
from tests.vlm import hosts, oracle
from tests.vlm.test_hosts import ROWS, both, second_turn
from tests.vlm.tiny import TEXT
from tests.vlm.uneven import Uneven, UnevenLayer
from tokred.adapters.vlm.masks import check_kernel, windowed
from tokred.methods.vlm.fastkv import FastKVPropagation

QWEN = {k: v for k, v in TEXT.items() if k != "head_dim"}
METHODS = {
    "projector": Uneven,
    "layer": lambda: tokred.make("fastv", layer=2, ratio=0.4),
    "both": both,
}


@functools.cache
def model_of(kind: str, window: int) -> Any:
    torch.manual_seed(0)
    if kind == "gemma3":
        return hosts.ready(hosts.gemma3(window))
    if kind == "paligemma":  # 2, around a Gemma 2: masks from outside, some layers slide, eager attention
        return hosts.ready(hosts.paligemma(model_type="gemma2", sliding_window=window, query_pre_attn_scalar=8))
    if kind == "qwen2_vl":
        return hosts.ready(hosts.qwen2_vl(use_sliding_window=True, sliding_window=window, max_window_layers=2))
    if kind == "mistral":  # all layers slide
        return hosts.ready(hosts.llava(t.MistralConfig(**TEXT, sliding_window=window)))
    kinds = ["full_attention"] * 2 + ["sliding_attention"] * 2
    text = t.Qwen2Config(**QWEN, use_sliding_window=True, sliding_window=window, layer_types=kinds)
    return hosts.ready(hosts.llava(text))


def host_of(kind: str) -> str:
    """Which prompts it takes."""
    return kind if kind in hosts.HOSTS else "llava"


def batch_of(kind: str, rows: hosts.Rows) -> dict[str, Any]:
    return hosts.prompts(host_of(kind), rows)


# Images of Gemma 3 have 16 tokens that see each other, within a window of 6 as well.
@pytest.mark.parametrize(
    ("kind", "window"),
    [("gemma3", 6), ("gemma3", 24), ("mistral", 12), ("qwen2", 12), ("paligemma", 12), ("qwen2_vl", 12)],
)
@pytest.mark.parametrize("method", METHODS)
def test_dropping_equals_masking(kind, window, method):
    model = model_of(kind, window)
    lists = model.model.language_model.layers
    oracle.agree(model, lists, METHODS[method](), batch_of(kind, ROWS), max_new_tokens=8)


@pytest.mark.parametrize("options", [{"num_beams": 2}, {"do_sample": True, "num_return_sequences": 2}])
def test_beams_and_returns(options):
    model = model_of("gemma3", 12)
    oracle.agree(model, model.model.language_model.layers, both(), batch_of("gemma3", ROWS), **options)


def test_eager_attention():
    model = model_of("gemma3", 12)
    model.set_attn_implementation("eager")
    try:
        oracle.agree(model, model.model.language_model.layers, both(), batch_of("gemma3", ROWS))
    finally:
        model.set_attn_implementation("sdpa")


@pytest.mark.parametrize("image", [False, True])
@pytest.mark.parametrize("kind", ["gemma3", "mistral", "qwen2", "paligemma", "qwen2_vl"])
def test_second_turn(kind, image):
    second_turn(model_of(kind, 12), host_of(kind), [Uneven(), UnevenLayer()], image)


@pytest.mark.parametrize("kind", ["gemma3", "mistral", "qwen2"])
def test_prompt_lookup_and_no_cache(kind):
    model, batch = model_of(kind, 12), batch_of(kind, [[3, "image", 6]])
    batch["input_ids"][0, -6:] = torch.tensor([7, 8, 9, 7, 8, 9])
    tokred.apply(model, both())
    plain = oracle.generate(model, batch)
    drafted = oracle.generate(model, batch, prompt_lookup_num_tokens=3)
    first = oracle.generate(model, batch, max_new_tokens=1, use_cache=False)
    tokred.remove(model)
    assert plain.sequences.tolist() == drafted.sequences.tolist()
    torch.testing.assert_close(first.logits[0], plain.logits[0], rtol=1e-4, atol=1e-4)


def beside(method: str, policy: Any) -> list[Any]:
    pruning = METHODS[method]()
    return [*(pruning if isinstance(pruning, list) else [pruning]), policy]


# Masks for sliding layers do not depend on what a policy holds of the others; one that keeps all changes nothing else.
@pytest.mark.parametrize("options", [{}, {"num_beams": 2}, {"prompt_lookup_num_tokens": 3}])
@pytest.mark.parametrize("kind", ["qwen2", "qwen2_vl"])
@pytest.mark.parametrize("method", METHODS)
def test_a_policy_that_keeps_all_changes_nothing(kind, method, options):
    model = model_of(kind, 12)
    batch = batch_of(kind, [[3, "image", 6]] if "prompt_lookup_num_tokens" in options else ROWS)
    with tokred.applied(model, METHODS[method]()):
        without = oracle.generate(model, batch, **options)
    with tokred.applied(model, beside(method, tokred.make("snapkv", budget=1.0, window=2))):
        found = oracle.generate(model, batch, **options)
    assert found.sequences.tolist() == without.sequences.tolist()
    assert all(torch.equal(a, b) for a, b in zip(found.logits, without.logits, strict=True))


@pytest.mark.parametrize("image", [False, True])
def test_second_turn_beside_a_policy(image):
    """Dropping equals masking where the policy keeps all."""
    second_turn(model_of("qwen2", 12), "llava", [Uneven(), UnevenLayer(), tokred.make("snapkv", budget=1.0)], image)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["qwen2", "qwen2_vl"])
@pytest.mark.parametrize("method", METHODS)
def test_rows_leave_under_a_policy_beside_a_window(kind, method):
    """Full layers hold the policy's rows, sliding ones their window's; the prompt's logits are those without policy."""
    model, batch = model_of(kind, 12), batch_of(kind, ROWS)
    with tokred.applied(model, METHODS[method]()):
        without = oracle.generate(model, batch)
    with tokred.applied(model, beside(method, tokred.make("snapkv", budget=8, window=2))):
        out = oracle.generate(model, batch, max_new_tokens=4)
    assert torch.equal(out.logits[0], without.logits[0])
    rows = [layer.keys.shape[2] for layer in out.past_key_values.layers]
    assert rows == [8 + 3, 8 + 3, 11, 11]
    assert all(logits.isfinite().all() for logits in out.logits)


def test_flash_attention_is_refused_beside_a_policy_too():
    config = t.Qwen2Config(**QWEN, use_sliding_window=True, sliding_window=12)
    config._attn_implementation = "tokred:flash_attention_2"
    with pytest.raises(ValueError, match="'flash_attention_2' counts the window"):
        check_kernel(config, None)


@torch.no_grad()
def test_positions_counted_anew_take_the_window_along():
    """Then the prompt is as if it were that short."""
    model, batch = model_of("mistral", 12), batch_of("mistral", [[3, "image", 5]])
    language = model.model.language_model
    seen: list[Any] = []
    handle = language.layers[0].register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    with tokred.applied(model, "uniform_visual", budget=8, positions="repack"):
        short = model(**batch).logits
    handle.remove()
    assert seen[0].shape[1] == 16
    torch.testing.assert_close(short, model.lm_head(language(inputs_embeds=seen[0]).last_hidden_state))


def test_a_mask_by_hand():
    # Of tokens 0 to 6, 1 and 2 left; a window of 4 sees the own token and three before it in the conversation.
    places = torch.tensor([[0, 3, 4, 5, 6]])
    assert windowed(None, places, 2, None, 4, False).long().tolist() == [[[[0, 1, 1, 1, 0], [0, 1, 1, 1, 1]]]]
    stock = torch.ones(1, 1, 2, 5)  # additive: nothing below the least is hidden yet
    stock[..., 0, 4] = torch.finfo(torch.float32).min
    least = torch.finfo(torch.float32).min
    assert windowed(stock, places, 2, None, 3, True)[0, 0].tolist() == [
        [least, 1, 1, 1, least],
        [least, least, 1, 1, 1],
    ]
    nothing = torch.tensor([[True, True, True, True, False]])
    assert windowed(None, places, 1, nothing, 1, False).tolist() == [[[[False] * 4 + [True]]]], "no row is empty"


def test_kernels_that_count_windows_themselves_are_refused():
    config = t.Gemma3TextConfig(sliding_window=12)
    for name in ("flash_attention_2", "flash_attention_3"):
        config._attn_implementation = name
        with pytest.raises(ValueError, match=f"{name}.*12 tokens.*sdpa"):
            check_kernel(config, None)
    config._attn_implementation = "sdpa"
    check_kernel(config, torch.ones(1, 1, 2, 2))
    with pytest.raises(ValueError, match="sdpa"):
        check_kernel(config, object())  # a block mask
    model = model_of("mistral", 12)
    model.config.text_config._attn_implementation = "flash_attention_2"
    try:
        with tokred.applied(model, Uneven()), pytest.raises(ValueError, match=r"window .* too far back"):
            model(**batch_of("mistral", ROWS))
    finally:
        model.config.text_config._attn_implementation = "sdpa"


@pytest.mark.parametrize("length", [14, 25])
def test_language_models_alone(length):
    model = text_model("gemma3")
    method = FastKVPropagation(tokred.make("fastkv", window=2, tsp_layer=1, tsp_len=10))
    batch = {"input_ids": text_prompt(length, 2)}
    oracle.agree(model, model.model.layers, method, batch, max_new_tokens=10)
