"""What cannot work is refused before anything runs, with what would work instead; nothing is left half patched."""

from __future__ import annotations

import copy
import functools
import pickle
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
import transformers as t

import tokred
from tests.kinds import VISION_LANGUAGE, each
from tests.kv.tiny import build as language_model
from tests.kv.tiny import prompt as text_prompt
from tests.vlm import hosts, oracle
from tests.vlm.test_methods import NAMES, SOME
from tests.vlm.uneven import Uneven, UnevenLayer
from tokred.adapters.vlm.columns import left_pack
from tokred.adapters.vlm.masks import MaskMaker, gather_any_mask

STAGES = {"projector": lambda: Uneven(), "layer": lambda: tokred.make("fastv", layer=1)}
# Families whose tower has a class token that says something about single visual tokens.
WITH_CLASS = {"llava", "llava_next", "llava_next_video"}
# Those whose tower has none; the others merge several patches to a token.
WITHOUT = {"onevision", "onevision_video", "paligemma"}


@functools.cache
def model_of(name: str) -> Any:
    return hosts.build(name)


@pytest.fixture(params=each(hosts.HOSTS, VISION_LANGUAGE))
def name(request: pytest.FixtureRequest) -> Any:
    yield request.param
    assert whole(model_of(request.param))


def whole(model: Any) -> bool:
    tokred.remove(model)
    return not any("tokred" in key for m in model.modules() for key in m.__dict__)


@pytest.mark.parametrize("stage", STAGES)
def test_static_caches_and_chunks(name, stage):
    model, batch = model_of(name), hosts.prompts(name, [[3, "image", 5]])
    config = model.config.get_text_config()
    tokred.apply(model, STAGES[stage]())
    for options, match in (
        ({"cache_implementation": "static"}, r"'static' has rows for every token .* \(a DynamicCache\)"),
        ({"cache_implementation": "quantized"}, r"'quantized' is not known .* \(a DynamicCache\)"),
        ({"prefill_chunk_size": 8}, r"prefill_chunk_size=8 .*: leave it out"),
        ({"past_key_values": t.StaticCache(config=config, max_cache_len=64)}, r"a StaticCache .* \(a DynamicCache\)"),
    ):
        with pytest.raises(ValueError, match=match):
            oracle.generate(model, batch, **options)
    with pytest.raises(ValueError, match=r"a StaticCache .* \(a DynamicCache\)"):
        model(**batch, past_key_values=t.StaticCache(config=config, max_cache_len=64))
    assert model(**batch).logits.isfinite().all(), "what follows is as if it had not been tried"


@pytest.mark.parametrize("method", ["fastervlm", "hired", "visionzip", "prumerge", "vscan"])
def test_scores_of_a_class_token(name, method):
    model = model_of(name)
    if name in WITH_CLASS:
        if method == "vscan":
            with pytest.raises(ValueError, match=r"'vscan' reads layer 5 of the vision tower.* has 3 \(0 to 2\)"):
                tokred.apply(model, method)
        tokred.apply(model, method, **({"shallow": 0} if method == "vscan" else {}))
        return
    with pytest.raises(tokred.MissingInputError, match=r"class_attention, .*(works|here work .*divprune)") as caught:
        tokred.apply(model, method)
    if method == "fastervlm" and name in WITHOUT:
        assert "'fastervlm' with attention='received' works" in str(caught.value)


@pytest.mark.parametrize("method", [n for n in NAMES if "budget" in tokred.make(n).to_dict()["parameters"]])
def test_less_than_one_token(method):
    """No budget says so; a share that is less of a small image leaves one, or its batch would not run for its sake."""
    model, batch = model_of("llava"), hosts.prompts("llava", [[3, "image", 5]])
    if method == "sparsevlm":  # a share for each of its layers
        with pytest.raises(ValueError, match="budget"):
            tokred.make(method, layers=(0, 1), budget=(0.5, 0.0))
        return
    settings = {k: v for k, v in SOME.get(method, {}).items() if k != "contextual"}
    for budget in (0, 0.0, -1):
        with pytest.raises(ValueError, match="at least 1"):
            tokred.make(method, **{**settings, "budget": budget})
    tokred.apply(model, method, **{**settings, "budget": 0.01})
    assert model(**batch).logits.isfinite().all()
    assert tokred.report(model).layers[-1].visual == ((2 if method.startswith("prumerge") else 1),)


