"""Tiny LLaVAs of several towers, and their prompts."""

from __future__ import annotations

from typing import Any

import torch
import transformers as t
from torch import Tensor

from tokred.adapters.tiny import vlm
from tokred.adapters.tiny.vlm import IMAGE, TEXT, VISION
from tokred.adapters.tiny.weights import livelier

__all__ = ["IMAGE", "TEXT", "VISION", "livelier", "llava", "prompts"]


def llava(dtype: torch.dtype = torch.float32, seed: int = 0, tower: str = "clip") -> Any:
    """CLIP, or "dinov2", and a Llama; 16 visual tokens an image."""
    torch.manual_seed(seed)
    make = t.CLIPVisionConfig if tower == "clip" else t.Dinov2Config
    vision = make(**VISION)
    config = t.LlavaConfig(vision_config=vision, text_config=t.LlamaConfig(**TEXT), image_token_id=IMAGE)
    return livelier(t.LlavaForConditionalGeneration(config)).to(dtype).eval()


def prompts(rows: list[list[int | str]], seed: int = 1) -> dict[str, Tensor]:
    """A left-padded batch: each row a list of text lengths and "image" entries.

    Returns:
        ``input_ids``, ``attention_mask``, ``pixel_values``.
    """
    return vlm.prompts("llava", rows, seed)
