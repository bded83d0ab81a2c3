"""Denoisers of diffusers with two to four blocks, on samples of 16 x 16."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

FRAMES = 3


class Family(NamedTuple):
    """One way of building one class.

    Attributes:
        model: its class.
        options: of it.
    """

    model: str
    options: dict[str, Any]


HEADS: dict[str, Any] = {"num_attention_heads": 2, "attention_head_dim": 8}
SD: dict[str, Any] = {
    "sample_size": 16, "block_out_channels": (16, 32), "layers_per_block": 1,
    "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"), "norm_num_groups": 4, "cross_attention_dim": 12,
    "attention_head_dim": 2,
}  # fmt: skip
COGVIDEOX: dict[str, Any] = {
    "num_attention_heads": 2, "attention_head_dim": 16, "in_channels": 4, "out_channels": 4, "time_embed_dim": 8,
    "text_embed_dim": 12, "num_layers": 2, "sample_width": 16, "sample_height": 16,
    "sample_frames": 4 * (FRAMES - 1) + 1, "max_text_seq_length": 5,
}  # fmt: skip
HUNYUAN: dict[str, Any] = {
    **HEADS, "in_channels": 4, "out_channels": 4, "num_layers": 1, "num_single_layers": 2, "num_refiner_layers": 1,
    "text_embed_dim": 12, "pooled_projection_dim": 10, "rope_axes_dim": (2, 2, 4), "guidance_embeds": False,
}  # fmt: skip

FAMILIES: dict[str, Family] = {
    # Attention without text at 1 and 2 times coarser.
    "unet": Family("UNet2DModel", {
        "sample_size": 16, "in_channels": 1, "out_channels": 1, "block_out_channels": (16, 32), "layers_per_block": 1,
        "down_block_types": ("AttnDownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "AttnUpBlock2D"), "norm_num_groups": 4, "attention_head_dim": 8,
    }),
    # Convolutions around the blocks.
    "sd15": Family("UNet2DConditionModel", SD),
    # Linear layers around the blocks, heads of one size.
    "sd21": Family("UNet2DConditionModel", {**SD, "use_linear_projection": True, "attention_head_dim": (2, 4)}),
    # No attention at the resolution of the sample, several blocks in a transformer, more conditions.
    "sdxl": Family("UNet2DConditionModel", {
        **SD, "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"), "transformer_layers_per_block": (1, 2),
        "use_linear_projection": True, "addition_embed_type": "text_time", "addition_time_embed_dim": 4,
        "projection_class_embeddings_input_dim": 6 * 4 + 10,
    }),
    # Patches of 2, one sequence.
    "dit": Family("DiTTransformer2DModel", {
        **HEADS, "in_channels": 4, "out_channels": 8, "num_layers": 2, "sample_size": 16, "patch_size": 2,
        "num_embeds_ada_norm": 10, "norm_num_groups": 4,
    }),
    # Blocks without a third norm, text by cross-attention.
    "pixart": Family("PixArtTransformer2DModel", {
        **HEADS, "in_channels": 4, "out_channels": 8, "num_layers": 2, "cross_attention_dim": 16, "sample_size": 16,
        "patch_size": 2, "caption_channels": 12, "use_additional_conditions": False,
    }),
    # SD 3.5 medium: text and image in one attention, and a second one of the image alone in the first layer.
    "sd3": Family("SD3Transformer2DModel", {
        **HEADS, "sample_size": 16, "patch_size": 2, "in_channels": 4, "num_layers": 2, "joint_attention_dim": 12,
        "caption_projection_dim": 16, "pooled_projection_dim": 10, "out_channels": 4, "pos_embed_max_size": 32,
        "dual_attention_layers": (0,), "qk_norm": "rms_norm",
    }),
    # Text first, rotary embedding, double and single blocks.
    "flux": Family("FluxTransformer2DModel", {
        **HEADS, "patch_size": 1, "in_channels": 8, "num_layers": 1, "num_single_layers": 2, "joint_attention_dim": 12,
        "pooled_projection_dim": 10, "axes_dims_rope": (2, 2, 4),
    }),
    # CogVideoX-2b: text first, projected together with the clip, positions added at the input.
    "cogvideox": Family("CogVideoXTransformer3DModel", COGVIDEOX),
    # CogVideoX-5b: rotary embedding.
    "cogvideox_rotary": Family(
        "CogVideoXTransformer3DModel", {**COGVIDEOX, "use_rotary_positional_embeddings": True}
    ),
    # Rotary embedding, text by cross-attention.
    "wan": Family("WanTransformer3DModel", {
        "num_attention_heads": 2, "attention_head_dim": 12, "in_channels": 4, "out_channels": 4, "text_dim": 12,
        "freq_dim": 8, "ffn_dim": 32, "num_layers": 2,
    }),
    # Text last and masked, rotary embedding, double and single blocks.
    "hunyuan": Family("HunyuanVideoTransformer3DModel", HUNYUAN),
    # Given an image: the tokens of the first frame have gates of their own.
    "hunyuan_first_frame": Family(
        "HunyuanVideoTransformer3DModel", {**HUNYUAN, "image_condition_type": "token_replace"}
    ),
}  # fmt: skip
CLIPS = ("cogvideox", "cogvideox_rotary", "wan", "hunyuan", "hunyuan_first_frame")


def build(kind: str, seed: int = 0, **more: Any) -> nn.Module:
    """A denoiser in evaluation mode.

    Args:
        kind: a family.
        seed: of its weights.
        more: other options of the class.
    """
    import diffusers

    row = FAMILIES[kind]
    torch.manual_seed(seed)
    model: nn.Module = getattr(diffusers, row.model)(**{**copy.deepcopy(row.options), **more})
    return model.eval()


def inputs(kind: str, size: tuple[int, int] = (16, 16), batch: int = 2, seed: int = 1) -> dict[str, Any]:
    """Keyword arguments of a forward."""
    g = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g)

    if kind in CLIPS:
        return _clip(kind, size, batch, normal)
    sample, time = normal(batch, 1 if kind == "unet" else 4, *size), torch.full((batch,), 7)
    if kind == "unet":
        return {"sample": sample, "timestep": 7}
    text = normal(batch, 5, 12)
    if kind == "flux":
        high, wide = size[0] // 2, size[1] // 2
        ids = torch.zeros(high, wide, 3)
        ids[..., 1], ids[..., 2] = torch.arange(high).unsqueeze(1), torch.arange(wide)
        given = {"hidden_states": normal(batch, high * wide, 8), "encoder_hidden_states": text}
        given |= {"pooled_projections": normal(batch, 10), "timestep": torch.full((batch,), 0.7)}
        return given | {"img_ids": ids.view(-1, 3), "txt_ids": torch.zeros(5, 3)}
    if kind == "dit":
        return {"hidden_states": sample, "timestep": time, "class_labels": torch.arange(batch)}
    if kind == "pixart":
        extra = {"added_cond_kwargs": {"resolution": None, "aspect_ratio": None}}
        return {"hidden_states": sample, "encoder_hidden_states": text, "timestep": time, **extra}
    if kind == "sd3":
        rest = {"encoder_hidden_states": text, "pooled_projections": normal(batch, 10), "timestep": time}
        return {"hidden_states": sample, **rest}
    stable: dict[str, Any] = {"sample": sample, "timestep": 7, "encoder_hidden_states": text}
    if kind == "sdxl":
        stable["added_cond_kwargs"] = {"text_embeds": normal(batch, 10), "time_ids": torch.ones(batch, 6)}
    return stable


def _clip(kind: str, size: tuple[int, int], batch: int, normal: Callable[..., Tensor]) -> dict[str, Any]:
    high, wide = size
    given: dict[str, Any] = {"encoder_hidden_states": normal(batch, 5, 12), "timestep": torch.full((batch,), 7)}
    frames_first = kind.startswith("cogvideox")
    given["hidden_states"] = normal(batch, *((FRAMES, 4) if frames_first else (4, FRAMES)), high, wide)
    if kind == "cogvideox_rotary":
        from diffusers.models.embeddings import get_3d_rotary_pos_embed

        grid = (high // 2, wide // 2)
        table = get_3d_rotary_pos_embed(16, ((0, 0), grid), grid, FRAMES, device=torch.device("cpu"))
        given["image_rotary_emb"] = table
    if kind.startswith("hunyuan"):
        mask = torch.ones(batch, 5)
        mask[0, 3:] = 0
        given |= {"encoder_attention_mask": mask, "pooled_projections": normal(batch, 10)}
    return given


@torch.no_grad()
def run(model: nn.Module, given: dict[str, Any]) -> Tensor:
    out: Tensor = model(**given).sample
    return out
