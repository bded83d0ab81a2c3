"""Models with vision of transformers, with prompts for them: 16 visual tokens an image, four decoder layers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tokred.adapters.tiny.config import Config
from tokred.adapters.tiny.weights import livelier

Rows = list[list[int | str]]
Pixels = Callable[[list[int], torch.Generator], dict[str, Tensor]]
IMAGE, VIDEO = 98, 97
TEXT: dict[str, Any] = {
    "vocab_size": 99, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 512, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2,
}  # fmt: skip
VISION: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "image_size": 16,
    "patch_size": 4,
}  # fmt: skip
SIGLIP: dict[str, Any] = {**VISION, "vision_use_head": False}
QWEN2: dict[str, Any] = {k: v for k, v in TEXT.items() if k != "head_dim"}
ROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}}
QWEN_VISION = {
    "depth": 2, "num_heads": 2, "patch_size": 4, "spatial_merge_size": 2, "temporal_patch_size": 2, "hidden_size": 32,
}  # fmt: skip
QWEN_MARKS = {
    "image_token_id": IMAGE, "video_token_id": VIDEO, "vision_start_token_id": 95, "vision_end_token_id": 96,
}  # fmt: skip
NEWER_QWEN = {**QWEN_VISION, "out_hidden_size": 32, "intermediate_size": 32}
CLIP, LLAMA = Config("CLIPVisionConfig", VISION), Config("LlamaConfig", TEXT)
TILES = {"image_grid_pinpoints": [[16, 32], [32, 16], [32, 32]]}


def _images(*shape: int) -> Pixels:
    return lambda counts, g: {"pixel_values": torch.randn(sum(counts), *shape, generator=g)}


def _qwen_images(counts: list[int], g: torch.Generator) -> dict[str, Tensor]:
    n = sum(counts)
    grid = torch.tensor([[1, 8, 8]] * n)
    return {"pixel_values": torch.randn(n * 64, 3 * 2 * 4 * 4, generator=g), "image_grid_thw": grid}


def _qwen_videos(counts: list[int], g: torch.Generator) -> dict[str, Tensor]:
    n = sum(counts)
    grid = torch.tensor([[2, 4, 4]] * n)
    return {"pixel_values_videos": torch.randn(n * 32, 3 * 2 * 4 * 4, generator=g), "video_grid_thw": grid}


def _tiles(counts: list[int], g: torch.Generator) -> dict[str, Tensor]:
    n = sum(counts)
    return {"pixel_values": torch.randn(n, 3, 3, 16, 16, generator=g), "image_sizes": torch.tensor([[14, 32]] * n)}


def _videos(counts: list[int], g: torch.Generator) -> dict[str, Tensor]:
    return {"pixel_values_videos": torch.randn(sum(counts), 3, 3, 16, 16, generator=g)}


def _padded_images(counts: list[int], g: torch.Generator) -> dict[str, Tensor]:
    pixels = torch.zeros(len(counts), max(counts), 3, 32, 32)
    for i, n in enumerate(counts):
        pixels[i, :n] = torch.randn(n, 3, 32, 32, generator=g)
    return {"pixel_values": pixels}


def _shaped_images(counts: list[int], g: torch.Generator) -> dict[str, Tensor]:
    """Every other one is wide and low, and all have padding behind their patches."""
    n = sum(counts)
    shapes = torch.tensor([[8, 8], [4, 16]] * n)[:n]
    mask = torch.arange(72) < shapes.prod(1, keepdim=True)
    pixels = torch.randn(n, 72, 48, generator=g) * mask.unsqueeze(2)
    return {"pixel_values": pixels, "spatial_shapes": shapes, "pixel_attention_mask": mask.long()}


class Family(NamedTuple):
    """One way of building one class.

    Attributes:
        name: of the family in transformers: its model is ``<name>ForConditionalGeneration``.
        options: of its configuration, ``<name>Config``.
        pixels: arguments of the features, for so many images (videos) in each sample.
        visual: placeholder ids of one image (or video), what stands around them included.
        language: dotted name of the language model.
        types: what tells visual tokens apart, "token_type_ids" or "mm_token_type_ids", or "".
    """

    name: str
    options: dict[str, Any]
    pixels: Pixels
    visual: tuple[int, ...] = (IMAGE,) * 16
    language: str = "model.language_model"
    types: str = ""

    @property
    def video(self) -> bool:
        """True where the pictures given to this model are videos."""
        return VIDEO in self.visual


# 16 of the whole image, then 2 tiles of 4 x 8 less one row of padding at top and bottom each, with newlines.
ANYRES = (IMAGE,) * (16 + 4 * 9)
MARKED = (95, *(IMAGE,) * 16, 96)
ONEVISION: dict[str, Any] = {
    "vision_config": Config("SiglipVisionConfig", SIGLIP), "text_config": Config("Qwen2Config", QWEN2),
    "image_token_id": IMAGE, "video_token_id": VIDEO, **TILES, "vision_aspect_ratio": "anyres_max_9",
}  # fmt: skip
QWEN2_5: dict[str, Any] = {
    "vision_config": {**NEWER_QWEN, "window_size": 16, "fullatt_block_indexes": [1]},
    "text_config": {**QWEN2, **ROPE}, **QWEN_MARKS,
}  # fmt: skip
GLM4V: dict[str, Any] = {
    "vision_config": {**NEWER_QWEN, "image_size": 32}, "text_config": {**TEXT, **ROPE}, "image_token_id": IMAGE,
    "video_token_id": VIDEO, "image_start_token_id": 95, "image_end_token_id": 96, "video_start_token_id": 93,
    "video_end_token_id": 94,
}  # fmt: skip
IDEFICS: dict[str, Any] = {"text_config": LLAMA, "image_token_id": IMAGE, "scale_factor": 2, "pad_token_id": 0}
IDEFICS_VISION: dict[str, Any] = {**VISION, "image_size": 32, "patch_size": 4}

FAMILIES: dict[str, Family] = {
    "llava": Family(
        "Llava", {"vision_config": CLIP, "text_config": LLAMA, "image_token_id": IMAGE}, _images(3, 16, 16)
    ),
    "llava_next": Family(
        "LlavaNext", {"vision_config": CLIP, "text_config": LLAMA, "image_token_id": IMAGE, **TILES}, _tiles, ANYRES
    ),
    "llava_next_video": Family(
        "LlavaNextVideo",
        {"vision_config": CLIP, "text_config": LLAMA, "image_token_index": IMAGE, "video_token_index": VIDEO, **TILES},
        _videos, (VIDEO,) * 12,
    ),
    "onevision": Family("LlavaOnevision", ONEVISION, _tiles, ANYRES),
    "onevision_video": Family("LlavaOnevision", ONEVISION, _videos, (VIDEO,) * 13),
    "qwen2_vl": Family(
        "Qwen2VL",
        {"vision_config": {**QWEN_VISION, "embed_dim": 32, "mlp_ratio": 2}, "text_config": {**QWEN2, **ROPE},
         **QWEN_MARKS},
        _qwen_images, MARKED, types="mm_token_type_ids",
    ),
    "qwen2_5_vl": Family("Qwen2_5_VL", QWEN2_5, _qwen_images, MARKED, types="mm_token_type_ids"),
    "qwen2_5_vl_video": Family(
        "Qwen2_5_VL", QWEN2_5, _qwen_videos, (95, *(VIDEO,) * 8, 96), types="mm_token_type_ids"
    ),
    "qwen3_vl": Family(
        "Qwen3VL",
        {"vision_config": {**NEWER_QWEN, "num_position_embeddings": 64, "deepstack_visual_indexes": [0]},
         "text_config": {**TEXT, **ROPE}, **QWEN_MARKS},
        _qwen_images, MARKED, types="mm_token_type_ids",
    ),
    "qwen3_5_vl": Family(
        "Qwen3_5",
        {"vision_config": {**NEWER_QWEN, "num_position_embeddings": 64},
         "text_config": {**TEXT, "rope_parameters": {**ROPE["rope_parameters"], "partial_rotary_factor": 1.0},
                         "layer_types": ["full_attention"] * 4},
         **QWEN_MARKS},
        _qwen_images, MARKED, types="mm_token_type_ids",
    ),
    "glm4v": Family("Glm4v", GLM4V, _qwen_images, MARKED, types="mm_token_type_ids"),
    "internvl": Family(
        "InternVL",
        {"vision_config": Config("InternVLVisionConfig", {**VISION, "image_size": [16, 16], "patch_size": [2, 2]}),
         "text_config": Config("Qwen2Config", QWEN2), "image_token_id": IMAGE},
        _images(3, 16, 16),
    ),
    "idefics3": Family(
        "Idefics3", {**IDEFICS, "vision_config": {**IDEFICS_VISION, "model_type": "idefics3_vision"}},
        _padded_images, language="model.text_model",
    ),
    "smolvlm": Family(
        "SmolVLM", {**IDEFICS, "vision_config": {**IDEFICS_VISION, "model_type": "smolvlm_vision"}},
        _padded_images, language="model.text_model",
    ),
    "paligemma": Family(
        "PaliGemma",
        {"vision_config": {**SIGLIP, "model_type": "siglip_vision_model", "projection_dim": 32},
         "text_config": {**TEXT, "model_type": "gemma"}, "image_token_index": IMAGE, "projection_dim": 32,
         "hidden_size": 32},
        _images(3, 16, 16), types="token_type_ids",
    ),
    "gemma3": Family(
        "Gemma3",
        {"vision_config": {**SIGLIP, "image_size": 32, "model_type": "siglip_vision_model"},
         "text_config": {**TEXT, "layer_types": ["sliding_attention", "full_attention"] * 2, "sliding_window": 128,
                         "query_pre_attn_scalar": 8},
         "mm_tokens_per_image": 16, "image_token_index": IMAGE, "boi_token_index": 95, "eoi_token_index": 96},
        _images(3, 32, 32), MARKED, types="token_type_ids",
    ),
}  # fmt: skip


# Of layers that keep a state and one that keeps rows: tokens leave before the first of them, and not in between.
HYBRIDS: dict[str, Family] = {
    "qwen3_5_states": FAMILIES["qwen3_5_vl"]._replace(
        options={**FAMILIES["qwen3_5_vl"].options, "text_config": {
            **FAMILIES["qwen3_5_vl"].options["text_config"], "linear_num_key_heads": 2, "linear_num_value_heads": 4,
            "linear_key_head_dim": 8, "linear_value_head_dim": 8,
            "layer_types": ["linear_attention", "linear_attention", "full_attention", "linear_attention"],
        }},
    ),
    "lfm2_vl": Family(
        "Lfm2Vl",
        {"vision_config": {**SIGLIP, "model_type": "siglip2_vision_model", "num_patches": 64, "vision_use_head": False},
         "text_config": {**TEXT, "model_type": "lfm2",
                         "layer_types": ["conv", "full_attention", "conv", "full_attention"]},
         "image_token_id": IMAGE, "projector_hidden_size": 32},
        _shaped_images,
    ),
}  # fmt: skip


def _row(name: str) -> Family:
    return (FAMILIES | HYBRIDS)[name]


def make(name: str, **changes: Any) -> Any:
    """The host's model as it makes it, some options of its configuration replaced."""
    import transformers as t

    row = _row(name)
    config = Config(f"{row.name}Config", row.options).make(t, **changes)
    return getattr(t, f"{row.name}ForConditionalGeneration")(config)


