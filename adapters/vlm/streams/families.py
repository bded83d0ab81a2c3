"""Families that take frames one by one, as data: how a frame goes in, and where its tokens stand."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from tokred.adapters.contract import members, words
from tokred.adapters.vlm.families import core_name
from tokred.errors import UnsupportedModelError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Looks(NamedTuple):
    """How one family takes a frame.

    Attributes:
        getter: of features.
        modality: that it is for.
        given: makes its arguments of a frame's pixels: ``given(core, pixels)``.
        newline: whether an embedding of the model's own stands behind the last frame.
        axes: whether positions are times, rows and columns.
    """

    getter: str
    modality: str
    given: Callable[[PreTrainedModel, Tensor], dict[str, Any]]
    newline: bool = False
    axes: bool = False


def _image(core: PreTrainedModel, pixels: Tensor) -> dict[str, Any]:
    return {words.PIXELS.name: _plain(pixels)[None]}


def _video(core: PreTrainedModel, pixels: Tensor) -> dict[str, Any]:
    return {words.VIDEO_PIXELS.name: _plain(pixels)[None, None]}


def _plain(pixels: Tensor) -> Tensor:
    if pixels.ndim != 3:
        raise ValueError(f"pixels of a frame must be (channels, height, width), got {tuple(pixels.shape)}")
    return pixels


def _patches(core: PreTrainedModel, pixels: Tensor) -> dict[str, Any]:
    """Qwen's: patches in the order of the cells that become one token, each as deep in time as the tower takes it."""
    vision = words.VISION.need(words.CONFIG.need(core))
    deep, side, joined = (int(w.need(vision)) for w in (words.TOWER_DEPTH, words.PATCH, words.JOINED))
    if pixels.ndim == 3:
        pixels = pixels[None].expand(deep, -1, -1, -1)  # as processors do with a picture
    if pixels.ndim != 4 or len(pixels) != deep:
        raise ValueError(
            f"pixels of a frame must be (channels, height, width), or ({deep}, channels, height, width) for the {deep} "
            f"frames that this tower takes together, got {tuple(pixels.shape)}"
        )
    high, wide = pixels.shape[2:]
    unit = side * joined
    if high % unit or wide % unit:
        raise ValueError(f"pixels of a frame must have sides that {unit} divides, got {high} x {wide}")
    rows, columns = high // side, wide // side
    cells = pixels.view(deep, -1, rows // joined, joined, side, columns // joined, joined, side)
    flat = cells.permute(2, 5, 3, 6, 1, 0, 4, 7).reshape(rows * columns, -1)
    return {words.VIDEO_PIXELS.name: flat, words.VIDEO_GRIDS.name: torch.tensor([[1, rows, columns]])}


_FRAMES = Looks("get_video_features", "video", _video)
_IMAGES = Looks("get_image_features", "image", _image)
_QWEN = Looks("get_video_features", "video", _patches, axes=True)

LOOKS: dict[str, Looks] = {
    "LlavaModel": _IMAGES,
    "InternVLModel": _IMAGES,
    "LlavaNextVideoModel": _FRAMES,
    "LlavaOnevisionModel": _FRAMES._replace(newline=True),
    "Qwen2VLModel": _QWEN,
    "Qwen2_5_VLModel": _QWEN,
}

_TOGETHER = "takes all tiles of a sample together"
_BOTH_WAYS = "lets the tokens of an image see one another in both directions, also in its language model"
_STATES = "keeps a state in some layers, which no frame can leave"
_TIMES = "writes the time of each frame into the prompt, which frames alone do not tell"
REASONS = {
    "LlavaNextModel": "cuts images into tiles, and knows no videos",
    "Qwen2_5OmniThinkerModel": "places what it sees and hears in windows of both, which frames alone do not make",
    "Qwen3VLModel": "adds features of its tower inside its language model, at the places of all visual tokens",
    "Idefics3Model": _TOGETHER,
    "SmolVLMModel": _TOGETHER,
    "Mistral3Model": "takes images of several sizes with marks between their rows, and knows no videos",
    **dict.fromkeys(("Glm4vModel", "Glm4vMoeModel"), _TIMES),
    **dict.fromkeys(("Qwen3_5Model", "Qwen3_5MoeModel", "Lfm2VlModel"), _STATES),
    "Qwen3VLMoeModel": "adds features of its tower inside its language model, at the places of all visual tokens",
    "PaliGemmaModel": _BOTH_WAYS,
    "Gemma3Model": _BOTH_WAYS,
    "Florence2Model": "reads all of its prompt at once in an encoder, and knows no videos",
}


def looks_of(core: nn.Module) -> Looks:
    """How a model takes frames.

    Raises:
        UnsupportedModelError: it takes none one by one; the message says why.
    """
    name = core_name(core)
    if name not in LOOKS:
        why = REASONS.get(name, "is of a family whose frames are not known")
        raise UnsupportedModelError(f"{name} cannot watch a stream: it {why}; streams run on {', '.join(LOOKS)}")
    return LOOKS[name]


def newline_of(core: nn.Module, looks: Looks) -> Tensor | None:
    """``(1, C)``: what stands behind the last frame; None: nothing does."""
    if not looks.newline:
        return None
    found: Tensor = members.NEWLINE.need(core)
    return found.detach()[None]
