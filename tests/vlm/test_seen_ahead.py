"""Policies of the cache of Gemma 3, which makes masks before its language model: tokens of an image see one another."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

import tokred
from tests.kv.masked import evicted_rows, masked_reference
from tests.vlm import hosts, oracle

ROWS = [[7, "image", 5], [3, "image", 4, "image", 2], [4]]
POLICIES = [
    ("snapkv", {"budget": 8, "window": 4}),
    ("knorm", {"budget": 0.5}),
    ("streaming_llm", {"budget": 10}),
    ("keydiff", {"budget": 0.5}),
]


def reference(plain: Any, evicted: list[Tensor | None], first: int, batch: dict[str, Any]) -> Tensor:
    """Logits of a model that keeps all rows, and hides those that left from queries at ``first`` and later."""
    copied = masked_reference(plain, evicted, first)
    for one in (copied.config.text_config, copied.model.language_model.config):
        one._attn_implementation_internal = "kv_reference"
    return copied(**batch, use_cache=False).logits  # type: ignore[no-any-return]


def longer(batch: dict[str, Any], ids: Tensor) -> dict[str, Any]:
    """A prompt with more tokens of text behind it."""
    b, n = ids.shape
    more = {"input_ids": ids, "attention_mask": torch.ones(b, n, dtype=torch.long)}
    more["token_type_ids"] = torch.zeros(b, n, dtype=torch.long)
    return {**batch, **{k: torch.cat([batch[k], v], 1) for k, v in more.items()}}


@pytest.mark.parametrize(("name", "parameters"), POLICIES)
def test_what_left_is_what_is_masked(name: str, parameters: dict[str, Any]) -> None:
    model, batch = hosts.build("gemma3"), hosts.prompts("gemma3", ROWS)
    length, plain = batch["input_ids"].shape[1], copy.deepcopy(model)
    tokred.apply(model, name, **parameters)
    with torch.inference_mode():
        run = oracle.generate(model, batch)
        cache = run.past_key_values
        evicted = [None if x is None else x[..., :length] for x in evicted_rows(cache, cache.get_seq_length())]
        assert any(gone is not None and gone.any() for gone in evicted)
        if name != "streaming_llm":  # which lets a row go at every step
            wanted = reference(plain, evicted, length, longer(batch, run.sequences[:, length:-1]))[:, length - 1 :]
            torch.testing.assert_close(torch.stack(run.logits, 1), wanted, atol=2e-5, rtol=2e-4)
    tokred.remove(model)
    assert torch.equal(oracle.generate(model, batch).logits[1], oracle.generate(plain, batch).logits[1])


def test_a_format_holds_the_newest_rows_as_they_are() -> None:
    model, batch = hosts.build("gemma3"), hosts.prompts("gemma3", ROWS)
    wanted = oracle.generate(model, batch)
    found = oracle.generate(tokred.apply(model, "kivi"), batch)
    assert all(torch.equal(a, b) for a, b in zip(found.logits, wanted.logits, strict=True))


def test_an_image_in_a_later_turn_is_seen_both_ways() -> None:
    """Rows of the first turn have left; the tokens of the new image see one another, as in one prompt."""
    model = hosts.build("gemma3")
    plain = copy.deepcopy(model)
    first, second = hosts.prompts("gemma3", [[24]]), hosts.prompts("gemma3", [[2, "image", 3]], seed=5)
    whole = {**second, **{k: torch.cat([first[k], second[k]], 1) for k in first}}
    tokred.apply(model, "snapkv", budget=8, window=4)
    with torch.inference_mode():
        cache = model(**first, use_cache=True).past_key_values
        evicted = evicted_rows(cache, 24)
        given = {**second, **{k: whole[k] for k in ("attention_mask", "token_type_ids")}}
        later = model(**given, past_key_values=cache, use_cache=True).logits
        wanted = reference(plain, evicted, 24, whole)[:, 24:]
    torch.testing.assert_close(later, wanted, atol=2e-5, rtol=2e-4)


@pytest.mark.parametrize("cached", [True, False])
def test_tokens_that_leave_before_it_as_well(cached: bool) -> None:
    """Masks that are made for all tokens are cut to those that are left, with the pairs that see one another."""
    batch, fewer = hosts.prompts("gemma3", ROWS), tokred.make("divprune", budget=0.5)
    alone = oracle.generate(tokred.apply(hosts.build("gemma3"), fewer), batch, use_cache=cached)
    both = tokred.apply(hosts.build("gemma3"), [fewer, tokred.make("snapkv", budget=1.0, window=2)])
    for found, one in zip(oracle.generate(both, batch, use_cache=cached).logits, alone.logits, strict=True):
        torch.testing.assert_close(found, one, atol=1e-5, rtol=1e-4)
    few = tokred.apply(hosts.build("gemma3"), [fewer, tokred.make("snapkv", budget=6, window=2)])
    run = oracle.generate(few, batch, use_cache=cached)
    torch.testing.assert_close(run.logits[0], alone.logits[0], atol=1e-5, rtol=1e-4)
    if cached:
        assert not torch.equal(run.logits[2], alone.logits[2])