def ready(model: Any) -> Any:
    """A model with weights that tell tokens apart, in evaluation mode."""
    with torch.no_grad():
        for key, p in model.named_parameters():
            if key.endswith("mm_input_projection_weight"):  # zeros, and so would be all visual tokens
                p.normal_(std=0.1)
    return livelier(model).eval()


def build(name: str, seed: int = 0) -> Any:
    """The model, in evaluation mode."""
    torch.manual_seed(seed)
    return ready(make(name))


def layers(name: str, model: Any) -> Any:
    """Decoder layers of the language model inside."""
    return model.get_submodule(_row(name).language).layers


def prompts(name: str, rows: Rows, seed: int = 1) -> dict[str, Any]:
    """A left-padded batch: each row a list of text lengths and "image" entries.

    Returns:
        ``input_ids``, ``attention_mask``, and what the family takes of images.
    """
    host, g = _row(name), torch.Generator().manual_seed(seed)
    sequences, counts = [], []
    for row in rows:
        ids: list[int] = []
        for part in row:
            ids += host.visual if part == "image" else torch.randint(3, 90, (int(part),), generator=g).tolist()
        sequences.append(ids)
        counts.append(row.count("image"))
    longest = max(map(len, sequences))
    padded = torch.tensor([[0] * (longest - len(s)) + s for s in sequences])
    mask = torch.arange(longest) >= longest - torch.tensor([len(s) for s in sequences]).unsqueeze(1)
    batch: dict[str, Any] = {"input_ids": padded, "attention_mask": mask.long()}
    if host.types:
        batch[host.types] = (padded == IMAGE).long() + 2 * (padded == VIDEO).long()
        if name == "paligemma":  # zeros are the prefix, all of which sees all of it
            batch[host.types] = torch.zeros_like(padded)
    if sum(counts):
        batch |= host.pixels(counts, g)
    return batch
