"""Denoisers by name, at their real sizes and without weights: what counts and timings need."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

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


class Geometry(NamedTuple):
    """A denoiser at its real size.

    Attributes:
        cls: class of diffusers.
        settings: of its configuration, where they differ from the class's own.
        pixels: per row of the sample.
        frames: of a clip for each of the sample but the first; 0: the sample is an image.
    """

    cls: str
    settings: dict[str, Any]
    pixels: int = 8
    frames: int = 0

    def sample(self, size: tuple[int, ...]) -> tuple[int, ...]:
        """Rows and columns of the sample for an image of ``(height, width)``; with a clip's ``(frames, ...)`` first.

        Raises:
            ValueError: the size is smaller than a row of the sample, or has frames where it should not, or none.
        """
        return sample_size(size, self.pixels, self.frames)


def sample_size(size: tuple[int, ...], pixels: int, frames: int) -> tuple[int, ...]:
    """Rows and columns of the sample for an image, or frames, rows and columns for a clip.

    Args:
        size: of the image or clip.
        pixels: per row of the sample.
        frames: of a clip for each of the sample but the first; 0: an image is meant.

    Raises:
        ValueError: ``size`` is smaller than a row of the sample, or has frames where it should not, or none.
    """
    if len(size) != (3 if frames else 2):
        wanted = "(frames, height, width)" if frames else "(height, width)"
        raise ValueError(f"the size of {'a clip' if frames else 'an image'} is {wanted}, got {size}")
    if min(size[-2:]) < pixels or min(size) < 1:
        raise ValueError(f"height and width must be at least {pixels}, and frames at least 1, got {size}")
    first = ((size[0] - 1) // frames + 1,) if frames else ()
    return (*first, size[-2] // pixels, size[-1] // pixels)


GEOMETRIES: dict[str, Geometry] = {
    "sd15": Geometry("UNet2DConditionModel", _SD),
    "sd21": Geometry(
        "UNet2DConditionModel",
        {**_SD, "cross_attention_dim": 1024, "attention_head_dim": (5, 10, 20, 20), "use_linear_projection": True},
    ),
    "sdxl": Geometry(
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
    ),
    "dit-xl-2": Geometry(
        "DiTTransformer2DModel",
        {"num_layers": 28, "attention_head_dim": 72, "num_attention_heads": 16, "out_channels": 8},
    ),
    "pixart": Geometry(
        "PixArtTransformer2DModel",
        {"sample_size": 128, "caption_channels": 4096, "cross_attention_dim": 1152, "interpolation_scale": 2},
    ),
    "sd3": Geometry(
        "SD3Transformer2DModel",
        {
            "num_layers": 24,
            "num_attention_heads": 24,
            "caption_projection_dim": 1536,
            "joint_attention_dim": 4096,
            "pos_embed_max_size": 192,
        },
    ),
    "sd35-medium": Geometry(
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
    ),
    "flux": Geometry("FluxTransformer2DModel", {"guidance_embeds": True}),
    "cogvideox-2b": Geometry("CogVideoXTransformer3DModel", {}, 8, 4),
    "cogvideox-5b": Geometry(
        "CogVideoXTransformer3DModel",
        {"num_attention_heads": 48, "num_layers": 42, "use_rotary_positional_embeddings": True},
        8,
        4,
    ),
    "wan-1.3b": Geometry("WanTransformer3DModel", {"num_attention_heads": 12, "num_layers": 30, "ffn_dim": 8960}, 8, 4),
    "wan-14b": Geometry("WanTransformer3DModel", {}, 8, 4),
    "hunyuan-video": Geometry("HunyuanVideoTransformer3DModel", {}, 8, 4),
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
    made = GEOMETRIES[name]
    with torch.device(device):
        model: nn.Module = getattr(diffusers, made.cls)(**{**made.settings, **changes})
    return model.eval()


def read(where: str) -> tuple[nn.Module, int, int]:
    """A denoiser on the meta device, by name or by a folder that diffusers saved.

    Args:
        where: a name of :data:`GEOMETRIES`, or the folder of a pipeline or of a denoiser.

    Returns:
        It, pixels per row of its sample, and frames of a clip for each of the sample's (0: it is of images).

    Raises:
        ValueError: it is neither.
    """
    import diffusers

    if where in GEOMETRIES:
        return build(where), GEOMETRIES[where].pixels, GEOMETRIES[where].frames
    folder = Path(where)
    # A pipeline's folder has the denoiser in a folder of its own; a denoiser saved alone has its configuration here.
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
    clips = any(cls.__name__ == made.cls and made.frames for made in GEOMETRIES.values())
    pixels, frames = _scales(folder / "vae" / "config.json")
    # Denoisers of images may come with the VAE of a video model: its frames say nothing about their samples.
    return model.eval(), pixels, frames if clips else 0


def _scales(file: Path) -> tuple[int, int]:
    """Pixels per row and frames per frame of the sample, by the settings of a pipeline's VAE; without one: 1."""
    if not file.is_file():
        return 1, 1
    found = json.loads(file.read_text("utf8"))
    rows = 2 ** (len(found.get("block_out_channels", [0])) - 1)
    pixels = found.get("scale_factor_spatial") or found.get("spatial_compression_ratio") or rows
    frames = found.get("scale_factor_temporal") or found.get("temporal_compression_ratio") or 1
    return int(pixels), int(frames)
