"""Language models that keep states in some layers (Qwen3.5): fewer visual tokens before them are a shorter prompt."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

import tokred
from tests.vlm.hosts import build, layers, prompts
from tests.vlm.oracle import generate, kept
from tokred.adapters.tiny.vlm import HYBRIDS

FAMILIES = [*HYBRIDS]
ROWS = [[7, "image", 5], [3, "image", 4, "image", 2], [4]]
STEPS = 5


class Read(NamedTuple):
    """What one forward of a language model was given: embeddings ``(B, L, C)``, positions ``(..., B, L)``."""

    embeds: Tensor
    positions: Tensor


@contextlib.contextmanager
def listening(model: Any) -> Iterator[list[Read]]:
    """Inside, what the language model reads is noted."""
    found: list[Read] = []

    def note(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        found.append(Read(kwargs["inputs_embeds"], kwargs["position_ids"]))

    handle = model.model.language_model.register_forward_pre_hook(note, with_kwargs=True)
    try:
        yield found
    finally:
        handle.remove()


def shorter(model: Any, prompt: Read, keep: Tensor, steps: list[Tensor], ids: Tensor) -> Tensor:
    """Logits ``(T, V)`` of one sample by the unpatched language model, which reads what is kept, and no filler.

    Args:
        prompt: of one sample, with padding.
        keep: ``(L,)`` bool.
        steps: positions of every later token.
        ids: those tokens.
    """
    language, head = model.model.language_model, model.lm_head
    out = language(inputs_embeds=prompt.embeds[:, keep], position_ids=prompt.positions[..., keep], use_cache=True)
    cache, found = out.past_key_values, [head(out.last_hidden_state[:, -1])]
    for token, positions in zip(ids[:-1], steps, strict=True):
        out = language(input_ids=token.view(1, 1), position_ids=positions, use_cache=True, past_key_values=cache)
        found.append(head(out.last_hidden_state[:, -1]))
    return torch.cat(found)


def check(model: Any, plain: Any, batch: dict[str, Any], **options: Any) -> None:
    """Every sample of a patched model's answer is that of the unpatched language model to what is left of it."""
    with listening(plain) as read:
        generate(plain, batch, max_new_tokens=STEPS)
    with torch.inference_mode():
        pruned = generate(model, batch, max_new_tokens=STEPS, **options)
        length = batch["input_ids"].shape[1]
        keep = kept(pruned.past_key_values, length)[0] & batch["attention_mask"].bool()
        assert len({*keep.sum(1).tolist()}) == len(keep)  # samples differ
        logits, prompt = torch.stack(pruned.logits, 1), read[0]
        for b in range(len(keep)):
            one = Read(prompt.embeds[b : b + 1], prompt.positions[..., b : b + 1, :])
            steps = [r.positions[..., b : b + 1, :] for r in read[1:STEPS]]
            wanted = shorter(plain, one, keep[b], steps, pruned.sequences[b, length:])
            torch.testing.assert_close(logits[b], wanted, atol=2e-5, rtol=2e-4)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "method", ["divprune", *(pytest.param(n, marks=pytest.mark.hosts) for n in ("random_visual", "cdpruner"))]
)
def test_fewer_tokens_are_a_shorter_prompt(family: str, method: str) -> None:
    """Samples of one batch that lose different numbers of tokens each read what is left, and nothing else."""
    model, batch = build(family), prompts(family, ROWS)
    plain = copy.deepcopy(model)
    tokred.apply(model, method, budget=0.4)
    check(model, plain, batch)
    report = tokred.report(model)
    assert len(report.layers) == len(layers(family, model))
    tokred.remove(model)
    with torch.inference_mode():
        assert torch.equal(model(**batch).logits, plain(**batch).logits)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_policy_of_the_cache_beside_it(family: str) -> None:
    """Layers with rows evict some of what reached them; a budget for all is the prompt that was left."""
    batch = prompts(family, ROWS)
    alone = generate(tokred.apply(build(family), "divprune", budget=0.4), batch)
    first = tokred.make("divprune", budget=0.4)
    both = tokred.apply(build(family), [first, tokred.make("snapkv", budget=1.0, window=2)])
    for found, wanted in zip(generate(both, batch).logits, alone.logits, strict=True):
        torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-4)
    fewer = tokred.apply(build(family), [first, tokred.make("snapkv", budget=0.5, window=2)])
    rows = [
        next(layer.keys.shape[2] for layer in found.past_key_values.layers if hasattr(layer, "keys"))
        for found in (generate(fewer, batch), alone)
    ]
    assert rows[0] < rows[1]


