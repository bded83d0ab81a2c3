"""Methods of all stages on one model with vision: towers, projectors, layers, caches, one report; what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import tokred
from tests.vlm import hosts, oracle, tiny
from tests.vlm.uneven import Uneven

ROWS: hosts.Rows = [[3, "image", 5], [2, "image", 1, "image", 4], [9]]


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny.llava()


def pruned() -> list[Any]:
    return [Uneven(), tokred.make("fastv", layer=2, ratio=0.5)]


def test_a_policy_that_keeps_all_changes_nothing(model):
    batch = tiny.prompts(ROWS)
    tokred.apply(model, pruned())
    without = oracle.generate(model, batch, num_beams=2)
    tokred.apply(model, [*pruned(), tokred.make("snapkv", budget=1.0, window=2)])
    with_policy = oracle.generate(model, batch, num_beams=2)
    tokred.remove(model)
    assert without.sequences.tolist() == with_policy.sequences.tolist()
    assert all(torch.equal(a, b) for a, b in zip(without.logits, with_policy.logits, strict=True))


@pytest.mark.parametrize("policy", ["snapkv", "h2o", "fastkv"])
def test_all_stages_count_in_one_report(model, policy):
    batch = tiny.prompts(ROWS)
    settings = {"snapkv": {"budget": 8, "window": 2}, "h2o": {"budget": 8}, "fastkv": {"window": 2, "cap": 8}}[policy]
    if policy == "fastkv":
        settings |= {"tsp_len": 12, "tsp_layer": 1}
        methods = [tokred.make("tome", r=2), Uneven(), tokred.make("fastkv", **settings)]
    else:
        methods = [tokred.make("tome", r=2), *pruned(), tokred.make(policy, **settings)]
    tokred.apply(model, methods)
    out = oracle.generate(model, batch)
    report = tokred.report(model)
    rows = [layer.keys.shape[2] for layer in out.past_key_values.layers]
    tokred.remove(model)
    assert [row.layer for row in report.layers] == [0, 1, 2, 3]
    assert report.before == batch["input_ids"].shape[1]
    first, last = report.layers[0], report.layers[-1]
    assert first.columns == max(first.tokens) < report.before
    assert first.visual[2] == last.visual[2] == 0
    assert sum(last.tokens) < sum(first.tokens)
    if policy != "fastkv":  # text stays
        text = [[a - b for a, b in zip(row.tokens, row.visual, strict=True)] for row in (first, last)]
        assert text[0] == text[1]
    assert max(rows) <= 12
    assert out.past_key_values.get_seq_length() == report.before + 4
    tower, cache = report.more
    assert [row.tokens_out for row in tower.layers] == [15, 13, 11]
    assert [row.rows for row in cache.layers] == rows
    assert all(word in str(report) for word in ("visual", "block", "cache:"))


@pytest.mark.parametrize("name", ["llava_next", "onevision_video", "paligemma", "gemma3"])
def test_merging_inside_the_tower_keeps_the_count(name):
    model, batch = hosts.build(name), hosts.prompts(name, [[3, "image", 5]])
    stock = model(**batch).logits
    tokred.apply(model, [tokred.make("tome", r=2), tokred.make("random_visual", budget=1.0)])
    merged = model(**batch).logits
    assert merged.shape == stock.shape
    assert not torch.equal(merged, stock)
    tokred.remove(model)
    assert torch.equal(model(**batch).logits, stock)


def test_two_prompts_take_turns(model):
    """All state is the cache's: generations may interleave."""
    a, b = tiny.prompts([[3, "image", 5]]), tiny.prompts([[6, "image", 2]], seed=3)
    tokred.apply(model, pruned())
    step = {"input_ids": torch.tensor([[7]])}
    caches, expected = [], []
    for one in (a, b):
        cache = model(**one, use_cache=True).past_key_values
        expected.append(model(**step, past_key_values=cache).logits)
    for one in (a, b):
        caches.append(model(**one, use_cache=True).past_key_values)
    for cache, logits in zip(caches, expected, strict=True):
        assert torch.equal(model(**step, past_key_values=cache).logits, logits)
    tokred.remove(model)


@pytest.mark.parametrize(
    ("make", "error", "match"),
    [
        (lambda m: tokred.apply(m, "fastervlm", budget=0.0), ValueError, "budget"),
        (lambda m: tokred.apply(m, [tokred.make("tome", r=2), tokred.make("fastervlm")]), ValueError, "divprune"),
        (lambda m: tokred.apply(m, "fastv", expose="last"), ValueError, "expose"),
        (lambda m: tokred.apply(m, "random_visual", windows="all"), ValueError, "windows"),
        (lambda m: tokred.apply(m, [Uneven(), tokred.make("random_visual")]), ValueError, "one method a stage"),
    ],
)
def test_refused_before_anything_changes(model, make, error, match):
    with pytest.raises(error, match=match):
        make(model)
    assert not any(k.startswith("_tokred") for m in model.modules() for k in m.__dict__)


@pytest.mark.parametrize(
    ("name", "method", "error", "match"),
    [
        ("onevision", "fastervlm", tokred.MissingInputError, "received"),
        ("internvl", "fastervlm", tokred.MissingInputError, "class_attention"),
        ("gemma3", "hired", tokred.MissingInputError, "class_attention"),
        ("qwen3_vl", "pyramiddrop", None, ""),
    ],
)
def test_what_a_tower_does_not_tell_is_refused(name, method, error, match):
    model = hosts.build(name)
    if error is None:
        tokred.apply(model, method)
        return
    with pytest.raises(error, match=match):
        tokred.apply(model, method)


def test_deepstack_layers_come_first():
    model = hosts.build("qwen3_vl")
    model.config.vision_config.deepstack_visual_indexes = [0, 1]
    with pytest.raises(ValueError, match="before layer 2 at the earliest"):
        tokred.apply(model, "fastv", layer=1)


def test_features_that_come_in_part_are_refused(model):
    batch = tiny.prompts([[3, "image", 5, "image", 2]])
    outputs = model.model.get_image_features(batch["pixel_values"])
    tokred.apply(model, "random_visual", budget=5)
    wrong = {k: v for k, v in batch.items() if k != "pixel_values"}
    with pytest.raises(tokred.BypassedError, match="not made by the patched model"):
        model(**wrong, mm_encoder_outputs={"image": outputs})
    tokred.remove(model)
