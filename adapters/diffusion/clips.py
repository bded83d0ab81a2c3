"""Denoisers of clips: how many frames a forward is given, and what their forwards take."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tokred.adapters.diffusion.session import EnterDenoiser, Session


class EnterClip(EnterDenoiser):
    """Before the forward of a denoiser of clips.

    Args:
        session, names, sample: as for images.
        frames: dimension of the sample that counts frames.
        patch: frames that a token stands for.
    """

    def __init__(self, session: Session, names: tuple[str, ...], sample: str, frames: int, patch: int) -> None:
        super().__init__(session, names, sample)
        self.frames, self.patch = frames, patch

    def __call__(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = {**dict(zip(self.names, args, strict=False)), **kwargs}
        sample, side = given[self.sample], self.session.patch
        size = (sample.shape[-2] // side, sample.shape[-1] // side)
        time = given.get("timestep")
        if isinstance(time, Tensor) and time.ndim == 2:
            time = time.amax()  # one for each token, zero where an image is given
        self.session.begin(size, time, sample.shape[self.frames] // self.patch, sample)


def _cogvideox(config: Any, size: tuple[int, ...], empty: Callable[..., Tensor]) -> dict[str, Any]:
    frames, high, wide = size
    given: dict[str, Any] = {"hidden_states": empty(frames, int(config.in_channels), high, wide)}
    given["encoder_hidden_states"] = empty(int(config.max_text_seq_length), int(config.text_embed_dim))
    if config.use_rotary_positional_embeddings:
        side = int(config.patch_size)
        n = frames // int(config.patch_size_t or 1) * (high // side) * (wide // side)
        given["image_rotary_emb"] = tuple(torch.empty(n, int(config.attention_head_dim), device="meta") for _ in "cs")
    return given | ({"ofs": empty()} if config.ofs_embed_dim else {})


def _wan(config: Any, size: tuple[int, ...], empty: Callable[..., Tensor]) -> dict[str, Any]:
    given = {"hidden_states": empty(int(config.in_channels), *size)}
    given["encoder_hidden_states"] = empty(512, int(config.text_dim))
    if config.image_dim is not None:
        given["encoder_hidden_states_image"] = empty(257, int(config.image_dim))
    return given


def _hunyuan(config: Any, size: tuple[int, ...], empty: Callable[..., Tensor]) -> dict[str, Any]:
    given = {"hidden_states": empty(int(config.in_channels), *size)}
    given |= {"encoder_hidden_states": empty(256, int(config.text_embed_dim)), "encoder_attention_mask": empty(256)}
    given["pooled_projections"] = empty(int(config.pooled_projection_dim))
    return given | ({"guidance": empty()} if config.guidance_embeds else {})


# Class of a denoiser -> its arguments at batch 1, but for the timestep.
CLIPS: dict[str, Callable[..., dict[str, Any]]] = {
    "CogVideoXTransformer3DModel": _cogvideox,
    "WanTransformer3DModel": _wan,
    "HunyuanVideoTransformer3DModel": _hunyuan,
}


def clip(kind: str, config: Any, size: tuple[int, ...], empty: Callable[..., Tensor]) -> dict[str, Any]:
    """Arguments of a forward at batch 1, but for the timestep.

    Args:
        kind: class of the denoiser.
        config: its settings.
        size: frames, rows and columns of the sample.
        empty: makes a tensor of batch 1.
    """
    return CLIPS[kind](config, size, empty)
