"""Tiny random-weight models whose blocks work on maps of 6 x 6 tokens, in windows of 4 x 4 (padded) and without."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

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
    "hidden_size": 16,
    "mlp_dim": 16,
    "num_attention_heads": 2,
    "iou_head_hidden_dim": 16,
    "num_hidden_layers": 1,
}
PROMPT = {"hidden_size": 16, "image_size": SIZE, "patch_size": 8, "mask_input_channels": 4}
VITDET = {
    "hidden_size": 48, "num_hidden_layers": 4, "num_attention_heads": 3, "mlp_ratio": 2, "image_size": SIZE,
    "pretrain_image_size": SIZE, "patch_size": 8, "window_size": WINDOW, "window_block_indices": [0, 2],
    "use_relative_position_embeddings": True, "drop_path_rate": 0.0,
}  # fmt: skip


def _timm(**options: Any) -> nn.Module:
    from timm.models.vision_transformer_sam import VisionTransformerSAM

    return VisionTransformerSAM(**{**TIMM, **options})


def _sam(name: str, prefix: str, whole: bool, **options: Any) -> nn.Module:
    import transformers

    def config(kind: str, values: dict[str, Any]) -> Any:
        return getattr(transformers, f"{prefix}{kind}Config")(**values)

    vision = config("Vision", {**VISION, **options})
    if not whole:
        return getattr(transformers, name)(vision)
    parts = {
        "vision_config": vision,
        "prompt_encoder_config": config("PromptEncoder", PROMPT),
        "mask_decoder_config": config("MaskDecoder", {**DECODER, **({"vit_dim": 48} if prefix == "SamHQ" else {})}),
    }
    return getattr(transformers, name)(getattr(transformers, f"{prefix}Config")(**parts))


def _vitdet(name: str, **options: Any) -> nn.Module:
    import transformers

    return getattr(transformers, name)(transformers.VitDetConfig(**{**VITDET, **options}))


FAMILIES: dict[str, Callable[[], nn.Module]] = {
    "timm SAM": partial(_timm, use_rel_pos=True),
    "timm SAM, no positions in attention": partial(_timm, use_rel_pos=False),
    "timm SAM, rope": partial(_timm, use_rel_pos=False, use_rope=True),
    "timm SAM, key norm and layer scale": partial(_timm, use_rel_pos=True, qk_norm=True, init_values=0.5),
    "SAM vision": partial(_sam, "SamVisionModel", "Sam", False),
    "SAM vision, eager": partial(_sam, "SamVisionModel", "Sam", False, attn_implementation="eager"),
    "SAM": partial(_sam, "SamModel", "Sam", True),
    "SAM-HQ": partial(_sam, "SamHQModel", "SamHQ", True),
    "ViTDet": partial(_vitdet, "VitDetModel"),
    "ViTDet backbone": partial(_vitdet, "VitDetBackbone", out_indices=[1, 4], residual_block_indices=[1]),
}


def build(family: str, seed: int = 0) -> nn.Module:
    """A model in eval mode whose every parameter is random, so that no branch is zero."""
    torch.manual_seed(seed)
    model = FAMILIES[family]().eval()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn_like(p) * (0.15 if p.ndim > 1 else 0.3))
    return model


def images(b: int = 2, seed: int = 1) -> Tensor:
    """Random images of the models' size."""
    return torch.randn(b, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(seed))


def read(model: nn.Module, x: Tensor) -> list[Tensor]:
    """All tensors that a model answers with."""
    name = type(model).__name__
    if name == "VisionTransformerSAM":
        return [model(x), *model.forward_intermediates(x, intermediates_only=True)]
    if name in ("SamModel", "SamHQModel"):
        out = model(pixel_values=x, input_points=torch.full((len(x), 1, 1, 2), 20.0))
        return [out.pred_masks, out.iou_scores]
    out = model(pixel_values=x)
    return list(out.feature_maps) if "feature_maps" in out else [out.last_hidden_state]


def layers(model: nn.Module) -> list[nn.Module]:
    """All blocks, reducing or not."""
    for path in ("blocks", "layers", "vision_encoder.layers", "encoder.layer"):
        try:
            return list(model.get_submodule(path))
        except AttributeError:
            continue
    raise AssertionError(type(model))
