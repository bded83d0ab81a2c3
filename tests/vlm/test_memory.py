"""Florence-2, whose prompt an encoder reads: visual tokens leave before the encoder, and from its memory. Dropping
them equals hiding them by the padding mask, which is all that the oracle does."""

from __future__ import annotations

import contextlib
import copy
import functools
import pickle
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutput

import tokred
from tests.vlm import oracle
from tests.vlm.uneven import Uneven, UnevenMean
from tokred.adapters.swap import Hook, Standin
from tokred.adapters.tiny import florence
from tokred.adapters.vlm.memory.hooks import mask_of
from tokred.adapters.vlm.taps import in_flight

ROWS: florence.Rows = [[3, "image", 5], [2, "image", 1, "image", 4], [9]]
# The longest sample has no image, and keeps all.
LONGER: florence.Rows = [[20], [3, "image"]]
OPTIONS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampling": {"do_sample": True, "temperature": 2.0},
    "beams": {"num_beams": 2, "num_return_sequences": 2},
    "static": {"cache_implementation": "static"},
    "no cache": {"use_cache": False},
}


@functools.cache
def stock() -> Any:
    return florence.build()


@pytest.fixture
def model() -> Iterator[Any]:
    yield stock()
    tokred.remove(stock())
    for module in stock().modules():
        assert not any("tokred" in key or isinstance(value, Standin) for key, value in module.__dict__.items())
        assert not any(isinstance(h, Hook) for h in module._forward_pre_hooks.values())
        assert not any(isinstance(h, Hook) for h in module._forward_hooks.values())


def encoder(model: Any) -> Any:
    return model.model.language_model.encoder


@contextlib.contextmanager
def kept(model: Any) -> Iterator[list[Tensor]]:
    """Inside, which tokens ``(B, L)`` each pass of a patched model's encoder keeps."""
    found: list[Tensor] = []

    def note(*_: Any) -> None:
        assert in_flight.language is not None
        packed, forward = in_flight.language.forward.packed, in_flight.language.forward
        assert packed is not None
        keep = torch.zeros(forward.batch, forward.length, dtype=torch.long)
        rows = torch.arange(forward.batch).unsqueeze(1).expand_as(packed.columns)
        keep[rows[packed.valid], packed.columns[packed.valid]] = 1
        found.append(keep)

    handle = encoder(model).register_forward_pre_hook(note)
    try:
        yield found
    finally:
        handle.remove()


def forced(batch: dict[str, Any]) -> dict[str, Any]:
    """The batch, with what the decoder has written."""
    return {**batch, "decoder_input_ids": torch.tensor([[2, 5, 6, 7]]).expand(len(batch["input_ids"]), -1)}


