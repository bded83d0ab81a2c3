"""Tiny random-weight models of every timm family that can be patched, all with 17 patches or fewer and three blocks."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import nn

SIZE = 40
COMMON = {"img_size": SIZE, "patch_size": 8, "embed_dim": 48, "depth": 3, "num_heads": 3, "num_classes": 7}


def _vit(**options):
    from timm.models.vision_transformer import VisionTransformer

    return VisionTransformer(**{**COMMON, **options})


def _block(name: str):
    from timm.models import vision_transformer

    return getattr(vision_transformer, name)


def _distilled():
    from timm.models.deit import VisionTransformerDistilled

    return VisionTransformerDistilled(**COMMON)


def _eva(**options):
    from timm.models.eva import Eva

    return Eva(**{**COMMON, **options})


def _beit(**options):
    from timm.models.beit import Beit

    return Beit(**{**COMMON, **options})


def _relpos(**options):
    from timm.models.vision_transformer_relpos import VisionTransformerRelPos

    return VisionTransformerRelPos(**{**COMMON, **options})


FAMILIES = {
    "vit": _vit,
    "vit-layerscale (DeiT-3)": partial(_vit, init_values=0.1, no_embed_class=True),
    "vit-qknorm": partial(_vit, qk_norm=True),
    "vit-registers (DINOv2)": partial(_vit, init_values=0.1, reg_tokens=4, no_embed_class=True),
    "vit-mean": partial(_vit, class_token=False, global_pool="avg"),
    "vit-mean-with-class (MAE)": partial(_vit, global_pool="avg"),
    "vit-attention-pool (SigLIP)": partial(_vit, class_token=False, global_pool="map"),
    "vit-pre-norm (CLIP)": partial(_vit, pre_norm=True),
    "vit-no-bias": partial(_vit, qkv_bias=False),
    "vit-parallel-scaling": lambda: _vit(block_fn=_block("ParallelScalingBlock")),
    "vit-parallel-things": lambda: _vit(block_fn=_block("ParallelThingsBlock")),
    "vit-post-norm": lambda: _vit(block_fn=_block("ResPostBlock"), init_values=None),
    "deit-distilled": _distilled,
    "eva (EVA)": partial(_eva, use_rot_pos_emb=False, init_values=0.1),
    "eva02 (rope, swiglu)": partial(_eva, use_rot_pos_emb=True, swiglu_mlp=True, scale_mlp=True, ref_feat_shape=(5, 5)),
    "eva-post-norm (rope)": partial(_eva, use_rot_pos_emb=True, use_post_norm=True),
    "dinov3 (rope, registers)": partial(
        _eva, use_rot_pos_emb=True, rope_type="dinov3", num_reg_tokens=4, use_abs_pos_emb=False, init_values=0.1,
        attn_type="rope", rope_rotate_half=True,
    ),
    "rope-mixed": partial(_eva, use_rot_pos_emb=True, rope_type="mixed", attn_type="rope"),
    "rope-mean": partial(_eva, use_rot_pos_emb=True, class_token=False, global_pool="avg"),
    "beit (own bias)": partial(_beit, use_rel_pos_bias=True, use_abs_pos_emb=False, init_values=0.1),
    "beit (shared bias)": partial(_beit, use_shared_rel_pos_bias=True, use_abs_pos_emb=True, init_values=None),
    "relpos": partial(_relpos, class_token=True),
    "relpos-mlp-mean": partial(_relpos, rel_pos_type="mlp", class_token=False, global_pool="avg"),
    "relpos-shared": partial(_relpos, shared_rel_pos=True, class_token=True),
}  # fmt: skip


def build(family: str, seed: int = 0) -> nn.Module:
    """A model in eval mode whose every parameter is random, so that no branch is zero."""
    torch.manual_seed(seed)
    try:
        model = FAMILIES[family]().eval()
    except TypeError as error:
        pytest.skip(f"the installed timm cannot build this family itself: {error}")
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(torch.randn_like(p) * (0.15 if p.ndim > 1 else 0.3))
            if p.ndim == 1 and ("norm" in name and name.endswith("weight")):
                p.add_(1)
    return model


def without_weights(name: str) -> nn.Module:
    """A model of timm's on the meta device, for questions about its structure."""
    import timm

    try:
        with torch.device("meta"):
            return timm.create_model(name)
    except RuntimeError as error:
        pytest.skip(f"the installed timm computes values while it builds {name}: {error}")


def images(b: int = 3, seed: int = 1) -> torch.Tensor:
    """Random images of the models' size."""
    return torch.randn(b, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(seed))
