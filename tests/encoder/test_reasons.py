"""What ``supports`` says: never a promise that a forward breaks, and the true reason where there is none."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("transformers")

import transformers

import tokred
from tests.encoder import tiny_transformers
from tests.encoder.tiny_transformers import BERT, COMMON, FAMILIES, IMAGE, SIGLIP2, VIDEO
from tests.kinds import TRANSFORMERS, each

SMALL = {"tome": {"r": 3}, "evit": {"kappa": 0.6, "blocks": (1,)}, "downsample": {"keep": 0.5}}
# Classes and settings that no family of the tiny models has: the class, its configuration, options, inputs.
OTHERS: dict[str, tuple[str, str, dict[str, Any], Any]] = {
    "CamemBERT": ("CamembertModel", "CamembertConfig", BERT, tiny_transformers.texts),
    "ERNIE": ("ErnieModel", "ErnieConfig", BERT, tiny_transformers.texts),
    "XLM-RoBERTa": ("XLMRobertaModel", "XLMRobertaConfig", BERT, tiny_transformers.texts),
    "BERT, a single type": ("BertModel", "BertConfig", {**BERT, "type_vocab_size": 1}, tiny_transformers.texts),
    "ViT, no bias": ("ViTModel", "ViTConfig", {**IMAGE, "qkv_bias": False}, tiny_transformers.images),
    "DINOv2, gated": ("Dinov2Model", "Dinov2Config", {**IMAGE, "use_swiglu_ffn": True}, tiny_transformers.images),
    "BEiT, no bias": ("BeitModel", "BeitConfig", {**IMAGE, "use_mean_pooling": True}, tiny_transformers.images),
    "BEiT, places": (
        "BeitModel", "BeitConfig", {**IMAGE, "use_absolute_position_embeddings": True}, tiny_transformers.images,
    ),
    "SigLIP, no head": (
        "SiglipVisionModel", "SiglipVisionConfig", {**IMAGE, "vision_use_head": False}, tiny_transformers.images,
    ),
    "SigLIP 2": ("Siglip2VisionModel", "Siglip2VisionConfig", SIGLIP2, tiny_transformers.packed),
    "YOLOS": (
        "YolosModel", "YolosConfig",
        {**COMMON, "image_size": [40, 40], "patch_size": 8, "num_detection_tokens": 5}, tiny_transformers.images,
    ),
    "ViTMAE": ("ViTMAEModel", "ViTMAEConfig", {**IMAGE, "mask_ratio": 0.5}, tiny_transformers.noisy),
    "VideoMAE": ("VideoMAEModel", "VideoMAEConfig", VIDEO, tiny_transformers.videos),
    "ViViT": ("VivitModel", "VivitConfig", {**VIDEO, "tubelet_size": [2, 8, 8]}, tiny_transformers.videos),
    "I-JEPA": ("IJepaModel", "IJepaConfig", IMAGE, tiny_transformers.images),
    "CLIPSeg": ("CLIPSegVisionModel", "CLIPSegVisionConfig", IMAGE, tiny_transformers.images),
    "OWL-ViT": ("OwlViTVisionModel", "OwlViTVisionConfig", IMAGE, tiny_transformers.images),
}  # fmt: skip


def made(label: str) -> tuple[nn.Module, dict[str, Any]]:
    """A model and its inputs."""
    if label in FAMILIES:
        return tiny_transformers.build(label), FAMILIES[label].inputs(2)
    name, config, options, inputs = OTHERS[label]
    torch.manual_seed(0)
    return getattr(transformers, name)(getattr(transformers, config)(**options)).eval(), inputs(2)


@pytest.mark.parametrize("label", each([*(f for f in FAMILIES if f not in OTHERS), *OTHERS], TRANSFORMERS))
def test_a_promise_is_kept_and_a_refusal_is_one(label):
    model, x = made(label)
    promised = {row.method: row for row in tokred.supports(model)}
    for name, parameters in SMALL.items():
        if not promised[name].works:
            with pytest.raises((tokred.MissingInputError, tokred.UnsupportedModelError)):
                tokred.apply(model, name, **parameters)
            continue
        tokred.apply(model, name, **parameters)
        with torch.no_grad():
            model(**x)
        layers = tokred.report(model).layers
        assert min(row.tokens_out for row in layers) < layers[0].tokens_in, f"{name} removed nothing"
        tokred.remove(model)


def tower(name: str, config: str, **options: Any) -> nn.Module:
    """A model without values."""
    with torch.device("meta"):
        return getattr(transformers, name)(getattr(transformers, config)(**options))


def refusal(model: nn.Module) -> str:
    """Why no block method runs on it, as ``supports`` and ``apply`` both say."""
    with pytest.raises(tokred.UnsupportedModelError) as error:
        tokred.apply(model, "tome", r=2)
    said = {row.reason for row in tokred.supports(model) if row.method in ("tome", "evit")}
    assert said == {str(error.value)}
    return str(error.value)


def test_towers_that_are_not_known():
    """They join patches, or see a whole clip at once; there is something to do for each all the same."""
    import importlib

    for family, name, config, words in (
        ("glm_ocr", "GlmOcrVisionModel", "GlmOcrVisionConfig", "2 x 2 patches that stand side by side are joined"),
        ("mllama", "MllamaVisionModel", "MllamaVisionConfig", "a class token and padding inside"),
    ):
        module = f"transformers.models.{family}"
        made = getattr(importlib.import_module(f"{module}.configuration_{family}"), config)()
        with torch.device("meta"):
            model = getattr(importlib.import_module(f"{module}.modeling_{family}"), name)(made)
        said = refusal(model)
        assert words in said
        assert "encoder inside" not in said


def test_an_encoder_inside_is_named_only_where_there_is_one():
    config = transformers.VisionTextDualEncoderConfig.from_vision_text_configs(
        transformers.ViTConfig(num_hidden_layers=1), transformers.BertConfig(num_hidden_layers=1)
    )
    with torch.device("meta"):
        both: Any = transformers.VisionTextDualEncoderModel(config)
    assert "apply to the encoder inside it: model.vision_model" in refusal(both)
    assert any(row.works for row in tokred.supports(both.vision_model))
    for name, config_name in (("Wav2Vec2Model", "Wav2Vec2Config"), ("DebertaV2Model", "DebertaV2Config")):
        assert "inside" not in refusal(tower(name, config_name, num_hidden_layers=1))


def test_models_of_language():
    text = {"num_hidden_layers": 1, "hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 2}
    said = refusal(tower("LlamaModel", "LlamaConfig", vocab_size=60, **text))
    assert "attends to those before it" in said
    assert "inside" not in said
    with torch.device("meta"):
        whole = transformers.MllamaModel(transformers.MllamaConfig())
    assert "counts and places the tokens of its vision encoder" in refusal(whole)
