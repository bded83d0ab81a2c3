"""Wrappers of modules and embeddings of the caller's own: tokens leave as ever, or the forward says why not."""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch

import tokred
from tests.kinds import VISION_LANGUAGE, each
from tests.vlm import hosts, oracle, tiny

ROWS: hosts.Rows = [[3, "image", 5], [2, "image", 1, "image", 4], [9]]
METHODS: dict[str, Callable[[], Any]] = {
    "divprune": lambda: tokred.make("divprune", budget=5),
    "fastervlm": lambda: tokred.make("fastervlm", budget=5),
    "visionzip": lambda: tokred.make("visionzip", budget=6, contextual=2),
    "fastv": lambda: tokred.make("fastv"),
}


@functools.cache
def model_of(name: str) -> Any:
    return hosts.build(name)


def offloaded(model: Any) -> Any:
    accelerate = pytest.importorskip("accelerate")
    return accelerate.cpu_offload(model, execution_device="cpu")


def dispatched(model: Any) -> Any:
    accelerate = pytest.importorskip("accelerate")
    return accelerate.dispatch_model(model, {"": "cpu"}, main_device="cpu", force_hooks=True)


def aligned(model: Any) -> Any:
    tools = pytest.importorskip("accelerate.hooks")
    for module in list(model.modules()):
        hook = tools.AlignDevicesHook(execution_device="cpu", io_same_device=True)
        tools.add_hook_to_module(module, hook, append=True)
    return model


@pytest.mark.parametrize("wrap", [offloaded, dispatched, aligned])
@pytest.mark.parametrize("first", ["wrapped", "patched"])
@pytest.mark.parametrize("method", METHODS)
def test_hooks_that_rebuild_arguments(method, first, wrap):
    model, batch = tiny.llava(), tiny.prompts(ROWS)
    plain = copy.deepcopy(model)
    tokred.apply(plain, METHODS[method]())
    expected = [plain(**batch).logits, *oracle.generate(plain, batch).logits]
    beams = oracle.generate(plain, batch, num_beams=2).sequences
    if first == "wrapped":
        model = tokred.apply(wrap(model), METHODS[method]())
    else:
        model = wrap(tokred.apply(model, METHODS[method]()))
    found = [model(**batch).logits, *oracle.generate(model, batch).logits]
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs)
    assert oracle.generate(model, batch, num_beams=2).sequences.tolist() == beams.tolist()


@pytest.mark.parametrize("name", each(hosts.HOSTS, VISION_LANGUAGE))
def test_features_that_are_rebuilt_are_known_by_their_values(name):
    """As where they come from another device."""
    model, batch = model_of(name), hosts.prompts(name, ROWS)
    if "mm_encoder_outputs" not in inspect.signature(type(model.model).forward).parameters:
        pytest.skip("this version takes no features")
    tokred.apply(model, tokred.make("random_visual", budget=3))
    expected = model(**batch).logits
    modality = "video" if hosts.HOSTS[name].video else "image"
    getter = getattr(model.model, f"get_{modality}_features")
    keys = [k for k in batch if k not in ("input_ids", "attention_mask", hosts.HOSTS[name].types)]
    output = getter(
        **{k: batch.pop(k) for k in keys if not k.endswith("_thw")},
        **{k: batch[k] for k in batch if k.endswith("_thw")},
    )
    moved = type(output)(
        **{k: torch.stack([f.clone() for f in v]) if isinstance(v, torch.Tensor) else [f.clone() for f in v]
           for k, v in output.items() if k == "pooler_output"},
        **{k: v for k, v in output.items() if k == "deepstack_features"},
    )  # fmt: skip
    found = model(**batch, mm_encoder_outputs={modality: moved}).logits
    tokred.remove(model)
    assert found.shape[1] < batch["input_ids"].shape[1]
    torch.testing.assert_close(found, expected)


def merged(model: Any, name: str, batch: dict[str, Any]) -> tuple[torch.Tensor, dict[str, Any]]:
    """Embeddings with features, as callers make them who run the model's parts themselves, and the other arguments."""
    host = hosts.HOSTS[name]
    modality = "video" if host.video else "image"
    rest = {k: v for k, v in batch.items() if "pixel" not in k and not k.startswith("image_sizes")}
    pixels = {k: v for k, v in batch.items() if k not in ("input_ids", "attention_mask", host.types)}
    ids = rest.pop("input_ids")
    embeds = model.get_input_embeddings()(ids)
    getter = getattr(model.model, f"get_{modality}_features")
    takes = inspect.signature(getattr(type(model.model), f"get_{modality}_features")).parameters
    if "pixel_values_videos" not in takes and "pixel_values_videos" in pixels:  # older versions call them all alike
        pixels["pixel_values"] = pixels.pop("pixel_values_videos")
    pooled = getter(**pixels).pooler_output
    visual = (ids == (97 if host.video else 98)).unsqueeze(-1)
    parts = [one.flatten(0, -2) for one in pooled]
    if sum(map(len, parts)) < visual.sum():  # older versions leave the newline behind a video to their forwards
        parts = [torch.cat([one, model.model.image_newline[None]]) for one in parts]
    features = torch.cat(parts)
    return embeds.masked_scatter(visual, features.to(embeds.dtype)), rest


# Those whose positions or masks need no more than what a caller has who merges the features.
MERGED = [n for n, host in hosts.HOSTS.items() if host.types == ""]


