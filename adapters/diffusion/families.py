"""Families of denoisers, as data: their classes, and those of their blocks and sub-layers."""

from __future__ import annotations

from collections.abc import Container
from typing import NamedTuple

from tokred.adapters.contract import words
from tokred.adapters.diffusion.sublayers import Kind


class Denoiser(NamedTuple):
    """A class of denoisers.

    Attributes:
        sample: name of the sample in its forward.
        frames: dimension of the sample that counts the frames of a clip; 0: it is an image.
        packed: the sample is a sequence of 2 x 2 patches, with the ids of their places beside it.
        loose: attention without a block around it may be over the image's tokens.
    """

    sample: str = words.STATES.name
    frames: int = 0
    packed: bool = False
    loose: bool = False


class Layout(NamedTuple):
    """A class of transformer blocks.

    Attributes:
        sublayers: attentions and MLPs over the tokens of the image, and their kinds.
        first: where text and image attend together, the text stands first.
        parallel: attention and MLP read one tensor, and share their last layer.
    """

    sublayers: tuple[tuple[str, Kind], ...]
    first: bool = False
    parallel: bool = False


DENOISERS = {
    "UNet2DModel": Denoiser("sample", loose=True),
    "UNet2DConditionModel": Denoiser("sample", loose=True),
    "DiTTransformer2DModel": Denoiser(),
    "PixArtTransformer2DModel": Denoiser(),
    "SD3Transformer2DModel": Denoiser(),
    "FluxTransformer2DModel": Denoiser(packed=True),
    "CogVideoXTransformer3DModel": Denoiser(frames=1),
    "WanTransformer3DModel": Denoiser(frames=2),
    "HunyuanVideoTransformer3DModel": Denoiser(frames=2),
}
_JOINT: tuple[tuple[str, Kind], ...] = (("attn", "joint"), ("ff", "mlp"))
BLOCKS: dict[str, Layout] = {
    "BasicTransformerBlock": Layout((("attn1", "attention"), ("attn2", "attention"), ("ff", "mlp"))),
    "JointTransformerBlock": Layout((("attn", "joint"), ("attn2", "joint"), ("ff", "mlp"))),
    "FluxTransformerBlock": Layout(_JOINT, first=True),
    "FluxSingleTransformerBlock": Layout((("attn", "single"),), first=True, parallel=True),
    "CogVideoXBlock": Layout((("attn1", "joint"), ("ff", "mlp")), first=True),
    "WanTransformerBlock": Layout((("attn1", "attention"), ("attn2", "attention"), ("ffn", "mlp"))),
    "HunyuanVideoTransformerBlock": Layout(_JOINT),
    "HunyuanVideoSingleTransformerBlock": Layout((("attn", "joint"),), parallel=True),
    # The tokens of their first frame are scaled by other gates, so the block cannot run on fewer as a whole.
    "HunyuanVideoTokenReplaceTransformerBlock": Layout(_JOINT),
    "HunyuanVideoTokenReplaceSingleTransformerBlock": Layout((("attn", "joint"),)),
}

# Sub-layers whose forwards are known; modules of other libraries in their places are taken as they are.
SUBLAYERS = ("Attention", "FeedForward", "FluxAttention", "WanAttention")
# What diffusers calls its lists of transformer blocks.
LISTS = ("transformer_blocks", "single_transformer_blocks", "blocks")


class _Others(NamedTuple):
    """Names of classes that are none of these: words in those of denoisers, and a part of UNets that has one too."""

    denoisers: tuple[str, ...]
    part: str


OTHERS = _Others(("UNet", "Transformer"), "Transformer2DModel")


def known_as(cls: type, names: Container[str]) -> str | None:
    """The name under which a class of diffusers, or a subclass of one, is known."""
    return next(
        (c.__name__ for c in cls.__mro__ if c.__module__.startswith("diffusers.") and c.__name__ in names), None
    )