@pytest.mark.parametrize("rows", [ROWS, LONGER], ids=["uneven", "one keeps all"])
@pytest.mark.parametrize("options", OPTIONS)
def test_dropping_equals_masking(model, rows, options):
    batch = florence.prompts(rows)
    tokred.apply(model, Uneven())
    with kept(model) as keeps:
        pruned = oracle.generate(model, batch, **OPTIONS[options])
    tokred.remove(model)
    (keep,) = keeps
    assert len({*keep.sum(1).tolist()}) == len(rows)
    expected = oracle.generate(model, {**batch, "attention_mask": keep}, **OPTIONS[options])
    assert pruned.sequences.tolist() == expected.sequences.tolist()
    for ours, theirs in zip(pruned.logits, expected.logits, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("kernel", ["sdpa", "eager"])
@pytest.mark.parametrize("mask", [True, False])
def test_a_forward_and_its_memory(model, kernel, mask):
    """The memory is short, and serves by itself: the decoder sees which of its rows hold a token."""
    batch = forced(florence.prompts(ROWS[:2] if mask else [[3, "image", 5], [1, "image", 7]]))
    if not mask:
        batch.pop("attention_mask")
    model.set_attn_implementation(kernel)
    try:
        tokred.apply(model, Uneven())
        with kept(model) as keeps:
            pruned = model(**batch)
        memory, (keep,) = pruned.encoder_last_hidden_state, keeps
        assert memory.shape[1] == keep.sum(1).max() < batch["input_ids"].shape[1]
        told = {k: v for k, v in batch.items() if k in ("attention_mask", "decoder_input_ids")}
        again = model(encoder_outputs=BaseModelOutput(memory), **told)
        assert torch.equal(again.logits, pruned.logits)
        tokred.remove(model)
        expected = model(**{**batch, "attention_mask": keep})
    finally:
        tokred.remove(model)
        model.set_attn_implementation("sdpa")
    torch.testing.assert_close(pruned.logits, expected.logits, rtol=1e-5, atol=1e-5)
    assert not keep.all()
    for row, some, whole in zip(keep.bool(), memory, expected.encoder_last_hidden_state, strict=True):
        torch.testing.assert_close(some[len(some) - int(row.sum()) :], whole[row], rtol=1e-5, atol=1e-5)
        assert not some[: len(some) - int(row.sum())].any()


def test_loss_and_gradients(model):
    batch = florence.prompts(ROWS)
    labels = torch.tensor([[5, 6, 7, 2]] * 3)
    grads = []
    tokred.apply(model, Uneven())
    with kept(model) as keeps:
        losses = [model(**batch, labels=labels).loss]
    losses[0].backward()
    grads.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    model.zero_grad(set_to_none=True)
    tokred.remove(model)
    losses.append(model(**{**batch, "attention_mask": keeps[0]}, labels=labels).loss)
    losses[1].backward()
    torch.testing.assert_close(*losses)
    for name, p in model.named_parameters():
        if p.grad is not None:
            torch.testing.assert_close(grads[0][name], p.grad, rtol=1e-3, atol=1e-5, msg=name)
    model.zero_grad(set_to_none=True)


@torch.no_grad()
def test_nothing_to_remove_removal_and_copies_are_exact(model):
    batch = forced(florence.prompts(ROWS))
    bare = {k: v for k, v in forced(florence.prompts([[3, "image", 5]])).items() if k != "attention_mask"}
    outputs = [model(**given).logits for given in (batch, bare)]
    written = oracle.generate(model, florence.prompts(ROWS), num_beams=2)
    tokred.apply(model, "random_visual", budget=1.0)
    assert all(torch.equal(model(**g).logits, y) for g, y in zip((batch, bare), outputs, strict=True))
    same = oracle.generate(model, florence.prompts(ROWS), num_beams=2)
    assert all(torch.equal(a, b) for a, b in zip(written.logits, same.logits, strict=True))
    tokred.apply(model, Uneven())
    ours = model(**batch).logits
    assert not torch.equal(ours, outputs[0])
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(copied(**batch).logits, ours)
        assert torch.equal(tokred.remove(copied)(**batch).logits, outputs[0])
    text = forced(florence.prompts([[9], [4]]))
    of_text = model(**text).logits
    tokred.remove(model)
    assert all(torch.equal(model(**g).logits, y) for g, y in zip((batch, bare), outputs, strict=True))
    assert torch.equal(model(**text).logits, of_text)


@torch.no_grad()
@pytest.mark.parametrize(("dtype", "close"), [(torch.float16, 0.02), (torch.bfloat16, 0.1)], ids=["fp16", "bf16"])
def test_half_precision(dtype, close):
    model = copy.deepcopy(stock()).to(dtype)
    batch = florence.prompts(ROWS)
    batch["pixel_values"] = batch["pixel_values"].to(dtype)
    tokred.apply(model, Uneven())
    with kept(model) as keeps:
        pruned = oracle.generate(model, batch, max_new_tokens=1).logits[0].float()
        assert model(**forced(batch)).encoder_last_hidden_state.dtype == dtype
    tokred.remove(model)
    expected = oracle.generate(model, {**batch, "attention_mask": keeps[0]}, max_new_tokens=1).logits[0].float()
    assert pruned.isfinite().all()
    assert (pruned - expected).norm() < close * expected.norm()


@torch.no_grad()
@pytest.mark.parametrize("positions", ["keep", "repack"])
def test_positions_of_what_is_left(model, positions):
    tokred.apply(model, "uniform_visual", budget=4, positions=positions)
    embedding, seen = encoder(model).embed_positions, []
    handle = embedding.register_forward_hook(lambda m, a, output: seen.append(output))
    with kept(model) as keeps:
        model(**forced(florence.prompts([[3, "image", 5]])))
    handle.remove()
    columns = keeps[0][0].nonzero().squeeze(1)
    wanted = columns if positions == "keep" else torch.arange(len(columns))
    assert len(columns) == 3 + 1 + 4 + 5  # the mean of the image is no part of its grid, and stays
    assert torch.equal(seen[0], embedding.weight[embedding.offset + wanted].unsqueeze(0))


METHODS: dict[str, dict[str, Any]] = {
    "cat": {"selector": "divprune", "n_min": 3, "n_max": 5}, "cdpruner": {"budget": 4}, "divprune": {"budget": 4},
    "downsample_visual": {"budget": 4}, "flash_vl": {"s": 2}, "nemotron": {"s": 2}, "random_visual": {"budget": 4},
    "uniform_visual": {"budget": 4},
}  # fmt: skip


@torch.no_grad()
def test_methods_that_need_no_attention_of_the_tower_run(model):
    batch = forced(florence.prompts(ROWS))
    before = tokred.list_methods(stage="projector", model=model)
    assert {*METHODS} == {*before}
    works = {row.method for row in tokred.supports(model) if row.works}
    assert not works & {"visionzip", "fastervlm", "prumerge", "evs", "fastv", "sparsevlm", "tome", "restore"}
    for name, settings in METHODS.items():
        tokred.apply(model, name, **settings)
        assert model(**batch).logits.isfinite().all()
        report = tokred.report(model)
        assert report.before == batch["input_ids"].shape[1]
        assert [row.layer for row in report.layers] == [0, 1, 2]
        for row in report.layers:
            assert row.columns == max(row.tokens)
            assert [a - b for a, b in zip(row.tokens, row.visual, strict=True)] == [8, 7, 9]
            assert row.visual[2] == 0
            assert name == "cat" or row.visual[:2] == (5, 10)
    tokred.apply(model, UnevenMean())
    merged = model(**batch).logits
    tokred.apply(model, Uneven())
    assert not torch.equal(merged, model(**batch).logits)


def test_rows_of_the_memory_leave_the_cache_too(model):
    batch = florence.prompts(ROWS)
    tokred.apply(model, Uneven())
    pruned = oracle.generate(model, batch, num_beams=2)
    tokred.apply(model, [Uneven(), tokred.make("snapkv", budget=1.0, window=2)])
    both = oracle.generate(model, batch, num_beams=2)
    assert pruned.sequences.tolist() == both.sequences.tolist()
    for ours, theirs in zip(pruned.logits, both.logits, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "settings", "error", "match"),
    [
        ("fastv", {}, tokred.UnsupportedModelError, "reads its prompt in an encoder.*'divprune'"),
        ("visionzip", {}, tokred.MissingInputError, "reads class_attention, k, which .*here work .*divprune"),
        ("restore", {}, tokred.MissingInputError, "reads calibration"),
        ("tome", {"r": 2}, tokred.UnsupportedModelError, "methods of another stage"),
    ],
)
def test_what_does_not_run_here(model, name, settings, error, match):
    with pytest.raises(error, match=match):
        tokred.apply(model, name, **settings)
    with pytest.raises(tokred.UnsupportedModelError, match="cannot watch a stream: it reads all of its prompt"):
        tokred.stream(model)


