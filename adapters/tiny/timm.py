"""Every family of timm that can be patched: 25 patches, three blocks."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from tokred.adapters.tiny.config import NONE
from tokred.adapters.tiny.weights import scattered

SIZE = 40
COMMON: dict[str, Any] = {
    "img_size": SIZE, "patch_size": 8, "embed_dim": 48, "depth": 3, "num_heads": 3, "num_classes": 7,
}  # fmt: skip


class Family(NamedTuple):
    """One way of building one class.

    Attributes:
        model: module below ``timm.models`` and class.
        options: beside :data:`COMMON`.
        block: class of the blocks, in the same module; "": the usual one.
        since: the first timm that can build it; "": all that tokred runs with.
    """

    model: str
    options: Mapping[str, Any] = NONE
    block: str = ""
    since: str = ""


VIT = "vision_transformer.VisionTransformer"
EVA, BEIT, RELPOS = "eva.Eva", "beit.Beit", "vision_transformer_relpos.VisionTransformerRelPos"
MEAN: dict[str, Any] = {"class_token": False, "global_pool": "avg"}
ROPE: dict[str, Any] = {"use_rot_pos_emb": True}

FAMILIES: dict[str, Family] = {
    "vit": Family(VIT),
    "vit-layerscale (DeiT-3)": Family(VIT, {"init_values": 0.1, "no_embed_class": True}),
    "vit-qknorm": Family(VIT, {"qk_norm": True}),
    "vit-registers (DINOv2)": Family(VIT, {"init_values": 0.1, "reg_tokens": 4, "no_embed_class": True}),
    "vit-mean": Family(VIT, MEAN),
    "vit-mean-with-class (MAE)": Family(VIT, {"global_pool": "avg"}),
    "vit-attention-pool (SigLIP)": Family(VIT, {"class_token": False, "global_pool": "map"}),
    "vit-pre-norm (CLIP)": Family(VIT, {"pre_norm": True}),
    "vit-no-bias": Family(VIT, {"qkv_bias": False}),
    "vit-parallel-scaling": Family(VIT, block="ParallelScalingBlock"),
    "vit-parallel-things": Family(VIT, block="ParallelThingsBlock"),
    "vit-post-norm": Family(VIT, {"init_values": None}, block="ResPostBlock"),
    "deit-distilled": Family("deit.VisionTransformerDistilled"),
    "eva (EVA)": Family(EVA, {"use_rot_pos_emb": False, "init_values": 0.1}),
    "eva02 (rope, swiglu)": Family(EVA, {**ROPE, "swiglu_mlp": True, "scale_mlp": True, "ref_feat_shape": (5, 5)}),
    "eva-post-norm (rope)": Family(EVA, {**ROPE, "use_post_norm": True}, since="1.0.21"),
    "dinov3 (rope, registers)": Family(EVA, {
        **ROPE, "rope_type": "dinov3", "num_reg_tokens": 4, "use_abs_pos_emb": False, "init_values": 0.1,
        "attn_type": "rope", "rope_rotate_half": True,
    }),
    "rope-mixed": Family(EVA, {**ROPE, "rope_type": "mixed", "attn_type": "rope"}),
    "rope-mean": Family(EVA, {**ROPE, **MEAN}),
    "beit (own bias)": Family(BEIT, {"use_rel_pos_bias": True, "use_abs_pos_emb": False, "init_values": 0.1}),
    "beit (shared bias)": Family(
        BEIT, {"use_shared_rel_pos_bias": True, "use_abs_pos_emb": True, "init_values": None}
    ),
    "relpos": Family(RELPOS, {"class_token": True}),
    "relpos-mlp-mean": Family(RELPOS, {"rel_pos_type": "mlp", **MEAN}),
    "relpos-shared": Family(RELPOS, {"shared_rel_pos": True, "class_token": True}),
}  # fmt: skip


def build(family: str, seed: int = 0) -> nn.Module:
    """A model in evaluation mode whose every parameter is random, so that no branch is zero."""
    torch.manual_seed(seed)
    return scattered(made(FAMILIES[family]))


def made(row: Family, **options: Any) -> nn.Module:
    """A model as its class initialises it, with other options beside those of its row."""
    home, _, name = row.model.partition(".")
    module = importlib.import_module(f"timm.models.{home}")
    blocks = {"block_fn": getattr(module, row.block)} if row.block else {}
    model: nn.Module = getattr(module, name)(**{**COMMON, **row.options, **blocks, **options})
    return model


def images(b: int = 3, seed: int = 1) -> Tensor:
    """Random images of the models' size."""
    return torch.randn(b, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(seed))
