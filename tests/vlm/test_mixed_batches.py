"""Batches whose samples have other numbers of images: every sample is what it is alone, one without images is left as
it is, and so is a batch of text."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch

import tokred
from tests.kinds import VISION_LANGUAGE, each
from tests.vlm import hosts, oracle, tiny
from tests.vlm.test_methods import NAMES, SOME
from tests.vlm.uneven import UnevenMean

ROWS: hosts.Rows = [[9], [3, "image", 5], [2, "image", 1, "image", 4], [6], [1, "image", "image", 1, "image", 2]]


@functools.cache
def model_of(name: str) -> Any:
    return hosts.build(name)


def alone(name: str, batch: dict[str, Any], i: int) -> dict[str, Any]:
    """One sample of a batch, without its padding."""
    real = batch["attention_mask"][i].bool()
    counts = [row.count("image") for row in ROWS]
    some = slice(sum(counts[:i]), sum(counts[: i + 1]))
    one: dict[str, Any] = {}
    for key, value in batch.items():
        if value.shape[:2] == batch["input_ids"].shape:
            one[key] = value[i : i + 1, real]
        elif not counts[i]:
            continue
        elif value.ndim == 2 and key.startswith("pixel_values"):  # patches of all images, one after the other
            each = value.shape[0] // sum(counts)
            one[key] = value[some.start * each : some.stop * each]
        elif name in ("idefics3", "smolvlm"):
            one[key] = value[i : i + 1, : counts[i]]
        else:
            one[key] = value[some]
    return one


@torch.no_grad()
@pytest.mark.parametrize("stage", ["projector", "layer", "both"])
@pytest.mark.parametrize("name", each(hosts.HOSTS, VISION_LANGUAGE))
def test_every_sample_is_what_it_is_alone(name, stage):
    model, batch = model_of(name), hosts.prompts(name, ROWS)
    outer, inner = tokred.make("divprune", budget=3), tokred.make("fastv", layer=1, query="mean")
    tokred.apply(model, {"projector": [outer], "layer": [inner], "both": [outer, inner]}[stage])
    together = oracle.generate(model, batch, max_new_tokens=2, min_new_tokens=2)
    left = tokred.report(model).layers[-1]
    for i, row in enumerate(ROWS):
        one = oracle.generate(model, alone(name, batch, i), max_new_tokens=2, min_new_tokens=2)
        for ours, theirs in zip(one.logits, together.logits, strict=True):
            torch.testing.assert_close(ours[0], theirs[i], rtol=1e-3, atol=1e-3)
        assert tokred.report(model).layers[-1].visual[0] == left.visual[i]
        assert (left.visual[i] == 0) == ("image" not in row)
    tokred.remove(model)


@torch.no_grad()
@pytest.mark.parametrize("name", NAMES)
def test_every_method(name):
    model, batch = model_of("llava"), hosts.prompts("llava", ROWS)
    tokred.apply(model, name, **SOME.get(name, {}))
    together = oracle.generate(model, batch, max_new_tokens=2, min_new_tokens=2)
    left = tokred.report(model).layers[-1].visual
    for i in range(len(ROWS)):
        one = oracle.generate(model, alone("llava", batch, i), max_new_tokens=2, min_new_tokens=2)
        for ours, theirs in zip(one.logits, together.logits, strict=True):
            torch.testing.assert_close(ours[0], theirs[i], rtol=1e-3, atol=1e-3)
        assert tokred.report(model).layers[-1].visual == (left[i],)
    tokred.remove(model)


@torch.no_grad()
@pytest.mark.parametrize("name", each(hosts.HOSTS, VISION_LANGUAGE))
def test_text_alone_is_left_as_it_is(name):
    model = model_of(name)
    for rows in ([[9], [4]], [[7]]):
        batch = hosts.prompts(name, rows)
        stock = oracle.generate(model, batch, max_new_tokens=2, min_new_tokens=2)
        tokred.apply(model, [tokred.make("divprune", budget=3), tokred.make("fastv", layer=1)])
        found = oracle.generate(model, batch, max_new_tokens=2, min_new_tokens=2)
        counts = tokred.report(model).layers
        tokred.remove(model)
        assert all(torch.equal(a, b) for a, b in zip(found.logits, stock.logits, strict=True))
        assert all(row.visual == (0,) * len(rows) and row.tokens == tuple(r[0] for r in rows) for row in counts)


def test_a_placeholder_without_an_image_is_a_word():
    """As where drafts copy from the prompt."""
    model = tiny.llava()
    ids = torch.tensor([[7, 98, 8, 98, 98, 9]])
    stock = model(input_ids=ids).logits
    tokred.apply(model, [tokred.make("divprune", budget=1), tokred.make("fastv", layer=1)])
    assert torch.equal(model(input_ids=ids).logits, stock)


@torch.no_grad()
def test_uneven_numbers_of_merged_tokens():
    """Slots that a sample has not are none of its own tokens, the first one too."""
    model, batch = model_of("llava"), hosts.prompts("llava", ROWS)
    tokred.apply(model, UnevenMean())
    together = model(**batch).logits[:, -1]
    assert len(set(tokred.report(model).layers[-1].visual)) > 3
    for i in range(len(ROWS)):
        torch.testing.assert_close(model(**alone("llava", batch, i)).logits[0, -1], together[i], rtol=1e-3, atol=1e-4)
    tokred.remove(model)
