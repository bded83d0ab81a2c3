"""Tiny random denoisers of diffusers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def unet() -> nn.Module:
    """UNet2DModel: attention without text at 1, 2 times coarser."""
    from diffusers import UNet2DModel

    torch.manual_seed(0)
    return UNet2DModel(
        sample_size=16,
        in_channels=1,
        out_channels=1,
        block_out_channels=(16, 32),
        layers_per_block=1,
        down_block_types=("AttnDownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "AttnUpBlock2D"),
        norm_num_groups=4,
        attention_head_dim=8,
    ).eval()


def _sd(**more: Any) -> nn.Module:
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    settings: dict[str, Any] = {
        "sample_size": 16,
        "block_out_channels": (16, 32),
        "layers_per_block": 1,
        "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        "norm_num_groups": 4,
        "cross_attention_dim": 12,
        "attention_head_dim": 2,
    }
    return UNet2DConditionModel(**{**settings, **more}).eval()


def sd15() -> nn.Module:
    """As SD 1.x: convolutions around the blocks."""
    return _sd()


def sd_small() -> nn.Module:
    """As SD 1.x with a single level: for what takes long."""
    blocks = {"down_block_types": ("CrossAttnDownBlock2D",), "up_block_types": ("CrossAttnUpBlock2D",)}
    return _sd(block_out_channels=(16,), mid_block_type=None, **blocks)


def sd21() -> nn.Module:
    """As SD 2.x: linear layers around the blocks, heads of one size."""
    return _sd(use_linear_projection=True, attention_head_dim=(2, 4))


def sdxl() -> nn.Module:
    """As SDXL: no attention at the resolution of the sample, several blocks in a transformer, more conditions."""
    return _sd(
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=6 * 4 + 10,
    )


def dit() -> nn.Module:
    """DiT: patches of 2, one sequence."""
    from diffusers import DiTTransformer2DModel

    torch.manual_seed(0)
    return DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        sample_size=16,
        patch_size=2,
        num_embeds_ada_norm=10,
        norm_num_groups=4,
    ).eval()


def pixart() -> nn.Module:
    """PixArt: blocks without a third norm, text by cross-attention."""
    from diffusers import PixArtTransformer2DModel

    torch.manual_seed(0)
    return PixArtTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        cross_attention_dim=16,
        sample_size=16,
        patch_size=2,
        caption_channels=12,
        use_additional_conditions=False,
    ).eval()


def sd3() -> nn.Module:
    """SD 3.5 medium: text and image in one attention, and a second one of the image alone in the first layer."""
    from diffusers import SD3Transformer2DModel

    torch.manual_seed(0)
    return SD3Transformer2DModel(
        sample_size=16,
        patch_size=2,
        in_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=12,
        caption_projection_dim=16,
        pooled_projection_dim=10,
        out_channels=4,
        pos_embed_max_size=32,
        dual_attention_layers=(0,),
        qk_norm="rms_norm",
    ).eval()


def flux() -> nn.Module:
    """Flux: text first, rotary embedding, double and single blocks."""
    from diffusers import FluxTransformer2DModel

    torch.manual_seed(0)
    return FluxTransformer2DModel(
        patch_size=1,
        in_channels=8,
        num_layers=1,
        num_single_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=12,
        pooled_projection_dim=10,
        axes_dims_rope=(2, 2, 4),
    ).eval()


FRAMES = 3


def cogvideox() -> nn.Module:
    """CogVideoX-2b: text first, projected together with the clip, positions added at the input."""
    return _cogvideox()


def cogvideox_rotary() -> nn.Module:
    """CogVideoX-5b: rotary embedding."""
    return _cogvideox(use_rotary_positional_embeddings=True)


def _cogvideox(**more: Any) -> nn.Module:
    from diffusers import CogVideoXTransformer3DModel

    torch.manual_seed(0)
    return CogVideoXTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=4,
        time_embed_dim=8,
        text_embed_dim=12,
        num_layers=2,
        sample_width=16,
        sample_height=16,
        sample_frames=4 * (FRAMES - 1) + 1,
        max_text_seq_length=5,
        **more,
    ).eval()


def wan() -> nn.Module:
    """Wan: rotary embedding, text by cross-attention."""
    from diffusers import WanTransformer3DModel

    torch.manual_seed(0)
    return WanTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        text_dim=12,
        freq_dim=8,
        ffn_dim=32,
        num_layers=2,
    ).eval()


def hunyuan() -> nn.Module:
    """HunyuanVideo: text last and masked, rotary embedding, double and single blocks."""
    return _hunyuan()


def hunyuan_first_frame() -> nn.Module:
    """HunyuanVideo that is given an image: the tokens of the first frame have gates of their own."""
    return _hunyuan(image_condition_type="token_replace")


def _hunyuan(**more: Any) -> nn.Module:
    from diffusers import HunyuanVideoTransformer3DModel

    torch.manual_seed(0)
    return HunyuanVideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=1,
        num_single_layers=2,
        num_refiner_layers=1,
        text_embed_dim=12,
        pooled_projection_dim=10,
        rope_axes_dim=(2, 2, 4),
        guidance_embeds=False,
        **more,
    ).eval()


CLIPS = {
    "cogvideox": cogvideox,
    "cogvideox_rotary": cogvideox_rotary,
    "wan": wan,
    "hunyuan": hunyuan,
    "hunyuan_first_frame": hunyuan_first_frame,
}
MODELS = {
    "unet": unet,
    "sd15": sd15,
    "sd21": sd21,
    "sdxl": sdxl,
    "dit": dit,
    "pixart": pixart,
    "sd3": sd3,
    "flux": flux,
    **CLIPS,
}


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
        pooled = normal(batch, 10)
        rest = {"encoder_hidden_states": text, "pooled_projections": pooled, "timestep": time}
        return {"hidden_states": sample, **rest}
    given: dict[str, Any] = {"sample": sample, "timestep": 7, "encoder_hidden_states": text}
    if kind == "sdxl":
        given["added_cond_kwargs"] = {"text_embeds": normal(batch, 10), "time_ids": torch.ones(batch, 6)}
    return given


def _clip(kind: str, size: tuple[int, int], batch: int, normal: Any) -> dict[str, Any]:
    high, wide = size
    given = {"encoder_hidden_states": normal(batch, 5, 12), "timestep": torch.full((batch,), 7)}
    if not kind.startswith("cogvideox"):
        given["hidden_states"] = normal(batch, 4, FRAMES, high, wide)
    else:
        given["hidden_states"] = normal(batch, FRAMES, 4, high, wide)
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


def half(given: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """The same with floats of another type."""

    def turn(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: turn(v) for k, v in value.items()}
        return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value

    return {k: turn(v) for k, v in given.items()}


@torch.no_grad()
def run(model: nn.Module, given: dict[str, Any]) -> Tensor:
    """The denoiser's output."""
    out: Tensor = model(**given).sample
    return out
