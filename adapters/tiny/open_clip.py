"""Every family of open_clip: two towers of one to three blocks."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from tokred.adapters.tiny.config import NONE
from tokred.adapters.tiny.weights import scattered

SIZE, PATCH = 40, 8
TEXT = {"context_length": 8, "vocab_size": 60, "width": 32, "heads": 2, "layers": 1}
VISION = {"image_size": SIZE, "patch_size": PATCH, "width": 48, "layers": 3, "head_width": 16, "mlp_ratio": 2.0}
CUSTOM = {
    "block_type": "custom", "qk_norm": True, "scale_heads": True, "scale_attn_inner": True, "scale_attn": True,
    "scale_fc": True,
}  # fmt: skip
POOLED = {"attentional_pool": True, "attn_pooler_queries": 4, "attn_pooler_heads": 2}
TRUNK = {"timm_model_name": "test_vit", "timm_pool": "token", "timm_proj": "linear", "image_size": 160}


class Family(NamedTuple):
    """One tower of images, and what stands around it.

    Attributes:
        vision: configuration of the tower.
        model: module below ``open_clip`` and class.
        leading: arguments before the configurations of the towers, which come as ``order`` says.
        text: beside :data:`TEXT`.
        order: of the towers.
    """

    vision: dict[str, Any]
    model: str = "model.CLIP"
    leading: tuple[Any, ...] = (16,)
    text: Mapping[str, Any] = NONE
    order: str = "vision text"


FAMILIES: dict[str, Family] = {
    "CLIP": Family(VISION),
    "layer scale": Family({**VISION, "ls_init_value": 0.5}),
    "mean pooling": Family({**VISION, "pool_type": "avg", "final_ln_after_pool": True}),
    "attentional pooling": Family({**VISION, **POOLED}),
    "no norm before, sine positions": Family({**VISION, "no_ln_pre": True, "pos_embed_type": "sin_cos_2d"}),
    "odd heads": Family({**VISION, "head_width": 48}),
    "custom blocks": Family({**VISION, **CUSTOM}),
    "own text tower": Family(VISION, "model.CustomTextCLIP"),
    "CoCa": Family(
        {**VISION, **POOLED, "output_tokens": True}, "coca_model.CoCa", (32, TEXT),
        {"embed_cls": True, "output_tokens": True}, "text vision",
    ),
    "timm trunk": Family(TRUNK),
}  # fmt: skip


def build(family: str, seed: int = 0) -> nn.Module:
    """A model in evaluation mode whose every parameter is random, so that no branch is zero."""
    torch.manual_seed(seed)
    return scattered(made(FAMILIES[family]), "ln_", keep="logit")


def made(row: Family, **options: Any) -> nn.Module:
    """A model as its class initialises it, with other options of the tower beside those of its row."""
    home, _, name = row.model.partition(".")
    towers = {"vision": {**row.vision, **options}, "text": {**TEXT, **row.text}}
    kind: Any = getattr(importlib.import_module(f"open_clip.{home}"), name)
    model: nn.Module = kind(*row.leading, *(towers[tower] for tower in row.order.split()))
    return model


def inputs(family: str, b: int = 3) -> tuple[Tensor, Tensor]:
    """Random images and a text for each."""
    size = FAMILIES[family].vision["image_size"]
    image = torch.randn(b, 3, size, size, generator=torch.Generator().manual_seed(1))
    return image, torch.arange(3, 11).repeat(b, 1)


def outputs(model: nn.Module, image: Tensor, text: Tensor) -> list[Tensor]:
    """All tensors of one forward."""
    out = model(image, text)
    return [v for v in (out.values() if isinstance(out, dict) else out) if isinstance(v, Tensor)]
