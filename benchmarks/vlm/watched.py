"""Models with the layer shapes of real VLMs and random weights, prompts for them, and all that a patch does there."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any

import torch

from tokred.adapters.vlm import decoder_layers, hooks, host, taps
from tokred.vlm.before_llm import ProjectorMethod
from tokred.vlm.in_llm import LayerMethod

IMAGE = 999  # the placeholder; ids say nothing, so that a small vocabulary does
VOCABULARY = 1000
TEXT = 64


@dataclass(frozen=True)
class Shape:
    """One model.

    Attributes:
        name: in tables.
        family: "llava" or "qwen2_5_vl".
        depth: decoder layers of the real model.
        language: settings of its language model's layers.
        tower: settings of its tower's.
        grid: rows and columns of visual tokens.
        text: other tokens of the prompt, a quarter of them before the image.
    """

    name: str
    family: str
    depth: int
    language: dict[str, Any]
    tower: dict[str, Any]
    grid: tuple[int, int]
    text: int = TEXT

    @property
    def visual(self) -> int:
        """Visual tokens."""
        return self.grid[0] * self.grid[1]

    def tiny(self) -> Shape:
        """The same with 64 visual tokens and narrow layers."""
        language = {**self.language, "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4}
        tower = {**self.tower, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "num_attention_heads": 2}
        if self.family == "llava":
            language["num_key_value_heads"] = 4
            tower = {**tower, "image_size": 112}
            del tower["num_heads"]
        else:
            language |= {"num_key_value_heads": 2, "mrope_section": [2, 3, 3]}
            tower = {**tower, "out_hidden_size": 64}
            del tower["num_attention_heads"]
        return replace(self, language=language, tower=tower, grid=(8, 8), text=8)


CASES = {
    "llava15": Shape(
        "llava15", "llava", 32,
        {"hidden_size": 4096, "intermediate_size": 11008, "num_attention_heads": 32, "num_key_value_heads": 32,
         "rms_norm_eps": 1e-5},
        {"hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 16, "image_size": 336,
         "patch_size": 14, "hidden_act": "quick_gelu"},
        (24, 24),
    ),
    "qwen25vl": Shape(
        "qwen25vl", "qwen2_5_vl", 28,
        {"hidden_size": 3584, "intermediate_size": 18944, "num_attention_heads": 28, "num_key_value_heads": 4,
         "mrope_section": [16, 24, 24], "rms_norm_eps": 1e-6},
        {"hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16, "out_hidden_size": 3584, "patch_size": 14,
         "window_size": 112},
        (36, 36),
    ),
}  # fmt: skip


def build(shape: Shape, layers: int, tower_layers: int, device: torch.device, dtype: torch.dtype) -> Any:
    """The model with random weights, in evaluation mode.

    Args:
        shape: see :class:`Shape`.
        layers: decoder layers.
        tower_layers: at least 2. Qwen's last one attends to the whole image and the others to windows.
        device, dtype: of the weights.
    """
    import transformers as t

    text = {
        **shape.language, "num_hidden_layers": layers, "vocab_size": VOCABULARY, "max_position_embeddings": 32768,
        "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
    }  # fmt: skip
    if shape.family == "llava":
        vision = t.CLIPVisionConfig(**shape.tower, num_hidden_layers=tower_layers)
        config = t.LlavaConfig(vision_config=vision, text_config=t.LlamaConfig(**text), image_token_id=IMAGE)
        cls = t.LlavaForConditionalGeneration
    else:
        sections = text.pop("mrope_section")
        text["rope_parameters"] = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": sections}
        vision = {**shape.tower, "depth": tower_layers, "fullatt_block_indexes": [tower_layers - 1]}
        config = t.Qwen2_5_VLConfig(
            vision_config=vision, text_config=text, image_token_id=IMAGE, video_token_id=IMAGE - 1,
            vision_start_token_id=IMAGE - 3, vision_end_token_id=IMAGE - 2,
        )  # fmt: skip
        cls = t.Qwen2_5_VLForConditionalGeneration
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    torch.manual_seed(0)
    try:
        with device:
            return cls(config).eval()
    finally:
        torch.set_default_dtype(before)


def prompt(shape: Shape, keeps: int, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """Arguments of the forward for one image and some text, and those of the feature getter under ``features``.

    Args:
        shape: of the model.
        keeps: the image has one of so many of its tokens: 1, 4, 8 or 16.
        device, dtype: of tensors and of pixels.
    """
    g = torch.Generator().manual_seed(1)
    rows, columns = shape.grid[0] // (2 if keeps in (4, 8) else 4 if keeps == 16 else 1), shape.grid[1]
    columns = columns // {1: 1, 4: 2, 8: 4, 16: 4}[keeps]
    count, ahead = rows * columns, shape.text // 4
    text = torch.randint(3, IMAGE - 3, (shape.text,), generator=g)
    ids = torch.cat([text[:ahead], torch.full((count,), IMAGE), text[ahead:]]).unsqueeze(0).to(device)
    given: dict[str, Any] = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if shape.family == "llava":
        side = shape.tower["image_size"]
        pixels = torch.randn(1, 3, side, side, generator=g)
        given["features"] = {"pixel_values": pixels.to(device, dtype)}
        return given
    grid = torch.tensor([[1, 2 * rows, 2 * columns]], device=device)
    pixels = torch.randn(4 * count, 3 * 2 * shape.tower["patch_size"] ** 2, generator=g)
    given |= {"image_grid_thw": grid, "mm_token_type_ids": (ids == IMAGE).long()}
    given["features"] = {"pixel_values": pixels.to(device, dtype), "image_grid_thw": grid}
    return given


# Where it stands and what it is called; the parts of "decide" are inside the others.
PARTS: tuple[tuple[Any, str, str], ...] = (
    (hooks.EnterCore, "__call__", "core"),
    (hooks.LeaveCore, "__call__", "core"),
    (hooks.EnterLanguage, "__call__", "language"),
    (hooks.LeaveLanguage, "__call__", "language"),
    (decoder_layers.Inner, "enter", "layer"),
    (decoder_layers.Inner, "_note", "note"),
    (taps.ProjectorTap, "__call__", "tower"),
    (taps.HeadTap, "__call__", "tower"),
    (taps.TablesTap, "__call__", "tower"),
    (taps.FusedTap, "__call__", "tower"),
    (host, "describe", "tower"),
    (ProjectorMethod, "reduce", "decide"),
    (LayerMethod, "reduce", "decide"),
)


@contextlib.contextmanager
def around(enter: Callable[[str], AbstractContextManager[object]]) -> Iterator[None]:
    """While this lasts, models that are patched inside it enter ``enter(part)`` around each of :data:`PARTS`.

    A part inside one of the same name (CAT's selector inside CAT) is not entered again. What runs a decoder layer is no
    part, nor are the hooks of torch that call these.
    """
    inside: set[str] = set()

    def wrapped(own: Callable[..., Any], part: str) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            if part in inside:
                return own(*args, **kwargs)
            inside.add(part)
            try:
                with enter(part):
                    return own(*args, **kwargs)
            finally:
                inside.discard(part)

        return call

    before = [(owner, name, owner.__dict__[name]) for owner, name, _ in PARTS]
    try:
        for owner, name, part in PARTS:
            setattr(owner, name, wrapped(owner.__dict__[name], part))
        yield
    finally:
        for owner, name, own in before:
            setattr(owner, name, own)
