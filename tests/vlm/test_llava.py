"""LLaVA: dropping tokens equals masking the same columns, however the model is used."""

from __future__ import annotations

import copy
import pickle
from dataclasses import dataclass
from typing import Any

import pytest
import torch

import tokred
from tests.vlm import oracle, tiny
from tests.vlm.uneven import Uneven, UnevenLayer
from tokred.adapters.vlm.tokens.recorded import track_of

ROWS: list[list[int | str]] = [[3, "image", 5], [2, "image", 1, "image", 4], [9]]


METHODS = {
    "random_visual": lambda: tokred.make("random_visual", budget=5),
    "uneven": Uneven,
    "fastv": lambda: tokred.make("fastv", ratio=0.5),
    "uneven_layer": UnevenLayer,
    "both": lambda: [Uneven(), tokred.make("fastv", layer=1, ratio=0.4)],
}
OPTIONS = {
    "greedy": {},
    "sampling": {"do_sample": True, "temperature": 2.0},
    "beams": {"num_beams": 3},
    "returns": {"do_sample": True, "num_return_sequences": 2},
    "beam returns": {"num_beams": 3, "num_return_sequences": 2},
}


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny.llava()


def layers(model: Any) -> Any:
    return model.model.language_model.layers


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("method", METHODS)
def test_dropping_equals_masking(model, method, options):
    if options in ("sampling", "beam returns") and method != "both":
        pytest.skip("the others differ in nothing that this would show")
    _, keeps = oracle.agree(model, layers(model), METHODS[method](), tiny.prompts(ROWS), **OPTIONS[options])
    assert any(not keep.all() for keep in keeps.values())


def test_cache_lengths_and_logical_length(model):
    batch = tiny.prompts([[3, "image", 2]])
    with tokred.applied(model, "fastv", ratio=0.5):
        cache = model(**batch, use_cache=True).past_key_values
        assert [layer.keys.shape[2] for layer in cache.layers] == [21, 21, 13, 13]
        assert cache.get_seq_length() == 21
    with tokred.applied(model, [tokred.make("random_visual", budget=6), tokred.make("fastv", ratio=0.5)]):
        cache = model(**batch, use_cache=True).past_key_values
        assert [layer.keys.shape[2] for layer in cache.layers] == [11, 11, 8, 8]
        assert cache.get_seq_length() == 21
        assert [row.visual for row in tokred.report(model).layers] == [(6,), (6,), (3,), (3,)]


@pytest.mark.parametrize("method", ["random_visual", "fastv"])
def test_nothing_to_remove_and_removal_are_exact(model, method):
    batch = tiny.prompts(ROWS)
    stock, run = model(**batch).logits, oracle.generate(model, batch)
    before, keys = repr(model), set(model.state_dict())
    hooks = sum(len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules())
    all_kept = {"random_visual": {"budget": 1.0}, "fastv": {"ratio": 0.0}}[method]
    tokred.apply(model, method, **all_kept)
    assert torch.equal(model(**batch).logits, stock)
    patched = oracle.generate(model, batch)
    assert torch.equal(patched.sequences, run.sequences)
    assert all(torch.equal(a, b) for a, b in zip(patched.logits, run.logits, strict=True))
    assert set(model.state_dict()) == keys
    tokred.apply(model, METHODS["both"]())
    assert model(**batch).logits.shape != stock.shape
    tokred.remove(model)
    assert torch.equal(model(**batch).logits, stock)
    assert repr(model) == before
    assert hooks == sum(len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules())
    assert not [k for m in model.modules() for k in m.__dict__ if "tokred" in k]


@pytest.mark.parametrize("method", METHODS)
def test_a_sample_alone(model, method):
    if method.startswith("uneven") or method == "both":
        pytest.skip("its counts depend on the place in the batch")
    batch = tiny.prompts(ROWS)
    tokred.apply(model, METHODS[method]())
    together = model(**batch).logits[:, -1]
    images = {0: slice(0, 1), 1: slice(1, 3)}
    for i in range(3):
        real = batch["attention_mask"][i].bool()
        alone = {"input_ids": batch["input_ids"][i : i + 1, real], "attention_mask": torch.ones(1, int(real.sum()))}
        # transformers counts positions from the first column, padding included.
        alone["position_ids"] = torch.arange(len(real))[real].unsqueeze(0)
        if i in images:
            alone["pixel_values"] = batch["pixel_values"][images[i]]
        torch.testing.assert_close(model(**alone).logits[0, -1], together[i], rtol=1e-4, atol=1e-4)
    tokred.remove(model)


