"""transformers: the tables of encoders, and of the models around one, that are known to be right with fewer tokens."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from tokred.adapters.encoder.timm import gather_embeddings, gather_rope

# What the model does with its tokens, weakest demand first: it reads the prefix or takes any length ("short"); it pools
# over all of them ("pooled"); it counts on their positions, at the end ("last") or between blocks ("all").
DEMANDS = ("short", "pooled", "last", "all")
Demand = str | Callable[[Any], str]


@dataclass(frozen=True)
class Encoder:
    """One encoder class.

    Attributes:
        layers: where its list of layers is.
        prefix, suffix: protected tokens, or how to read them off the model.
        demand: what the encoder itself does with its last tokens.
        class_token: whether the first token is a class token.
        positions: keyword arguments of a layer that follow the tokens, and how.
        keys: sub-module of a layer that makes the keys, where those that the attention sees are rotated already.
        relative: attention adds a bias to each pair of tokens, so its columns do not follow from queries and keys.
        rank: dimensions of an input.
        masked: most patches are taken out before the first layer, so that those left form no grid.
        clip: of an encoder of videos: frames, rows and columns of its tokens.
        embed: makes the tokens of an input, positions and protected tokens aside; given the encoder.
        outer: ``embed`` is given the model around the encoder.
    """

    layers: str
    prefix: int | Callable[[Any], int] = 1
    suffix: int | Callable[[Any], int] = 0
    demand: Demand = "short"
    class_token: bool = True
    positions: dict[str, Callable[..., Any]] = field(default_factory=dict)
    keys: str | None = None
    relative: bool = False
    rank: int = 4
    masked: bool = False
    clip: Callable[[Any], tuple[int, int, int]] | None = None
    outer: bool = False
    embed: Callable[[Any, Tensor], Tensor] = lambda model, x: _patches(model.embeddings.patch_embeddings, x)


def gather_tables(tables: tuple[Tensor, ...], representative: Tensor, prefix: int) -> tuple[Tensor, ...]:
    """Cosine and sine tables ``(N, D)`` at the rows that are left, ``(B, 1, M - prefix, D)``.

    DINOv3 takes the prefix to be what its tables lack in length: without this, dropping a few tokens would shift every
    position and raise nothing.
    """
    return tuple(gather_rope(t, representative, prefix) for t in tables)


def never(value: Any, representative: Tensor, prefix: int) -> bool:
    """Once tokens have gone, a BEiT layer must not interpolate its bias to their number; it is gathered instead."""
    return False


def _registers(model: Any) -> int:
    return 1 + int(model.config.num_register_tokens)


def _beit_pooler(model: Any) -> str:
    return "pooled" if model.pooler is not None and model.config.use_mean_pooling else "short"


def _data2vec(model: Any) -> str:
    # The shared bias is made anew before every layer, for as many tokens as come in.
    return "all" if model.config.use_shared_relative_position_bias else _beit_pooler(model)


def _video_head(model: Any) -> str:
    # Without mean pooling the head reads the first patch, which is not a class token.
    return "pooled" if model.config.use_mean_pooling else "last"


def _tubelets(model: Any) -> tuple[int, int, int]:
    """Steps of the convolution that makes the tokens of a video, frame after frame."""
    config, (t, h, w) = model.config, model.embeddings.patch_embeddings.projection.stride
    high, wide = config.image_size if not isinstance(config.image_size, int) else (config.image_size,) * 2
    return config.num_frames // t, high // h, wide // w


def _mid_positions(model: Any) -> str:
    return "all" if model.config.use_mid_position_embeddings else "short"


def _patches(module: nn.Module, x: Tensor) -> Tensor:
    """``(B, N, C)`` what a copy of ``module`` makes of an input on the meta device."""
    made: Any = copy.deepcopy(module).to("meta")(x)
    out: Tensor = made[0] if isinstance(made, tuple) else made
    return out.flatten(2).mT if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d) else out


def _siglip_embed(model: Any, x: Tensor) -> Tensor:
    return _patches(model.embeddings.patch_embedding, x)


def _aimv2_embed(model: Any, x: Tensor) -> Tensor:
    return _patches(model.embeddings.patch_embed, x)


def _whisper_embed(model: Any, x: Tensor) -> Tensor:
    return _patches(model.conv2, _patches(model.conv1, x).mT)


def _detr_embed(model: Any, x: Tensor) -> Tensor:
    whole = next((m for m in model.modules() if hasattr(m, "backbone") and hasattr(m, "input_projection")), None)
    if whole is None:
        raise ValueError("tokens of DETR's encoder are counted from the whole model, which has the backbone")
    backbone, projection = (copy.deepcopy(m).to("meta") for m in (whole.backbone, whole.input_projection))
    mask = torch.ones(1, *x.shape[-2:], device="meta")
    return _patches(projection, backbone(x, mask)[-1][0])


_ROPE: dict[str, Any] = {"positions": {"position_embeddings": gather_tables}, "keys": "attention.k_proj"}
_VIDEO: dict[str, Any] = {"rank": 5, "clip": _tubelets}
_PLAIN: dict[str, Any] = {"prefix": 0, "class_token": False}
_CLIP = Encoder("encoder.layers", embed=_siglip_embed)
_IDEFICS = Encoder("encoder.layers", embed=_siglip_embed, **_PLAIN)
_DINO3 = Encoder("model.layer", _registers, **_ROPE)

_DETR = Encoder(
    "layers",
    demand="last",
    positions={"spatial_position_embeddings": gather_embeddings},
    embed=_detr_embed,
    outer=True,
    **_PLAIN,
)

ENCODERS: dict[str, Encoder] = {
    "ViTModel": Encoder("layers"),
    "DeiTModel": Encoder("layers", 2),
    "BeitModel": Encoder("layers", demand=_beit_pooler, positions={"interpolate_pos_encoding": never}, relative=True),
    "Data2VecVisionModel": Encoder(
        "encoder.layer", demand=_data2vec, positions={"interpolate_pos_encoding": never}, relative=True
    ),
    "ASTModel": Encoder("layers", 2, rank=3),
    "ViTMAEModel": Encoder("layers", masked=True),
    "ViTMSNModel": Encoder("layers"),
    "IJepaModel": Encoder("layers", demand=lambda m: "short" if m.pooler is None else "last", **_PLAIN),
    "VivitModel": Encoder("layers", **_VIDEO),
    "Dinov2Model": Encoder("encoder.layer"),
    "Dinov2Backbone": Encoder("encoder.layer", demand="all"),
    "Dinov2WithRegistersModel": Encoder("encoder.layer", _registers),
    "Dinov2WithRegistersBackbone": Encoder("encoder.layer", _registers, demand="all"),
    "DINOv3ViTModel": _DINO3,
    "DINOv3ViTBackbone": Encoder("model.layer", _registers, demand="all", **_ROPE),
    "CLIPVisionModel": _CLIP,
    "CLIPSegVisionModel": _CLIP,
    "OwlViTVisionTransformer": _CLIP,
    "Owlv2VisionTransformer": _CLIP,
    "MetaClip2VisionModel": _CLIP,
    "SiglipVisionModel": Encoder(
        "encoder.layers", demand=lambda m: "pooled" if m.use_head else "short", embed=_siglip_embed, **_PLAIN
    ),
    "Siglip2VisionModel": Encoder("encoder.layers", demand="last", embed=_siglip_embed, rank=3, **_PLAIN),
    "Aimv2VisionModel": Encoder(
        "encoder.layers", demand=lambda m: "pooled" if m.use_head else "short", embed=_aimv2_embed, **_PLAIN
    ),
    "InternVLVisionModel": Encoder("encoder.layer"),
    "Idefics3VisionTransformer": _IDEFICS,
    "SmolVLMVisionTransformer": _IDEFICS,
    "YolosModel": Encoder("encoder.layer", suffix=lambda m: int(m.config.num_detection_tokens), demand=_mid_positions),
    "DPTModel": Encoder("encoder.layer", demand="all"),
    "VideoMAEModel": Encoder("encoder.layer", **_VIDEO, **_PLAIN),
    "VitPoseBackbone": Encoder("encoder.layer", demand="all", **_PLAIN),
    "WhisperEncoder": Encoder("layers", rank=3, embed=_whisper_embed, **_PLAIN),
    "DetrEncoder": _DETR,
    "ConditionalDetrEncoder": _DETR,
}

# Class of a model around an encoder: where the encoder is, and what the model does with its tokens.
HEADS: dict[str, tuple[str, Demand]] = {
    "ViTForImageClassification": ("vit", "short"),
    "ViTForMaskedImageModeling": ("vit", "last"),
    "DeiTForImageClassification": ("deit", "short"),
    "DeiTForImageClassificationWithTeacher": ("deit", "short"),
    "DeiTForMaskedImageModeling": ("deit", "last"),
    "BeitForImageClassification": ("beit", "short"),
    "BeitForMaskedImageModeling": ("beit", "last"),
    "BeitForSemanticSegmentation": ("beit", "all"),
    "BeitBackbone": ("beit", "all"),
    "Data2VecVisionForImageClassification": ("data2vec_vision", "short"),
    "Data2VecVisionForSemanticSegmentation": ("data2vec_vision", "all"),
    "ASTForAudioClassification": ("audio_spectrogram_transformer", "short"),
    "ViTMAEForPreTraining": ("vit", "last"),
    "ViTMSNForImageClassification": ("vit", "short"),
    "IJepaForImageClassification": ("ijepa", "pooled"),
    "VivitForVideoClassification": ("vivit", "short"),
    "Dinov2ForImageClassification": ("dinov2", "pooled"),
    "Dinov2WithRegistersForImageClassification": ("dinov2_with_registers", "pooled"),
    "CLIPModel": ("vision_model", "short"),
    "CLIPVisionModelWithProjection": ("vision_model", "short"),
    "CLIPForImageClassification": ("vision_model", "pooled"),
    "CLIPSegModel": ("vision_model", "short"),
    "CLIPSegForImageSegmentation": ("clip.vision_model", "all"),
    "OwlViTVisionModel": ("vision_model", "short"),
    "OwlViTModel": ("vision_model", "short"),
    "OwlViTForObjectDetection": ("owlvit.vision_model", "last"),
    "Owlv2VisionModel": ("vision_model", "short"),
    "Owlv2Model": ("vision_model", "short"),
    "Owlv2ForObjectDetection": ("owlv2.vision_model", "last"),
    "MetaClip2Model": ("vision_model", "short"),
    "MetaClip2VisionModelWithProjection": ("vision_model", "short"),
    "MetaClip2ForImageClassification": ("vision_model", "pooled"),
    "SiglipModel": ("vision_model", "short"),
    "SiglipForImageClassification": ("vision_model", "pooled"),
    "Siglip2Model": ("vision_model", "short"),
    "Siglip2ForImageClassification": ("vision_model", "short"),
    "YolosForObjectDetection": ("vit", "short"),
    "DPTForDepthEstimation": ("dpt", "short"),
    "DPTForSemanticSegmentation": ("dpt", "short"),
    "VideoMAEForVideoClassification": ("videomae", _video_head),
    "VideoMAEForPreTraining": ("videomae", "last"),
    "DetrModel": ("encoder", "short"),
    "DetrForObjectDetection": ("model.encoder", "short"),
    "DetrForSegmentation": ("detr.model.encoder", "short"),
    "ConditionalDetrModel": ("encoder", "short"),
    "ConditionalDetrForObjectDetection": ("model.encoder", "short"),
    "VisionEncoderDecoderModel": ("encoder", "short"),
    "WhisperModel": ("encoder", "short"),
    "WhisperForConditionalGeneration": ("model.encoder", "short"),
    "WhisperForAudioClassification": (
        "encoder",
        lambda m: "all" if m.config.use_weighted_layer_sum else "pooled",
    ),
}

# Models with vision count on every patch and read the states of single layers: every block gives full length back.
TOWERS = ("Llava", "LlavaNext", "LlavaNextVideo", "LlavaOnevision", "PaliGemma", "Gemma3", "InternVL")
HEADS |= {f"{name}Model": ("vision_tower", "all") for name in TOWERS}
HEADS |= {f"{name}ForConditionalGeneration": ("model.vision_tower", "all") for name in TOWERS}
# These read the last states alone, and fold them by the square that they form.
HEADS |= {f"{name}Model": ("vision_model", "last") for name in ("Idefics3", "SmolVLM")}
HEADS |= {f"{name}ForConditionalGeneration": ("model.vision_model", "last") for name in ("Idefics3", "SmolVLM")}

HEADS["ColPaliForRetrieval"] = ("vlm.vision_tower", "all")

# What the forwards of TimeSformer's blocks, which are composed anew, and of their attention use.
DIVIDED_NAMES = {
    "config", "num_frames", "image_size", "patch_size", "shape", "size", "attention_type", "attention",
    "layernorm_before", "drop_path", "layernorm_after", "intermediate", "output", "reshape", "temporal_attention",
    "temporal_layernorm", "temporal_dense", "unsqueeze", "repeat", "permute", "torch", "cat", "mean",
    "qkv", "num_heads", "transpose", "scale", "softmax", "attn_drop",
}  # fmt: skip
