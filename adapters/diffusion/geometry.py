"""Denoisers by name, at their real sizes and without weights: what counts and timings need."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

_CROSS, _PLAIN = ("CrossAttnDownBlock2D", "CrossAttnUpBlock2D"), ("DownBlock2D", "UpBlock2D")
_SD: dict[str, Any] = {
    "sample_size": 64,
    "block_out_channels": (320, 640, 1280, 1280),
    "down_block_types": (_CROSS[0],) * 3 + (_PLAIN[0],),
    "up_block_types": (_PLAIN[1],) + (_CROSS[1],) * 3,
    "cross_attention_dim": 768,
    "attention_head_dim": 8,
}
# Name -> class, its settings, and pixels per row of the sample.
GEOMETRIES: dict[str, tuple[str, dict[str, Any], int]] = {
    "sd15": ("UNet2DConditionModel", _SD, 8),
    "sd21": (
        "UNet2DConditionModel",
        {**_SD, "cross_attention_dim": 1024, "attention_head_dim": (5, 10, 20, 20), "use_linear_projection": True},
        8,
    ),
    "sdxl": (
        "UNet2DConditionModel",
        {
            "sample_size": 128,
            "block_out_channels": (320, 640, 1280),
            "down_block_types": (_PLAIN[0], _CROSS[0], _CROSS[0]),
            "up_block_types": (_CROSS[1], _CROSS[1], _PLAIN[1]),
            "transformer_layers_per_block": (1, 2, 10),
            "cross_attention_dim": 2048,
            "attention_head_dim": (5, 10, 20),
            "use_linear_projection": True,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": 2816,
        },
        8,
    ),
    "dit-xl-2": (
        "DiTTransformer2DModel",
        {"num_layers": 28, "attention_head_dim": 72, "num_attention_heads": 16, "out_channels": 8},
        8,
    ),
    "pixart": (
        "PixArtTransformer2DModel",
        {"sample_size": 128, "caption_channels": 4096, "cross_attention_dim": 1152, "interpolation_scale": 2},
        8,
    ),
    "sd3": (
        "SD3Transformer2DModel",
        {
            "num_layers": 24,
            "num_attention_heads": 24,
            "caption_projection_dim": 1536,
            "joint_attention_dim": 4096,
            "pos_embed_max_size": 192,
        },
        8,
    ),
    "sd35-medium": (
        "SD3Transformer2DModel",
        {
            "num_layers": 24,
            "num_attention_heads": 24,
            "caption_projection_dim": 1536,
            "joint_attention_dim": 4096,
            "pos_embed_max_size": 384,
            "dual_attention_layers": tuple(range(13)),
            "qk_norm": "rms_norm",
        },
        8,
    ),
    "flux": ("FluxTransformer2DModel", {"guidance_embeds": True}, 8),
}


def build(name: str, device: str = "meta", **changes: Any) -> nn.Module:
    """A denoiser of one of :data:`GEOMETRIES` with random weights.

    Args:
        name: of the geometry.
        device: ``"meta"`` has shapes alone and takes no memory.
        changes: other settings of its class.

    Raises:
        ValueError: there is no such geometry.
    """
    import diffusers

    if name not in GEOMETRIES:
        raise ValueError(f"no denoiser is named {name!r}; known are {', '.join(GEOMETRIES)}")
    cls, settings, _ = GEOMETRIES[name]
    with torch.device(device):
        model: nn.Module = getattr(diffusers, cls)(**{**settings, **changes})
    return model.eval()


def read(where: str) -> tuple[nn.Module, int]:
    """A denoiser on the meta device, by name or by a folder that diffusers saved, and pixels per row of its sample.

    Args:
        where: a name of :data:`GEOMETRIES`, or the folder of a pipeline or of a denoiser.

    Raises:
        ValueError: it is neither.
    """
    import diffusers

    if where in GEOMETRIES:
        return build(where), GEOMETRIES[where][2]
    folder = Path(where)
    inside = next((folder / part for part in ("unet", "transformer") if (folder / part).is_dir()), folder)
    file = inside / "config.json"
    if not file.is_file():
        raise ValueError(
            f"{where!r} is no denoiser: give one of {', '.join(GEOMETRIES)}, or the folder of a pipeline of diffusers"
        )
    config = json.loads(file.read_text("utf8"))
    cls = getattr(diffusers, str(config.get("_class_name")), None)
    if cls is None:
        raise ValueError(f"{file} names the class {config.get('_class_name')!r}, which diffusers does not have")
    with torch.device("meta"):
        model = cls.from_config(config)
    return model.eval(), _pixels(folder)


def _pixels(folder: Path) -> int:
    """Pixels per row of the sample, of a pipeline with a VAE beside its denoiser; else 1."""
    file = folder / "vae" / "config.json"
    if not file.is_file():
        return 1
    return int(2 ** (len(json.loads(file.read_text("utf8")).get("block_out_channels", [0])) - 1))