@pytest.mark.parametrize("stage", ["projector", "layer", "both"])
@pytest.mark.parametrize("name", MERGED)
def test_embeddings_of_the_callers(name, stage):
    model, batch = model_of(name), hosts.prompts(name, ROWS)
    methods = {"projector": [tokred.make("divprune", budget=3)], "layer": [tokred.make("fastv", layer=1)]}
    methods["both"] = [*methods["projector"], *methods["layer"]]
    tokred.apply(model, methods[stage])
    try:
        expected, left = model(**batch).logits, tokred.report(model).layers
        embeds, rest = merged(model, name, batch)
        found = model(inputs_embeds=embeds, **rest).logits
        assert tokred.report(model).layers == left
        torch.testing.assert_close(found, expected)
        longer = oracle.generate(model, {"inputs_embeds": embeds, **rest}, max_new_tokens=2)
        assert tokred.report(model).layers == left
        torch.testing.assert_close(longer.logits[0], expected[:, -1])
    finally:
        tokred.remove(model)


@pytest.mark.parametrize("name", MERGED)
def test_embeddings_that_the_model_merges_itself(name):
    """The tower runs inside the forward; its places are those of the placeholder's embedding."""
    model, batch = model_of(name), hosts.prompts(name, ROWS)
    tokred.apply(model, [tokred.make("divprune", budget=3), tokred.make("fastv", layer=1)])
    try:
        expected = model(**batch).logits
        embeds = model.get_input_embeddings()(batch.pop("input_ids"))
        torch.testing.assert_close(model(inputs_embeds=embeds, **batch).logits, expected)
    finally:
        tokred.remove(model)


@pytest.mark.parametrize("method", ["divprune", "fastv"])
def test_embeddings_that_cannot_be_told_apart(method):
    model, batch = tiny.llava(), tiny.prompts([[3, "image", 5]])
    stock, _ = merged(model, "llava", batch)
    mask = batch["attention_mask"]
    tokred.apply(model, METHODS[method]())
    with pytest.raises(tokred.BypassedError, match=rf"{method}.*inputs_embeds.*pixel_values.*tokred\.remove"):
        model(inputs_embeds=stock, attention_mask=mask)
    with pytest.raises(tokred.BypassedError, match="more than words"):
        model.model.language_model(inputs_embeds=stock, attention_mask=mask)
    merged(model, "llava", {**batch, "pixel_values": batch["pixel_values"] + 1})
    with pytest.raises(tokred.BypassedError, match="more than words"):
        model(inputs_embeds=stock, attention_mask=mask)
    words = model.get_input_embeddings()(torch.randint(3, 90, (2, 9)))
    assert model(inputs_embeds=words, attention_mask=torch.ones(2, 9)).logits.shape[1] == 9, "words alone pass"
    assert model(inputs_embeds=stock[:, :1]).logits.shape[1] == 1, "a step of decoding brings no image"
    short = model(**batch).logits
    tokred.remove(model)
    assert short.isfinite().all()
    assert model(inputs_embeds=stock, attention_mask=mask).logits.shape[1] == 24


@pytest.mark.parametrize("known", [True, False])
def test_embeddings_beside_their_ids(known):
    """Qwen takes both; for methods before the language model the features have to be known."""
    name = "qwen2_vl"
    model, batch = model_of(name), hosts.prompts(name, [[3, "image", 5], [6, "image", 4]])
    ids = batch["input_ids"]
    stock, rest = merged(model, name, batch)
    tokred.apply(model, [tokred.make("divprune", budget=3), tokred.make("fastv", layer=1)])
    try:
        expected = model(**batch).logits
        if known:
            embeds, rest = merged(model, name, batch)
            torch.testing.assert_close(model(input_ids=ids, inputs_embeds=embeds, **rest).logits, expected)
            return
        other = hosts.prompts(name, [[3, "image", 5]], seed=5)
        merged(model, name, other)
        with pytest.raises(tokred.BypassedError, match="get_image_features of the patched model gave last"):
            model(input_ids=ids, inputs_embeds=stock, **rest)
        tokred.apply(model, "fastv", layer=1)  # needs the places alone
        model(input_ids=ids, inputs_embeds=stock, **rest)
        assert tokred.report(model).layers[-1].visual == (8, 8)
    finally:
        tokred.remove(model)


def test_a_getter_that_is_passed_by():
    model, batch = tiny.llava(), tiny.prompts([[3, "image", 5]])
    tokred.apply(model, "divprune", budget=4)
    core = model.model
    core.__dict__["get_image_features"] = functools.partial(type(core).get_image_features, core)
    with pytest.raises(tokred.BypassedError, match=r"'divprune' did not run.*saw images.*tokred\.apply"):
        model(**batch)


def test_a_language_model_that_is_passed_by():
    model, batch = tiny.llava(), tiny.prompts([[3, "image", 5]])
    tokred.apply(model, [tokred.make("divprune", budget=4), tokred.make("fastv", layer=1)])
    other = copy.deepcopy(model)
    tokred.remove(other)
    layers = model.model.language_model.layers
    model.model.language_model.layers = other.model.language_model.layers
    with pytest.raises(tokred.BypassedError, match=r"'fastv' did not run: the decoder layers"):
        model(**batch)
    model.model.language_model.layers = layers
    model.model.language_model = other.model.language_model
    with pytest.raises(tokred.BypassedError, match=r"'divprune' did not run.*saw images"):
        model(**batch)


def test_features_of_others_are_not_taken_for_the_last_ones():
    model, batch = tiny.llava(), tiny.prompts([[3, "image", 5]])
    pixels = batch.pop("pixel_values")
    stock = model.model.get_image_features(pixels)
    tokred.apply(model, "fastervlm", budget=4)
    model.model.get_image_features(pixels + 1)
    with pytest.raises(tokred.BypassedError, match="not made by the patched model"):
        model(**batch, mm_encoder_outputs={"image": stock})
    model.model.get_image_features(pixels)
    assert model(**batch, mm_encoder_outputs={"image": stock}).logits.shape[1] == 12, "of the same values they are"