@pytest.mark.parametrize("method", ["uneven", "fastv", "both"])
def test_prompt_lookup_equals_greedy(model, method):
    ids = tiny.prompts([[3, "image", 6]])
    ids["input_ids"][0, -6:] = torch.tensor([7, 8, 9, 7, 8, 9])
    tokred.apply(model, METHODS[method]())
    plain = oracle.generate(model, ids, max_new_tokens=8)
    drafted = oracle.generate(model, ids, max_new_tokens=8, prompt_lookup_num_tokens=3)
    tokred.remove(model)
    assert plain.sequences.tolist() == drafted.sequences.tolist()


@pytest.mark.parametrize("image", [False, True])
@pytest.mark.parametrize("method", ["uneven", "fastv", "uneven_layer", "both"])
def test_second_turn(model, method, image):
    first = tiny.prompts([[3, "image", 5], [6, "image", 3]])
    more = tiny.prompts([[4, "image", 5], [5, "image", 2]] if image else [[4], [3]], seed=2)
    tokred.apply(model, METHODS[method]())
    out = oracle.generate(model, first)
    done = out.sequences  # the newest token is in no cache yet
    ids = torch.cat([done, more["input_ids"]], 1)
    fill = torch.ones(2, done.shape[1] - first["input_ids"].shape[1], dtype=torch.long)
    mask = torch.cat([first["attention_mask"], fill, more["attention_mask"]], 1)
    second = {"input_ids": ids, "attention_mask": mask}
    if image:
        second["pixel_values"] = more["pixel_values"]
    cache = copy.deepcopy(out.past_key_values)
    pruned = oracle.generate(model, {**second, "past_key_values": cache})
    keeps = oracle.kept(pruned.past_key_values, ids.shape[1])
    tokred.remove(model)
    with oracle.masked(layers(model), keeps, mask):
        stock = oracle.generate(model, first)
        assert stock.sequences.tolist() == done.tolist()
        expected = oracle.generate(model, {**second, "past_key_values": stock.past_key_values})
    assert pruned.sequences.tolist() == expected.sequences.tolist()
    for ours, theirs in zip(pruned.logits, expected.logits, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-4)
    if image:  # the new images lost tokens too
        assert all(not keep[:, done.shape[1] :].all() for keep in keeps.values())


@pytest.mark.parametrize("method", ["random_visual", "fastv"])
def test_without_a_cache(model, method):
    batch = tiny.prompts(ROWS)
    tokred.apply(model, METHODS[method]())
    cached = oracle.generate(model, batch, max_new_tokens=1)
    without = oracle.generate(model, batch, max_new_tokens=1, use_cache=False)
    longer = oracle.generate(model, batch, use_cache=False)
    tokred.remove(model)
    torch.testing.assert_close(cached.logits[0], without.logits[0])
    if method == "random_visual":  # the choice does not change as the text grows
        keep = tokred.make("random_visual", budget=5)
        again, _ = oracle.agree(model, layers(model), keep, batch)
        assert longer.sequences.tolist() == again.sequences.tolist()


@pytest.mark.parametrize("method", ["random_visual", "both"])
def test_loss_of_what_is_left(model, method):
    batch = tiny.prompts(ROWS)
    labels = batch["input_ids"].clone()
    labels[(labels == tiny.IMAGE) | (batch["attention_mask"] == 0)] = -100
    # What follows an image is predicted from its last token, which may have left.
    after = (batch["input_ids"] == tiny.IMAGE).roll(1, 1)
    labels[after | (batch["attention_mask"].cumsum(1) == 1)] = -100
    tokred.apply(model, METHODS[method]())
    out = model(**batch, labels=labels, use_cache=True)
    pairs = model(**batch, labels=labels, return_dict=False)
    keeps = oracle.kept(out.past_key_values, labels.shape[1])
    tokred.remove(model)
    with oracle.masked(layers(model), keeps, batch["attention_mask"]):
        expected = model(**batch, labels=labels, position_ids=torch.arange(labels.shape[1])[None]).loss
    torch.testing.assert_close(out.loss, expected)
    torch.testing.assert_close(pairs[0], expected)
    with pytest.raises(ValueError, match="logits_to_keep"), tokred.applied(model, METHODS[method]()):
        model(**batch, labels=labels, logits_to_keep=1)
    with pytest.raises(ValueError, match="shift_labels"), tokred.applied(model, METHODS[method]()):
        model(**batch, labels=labels, shift_labels=labels)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_half_precision(dtype, attention):
    model = tiny.llava(dtype)
    model.set_attn_implementation(attention)
    batch = tiny.prompts(ROWS)
    batch["pixel_values"] = batch["pixel_values"].to(dtype)
    with tokred.applied(model, METHODS["both"]()):
        out = oracle.generate(model, batch)
    assert all(one.isfinite().all() for one in out.logits)


