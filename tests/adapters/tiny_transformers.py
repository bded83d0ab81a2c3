"""Tiny random-weight models of every transformers family, made from configurations alone, three layers each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

SIZE, PATCH = 40, 8  # 25 patches
COMMON = {"hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 3, "intermediate_size": 64}
IMAGE = {**COMMON, "image_size": SIZE, "patch_size": PATCH}
VIDEO = {**COMMON, "image_size": 32, "patch_size": 8, "num_frames": 4}
TEXT = {
    "hidden_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 3,
    "intermediate_size": 32,
    "vocab_size": 60,
    "max_position_embeddings": 12,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
WHISPER = {
    "d_model": 48,
    "encoder_layers": 3,
    "decoder_layers": 2,
    "encoder_attention_heads": 3,
    "decoder_attention_heads": 3,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "num_mel_bins": 8,
    "max_source_positions": 30,
    "max_target_positions": 16,
    "vocab_size": 60,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
    "classifier_proj_size": 16,
}
BACK = {"out_indices": [1, 3]}
DENSE = {
    "neck_hidden_sizes": [8, 8, 8, 8],
    "fusion_hidden_size": 8,
    "backbone_out_indices": [0, 1, 2, 3],
    "num_hidden_layers": 4,
    "is_hybrid": False,
}


class Family(NamedTuple):
    """How to build a model, what to give it, and what to read off its output.

    Attributes:
        build: makes the model, given the transformers module.
        inputs: keyword arguments of a forward for a batch size.
        read: the tensors of an output that do not depend on the number of tokens.
        classes: the first token is a class token.
        protected: prefix and suffix.
        tokens: number of tokens.
        shape: what to give ``tokred.flops``.
    """

    build: Callable[[Any], nn.Module]
    inputs: Callable[[int], dict[str, Tensor]]
    read: str
    classes: bool = True
    prefix: int = 1
    suffix: int = 0
    tokens: int = 26
    shape: tuple[int, ...] = (1, 3, SIZE, SIZE)


def _noise(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


def images(b: int) -> dict[str, Tensor]:
    """Random images."""
    return {"pixel_values": _noise(b, 3, SIZE, SIZE)}


def videos(b: int) -> dict[str, Tensor]:
    """Random clips."""
    return {"pixel_values": _noise(b, 4, 3, 32, 32)}


def both(b: int) -> dict[str, Tensor]:
    """Random images and a text for each."""
    return {**images(b), "input_ids": torch.arange(3, 11).repeat(b, 1)}


def both2(b: int) -> dict[str, Tensor]:
    """What SigLIP 2 takes, without padding."""
    return {**packed(b), "input_ids": torch.arange(3, 11).repeat(b, 1)}


def packed(b: int) -> dict[str, Tensor]:
    """Patches of images of one size, for NaFlex models."""
    return {
        "pixel_values": _noise(b, 25, 3 * PATCH * PATCH),
        "pixel_attention_mask": torch.ones(b, 25, dtype=torch.long),
        "spatial_shapes": torch.tensor([[5, 5]] * b),
    }


def masked(b: int) -> dict[str, Tensor]:
    """Images of which some patches are masked."""
    return {**images(b), "bool_masked_pos": (torch.arange(25) % 3 == 0).repeat(b, 1)}


def masked_video(b: int) -> dict[str, Tensor]:
    """Clips of which half is masked."""
    return {**videos(b), "bool_masked_pos": (torch.arange(32) % 2 == 0).repeat(b, 1)}


def noisy(b: int) -> dict[str, Tensor]:
    """Images with the noise that chooses what a masked autoencoder sees; the same for every image."""
    return {**images(b), "noise": torch.rand(25, generator=torch.Generator().manual_seed(2)).repeat(b, 1)}


def sounds(b: int) -> dict[str, Tensor]:
    """Spectrograms for Whisper."""
    return {"input_features": _noise(b, 8, 60)}


def speech(b: int) -> dict[str, Tensor]:
    """Spectrograms and the first tokens of a transcript."""
    return {**sounds(b), "decoder_input_ids": torch.arange(3, 8).repeat(b, 1)}


def texts(b: int) -> dict[str, Tensor]:
    """Token ids without padding."""
    return {"input_ids": torch.randint(3, 60, (b, 26), generator=torch.Generator().manual_seed(1))}


def spectra(b: int) -> dict[str, Tensor]:
    """Spectrograms for the audio spectrogram transformer: 24 patches."""
    return {"input_values": _noise(b, 32, 24)}


RESNET = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic"}
DETR = {
    "d_model": 48,
    "encoder_layers": 3,
    "decoder_layers": 2,
    "encoder_attention_heads": 3,
    "decoder_attention_heads": 3,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "num_queries": 5,
    "use_timm_backbone": False,
    "backbone": None,
}


def _detr(name: str, config: str) -> Callable[[Any], nn.Module]:
    """A detector on a tiny ResNet with maps of 5 x 5."""
    return lambda t: getattr(t, name)(
        getattr(t, config)(**DETR, backbone_config=t.ResNetConfig(**RESNET, out_features=["stage2"]))
    )


def _of(name: str, config: str, **options: Any) -> Callable[[Any], nn.Module]:
    return lambda t: getattr(t, name)(getattr(t, config)(**options))


def _pair(name: str, config: str, vision: dict[str, Any], width: int = 16) -> Callable[[Any], nn.Module]:
    options: dict[str, Any] = {"vision_config": vision, "text_config": TEXT}
    if "Siglip" not in name:
        options["projection_dim"] = width
    return _of(name, config, **options)


DINO3 = {**IMAGE, "num_register_tokens": 4, "layerscale_value": 0.5}
SIGLIP2 = {**COMMON, "patch_size": PATCH, "num_patches": 25}
AST = {**COMMON, "patch_size": 8, "num_mel_bins": 24, "max_length": 32, "frequency_stride": 4, "time_stride": 8}
YOLOS = {**COMMON, "image_size": [SIZE, SIZE], "patch_size": PATCH, "num_detection_tokens": 5}
BEIT = {**IMAGE, "layer_scale_init_value": 0.5}
PLAIN = {"classes": False, "prefix": 0}
BERT = {**COMMON, "vocab_size": 60, "max_position_embeddings": 32, "pad_token_id": 0}
DISTIL = {"dim": 48, "n_layers": 3, "n_heads": 3, "hidden_dim": 64, "vocab_size": 60, "max_position_embeddings": 32}
MODERN = {**BERT, "global_attn_every_n_layers": 2, "local_attention": 16, "bos_token_id": 1, "eos_token_id": 2}
MODERN |= {"cls_token_id": 1, "sep_token_id": 2}

FAMILIES: dict[str, Family] = {
    "ViT": Family(_of("ViTModel", "ViTConfig", **IMAGE), images, "pooler_output"),
    "ViT classifier": Family(_of("ViTForImageClassification", "ViTConfig", **IMAGE), images, "logits"),
    "ViT masked": Family(
        _of("ViTForMaskedImageModeling", "ViTConfig", **IMAGE, encoder_stride=8), masked, "reconstruction"
    ),
    "DeiT": Family(
        _of("DeiTForImageClassificationWithTeacher", "DeiTConfig", **IMAGE), images, "logits", prefix=2, tokens=27
    ),
    "BEiT (own bias)": Family(
        _of("BeitForImageClassification", "BeitConfig", **BEIT, use_relative_position_bias=True), images, "logits"
    ),
    "BEiT (shared bias)": Family(
        _of("BeitModel", "BeitConfig", **BEIT, use_shared_relative_position_bias=True, use_mean_pooling=False),
        images,
        "pooler_output",
    ),
    "BEiT masked": Family(
        _of("BeitForMaskedImageModeling", "BeitConfig", **BEIT, use_mask_token=True, vocab_size=9), masked, "logits"
    ),
    "BEiT backbone": Family(_of("BeitBackbone", "BeitConfig", **BEIT, **BACK), images, "feature_maps"),
    "UperNet on BEiT": Family(
        lambda t: t.UperNetForSemanticSegmentation(
            t.UperNetConfig(
                backbone_config=t.BeitConfig(
                    **{**BEIT, "num_hidden_layers": 4},
                    use_relative_position_bias=True,
                    out_features=["stage1", "stage2", "stage3", "stage4"],
                    add_fpn=True,
                    reshape_hidden_states=True,
                ),
                hidden_size=8,
                auxiliary_in_channels=48,
                auxiliary_channels=8,
                num_labels=3,
            )
        ),
        images,
        "logits",
    ),
    "BEiT segmentation": Family(
        _of(
            "BeitForSemanticSegmentation",
            "BeitConfig",
            **{**BEIT, "num_hidden_layers": 4},
            use_relative_position_bias=True,
            out_indices=[1, 2, 3, 4],
            auxiliary_channels=8,
        ),
        images,
        "logits",
    ),
    "Data2Vec vision (own bias)": Family(
        _of("Data2VecVisionForImageClassification", "Data2VecVisionConfig", **BEIT, use_relative_position_bias=True),
        images,
        "logits",
    ),
    "Data2Vec vision (shared bias)": Family(
        _of(
            "Data2VecVisionForImageClassification",
            "Data2VecVisionConfig",
            **BEIT,
            use_shared_relative_position_bias=True,
            use_mean_pooling=False,
        ),
        images,
        "logits",
    ),
    "AST": Family(
        _of("ASTForAudioClassification", "ASTConfig", **AST), spectra, "logits", prefix=2, tokens=22, shape=(1, 32, 24)
    ),
    "ViT-MAE": Family(
        _of(
            "ViTMAEForPreTraining",
            "ViTMAEConfig",
            **IMAGE,
            mask_ratio=0.4,
            decoder_hidden_size=24,
            decoder_num_hidden_layers=1,
            decoder_num_attention_heads=2,
            decoder_intermediate_size=24,
        ),
        noisy,
        "logits",
        tokens=16,
        shape=(),
    ),
    "ViT-MSN": Family(_of("ViTMSNForImageClassification", "ViTMSNConfig", **IMAGE), images, "logits"),
    "I-JEPA": Family(_of("IJepaForImageClassification", "IJepaConfig", **IMAGE), images, "logits", tokens=25, **PLAIN),
    "ViViT": Family(
        _of("VivitForVideoClassification", "VivitConfig", **{**VIDEO, "tubelet_size": [2, 8, 8]}),
        videos,
        "logits",
        tokens=33,
        shape=(1, 4, 3, 32, 32),
    ),
    "TimeSformer": Family(
        _of("TimesformerForVideoClassification", "TimesformerConfig", **VIDEO),
        videos,
        "logits",
        tokens=17,
        shape=(1, 4, 3, 32, 32),
    ),
    "DINOv2": Family(_of("Dinov2Model", "Dinov2Config", **IMAGE), images, "pooler_output"),
    "DINOv2 classifier": Family(_of("Dinov2ForImageClassification", "Dinov2Config", **IMAGE), images, "logits"),
    "DINOv2 backbone": Family(_of("Dinov2Backbone", "Dinov2Config", **IMAGE, **BACK), images, "feature_maps"),
    "DINOv2 with registers": Family(
        _of("Dinov2WithRegistersForImageClassification", "Dinov2WithRegistersConfig", **IMAGE, num_register_tokens=4),
        images,
        "logits",
        prefix=5,
        tokens=30,
    ),
    "DINOv3": Family(_of("DINOv3ViTModel", "DINOv3ViTConfig", **DINO3), images, "pooler_output", prefix=5, tokens=30),
    "DINOv3 backbone": Family(
        _of("DINOv3ViTBackbone", "DINOv3ViTConfig", **DINO3, **BACK, use_gated_mlp=True),
        images,
        "feature_maps",
        prefix=5,
        tokens=30,
    ),
    "CLIP": Family(_pair("CLIPModel", "CLIPConfig", IMAGE), both, "image_embeds text_embeds"),
    "CLIP vision": Family(_of("CLIPVisionModel", "CLIPVisionConfig", **IMAGE), images, "pooler_output"),
    "CLIP projection": Family(
        _of("CLIPVisionModelWithProjection", "CLIPVisionConfig", **IMAGE, projection_dim=16), images, "image_embeds"
    ),
    "CLIP classifier": Family(_pair("CLIPForImageClassification", "CLIPConfig", IMAGE), images, "logits"),
    "CLIPSeg": Family(
        lambda t: t.CLIPSegForImageSegmentation(
            t.CLIPSegConfig(
                vision_config=IMAGE,
                text_config=TEXT,
                projection_dim=16,
                extract_layers=[0, 1, 2],
                reduce_dim=16,
                decoder_num_attention_heads=2,
                decoder_intermediate_size=16,
            )
        ),
        both,
        "logits",
    ),
    "OWL-ViT": Family(_pair("OwlViTForObjectDetection", "OwlViTConfig", IMAGE, 48), both, "logits pred_boxes"),
    "OWLv2": Family(
        _pair("Owlv2ForObjectDetection", "Owlv2Config", IMAGE, 48), both, "logits pred_boxes objectness_logits"
    ),
    "MetaCLIP 2": Family(_pair("MetaClip2ForImageClassification", "MetaClip2Config", IMAGE), images, "logits"),
    "SigLIP": Family(_pair("SiglipModel", "SiglipConfig", IMAGE), both, "image_embeds text_embeds", tokens=25, **PLAIN),
    "SigLIP vision": Family(
        _of("SiglipVisionModel", "SiglipVisionConfig", **IMAGE), images, "pooler_output", tokens=25, **PLAIN
    ),
    "SigLIP classifier": Family(
        _pair("SiglipForImageClassification", "SiglipConfig", IMAGE), images, "logits", tokens=25, **PLAIN
    ),
    "SigLIP 2": Family(
        _pair("Siglip2Model", "Siglip2Config", SIGLIP2),
        both2,
        "image_embeds text_embeds",
        tokens=25,
        shape=(1, 25, 3 * PATCH * PATCH),
        **PLAIN,
    ),
    "SigLIP 2 classifier": Family(
        _pair("Siglip2ForImageClassification", "Siglip2Config", SIGLIP2),
        packed,
        "logits",
        tokens=25,
        shape=(1, 25, 3 * PATCH * PATCH),
        **PLAIN,
    ),
    "YOLOS": Family(
        _of("YolosForObjectDetection", "YolosConfig", **YOLOS, use_mid_position_embeddings=False),
        images,
        "logits pred_boxes",
        suffix=5,
        tokens=31,
    ),
    "YOLOS (mid positions)": Family(
        _of("YolosForObjectDetection", "YolosConfig", **YOLOS, use_mid_position_embeddings=True),
        images,
        "logits pred_boxes",
        suffix=5,
        tokens=31,
    ),
    "DETR": Family(
        _detr("DetrForObjectDetection", "DetrConfig"),
        images,
        "logits pred_boxes encoder_last_hidden_state",
        tokens=25,
        **PLAIN,
    ),
    "Conditional DETR": Family(
        _detr("ConditionalDetrForObjectDetection", "ConditionalDetrConfig"),
        images,
        "logits pred_boxes",
        tokens=25,
        **PLAIN,
    ),
    "DPT": Family(_of("DPTForDepthEstimation", "DPTConfig", **{**IMAGE, **DENSE}), images, "predicted_depth"),
    "VideoMAE": Family(
        _of("VideoMAEForVideoClassification", "VideoMAEConfig", **VIDEO, use_mean_pooling=True),
        videos,
        "logits",
        tokens=32,
        shape=(1, 4, 3, 32, 32),
        **PLAIN,
    ),
    "VideoMAE (first token)": Family(
        _of("VideoMAEForVideoClassification", "VideoMAEConfig", **VIDEO, use_mean_pooling=False),
        videos,
        "logits",
        tokens=32,
        shape=(1, 4, 3, 32, 32),
        **PLAIN,
    ),
    "VideoMAE masked": Family(
        _of(
            "VideoMAEForPreTraining",
            "VideoMAEConfig",
            **VIDEO,
            decoder_hidden_size=24,
            decoder_num_hidden_layers=1,
            decoder_num_attention_heads=2,
            decoder_intermediate_size=24,
            norm_pix_loss=False,
        ),
        masked_video,
        "logits",
        tokens=16,
        shape=(),
        **PLAIN,
    ),
    "ViTPose": Family(
        lambda t: t.VitPoseForPoseEstimation(
            t.VitPoseConfig(
                backbone_config=t.VitPoseBackboneConfig(
                    **{
                        **COMMON,
                        "image_size": [SIZE, SIZE],
                        "patch_size": [PATCH, PATCH],
                        "out_indices": [3],
                        "mlp_ratio": 2,
                    }
                ),
                num_labels=3,
                use_simple_decoder=True,
            )
        ),
        images,
        "heatmaps",
        tokens=25,
        **PLAIN,
    ),
    "Depth Anything": Family(
        lambda t: t.DepthAnythingForDepthEstimation(
            t.DepthAnythingConfig(
                backbone_config=t.Dinov2Config(
                    **{**IMAGE, "num_hidden_layers": 4},
                    out_indices=[1, 2, 3, 4],
                    reshape_hidden_states=False,
                    apply_layernorm=True,
                ),
                reassemble_hidden_size=48,
                patch_size=PATCH,
                neck_hidden_sizes=[8, 8, 8, 8],
                fusion_hidden_size=8,
            )
        ),
        images,
        "predicted_depth",
    ),
    "Whisper": Family(
        _of("WhisperForConditionalGeneration", "WhisperConfig", **WHISPER),
        speech,
        "logits",
        tokens=30,
        shape=(1, 8, 60),
        **PLAIN,
    ),
    "Whisper classifier": Family(
        _of("WhisperForAudioClassification", "WhisperConfig", **WHISPER, use_weighted_layer_sum=True),
        sounds,
        "logits",
        tokens=30,
        shape=(1, 8, 60),
        **PLAIN,
    ),
    "BERT": Family(_of("BertModel", "BertConfig", **BERT), texts, "pooler_output last_hidden_state", shape=(1, 26)),
    "BERT classifier": Family(
        _of("BertForSequenceClassification", "BertConfig", **BERT), texts, "logits", shape=(1, 26)
    ),
    "RoBERTa tokens": Family(
        _of("RobertaForTokenClassification", "RobertaConfig", **BERT), texts, "logits", shape=(1, 26)
    ),
    "DistilBERT classifier": Family(
        _of("DistilBertForSequenceClassification", "DistilBertConfig", **DISTIL), texts, "logits", shape=(1, 26)
    ),
    "ELECTRA classifier": Family(
        _of("ElectraForSequenceClassification", "ElectraConfig", **BERT, embedding_size=24),
        texts,
        "logits",
        shape=(1, 26),
    ),
    "ModernBERT classifier": Family(
        _of("ModernBertForSequenceClassification", "ModernBertConfig", **MODERN), texts, "logits", shape=(1, 26)
    ),
}


def build(family: str, seed: int = 0) -> nn.Module:
    """A model in eval mode whose every parameter is random, so that no branch is zero."""
    import transformers

    torch.manual_seed(seed)
    model = FAMILIES[family].build(transformers).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(torch.randn_like(p) * (0.15 if p.ndim > 1 else 0.3))
            if p.ndim == 1 and "norm" in name and name.endswith("weight"):
                p.add_(1)
    return model


def read(family: str, out: Any) -> list[Tensor]:
    """The tensors of an output whose shape does not depend on the number of tokens."""
    found: list[Tensor] = []
    for name in FAMILIES[family].read.split():
        value = out[name]
        found.extend(value if isinstance(value, tuple | list) else [value])
    return found