@pytest.mark.parametrize(
    ("method", "parameters"),
    [("fastv", {"ratio": 1.0}), ("cat", {"n_min": 0}), ("pyramiddrop", {"ratios": (0.5, 0.0, 0.5)})],
)
def test_no_token_at_all(method, parameters):
    with pytest.raises(ValueError, match=next(iter(parameters))):
        tokred.make(method, **parameters)


@pytest.mark.parametrize("method", NAMES)
def test_a_language_model_alone(method):
    model = language_model("llama", num_hidden_layers=18)
    stage = tokred.make(method).stage
    match = r"reads images.*'fastkv'.*'snapkv'" if stage == "layer" else r"offers only stage 'cache': take .*'snapkv'"
    with pytest.raises(tokred.MissingInputError, match=match):
        tokred.apply(model, method)
    assert whole(model)
    assert next(row for row in tokred.supports(model) if row.method == method).works is False


def test_a_language_model_alone_takes_what_drops_text():
    model = language_model("llama")
    tokred.apply(model, "fastkv", window=2, tsp_layer=1, tsp_len=8)
    assert model(text_prompt()).logits.isfinite().all()
    tokred.remove(model)


@pytest.mark.parametrize("method", [n for n in NAMES if tokred.make(n).stage == "layer"])
def test_positions_inside_the_language_model_stay(method):
    with pytest.raises(TypeError, match=r"no parameter 'positions'.*'divprune', take positions='repack'"):
        tokred.make(method, positions="repack")

    @dataclass(frozen=True)
    class Repacked(UnevenLayer):
        name: ClassVar[str] = "repacked"
        positions: str = "repack"

    with pytest.raises(ValueError, match=r"'repacked' has no positions.*'divprune', take positions='repack'"):
        tokred.apply(model_of("llava"), Repacked())
    assert whole(model_of("llava"))


def test_block_masks_for_images_that_see_themselves():
    """Flex attention's masks, where they are more than causal."""

    class BlockMask:
        pass

    packed = left_pack(torch.tensor([[True, False, True]]), (2,))
    before = torch.ones(1, 0, dtype=torch.bool)
    maker = MaskMaker(t.GemmaConfig(), None, packed.columns, packed.valid, 3, blocks=True)
    for run in (
        lambda: gather_any_mask(BlockMask(), packed, before, 3),
        lambda: gather_any_mask({"full_attention": BlockMask()}, packed, before, 3),
        lambda: maker(BlockMask(), torch.zeros(1, 2, 4), None, 1, None),
    ):
        with pytest.raises(ValueError, match=r"BlockMask cannot be cut down.*'sdpa'"):
            run()


def test_cache_policies_where_a_prompt_is_read_in_both_directions():
    with pytest.raises(tokred.UnsupportedModelError, match="see one another in both directions"):
        tokred.apply(model_of("paligemma"), "snapkv", budget=8, window=4)
    tokred.remove(tokred.apply(hosts.build("gemma3"), "snapkv", budget=8, window=4))  # runs: only images see ahead


SHORT = [("divprune", {"budget": 6}), ("divprune", {"budget": 6, "positions": "repack"}), ("fastv", {"layer": 1})]


@pytest.mark.parametrize(("name", "parameters"), SHORT)
def test_a_pruned_cache_is_of_a_patched_model(name, parameters):
    """Without the patch masks and positions would be those of other tokens: refused in the first later forward."""
    model, batch = hosts.build("llava"), hosts.prompts("llava", [[3, "image", 4, "image", 3], [20]])
    tokred.apply(model, name, **parameters)
    run = oracle.generate(model, batch)
    cache, ids = run.past_key_values, run.sequences
    mask = torch.nn.functional.pad(
        batch["attention_mask"], (0, ids.shape[1] - batch["attention_mask"].shape[1]), value=1
    )
    more = {"input_ids": ids, "attention_mask": mask}
    wanted = oracle.generate(model, more, **tokred.cache_kwargs(copy.deepcopy(cache)))
    again = pickle.loads(pickle.dumps(cache))
    found = oracle.generate(model, more, **tokred.cache_kwargs(again))
    assert all(torch.equal(a, b) for a, b in zip(found.logits, wanted.logits, strict=True))
    if name == "fastv":
        tokred.apply(model, "uniform_visual", budget=4)
        with pytest.raises(tokred.TokenStateError, match="between decoder layers"):
            oracle.generate(model, more, **tokred.cache_kwargs(copy.deepcopy(cache)))
    tokred.remove(model)
    with pytest.raises(tokred.TokenStateError, match="not patched"):
        oracle.generate(model, more, **tokred.cache_kwargs(copy.deepcopy(cache)))