@torch.no_grad()
def test_what_cannot_be_told_is_refused(model):
    batch = forced(florence.prompts([[3, "image", 5]]))
    tokred.apply(model, "uniform_visual", budget=4)
    pixels = batch.pop("pixel_values")
    embeds = torch.randn(1, 25, 32)
    with pytest.raises(tokred.BypassedError, match="visual tokens cannot be told from others"):
        model(inputs_embeds=embeds, decoder_input_ids=batch["decoder_input_ids"])
    pairs = batch["attention_mask"][:, None, None, :].expand(-1, 1, 25, -1).bool()
    with pytest.raises(ValueError, match=r"a mask for each pair of tokens does not fit a prompt that was pruned"):
        model(**{**batch, "attention_mask": pairs}, pixel_values=pixels)
    assert in_flight.core is None
    assert in_flight.language is None


def test_an_encoder_with_other_positions_is_refused():
    model = copy.deepcopy(stock())
    del encoder(model).embed_positions
    with pytest.raises(tokred.UnsupportedModelError, match="a BartEncoder, which does not embed positions"):
        tokred.apply(model, "divprune", budget=4)


def test_masks_of_memories():
    full, short = torch.ones(2, 4, 3), torch.ones(2, 4, 3)
    short[1, :2] = 0
    given = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]])
    found = [[True] * 4, [False, False, True, True]]
    assert mask_of(full, None) is None
    assert mask_of(short, None).tolist() == found
    assert torch.equal(mask_of(full, given), given)
    assert mask_of(short, given).tolist() == mask_of(short, torch.ones(2, 9).long()).tolist()
    assert mask_of(short, torch.ones(2, 9)).tolist() == found
    assert mask_of(full, torch.ones(2, 9, dtype=torch.bool)).all()
    assert mask_of(full, torch.ones(2, 3)) is None  # the host says what is wrong with it
    assert mask_of(full, torch.ones(2, 1, 5, 4)) is None