def test_merged_tokens_enter_in_place_of_the_first(model):
    batch = tiny.prompts([[3, "image", 5]])
    seen: dict[str, Any] = {}
    language = model.model.language_model
    handle = language.layers[0].register_forward_pre_hook(lambda m, a, k: seen.update(x=a[0]), with_kwargs=True)
    model(**batch)
    full = seen["x"][0, 3:19].clone()
    with tokred.applied(model, "downsample_visual", budget=4):
        model(**batch)
    handle.remove()
    assert seen["x"].shape[1] == 12
    cells = full.view(2, 2, 2, 2, -1).mean((1, 3)).view(4, -1)
    torch.testing.assert_close(seen["x"][0, 3:7], cells, rtol=1e-5, atol=1e-5)


def test_repacked_positions(model):
    @dataclass(frozen=True)
    class Repacked(Uneven):
        positions: str = "repack"

    batch = tiny.prompts([[3, "image", 5], [2, "image", 1, "image", 4]])
    seen = []
    handle = model.model.language_model.layers[0].register_forward_pre_hook(
        lambda m, a, k: seen.append(k["position_ids"].tolist()), with_kwargs=True
    )
    with tokred.applied(model, Repacked()):
        oracle.generate(model, batch, max_new_tokens=3)
    handle.remove()
    real = [max(row) + 1 for row in seen[0]]
    longest = max(real)
    assert seen[0] == [[0] * (longest - n) + list(range(n)) for n in real]
    assert seen[1:] == [[[n] for n in real], [[n + 1] for n in real]]
    assert real[0] != real[1] < 27


def test_copies_and_pickles():
    model = tiny.llava()
    batch = tiny.prompts(ROWS)
    tokred.apply(model, METHODS["both"]())
    # transformers' own hooks, set at the first forward, do not pickle.
    twins = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
    expected = model(**batch).logits
    for twin in (*twins, copy.deepcopy(model)):
        assert torch.equal(twin(**batch).logits, expected)
        tokred.remove(twin)
        assert twin(**batch).logits.shape[1] == batch["input_ids"].shape[1]


def test_compiled_layers_break_no_graph(model):
    other = copy.deepcopy(model)
    batch = tiny.prompts([[3, "image", 5]])
    tokred.apply(other, METHODS["both"]())
    expected = other(**batch).logits
    torch._dynamo.reset()
    for layer in layers(other):
        layer.compile(backend="eager", fullgraph=True, dynamic=False)
    with torch.no_grad():
        torch.testing.assert_close(other(**batch, use_cache=False).logits, expected)


def test_bad_calls_are_refused_and_leave_the_model_whole(model):
    batch = tiny.prompts(ROWS)
    tokred.apply(model, "random_visual", budget=5)
    expected = model(**batch).logits
    for options, match in (
        ({"cache_implementation": "static"}, "cache_implementation"),
        ({"prefill_chunk_size": 8}, "prefill_chunk_size"),
    ):
        with pytest.raises(ValueError, match=match):
            oracle.generate(model, batch, **options)
    tokred.apply(model, "random_visual", budget=0.01)  # of 16: one token, as a share that is less leaves
    assert model(**batch).logits.isfinite().all()
    assert tokred.report(model).layers[-1].visual == (1, 2, 0)  # one of each image
    tokred.apply(model, "random_visual", budget=5)
    assert torch.equal(model(**batch).logits, expected)
    with pytest.raises(ValueError, match="4 decoder layers"):
        tokred.apply(model, "fastv", layer=4)
    assert torch.equal(model(**batch).logits, expected)
    tokred.remove(model)


def test_crop_and_reset(model):
    batch = tiny.prompts([[3, "image", 5]])
    tokred.apply(model, METHODS["both"]())
    cache = model(**batch, use_cache=True).past_key_values
    cache.crop(-2)
    assert cache.get_seq_length() == 22
    again = model(input_ids=batch["input_ids"][:, -2:], attention_mask=batch["attention_mask"], past_key_values=cache)
    torch.testing.assert_close(again.logits[:, -1], model(**batch).logits[:, -1])
    with pytest.raises(ValueError, match="pruned"):
        cache.crop(-8)
    assert cache.get_seq_length() == 24
    cache.reset()
    assert track_of(cache) is None
    tokred.remove(model)
