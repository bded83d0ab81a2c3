"""Tiny vision towers of models with vision that hold all images in one sequence, with inputs for them."""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor, nn

from tokred.adapters.tiny.weights import livelier

SIZES = ((1, 8, 12), (1, 4, 4), (1, 8, 12))
_QWEN = {
    "depth": 4,
    "num_heads": 2,
    "patch_size": 4,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "hidden_size": 32,
}
_NEWER = {**_QWEN, "out_hidden_size": 32, "intermediate_size": 32}
_GLM = {**_NEWER, "out_hidden_size": 32, "image_size": 32, "in_channels": 3}
# Family: module of transformers, class, configuration, options.
TOWERS: dict[str, tuple[str, str, str, dict[str, Any]]] = {
    "qwen2": (
        "qwen2_vl", "Qwen2VisionTransformerPretrainedModel", "Qwen2VLVisionConfig",
        {**_QWEN, "embed_dim": 32, "mlp_ratio": 2},
    ),
    "qwen2.5": (
        "qwen2_5_vl", "Qwen2_5_VisionTransformerPretrainedModel", "Qwen2_5_VLVisionConfig",
        {**_NEWER, "window_size": 16, "fullatt_block_indexes": [1, 3]},
    ),
    "qwen3": (
        "qwen3_vl", "Qwen3VLVisionModel", "Qwen3VLVisionConfig",
        {**_NEWER, "num_position_embeddings": 64, "deepstack_visual_indexes": [1]},
    ),
    "qwen3 moe": (
        "qwen3_vl_moe", "Qwen3VLMoeVisionModel", "Qwen3VLMoeVisionConfig",
        {**_NEWER, "num_position_embeddings": 64, "deepstack_visual_indexes": [1]},
    ),
    "qwen3.5": ("qwen3_5", "Qwen3_5VisionModel", "Qwen3_5VisionConfig", {**_NEWER, "num_position_embeddings": 64}),
    "glm4v": ("glm4v", "Glm4vVisionModel", "Glm4vVisionConfig", _GLM),
    "kimi k2.5": (
        "kimi_k25", "Kimi_K25VisionModel", "Kimi_K25VisionConfig",
        {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 2, "patch_size": 4,
         "pos_emb_height": 8, "pos_emb_width": 8},
    ),
    "pixtral": (
        "pixtral", "PixtralVisionModel", "PixtralVisionConfig",
        {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 2, "image_size": 64,
         "patch_size": 4},
    ),
}  # fmt: skip


def build(name: str, **more: Any) -> nn.Module:
    """A tower in evaluation mode, with weights that tell its tokens apart."""
    module, cls, config, options = TOWERS[name]
    where = f"transformers.models.{module}"
    made = getattr(importlib.import_module(f"{where}.configuration_{module}"), config)(**{**options, **more})
    made._attn_implementation = "sdpa"
    torch.manual_seed(0)
    model: nn.Module = getattr(importlib.import_module(f"{where}.modeling_{module}"), cls)(made)
    return livelier(model).eval()


def inputs(name: str, sizes: tuple[tuple[int, int, int], ...] = SIZES, seed: int = 1) -> dict[str, Any]:
    """Images (or clips) of these frames, rows and columns of patches, of noise."""
    g = torch.Generator().manual_seed(seed)
    if name == "pixtral":
        high, wide = max(s[1] for s in sizes) * 4, max(s[2] for s in sizes) * 4
        pixels = torch.zeros(len(sizes), 3, high, wide)
        for i, (_, rows, columns) in enumerate(sizes):
            pixels[i, :, : rows * 4, : columns * 4] = torch.randn(3, rows * 4, columns * 4, generator=g)
        return {"pixel_values": pixels, "image_sizes": [(rows * 4, columns * 4) for _, rows, columns in sizes]}
    count = sum(t * h * w for t, h, w in sizes)
    pixels = torch.randn(count, 96, generator=g)
    if name == "kimi k2.5":
        return {"pixel_values": pixels[:, :48].reshape(-1, 3, 4, 4), "grid_thw": torch.tensor(sizes)}
    return {"hidden_states": pixels, "grid_thw": torch.tensor(sizes)}


def alone(name: str, given: dict[str, Any], sizes: tuple[tuple[int, int, int], ...], i: int) -> dict[str, Any]:
    """One image of those inputs, by itself."""
    if name == "pixtral":
        high, wide = given["image_sizes"][i]
        return {"pixel_values": given["pixel_values"][i : i + 1, :, :high, :wide]}
    counts = [t * h * w for t, h, w in sizes]
    first = sum(counts[:i])
    rows = next(k for k in given if k != "grid_thw")
    return {rows: given[rows][first : first + counts[i]], "grid_thw": torch.tensor(sizes[i : i + 1])}


def run(model: Any, given: dict[str, Any]) -> list[Tensor]:
    """All that a tower answers: last states, what it folds, and deep features."""
    with torch.no_grad():
        out = model(**given)
    deep = getattr(out, "deepstack_features", None) or ()
    found = [out.last_hidden_state, *([] if out.pooler_output is None else [out.pooler_output]), *deep]
    return [t[0] if name_of(model) == "PixtralVisionModel" else t for t in found]


def name_of(model: nn.Module) -> str:
    """Class of a tower, patched or not."""
    return type(model).__name__