@pytest.mark.parametrize("family", FAMILIES)
def test_beams_and_samples_that_are_repeated(family: str) -> None:
    """Several answers to one prompt: those of a batch of copies."""
    model, batch = tokred.apply(build(family), "divprune", budget=0.4), prompts(family, [ROWS[0]])
    torch.manual_seed(0)
    many = model.generate(**batch, max_new_tokens=STEPS, do_sample=True, num_return_sequences=3)
    assert many.shape[0] == 3
    beams = model.generate(**batch, max_new_tokens=STEPS, num_beams=2, do_sample=False)
    greedy = model.generate(**batch, max_new_tokens=STEPS, num_beams=1, do_sample=False)
    assert beams.shape == greedy.shape


@pytest.mark.parametrize("family", FAMILIES)
def test_a_second_turn(family: str) -> None:
    """Text and pictures go on behind a pruned prompt as in one prompt; filler would change states, and is refused."""
    model = tokred.apply(build(family), "divprune", budget=0.5)
    one, two = prompts(family, [[7, "image", 5]]), prompts(family, [[4]], seed=2)
    with torch.inference_mode():
        whole = dict(one)
        for name in {"input_ids", "attention_mask", "mm_token_type_ids"} & set(one):
            whole[name] = torch.cat([one[name], two[name]], 1)
        together = generate(model, whole)
        first = generate(model, one, max_new_tokens=1)
        assert first.past_key_values.get_seq_length() == one["input_ids"].shape[1]
        text = {k: v for k, v in whole.items() if k != "pixel_values"}
        later = generate(model, text, past_key_values=first.past_key_values)
        for found, wanted in zip(later.logits, together.logits, strict=True):
            torch.testing.assert_close(found, wanted, atol=2e-5, rtol=2e-4)
        batch, more = prompts(family, [[6], [6]]), prompts(family, [["image", 3], ["image", "image", 3]], seed=3)
        cache = model(**batch, use_cache=True).past_key_values
        more["attention_mask"] = torch.cat([batch["attention_mask"], more["attention_mask"]], 1)
        with pytest.raises(ValueError, match="keep a state, which filler would change"):
            model(**more, past_key_values=cache, use_cache=True)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", ["fastv", "pyramiddrop", "fastkv"])
def test_inside_no_token_leaves(family: str, method: str) -> None:
    row = next(row for row in tokred.supports(build(family)) if row.method == method)
    assert not row.works
    with pytest.raises(
        tokred.UnsupportedModelError, match=r"keep a (recurrent|convolution) state instead of keys and values"
    ):
        tokred.apply(build(family), method)


@pytest.mark.parametrize("family", FAMILIES)
def test_attention_is_not_calibrated(family: str) -> None:
    """A bias for each pair of tokens says nothing to layers with a state."""
    with pytest.raises(tokred.MissingInputError, match="calibration"):
        tokred.apply(build(family), "restore", base="divprune")


@pytest.mark.parametrize("family", FAMILIES)
def test_who_is_refused_inside_is_told_of_methods_that_act_before(family: str) -> None:
    model = build(family)
    with pytest.raises(tokred.UnsupportedModelError, match=r"before the language model run: tokred\.supports\(model\)"):
        tokred.apply(model, tokred.make("fastv"))
    named = {said.method for said in tokred.supports(model) if said.works}
    assert "divprune" in named
    assert "fastv" not in named
