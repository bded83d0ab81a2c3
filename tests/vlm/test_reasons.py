"""What is said of models that are refused is true, and what is promised runs."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
import transformers as t

import tokred
from tests.kinds import VISION_LANGUAGE, each
from tests.vlm import hosts, oracle, tiny
from tests.vlm.test_methods import NAMES, SOME
from tests.vlm.uneven import Uneven

STAGES = ("projector", "layer")


def mistral3() -> Any:
    """Images of any size, whose patches are joined two by two."""
    torch.manual_seed(0)
    vision = {
        "model_type": "pixtral", "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2,
        "num_attention_heads": 2, "head_dim": 16, "image_size": 64, "patch_size": 4,
    }  # fmt: skip
    config = t.Mistral3Config(
        vision_config=vision, text_config={"model_type": "mistral", **tiny.TEXT, "sliding_window": None},
        image_token_index=98, spatial_merge_size=2, vision_feature_layer=-1,
    )  # fmt: skip
    return hosts.ready(t.Mistral3ForConditionalGeneration(config))


def sized(rows: list[list[Any]], seed: int = 1) -> dict[str, Any]:
    """A left-padded batch; an image is given by its height and width in pixels."""
    g = torch.Generator().manual_seed(seed)
    sequences, sizes = [], []
    for row in rows:
        ids: list[int] = []
        for part in row:
            if isinstance(part, int):
                ids += torch.randint(3, 90, (part,), generator=g).tolist()
            else:
                ids += [98] * (part[0] // 8 * (part[1] // 8))
                sizes.append(part)
        sequences.append(ids)
    longest = max(map(len, sequences))
    batch: dict[str, Any] = {
        "input_ids": torch.tensor([[0] * (longest - len(s)) + s for s in sequences]),
        "attention_mask": torch.tensor([[0] * (longest - len(s)) + [1] * len(s) for s in sequences]),
    }
    if sizes:
        high, wide = (max(s[i] for s in sizes) for i in (0, 1))
        batch["pixel_values"] = torch.randn(len(sizes), 3, high, wide, generator=g)
        batch["image_sizes"] = torch.tensor(sizes)
    return batch


def test_mistral_3():
    model, batch = mistral3(), sized([[3, (32, 16), 5], [2, (16, 48), 1, (32, 32), 4], [9]])
    stock = model(**batch).logits
    for method in (Uneven(), [tokred.make("divprune", budget=5), tokred.make("fastv", layer=1)]):
        oracle.agree(model, model.model.language_model.layers, method, batch)
    seen: list[Any] = []
    method = tokred.make("downsample_visual", budget=4)
    choose = method.choose
    object.__setattr__(method, "choose", lambda site: (seen.append(site), choose(site))[1])
    tokred.apply(model, method)
    model(**batch)
    assert [site.grid for site in seen] == [(4, 2), (2, 6), (4, 4)]
    tokred.remove(model)
    assert torch.equal(model(**batch).logits, stock)


# Families whose towers take videos as they take images.
FRAMES = {"qwen2_5_vl_video"}


@functools.cache
def model_of(name: str) -> Any:
    return mistral3() if name == "mistral3" else hosts.build(name)


@torch.no_grad()
@pytest.mark.parametrize("name", each([*hosts.HOSTS, "mistral3"], VISION_LANGUAGE))
def test_what_is_promised_runs(name):
    model = model_of(name)
    batch = sized([[3, (32, 32), 5]]) if name == "mistral3" else hosts.prompts(name, [[3, "image", 5]])
    rows = {row.method: row for row in tokred.supports(model)}
    for method in NAMES:
        settings = dict(SOME.get(method, {}))
        settings.update({"fastv": {"layer": 1}}.get(method, {}))
        if not rows[method].works:
            with pytest.raises((tokred.MissingInputError, tokred.UnsupportedModelError)) as caught:
                tokred.apply(model, method)
            assert "cache" not in str(caught.value), "a reason of its own"
            continue
        if name == "gemma3" and getattr(tokred.make(method), "evicts", False):
            with pytest.raises(ValueError, match="take evict=False"):  # a window's rows cannot be freed
                tokred.apply(model, method, **settings)
            settings["evict"] = False
        if method == "cat":  # with a method that reads what this tower has
            settings["selector"] = "divprune"
        tokred.apply(model, method, **settings)
        reads = tokred.make(method, **settings).reads
        reads = reads & {"tower_layers", "k"} or ("tower" in reads and reads & {"class_attention", "attention"})
        try:
            if hosts.HOSTS.get(name, hosts.HOSTS["llava"]).video and name not in FRAMES and reads:
                assert "of images alone" in rows[method].reason
                with pytest.raises(tokred.MissingInputError, match=r"frames of a video.* pools.*'divprune'"):
                    model(**batch)
                continue
            assert model(**batch).logits.isfinite().all()
        finally:
            tokred.remove(model)


@torch.no_grad()
@pytest.mark.parametrize("name", ["qwen2_5_vl", "onevision", "paligemma"])
def test_budgets_by_content_for_scores_without_a_class_token(name):
    model, batch = model_of(name), hosts.prompts(name, [[3, "image", 5, "image", 2]])
    inner = tokred.make("fastervlm", attention="received")
    tokred.apply(model, "cat", selector=inner, n_min=2, n_max=9)
    model(**batch)
    tokred.remove(model)
    whole = tokred.apply(model, "cat", selector="divprune", score="received", n_min=2, n_max=9)
    whole(**batch)
    assert 0 < tokred.report(model).layers[0].visual[0] < batch["input_ids"].shape[1]
    tokred.remove(model)


def colpali() -> Any:
    return t.ColPaliForRetrieval(t.ColPaliConfig(vlm_config=hosts.paligemma().config, embedding_dim=8))


def colqwen() -> Any:
    return t.ColQwen2ForRetrieval(t.ColQwen2Config(vlm_config=hosts.qwen2_vl().config, embedding_dim=8))


def gemma3_classifier() -> Any:
    return t.Gemma3ForSequenceClassification(hosts.gemma3().config)


def gemma3n() -> Any:
    text = {
        **tiny.TEXT, "hidden_size_per_layer_input": 4, "vocab_size_per_layer_input": 99, "num_kv_shared_layers": 2,
        "layer_types": ["sliding_attention", "full_attention"] * 2, "laurel_rank": 4, "altup_num_inputs": 2,
        "activation_sparsity_pattern": [0.0] * 4, "intermediate_size": [48] * 4,
    }  # fmt: skip
    sound = {"hidden_size": 16, "conf_num_attention_heads": 2, "conf_num_hidden_layers": 1, "vocab_size": 4}
    config = t.Gemma3nConfig(
        text_config=text, vision_config={"hidden_size": 32, "vocab_size": 8, "vocab_offset": 99},
        audio_config={**sound, "vocab_offset": 107},
    )  # fmt: skip
    pytest.importorskip("timm")
    with torch.device("meta"):
        return t.Gemma3nForConditionalGeneration(config)


def vipllava() -> Any:
    config = t.VipLlavaConfig(
        vision_config=t.CLIPVisionConfig(**tiny.VISION), text_config=t.LlamaConfig(**tiny.TEXT), image_token_index=98
    )
    return t.VipLlavaForConditionalGeneration(config)


def mllama() -> Any:
    vision = {
        "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_global_layers": 1,
        "attention_heads": 2, "image_size": 16, "patch_size": 4, "max_num_tiles": 2, "vision_output_dim": 64,
        "intermediate_layers_indices": [0], "supported_aspect_ratios": [[1, 1], [1, 2], [2, 1]],
    }  # fmt: skip
    text = {**tiny.TEXT, "cross_attention_layers": [1], "pad_token_id": 0}
    return t.MllamaForConditionalGeneration(t.MllamaConfig(vision_config=vision, text_config=text))


def idefics() -> Any:
    vision = {
        "embed_dim": 32, "image_size": 16, "patch_size": 4, "intermediate_size": 32, "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }  # fmt: skip
    perceiver = {"resampler_n_latents": 4, "resampler_depth": 1, "resampler_n_heads": 2, "resampler_head_dim": 8}
    config = t.IdeficsConfig(
        vocab_size=100, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        additional_vocab_size=2, cross_layer_interval=1, vision_config=vision, perceiver_config=perceiver,
    )  # fmt: skip
    return t.IdeficsForVisionText2Text(config)


WHOLE = r"ties its outputs to every token.*model\.(vlm|model)\)"
BESIDE = "reads its images in layers of cross-attention beside the prompt"
UNKNOWN = r"of a family whose image features.* does not know \(it knows LlavaModel"


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (colpali, WHOLE),
        (colqwen, WHOLE),
        (gemma3_classifier, WHOLE),
        (gemma3n, UNKNOWN),
        (vipllava, UNKNOWN),
        (mllama, BESIDE),
        (idefics, BESIDE),
    ],
)
def test_reasons_before_the_language_model(make, match):
    """A method there needs no cache: what stands in its way is another thing."""
    model = make()
    with pytest.raises(tokred.UnsupportedModelError, match=match) as caught:
        tokred.apply(model, "divprune")
    assert "loses rows" not in str(caught.value)
    row = next(row for row in tokred.supports(model) if row.method == "divprune")
    assert not row.works
    assert row.reason == str(caught.value)
    if match == WHOLE:
        with pytest.raises(tokred.UnsupportedModelError, match=match):
            tokred.apply(model, "fastv")


def test_a_method_inside_a_language_model_with_unknown_vision():
    model = vipllava()
    with pytest.raises(tokred.MissingInputError, match=r"it has vision, but of a family.*take 'fastkv'"):
        tokred.apply(model, "fastv")
    tokred.apply(model, "fastkv", tsp_layer=1, tsp_len=9, window=2)


@pytest.mark.parametrize("name", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl", "internvl", "idefics3", "mistral3"])
def test_towers_alone_are_encoders(name):
    core = model_of(name).model
    tower = next(getattr(core, n) for n in ("visual", "vision_tower", "vision_model") if hasattr(core, n))
    for method in ("divprune", "fastv"):
        with pytest.raises(tokred.MissingInputError, match=r"offers only stage 'block': take .*'tome'"):
            tokred.apply(tower, method)
    tokred.apply(tower, "tome", r=1)
    tokred.remove(tower)


def test_towers_that_are_encoders():
    tower = tiny.llava().model.vision_tower
    with pytest.raises(tokred.MissingInputError, match=r"offers only stage 'block': take .*'tome'"):
        tokred.apply(tower, "divprune")
    tokred.apply(tower, "tome", r=2)
