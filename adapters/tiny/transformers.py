"""Every family of transformers' encoders, made from configurations alone, three layers each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from tokred.adapters.tiny.config import Config
from tokred.adapters.tiny.given import (
    PATCH,
    SIZE,
    both,
    both2,
    images,
    masked,
    masked_video,
    noisy,
    packed,
    sounds,
    spectra,
    speech,
    texts,
    videos,
)
from tokred.adapters.tiny.weights import scattered


class Family(NamedTuple):
    """How to build a model, what to give it, and what to read off its output.

    Attributes:
        model: its class.
        config: its configuration.
        inputs: keyword arguments of a forward for a batch size.
        read: the tensors of an output that do not depend on the number of tokens.
        classes: the first token is a class token.
        prefix, suffix: tokens that are protected.
        tokens: number of tokens.
        shape: what to give ``tokred.flops``.
    """

    model: str
    config: Config
    inputs: Callable[[int], dict[str, Tensor]]
    read: str
    classes: bool = True
    prefix: int = 1
    suffix: int = 0
    tokens: int = 26
    shape: tuple[int, ...] = (1, 3, SIZE, SIZE)


Options = dict[str, Any]
COMMON: Options = {"hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 3, "intermediate_size": 64}
FOUR: Options = {"num_hidden_layers": 4}
IMAGE: Options = {**COMMON, "image_size": SIZE, "patch_size": PATCH}
VIDEO: Options = {**COMMON, "image_size": 32, "patch_size": 8, "num_frames": 4}
CLIP_SHAPE = (1, 4, 3, 32, 32)
TEXT: Options = {
    "hidden_size": 48, "num_hidden_layers": 1, "num_attention_heads": 3, "intermediate_size": 32, "vocab_size": 60,
    "max_position_embeddings": 12, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
WHISPER: Options = {
    "d_model": 48, "encoder_layers": 3, "decoder_layers": 2, "encoder_attention_heads": 3,
    "decoder_attention_heads": 3, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "num_mel_bins": 8,
    "max_source_positions": 30, "max_target_positions": 16, "vocab_size": 60, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2, "decoder_start_token_id": 1, "classifier_proj_size": 16,
}  # fmt: skip
BACK: Options = {"out_indices": [1, 3]}
DPT: Options = {
    **IMAGE, **FOUR, "neck_hidden_sizes": [8, 8, 8, 8], "fusion_hidden_size": 8, "backbone_out_indices": [0, 1, 2, 3],
    "is_hybrid": False,
}  # fmt: skip
DECODER: Options = {
    "decoder_hidden_size": 24, "decoder_num_hidden_layers": 1, "decoder_num_attention_heads": 2,
    "decoder_intermediate_size": 24,
}  # fmt: skip
# A detector on a tiny ResNet with maps of 5 x 5.
DETR: Options = {
    "d_model": 48, "encoder_layers": 3, "decoder_layers": 2, "encoder_attention_heads": 3,
    "decoder_attention_heads": 3, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "num_queries": 5,
    "use_timm_backbone": False, "backbone": None,
    "backbone_config": Config("ResNetConfig", {
        "embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic",
        "out_features": ["stage2"],
    }),
}  # fmt: skip
DINO3: Options = {**IMAGE, "num_register_tokens": 4, "layerscale_value": 0.5}
SIGLIP2: Options = {**COMMON, "patch_size": PATCH, "num_patches": 25}
AST: Options = {
    **COMMON, "patch_size": 8, "num_mel_bins": 24, "max_length": 32, "frequency_stride": 4, "time_stride": 8,
}  # fmt: skip
YOLOS: Options = {**COMMON, "image_size": [SIZE, SIZE], "patch_size": PATCH, "num_detection_tokens": 5}
BEIT: Options = {**IMAGE, "layer_scale_init_value": 0.5}
OWN: Options = {"use_relative_position_bias": True}
COMMON_BIAS: Options = {"use_shared_relative_position_bias": True, "use_mean_pooling": False}
BERT: Options = {**COMMON, "vocab_size": 60, "max_position_embeddings": 32, "pad_token_id": 0}
DISTIL: Options = {
    "dim": 48, "n_layers": 3, "n_heads": 3, "hidden_dim": 64, "vocab_size": 60, "max_position_embeddings": 32,
}  # fmt: skip
MODERN: Options = {
    **BERT, "global_attn_every_n_layers": 2, "local_attention": 16, "bos_token_id": 1, "eos_token_id": 2,
    "cls_token_id": 1, "sep_token_id": 2,
}  # fmt: skip
PLAIN: dict[str, Any] = {"classes": False, "prefix": 0}
VISION_ONLY: dict[str, Any] = {"tokens": 25, **PLAIN}
HEARD: dict[str, Any] = {"tokens": 30, "shape": (1, 8, 60), **PLAIN}
FLEX: dict[str, Any] = {"shape": (1, 25, 3 * PATCH * PATCH), **VISION_ONLY}
WRITTEN: dict[str, Any] = {"shape": (1, 26)}


def _towers(name: str, vision: Options, **more: Any) -> Config:
    return Config(name, {"vision_config": vision, "text_config": TEXT, **more})


def _around(name: str, inner: Config, **more: Any) -> Config:
    return Config(name, {"backbone_config": inner, **more})


FAMILIES: dict[str, Family] = {
    "ViT": Family("ViTModel", Config("ViTConfig", IMAGE), images, "pooler_output"),
    "ViT classifier": Family("ViTForImageClassification", Config("ViTConfig", IMAGE), images, "logits"),
    "ViT masked": Family(
        "ViTForMaskedImageModeling", Config("ViTConfig", {**IMAGE, "encoder_stride": 8}), masked, "reconstruction"
    ),
    "DeiT": Family(
        "DeiTForImageClassificationWithTeacher", Config("DeiTConfig", IMAGE), images, "logits", prefix=2, tokens=27
    ),
    "BEiT (own bias)": Family(
        "BeitForImageClassification", Config("BeitConfig", {**BEIT, **OWN}), images, "logits"
    ),
    "BEiT (shared bias)": Family(
        "BeitModel", Config("BeitConfig", {**BEIT, **COMMON_BIAS}), images, "pooler_output"
    ),
    "BEiT masked": Family(
        "BeitForMaskedImageModeling", Config("BeitConfig", {**BEIT, "use_mask_token": True, "vocab_size": 9}), masked,
        "logits",
    ),
    "BEiT backbone": Family("BeitBackbone", Config("BeitConfig", {**BEIT, **BACK}), images, "feature_maps"),
    "UperNet on BEiT": Family(
        "UperNetForSemanticSegmentation",
        _around(
            "UperNetConfig",
            Config("BeitConfig", {
                **BEIT, **FOUR, **OWN, "out_features": ["stage1", "stage2", "stage3", "stage4"], "add_fpn": True,
                "reshape_hidden_states": True,
            }),
            hidden_size=8, auxiliary_in_channels=48, auxiliary_channels=8, num_labels=3,
        ),
        images, "logits",
    ),
    "BEiT segmentation": Family(
        "BeitForSemanticSegmentation",
        Config("BeitConfig", {**BEIT, **FOUR, **OWN, "out_indices": [1, 2, 3, 4], "auxiliary_channels": 8}),
        images, "logits",
    ),
    "Data2Vec vision (own bias)": Family(
        "Data2VecVisionForImageClassification", Config("Data2VecVisionConfig", {**BEIT, **OWN}), images, "logits"
    ),
    "Data2Vec vision (shared bias)": Family(
        "Data2VecVisionForImageClassification", Config("Data2VecVisionConfig", {**BEIT, **COMMON_BIAS}), images,
        "logits",
    ),
    "AST": Family(
        "ASTForAudioClassification", Config("ASTConfig", AST), spectra, "logits", prefix=2, tokens=22,
        shape=(1, 32, 24),
    ),
    "ViT-MAE": Family(
        "ViTMAEForPreTraining", Config("ViTMAEConfig", {**IMAGE, **DECODER, "mask_ratio": 0.4}), noisy, "logits",
        tokens=16, shape=(),
    ),
    "ViT-MSN": Family("ViTMSNForImageClassification", Config("ViTMSNConfig", IMAGE), images, "logits"),
    "I-JEPA": Family("IJepaForImageClassification", Config("IJepaConfig", IMAGE), images, "logits", **VISION_ONLY),
    "ViViT": Family(
        "VivitForVideoClassification", Config("VivitConfig", {**VIDEO, "tubelet_size": [2, 8, 8]}), videos, "logits",
        tokens=33, shape=CLIP_SHAPE,
    ),
    "TimeSformer": Family(
        "TimesformerForVideoClassification", Config("TimesformerConfig", VIDEO), videos, "logits", tokens=17,
        shape=CLIP_SHAPE,
    ),
    "DINOv2": Family("Dinov2Model", Config("Dinov2Config", IMAGE), images, "pooler_output"),
    "DINOv2 classifier": Family("Dinov2ForImageClassification", Config("Dinov2Config", IMAGE), images, "logits"),
    "DINOv2 backbone": Family("Dinov2Backbone", Config("Dinov2Config", {**IMAGE, **BACK}), images, "feature_maps"),
    "DINOv2 with registers": Family(
        "Dinov2WithRegistersForImageClassification",
        Config("Dinov2WithRegistersConfig", {**IMAGE, "num_register_tokens": 4}), images, "logits", prefix=5,
        tokens=30,
    ),
    "DINOv3": Family(
        "DINOv3ViTModel", Config("DINOv3ViTConfig", DINO3), images, "pooler_output", prefix=5, tokens=30
    ),
    "DINOv3 backbone": Family(
        "DINOv3ViTBackbone", Config("DINOv3ViTConfig", {**DINO3, **BACK, "use_gated_mlp": True}), images,
        "feature_maps", prefix=5, tokens=30,
    ),
    "CLIP": Family("CLIPModel", _towers("CLIPConfig", IMAGE, projection_dim=16), both, "image_embeds text_embeds"),
    "CLIP vision": Family("CLIPVisionModel", Config("CLIPVisionConfig", IMAGE), images, "pooler_output"),
    "CLIP projection": Family(
        "CLIPVisionModelWithProjection", Config("CLIPVisionConfig", {**IMAGE, "projection_dim": 16}), images,
        "image_embeds",
    ),
    "CLIP classifier": Family(
        "CLIPForImageClassification", _towers("CLIPConfig", IMAGE, projection_dim=16), images, "logits"
    ),
    "CLIPSeg": Family(
        "CLIPSegForImageSegmentation",
        _towers(
            "CLIPSegConfig", IMAGE, projection_dim=16, extract_layers=[0, 1, 2], reduce_dim=16,
            decoder_num_attention_heads=2, decoder_intermediate_size=16,
        ),
        both, "logits",
    ),
    "OWL-ViT": Family(
        "OwlViTForObjectDetection", _towers("OwlViTConfig", IMAGE, projection_dim=48), both, "logits pred_boxes"
    ),
    "OWLv2": Family(
        "Owlv2ForObjectDetection", _towers("Owlv2Config", IMAGE, projection_dim=48), both,
        "logits pred_boxes objectness_logits",
    ),
    "MetaCLIP 2": Family(
        "MetaClip2ForImageClassification", _towers("MetaClip2Config", IMAGE, projection_dim=16), images, "logits"
    ),
    "SigLIP": Family(
        "SiglipModel", _towers("SiglipConfig", IMAGE), both, "image_embeds text_embeds", **VISION_ONLY
    ),
    "SigLIP vision": Family(
        "SiglipVisionModel", Config("SiglipVisionConfig", IMAGE), images, "pooler_output", **VISION_ONLY
    ),
    "SigLIP classifier": Family(
        "SiglipForImageClassification", _towers("SiglipConfig", IMAGE), images, "logits", **VISION_ONLY
    ),
    "SigLIP 2": Family(
        "Siglip2Model", _towers("Siglip2Config", SIGLIP2), both2, "image_embeds text_embeds", **FLEX
    ),
    "SigLIP 2 classifier": Family(
        "Siglip2ForImageClassification", _towers("Siglip2Config", SIGLIP2), packed, "logits", **FLEX
    ),
    "YOLOS": Family(
        "YolosForObjectDetection", Config("YolosConfig", {**YOLOS, "use_mid_position_embeddings": False}), images,
        "logits pred_boxes", suffix=5, tokens=31,
    ),
    "YOLOS (mid positions)": Family(
        "YolosForObjectDetection", Config("YolosConfig", {**YOLOS, "use_mid_position_embeddings": True}), images,
        "logits pred_boxes", suffix=5, tokens=31,
    ),
    "DETR": Family(
        "DetrForObjectDetection", Config("DetrConfig", DETR), images, "logits pred_boxes encoder_last_hidden_state",
        **VISION_ONLY,
    ),
    "Conditional DETR": Family(
        "ConditionalDetrForObjectDetection", Config("ConditionalDetrConfig", DETR), images, "logits pred_boxes",
        **VISION_ONLY,
    ),
    "DPT": Family("DPTForDepthEstimation", Config("DPTConfig", DPT), images, "predicted_depth"),
    "VideoMAE": Family(
        "VideoMAEForVideoClassification", Config("VideoMAEConfig", {**VIDEO, "use_mean_pooling": True}), videos,
        "logits", tokens=32, shape=CLIP_SHAPE, **PLAIN,
    ),
    "VideoMAE (first token)": Family(
        "VideoMAEForVideoClassification", Config("VideoMAEConfig", {**VIDEO, "use_mean_pooling": False}), videos,
        "logits", tokens=32, shape=CLIP_SHAPE, **PLAIN,
    ),
    "VideoMAE masked": Family(
        "VideoMAEForPreTraining", Config("VideoMAEConfig", {**VIDEO, **DECODER, "norm_pix_loss": False}),
        masked_video, "logits", tokens=16, shape=(), **PLAIN,
    ),
    "ViTPose": Family(
        "VitPoseForPoseEstimation",
        _around(
            "VitPoseConfig",
            Config("VitPoseBackboneConfig", {
                **COMMON, "image_size": [SIZE, SIZE], "patch_size": [PATCH, PATCH], "out_indices": [3], "mlp_ratio": 2,
            }),
            num_labels=3, use_simple_decoder=True,
        ),
        images, "heatmaps", **VISION_ONLY,
    ),
    "Depth Anything": Family(
        "DepthAnythingForDepthEstimation",
        _around(
            "DepthAnythingConfig",
            Config("Dinov2Config", {
                **IMAGE, **FOUR, "out_indices": [1, 2, 3, 4], "reshape_hidden_states": False, "apply_layernorm": True,
            }),
            reassemble_hidden_size=48, patch_size=PATCH, neck_hidden_sizes=[8, 8, 8, 8], fusion_hidden_size=8,
        ),
        images, "predicted_depth",
    ),
    "Whisper": Family(
        "WhisperForConditionalGeneration", Config("WhisperConfig", WHISPER), speech, "logits", **HEARD
    ),
    "Whisper classifier": Family(
        "WhisperForAudioClassification", Config("WhisperConfig", {**WHISPER, "use_weighted_layer_sum": True}), sounds,
        "logits", **HEARD,
    ),
    "BERT": Family("BertModel", Config("BertConfig", BERT), texts, "pooler_output last_hidden_state", **WRITTEN),
    "BERT classifier": Family(
        "BertForSequenceClassification", Config("BertConfig", BERT), texts, "logits", **WRITTEN
    ),
    "RoBERTa tokens": Family(
        "RobertaForTokenClassification", Config("RobertaConfig", BERT), texts, "logits", **WRITTEN
    ),
    "DistilBERT classifier": Family(
        "DistilBertForSequenceClassification", Config("DistilBertConfig", DISTIL), texts, "logits", **WRITTEN
    ),
    "ELECTRA classifier": Family(
        "ElectraForSequenceClassification", Config("ElectraConfig", {**BERT, "embedding_size": 24}), texts, "logits",
        **WRITTEN,
    ),
    "ModernBERT classifier": Family(
        "ModernBertForSequenceClassification", Config("ModernBertConfig", MODERN), texts, "logits", **WRITTEN
    ),
}  # fmt: skip


def build(family: str, seed: int = 0) -> nn.Module:
    """A model in evaluation mode whose every parameter is random, so that no branch is zero."""
    import transformers

    row = FAMILIES[family]
    torch.manual_seed(seed)
    model: nn.Module = getattr(transformers, row.model)(row.config.make(transformers))
    return scattered(model)


def read(family: str, out: Any) -> list[Tensor]:
    """The tensors of an output whose shape does not depend on the number of tokens."""
    found: list[Tensor] = []
    for name in FAMILIES[family].read.split():
        value = out[name]
        found.extend(value if isinstance(value, tuple | list) else [value])
    return found
