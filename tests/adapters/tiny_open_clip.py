"""Tiny random-weight models of every open_clip family, made without any weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

SIZE, PATCH = 40, 8
TEXT = {"context_length": 8, "vocab_size": 60, "width": 32, "heads": 2, "layers": 1}
VISION = {"image_size": SIZE, "patch_size": PATCH, "width": 48, "layers": 3, "head_width": 16, "mlp_ratio": 2.0}
CUSTOM = {
    "block_type": "custom",
    "qk_norm": True,
    "scale_heads": True,
    "scale_attn_inner": True,
    "scale_attn": True,
    "scale_fc": True,
}
MULTIMODAL = {"context_length": 8, "vocab_size": 60, "width": 32, "heads": 2, "layers": 1}


def _clip(**vision: Any) -> nn.Module:
    from open_clip.model import CLIP

    return CLIP(16, {**VISION, **vision}, TEXT)


def _custom_text(**vision: Any) -> nn.Module:
    from open_clip.model import CustomTextCLIP

    return CustomTextCLIP(16, {**VISION, **vision}, TEXT)


def _coca() -> nn.Module:
    from open_clip.coca_model import CoCa

    vision = {
        **VISION,
        "attentional_pool": True,
        "attn_pooler_queries": 4,
        "attn_pooler_heads": 2,
        "output_tokens": True,
    }
    text = {**TEXT, "embed_cls": True, "output_tokens": True}
    return CoCa(32, MULTIMODAL, text, vision)


def _timm() -> nn.Module:
    from open_clip.model import CLIP

    vision = {"timm_model_name": "test_vit", "timm_pool": "token", "timm_proj": "linear", "image_size": 160}
    return CLIP(16, vision, TEXT)


FAMILIES: dict[str, Callable[[], nn.Module]] = {
    "CLIP": _clip,
    "layer scale": lambda: _clip(ls_init_value=0.5),
    "mean pooling": lambda: _clip(pool_type="avg", final_ln_after_pool=True),
    "attentional pooling": lambda: _clip(attentional_pool=True, attn_pooler_queries=4, attn_pooler_heads=2),
    "no norm before, sine positions": lambda: _clip(no_ln_pre=True, pos_embed_type="sin_cos_2d"),
    "odd heads": lambda: _clip(head_width=48),
    "custom blocks": lambda: _clip(**CUSTOM),
    "own text tower": _custom_text,
    "CoCa": _coca,
    "timm trunk": _timm,
}


def build(family: str, seed: int = 0) -> nn.Module:
    """A model in eval mode whose every parameter is random, so that no branch is zero."""
    torch.manual_seed(seed)
    model = FAMILIES[family]().eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "logit" in name:
                continue
            p.copy_(torch.randn_like(p) * (0.15 if p.ndim > 1 else 0.3))
            if p.ndim == 1 and "ln_" in name and name.endswith("weight"):
                p.add_(1)
    return model


def inputs(family: str, b: int = 3) -> tuple[Tensor, Tensor]:
    """Random images and a text for each."""
    size = 160 if family == "timm trunk" else SIZE
    image = torch.randn(b, 3, size, size, generator=torch.Generator().manual_seed(1))
    return image, torch.arange(3, 11).repeat(b, 1)


def outputs(model: nn.Module, image: Tensor, text: Tensor) -> list[Tensor]:
    """All tensors of one forward."""
    out = model(image, text)
    return [v for v in (out.values() if isinstance(out, dict) else out) if isinstance(v, Tensor)]
