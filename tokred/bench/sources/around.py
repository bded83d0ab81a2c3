"""Models around a model: an image tower alone, a zero-shot classifier, and a linear probe as a head."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

PROMPT = "a photo of a {}."


class Tower(nn.Module):
    """The image side of a model of two towers: pooled features ``(B, F)``."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixel_values: Tensor) -> Tensor:
        inner: Any = self.model
        found = inner.encode_image(pixel_values) if hasattr(inner, "encode_image") else None
        return pooled(inner.get_image_features(pixel_values=pixel_values) if found is None else found)


class ZeroShot(nn.Module):
    """A classifier by names: the cosine of an image with the text of each class, ``(B, classes)``."""

    texts: Tensor

    def __init__(self, model: nn.Module, texts: Tensor) -> None:
        super().__init__()
        self.tower = Tower(model)
        self.register_buffer("texts", texts)

    def forward(self, pixel_values: Tensor) -> Tensor:
        return F.normalize(self.tower(pixel_values), dim=-1) @ self.texts.T


class Probed(nn.Module):
    """A model with a linear classifier on its pooled features."""

    weight: Tensor
    bias: Tensor

    def __init__(self, model: nn.Module, probe: Any) -> None:
        super().__init__()
        self.model, self.probe = model, probe

    def forward(self, **inputs: Tensor) -> Tensor:
        features = features_of(self.model, inputs)
        found: Tensor = self.probe.logits(features.float())
        return found


def pooled(output: Any) -> Tensor:
    """The tensor ``(B, F)`` of a tower's output."""
    found = output if isinstance(output, Tensor) else getattr(output, "pooler_output", None)
    if found is None:
        found = output.last_hidden_state[:, 0]
    return found


@torch.inference_mode()
def zero_shot(model: Any, tokenizer: Any, names: Sequence[str]) -> ZeroShot:
    """A classifier of the classes that have these names.

    Args:
        model: of open_clip or transformers, with an image and a text tower.
        tokenizer: of its texts.
        names: of the classes; underscores stand for spaces.
    """
    prompts = [PROMPT.format(name.replace("_", " ")) for name in names]
    if hasattr(model, "encode_text"):
        texts = model.encode_text(tokenizer(prompts))
    else:
        # The longest text that the model takes: SigLIP was trained on padded ones.
        given = tokenizer(prompts, padding="max_length", truncation=True, return_tensors="pt")
        texts = model.get_text_features(**{k: v for k, v in given.items() if k in ("input_ids", "attention_mask")})
    return ZeroShot(model, F.normalize(pooled(texts).clone(), dim=-1)).eval()


def features_of(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    """Pooled features ``(B, F)`` that a classifier would stand on: of timm's head, or of a body of transformers."""
    if hasattr(model, "forward_features"):
        (x,) = inputs.values()
        found: Tensor = model.forward_head(model.forward_features(x), pre_logits=True)
        return found
    body = getattr(model, "base_model", model) if hasattr(model, "config") else model
    output = body(**inputs)
    if not isinstance(output, Tensor):
        return pooled(output)
    if output.ndim == 4:  # maps (B, C, H, W)
        return output.flatten(2).mean(-1)
    return output if output.ndim == 2 else output[:, 0]
