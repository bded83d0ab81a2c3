"""Inputs of denoisers: arguments of a forward at batch 1, on the meta device, by class."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tokred.adapters.diffusion.clips import CLIPS, clip
from tokred.adapters.diffusion.families import DENOISERS, known_as
from tokred.adapters.swap import host_class

TEXT = 77  # tokens of a prompt, as CLIP's
TEXTS = 512  # and as T5's


def float_type(model: nn.Module) -> torch.dtype:
    """The type in which a model computes: that of its first weights that are numbers with a point."""
    return next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)


def example(model: Any, size: tuple[int, ...]) -> dict[str, Any]:
    """Arguments of a forward at batch 1, on the meta device.

    Args:
        model: a denoiser.
        size: rows and columns of the sample; of a clip: frames, rows and columns.

    Raises:
        ValueError: the model takes conditions that are not known here, or the size has frames where it should not.
    """
    kind = known_as(host_class(model), DENOISERS) or ""
    if (len(size) == 3) != (kind in CLIPS):
        wanted = "rows and columns" if len(size) == 3 else "frames, rows and columns"
        raise ValueError(f"the sample of {host_class(model).__name__} has {wanted}, got a size of {size}")
    config, dtype = model.config, float_type(model)

    def empty(*shape: int, kind: torch.dtype = dtype) -> Tensor:
        return torch.empty(1, *shape, device="meta", dtype=kind)

    sample = empty(int(config.in_channels), *size)
    time = empty(kind=torch.int64)
    if kind in CLIPS:
        return {"timestep": time, **clip(kind, config, size, empty)}
    if kind == "UNet2DModel":
        return {"sample": sample, "timestep": time, **_classes(model, config, empty)}
    if kind == "UNet2DConditionModel":
        text = empty(TEXT, int(config.encoder_hid_dim or config.cross_attention_dim))
        given = {"sample": sample, "timestep": time, "encoder_hidden_states": text, **_classes(model, config, empty)}
        if config.addition_embed_type == "text_time":
            # SDXL embeds six sizes beside the pooled text, and its configuration gives the width of both together.
            pooled = int(config.projection_class_embeddings_input_dim) - 6 * int(config.addition_time_embed_dim)
            given["added_cond_kwargs"] = {"text_embeds": empty(pooled), "time_ids": empty(6)}
        elif config.addition_embed_type is not None:
            raise ValueError(f"a UNet with addition_embed_type {config.addition_embed_type!r} is not known here")
        return given
    if kind == "DiTTransformer2DModel":
        return {"hidden_states": sample, "timestep": time, "class_labels": empty(kind=torch.int64)}
    if kind == "PixArtTransformer2DModel":
        sizes = (empty(2), empty(1)) if model.use_additional_conditions else (None, None)
        more = {"added_cond_kwargs": dict(zip(("resolution", "aspect_ratio"), sizes, strict=True))}
        text = empty(120, int(config.caption_channels))
        return {"hidden_states": sample, "timestep": time, "encoder_hidden_states": text, **more}
    if kind == "FluxTransformer2DModel":
        # Flux's pipeline packs 2 x 2 of the sample into a token before the denoiser sees it.
        n, width = (size[0] // 2) * (size[1] // 2), len(config.axes_dims_rope)
        ids = (torch.empty(rows, width, device="meta") for rows in (n, TEXTS))
        given = {"hidden_states": empty(n, int(config.in_channels)), "timestep": empty()}
        given |= dict(zip(("img_ids", "txt_ids"), ids, strict=True))
        given |= {"encoder_hidden_states": empty(TEXTS, int(config.joint_attention_dim))}
        given |= {"pooled_projections": empty(int(config.pooled_projection_dim))}
        return given | ({"guidance": empty()} if config.guidance_embeds else {})
    text = empty(2 * TEXT, int(config.joint_attention_dim))
    pooled_text = empty(int(config.pooled_projection_dim))
    rest = {"encoder_hidden_states": text, "pooled_projections": pooled_text}
    return {"hidden_states": sample, "timestep": time, **rest}


def _classes(model: Any, config: Any, empty: Any) -> dict[str, Any]:
    if getattr(model, "class_embedding", None) is None:
        return {}
    kind = config.class_embed_type
    if kind == "identity":
        return {"class_labels": empty(int(model.time_embedding.linear_2.out_features))}
    if kind in ("projection", "simple_projection"):
        return {"class_labels": empty(int(config.projection_class_embeddings_input_dim))}
    return {"class_labels": empty(kind=torch.int64)}
