"""transformers: vision and audio encoders, alone or in the models around them that are known to take fewer tokens.

Every encoder is one row of ``ENCODERS``, every model around an encoder one row of ``HEADS``. A model in neither table
is refused, also when an encoder of the table is inside it: language models with vision, for instance, count and place
their encoder's tokens, and would go wrong without an error.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from tokred.adapters.block import Recipe
from tokred.adapters.host import Host, argument_names
from tokred.adapters.state import TokenState
from tokred.adapters.swap import host_class
from tokred.adapters.timm import gather_rope
from tokred.errors import UnsupportedModelError

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
        embed: makes the tokens of an input, positions and protected tokens aside.
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


def _video_head(model: Any) -> str:
    # Without mean pooling the head reads the first patch, which is not a class token.
    return "pooled" if model.config.use_mean_pooling else "last"


def _mid_positions(model: Any) -> str:
    return "all" if model.config.use_mid_position_embeddings else "short"


def _patches(module: nn.Module, x: Tensor) -> Tensor:
    """``(B, N, C)`` what a copy of ``module`` makes of an input on the meta device."""
    out: Tensor = copy.deepcopy(module).to("meta")(x)
    return out.flatten(2).mT if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d) else out


def _siglip_embed(model: Any, x: Tensor) -> Tensor:
    return _patches(model.embeddings.patch_embedding, x)


def _whisper_embed(model: Any, x: Tensor) -> Tensor:
    return _patches(model.conv2, _patches(model.conv1, x).mT)


_ROPE: dict[str, Any] = {"positions": {"position_embeddings": gather_tables}, "keys": "attention.k_proj"}
_VIDEO: dict[str, Any] = {"rank": 5}
_PLAIN: dict[str, Any] = {"prefix": 0, "class_token": False}
_CLIP = Encoder("encoder.layers", embed=_siglip_embed)
_DINO3 = Encoder("model.layer", _registers, **_ROPE)

ENCODERS: dict[str, Encoder] = {
    "ViTModel": Encoder("layers"),
    "DeiTModel": Encoder("layers", 2),
    "BeitModel": Encoder("layers", demand=_beit_pooler, positions={"interpolate_pos_encoding": never}, relative=True),
    "ASTModel": Encoder("layers", 2, rank=3),
    "ViTMAEModel": Encoder("layers"),
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
    "MetaClip2VisionModel": _CLIP,
    "SiglipVisionModel": Encoder(
        "encoder.layers", demand=lambda m: "pooled" if m.use_head else "short", embed=_siglip_embed, **_PLAIN
    ),
    "Siglip2VisionModel": Encoder("encoder.layers", demand="last", embed=_siglip_embed, rank=3, **_PLAIN),
    "YolosModel": Encoder("encoder.layer", suffix=lambda m: int(m.config.num_detection_tokens), demand=_mid_positions),
    "DPTModel": Encoder("encoder.layer", demand="all"),
    "VideoMAEModel": Encoder("encoder.layer", **_VIDEO, **_PLAIN),
    "VitPoseBackbone": Encoder("encoder.layer", demand="all", **_PLAIN),
    "WhisperEncoder": Encoder("layers", rank=3, embed=_whisper_embed, **_PLAIN),
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
    "WhisperModel": ("encoder", "short"),
    "WhisperForConditionalGeneration": ("model.encoder", "short"),
    "WhisperForAudioClassification": (
        "encoder",
        lambda m: "all" if m.config.use_weighted_layer_sum else "pooled",
    ),
}

GRID = "it works on maps of a fixed grid between its stages"
WINDOWED = "its attention runs in windows on a grid, which dropping tokens would break"
# By the start of the class name.
REFUSED = {
    "Swin": WINDOWED,
    "DonutSwin": WINDOWED,
    "MaskFormerSwin": WINDOWED,
    "VitDet": WINDOWED,
    "Sam": "its blocks work on (B, H, W, C) maps with window attention and decomposed relative positions",
    "Hiera": "it pools mask units of a fixed grid between its stages",
    "Segformer": GRID,
    "Pvt": GRID,
    "Cvt": GRID,
    "Levit": GRID,
    "MobileViT": GRID,
    "ConvNext": "it is a convolutional network without tokens",
    "ResNet": "it is a convolutional network without tokens",
    "Timesformer": "its attention is divided into space and time, so tokens must stay a rectangle of both",
    "VJEPA2": "each layer turns token numbers into rotary angles itself, so missing tokens would shift positions",
}
NO_FAMILY = "it is not among the encoders, or the models around one, that are known to be right with fewer tokens"
LANGUAGE = (
    "it counts and places the tokens of its vision encoder in a text, which fewer tokens would break without an error; "
    "language models with vision need methods of another stage"
)


def match(model: nn.Module) -> Host | None:
    """The host record of a transformers encoder, alone or in a known model; None when ``model`` is no such model.

    Raises:
        UnsupportedModelError: ``model`` is a transformers model that cannot be reduced rightly; the message says why.
    """
    names = _names(model)
    if "PreTrainedModel" not in names or any(n.startswith("Timm") for n in names):
        return None  # a layer, or a wrapper around a timm model, which the timm adapter finds inside
    located = _locate(model)
    if located is None:
        raise UnsupportedModelError(
            f"transformers' {names[0]} cannot run with fewer tokens here: {_reason(model, names)}"
        )
    return _host(model, *located)


def _names(module: nn.Module) -> list[str]:
    """Class names of a module of transformers, its own and those it derives from."""
    mro = host_class(module).__mro__
    return [c.__name__ for c in mro] if any(c.__module__.startswith("transformers.") for c in mro) else []


def _locate(model: Any) -> tuple[str, Any, str] | None:
    """Name of the encoder class, the encoder, and the strongest demand on its tokens."""
    names = _names(model)
    head = next((n for n in names if n in HEADS), None)
    path, demand = HEADS[head] if head is not None else ("", "short")
    encoder = model if not path else _get(model, path)
    name = next((n for n in _names(encoder) if n in ENCODERS), None) if encoder is not None else None
    if name is None:
        # Backbones return maps of full length, so whatever is built around one notices nothing.
        inner = [(n, m) for m in model.modules() for n in _names(m)[:1] if n in ENCODERS and n.endswith("Backbone")]
        if len(inner) != 1:
            return None
        name, encoder = inner[0]
    demands = [_ask(demand, model), _ask(ENCODERS[name].demand, encoder)]
    return name, encoder, max(demands, key=DEMANDS.index)


def _get(model: Any, path: str) -> Any:
    for part in path.split("."):
        model = getattr(model, part, None)
    return model


def _ask(value: Any, model: Any) -> Any:
    return value(model) if callable(value) else value


def _reason(model: Any, names: list[str]) -> str:
    reason = next((r for n in names for start, r in REFUSED.items() if n.startswith(start)), None)
    if reason is not None:
        return reason
    config = model.config
    if hasattr(config, "text_config") and hasattr(model, "generate"):
        return LANGUAGE
    return f"{NO_FAMILY} (if you know that it is, apply to the encoder inside it)"


def _host(model: Any, name: str, encoder: Any, demand: str) -> Host:
    row = ENCODERS[name]
    layers = [(f"{row.layers}.{i}", layer) for i, layer in enumerate(_get(encoder, row.layers))]
    _check_fused(encoder, layers)
    if getattr(encoder, "layerdrop", 0):
        raise UnsupportedModelError(
            f"transformers' {name} skips whole layers at random in training (layerdrop = {encoder.layerdrop}); "
            "set its layerdrop to 0 and apply again"
        )
    prefix, suffix = _ask(row.prefix, encoder), _ask(row.suffix, encoder)
    return Host(
        family=f"transformers {name}",
        model=encoder,
        blocks=layers,
        recipe=LayerRecipe(
            row.positions, argument_names(layers[0][1]), getattr(encoder, "shared_position_bias", None) is not None
        ),
        prefix=prefix,
        suffix=suffix,
        supplies=_supplies(row),
        pooled=demand == "pooled",
        full=demand if demand in ("last", "all") else "none",
        tokens=lambda shape: _embed(row, encoder, shape)[0] + prefix + suffix,
        outside_macs=lambda shape: _embed(row, encoder, shape)[1] + _head(model),
        key_norms=[] if row.keys is None else [_get(layer, row.keys) for _, layer in layers],
        key_heads=None if row.keys is None else int(encoder.config.num_attention_heads),
    )


def _supplies(row: Encoder) -> frozenset[str]:
    found = {"x", "q", "k", "v"}
    if row.class_token:
        found.add("class_attention")
    if not row.relative:
        found.add("attention")
    if row.rank == 4:
        found.add("grid")
    return frozenset(found)


def _check_fused(encoder: Any, layers: list[tuple[str, nn.Module]]) -> None:
    if not layers:
        raise UnsupportedModelError(f"transformers' {type(encoder).__name__} has no layers")
    configs: list[Any] = [m.config for _, layer in layers for m in layer.modules() if hasattr(m, "config")]
    kinds = {str(c._attn_implementation) for c in (configs or [encoder.config])}
    if kinds != {"sdpa"}:
        raise UnsupportedModelError(
            f"{type(encoder).__name__} runs attn_implementation={', '.join(sorted(kinds))!r}, which takes no token "
            "sizes; call model.set_attn_implementation('sdpa') (or load it so) and apply again"
        )


class LayerRecipe(Recipe):
    """Layers of transformers encoders.

    Args:
        biased: the model itself gives its layers a mask, the bias of relative positions.
    """

    def __init__(self, positions: dict[str, Callable[..., Any]], argument_names: tuple[str, ...], biased: bool) -> None:
        super().__init__(False, positions, argument_names)
        self.biased = biased

    def gather(self, kwargs: dict[str, Any], state: TokenState, prefix: int) -> dict[str, Any]:
        """Positions at the rows that are left; padding is refused, since no method here keeps it apart yet."""
        mask = kwargs.get("attention_mask")
        if mask is not None and (mask.dtype == torch.bool or not self.biased):
            raise UnsupportedModelError(
                "the batch holds padded tokens (a mask hides some of them), which would be merged with real ones: give "
                "inputs of one size without padding, or call tokred.remove(model) first"
            )
        return super().gather(kwargs, state, prefix)


def _embed(row: Encoder, encoder: Any, shape: tuple[int, ...]) -> tuple[int, int]:
    """Patches of an input, and the multiply-adds that make them; counted on the meta device."""
    from torch.utils.flop_counter import FlopCounterMode

    dtype = next(encoder.parameters()).dtype
    x = torch.empty(1, *shape[1 - row.rank :], device="meta", dtype=dtype)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        n = row.embed(encoder, x).shape[1]
    return int(n), int(counter.get_total_flops()) // 2


def _head(model: Any) -> int:
    """Matrices applied once a sample: classifiers and projections of the class token."""
    heads = [
        getattr(model, n, None)
        for n in ("classifier", "distillation_classifier", "cls_classifier", "visual_projection")
    ]
    return sum(p.numel() for m in heads if isinstance(m, nn.Module) for p in m.parameters() if p.ndim == 2)
