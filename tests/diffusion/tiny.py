"""The tiny denoisers of diffusers, and variants that only tests need."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from tokred.adapters.tiny.diffusion import CLIPS as _CLIPS
from tokred.adapters.tiny.diffusion import FAMILIES, FRAMES, build, inputs, run

__all__ = ["CLIPS", "FRAMES", "MODELS", "half", "inputs", "run", "sd15", "sd_small", "sdxl", "unet"]

MODELS = {kind: partial(build, kind) for kind in FAMILIES}
CLIPS = {kind: MODELS[kind] for kind in _CLIPS}
unet, sd15, sdxl = MODELS["unet"], MODELS["sd15"], MODELS["sdxl"]


def sd_small() -> nn.Module:
    """As SD 1.x with a single level: for what takes long."""
    blocks = {"down_block_types": ("CrossAttnDownBlock2D",), "up_block_types": ("CrossAttnUpBlock2D",)}
    return build("sd15", block_out_channels=(16,), mid_block_type=None, **blocks)


def half(given: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """The same with floats of another type."""

    def turn(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: turn(v) for k, v in value.items()}
        return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value

    return {k: turn(v) for k, v in given.items()}
