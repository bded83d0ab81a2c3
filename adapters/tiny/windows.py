"""Models whose blocks work on maps of 6 x 6 tokens, in windows of 4 x 4 (padded) and without."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from tokred.adapters.tiny.config import NONE
from tokred.adapters.tiny.weights import scattered

SIZE, SIDE, WINDOW = 48, 6, 4
TIMM = {
    "img_size": SIZE, "patch_size": 8, "embed_dim": 48, "depth": 4, "num_heads": 3, "num_classes": 5, "neck_chans": 16,
    "window_size": WINDOW, "global_attn_indexes": (1, 3),
}  # fmt: skip
VISION = {
    "hidden_size": 48, "num_hidden_layers": 4, "num_attention_heads": 3, "mlp_dim": 64, "image_size": SIZE,
    "patch_size": 8, "window_size": WINDOW, "global_attn_indexes": [1, 3], "output_channels": 16,
    "num_pos_feats": 8,
}  # fmt: skip
DECODER = {
    "hidden_size": 16, "mlp_dim": 16, "num_attention_heads": 2, "iou_head_hidden_dim": 16, "num_hidden_layers": 1,
}  # fmt: skip
PROMPT = {"hidden_size": 16, "image_size": SIZE, "patch_size": 8, "mask_input_channels": 4}
VITDET = {
    "hidden_size": 48, "num_hidden_layers": 4, "num_attention_heads": 3, "mlp_ratio": 2, "image_size": SIZE,
    "pretrain_image_size": SIZE, "patch_size": 8, "window_size": WINDOW, "window_block_indices": [0, 2],
    "use_relative_position_embeddings": True, "drop_path_rate": 0.0,
}  # fmt: skip


class Family(NamedTuple):
    """One way of building one class.

    Attributes:
        model: its class.
        library: it is of.
        options: of the encoder.
        config: of transformers: the class of the configuration, or what the names of several begin with.
        whole: several configurations: with prompts and a decoder of masks.
    """

    model: str
    library: str = "transformers"
    options: Mapping[str, Any] = NONE
    config: str = ""
    whole: bool = False


SAM = "VisionTransformerSAM"
NORMED = {"use_rel_pos": True, "qk_norm": True, "init_values": 0.5}
FAMILIES: dict[str, Family] = {
    "timm SAM": Family(SAM, "timm", {"use_rel_pos": True}),
    "timm SAM, no positions in attention": Family(SAM, "timm", {"use_rel_pos": False}),
    "timm SAM, rope": Family(SAM, "timm", {"use_rel_pos": False, "use_rope": True}),
    "timm SAM, key norm and layer scale": Family(SAM, "timm", NORMED),
    "SAM vision": Family("SamVisionModel", config="Sam"),
    "SAM vision, eager": Family("SamVisionModel", config="Sam", options={"attn_implementation": "eager"}),
    "SAM": Family("SamModel", config="Sam", whole=True),
    "SAM-HQ": Family("SamHQModel", config="SamHQ", whole=True),
    "ViTDet": Family("VitDetModel", config="VitDetConfig"),
    "ViTDet backbone": Family(
        "VitDetBackbone", config="VitDetConfig", options={"out_indices": [1, 4], "residual_block_indices": [1]}
    ),
}


def build(family: str, seed: int = 0) -> nn.Module:
    """A model in evaluation mode whose every parameter is random, so that no branch is zero."""
    row = FAMILIES[family]
    torch.manual_seed(seed)
    return scattered(_timm(row) if row.library == "timm" else _transformers(row), norms="")


def _timm(row: Family) -> nn.Module:
    from timm.models import vision_transformer_sam

    model: nn.Module = getattr(vision_transformer_sam, row.model)(**{**TIMM, **row.options})
    return model


def _transformers(row: Family) -> nn.Module:
    import transformers as t

    def config(kind: str, values: dict[str, Any]) -> Any:
        return getattr(t, f"{row.config}{kind}Config")(**values)

    kind: Any = getattr(t, row.model)
    if row.config.endswith("Config"):
        return kind(getattr(t, row.config)(**{**VITDET, **row.options}))  # type: ignore[no-any-return]
    vision = config("Vision", {**VISION, **row.options})
    if not row.whole:
        return kind(vision)  # type: ignore[no-any-return]
    wider = {"vit_dim": 48} if row.config == "SamHQ" else {}
    parts = {
        "vision_config": vision,
        "prompt_encoder_config": config("PromptEncoder", PROMPT),
        "mask_decoder_config": config("MaskDecoder", {**DECODER, **wider}),
    }
    return kind(config("", parts))  # type: ignore[no-any-return]


def images(b: int = 2, seed: int = 1) -> Tensor:
    """Random images of the models' size."""
    return torch.randn(b, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(seed))


def read(model: Any, x: Tensor) -> list[Tensor]:
    """All tensors that a model answers with."""
    name = type(model).__name__
    if name == SAM:
        return [model(x), *model.forward_intermediates(x, intermediates_only=True)]
    if name in ("SamModel", "SamHQModel"):
        out = model(pixel_values=x, input_points=torch.full((len(x), 1, 1, 2), 20.0))
        return [out.pred_masks, out.iou_scores]
    out = model(pixel_values=x)
    return list(out.feature_maps) if "feature_maps" in out else [out.last_hidden_state]
