"""Tiny random models with vision, their prompts, and the masked run that every pruned one has to equal."""

from __future__ import annotations

from typing import Any

import torch
import transformers as t
from torch import Tensor

TEXT = {
    "vocab_size": 99, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 512, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2,
}  # fmt: skip
VISION = {
    "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "image_size": 16,
    "patch_size": 4,
}  # fmt: skip
IMAGE = 98


def llava(dtype: torch.dtype = torch.float32, seed: int = 0, tower: str = "clip") -> Any:
    """CLIP, or "dinov2", and a Llama; 16 visual tokens an image."""
    torch.manual_seed(seed)
    make = t.CLIPVisionConfig if tower == "clip" else t.Dinov2Config
    vision = make(**VISION)
    config = t.LlavaConfig(vision_config=vision, text_config=t.LlamaConfig(**TEXT), image_token_id=IMAGE)
    return livelier(t.LlavaForConditionalGeneration(config)).to(dtype).eval()


def livelier(model: Any) -> Any:
    """Larger weights: with the usual ones attention is nearly even, and nothing would depend on which tokens stay."""
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim == 2:
                p.mul_(4)
    return model


def prompts(rows: list[list[int | str]], seed: int = 1) -> dict[str, Tensor]:
    """A left-padded batch: each row a list of text lengths and "image" entries.

    Returns:
        ``input_ids``, ``attention_mask``, ``pixel_values``.
    """
    g = torch.Generator().manual_seed(seed)
    sequences, images = [], 0
    for row in rows:
        ids: list[int] = []
        for part in row:
            if part == "image":
                ids += [IMAGE] * 16
                images += 1
            else:
                ids += torch.randint(3, 90, (int(part),), generator=g).tolist()
        sequences.append(ids)
    longest = max(map(len, sequences))
    ids = torch.tensor([[0] * (longest - len(s)) + s for s in sequences])
    batch = {
        "input_ids": ids,
        "attention_mask": (
            torch.arange(longest) >= longest - torch.tensor([len(s) for s in sequences]).unsqueeze(1)
        ).long(),
    }
    if images:
        batch["pixel_values"] = torch.randn(images, 3, 16, 16, generator=g)
    return batch
