"""One tiny random model of every family, with prompts for it: the matrix that the law is tested over."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import transformers as t
from torch import Tensor

from tests.vlm.tiny import TEXT, VISION, livelier

Rows = list[list[int | str]]
QWEN_VISION = {"depth": 2, "num_heads": 2, "patch_size": 4, "spatial_merge_size": 2, "temporal_patch_size": 2}
SIGLIP = {**VISION, "vision_use_head": False}
ROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}}


class Tiny(NamedTuple):
    """A family.

    Attributes:
        build: makes the model.
        visual: placeholder ids of one image (and one video), what stands around them included.
        pixels: arguments of the features, for ``n`` images (videos) of a batch.
        language: dotted name of the language model.
        video: whether the pictures are videos.
        types: what tells visual tokens apart, "token_type_ids" or "mm_token_type_ids", or "".
    """

    build: Callable[[], Any]
    visual: Callable[[], list[int]]
    pixels: Callable[[list[int], torch.Generator], dict[str, Tensor]]
    language: str = "model.language_model"
    video: bool = False
    types: str = ""


def _images(*shape: int) -> Callable[[list[int], torch.Generator], dict[str, Tensor]]:
    return lambda counts, g: {"pixel_values": torch.randn(sum(counts), *shape, generator=g)}


def _llama(**more: Any) -> Any:
    return t.LlamaConfig(**{**TEXT, **more})


def _qwen2(**more: Any) -> dict[str, Any]:
    return {k: v for k, v in {**TEXT, **more}.items() if k != "head_dim"}


def llava(text: Any = None) -> Any:
    text = _llama() if text is None else text
    config = t.LlavaConfig(vision_config=t.CLIPVisionConfig(**VISION), text_config=text, image_token_id=98)
    return t.LlavaForConditionalGeneration(config)


def llava_next() -> Any:
    config = t.LlavaNextConfig(
        vision_config=t.CLIPVisionConfig(**VISION), text_config=_llama(), image_token_id=98,
        image_grid_pinpoints=[[16, 32], [32, 16], [32, 32]],
    )  # fmt: skip
    return t.LlavaNextForConditionalGeneration(config)


def llava_next_video() -> Any:
    config = t.LlavaNextVideoConfig(
        vision_config=t.CLIPVisionConfig(**VISION), text_config=_llama(), image_token_index=98, video_token_index=97,
        image_grid_pinpoints=[[16, 32], [32, 16], [32, 32]],
    )  # fmt: skip
    return t.LlavaNextVideoForConditionalGeneration(config)


def onevision() -> Any:
    config = t.LlavaOnevisionConfig(
        vision_config=t.SiglipVisionConfig(**SIGLIP), text_config=t.Qwen2Config(**_qwen2()), image_token_id=98,
        video_token_id=97, image_grid_pinpoints=[[16, 32], [32, 16], [32, 32]], vision_aspect_ratio="anyres_max_9",
    )  # fmt: skip
    return t.LlavaOnevisionForConditionalGeneration(config)


def qwen2_vl(**more: Any) -> Any:
    vision = {**QWEN_VISION, "embed_dim": 32, "hidden_size": 32, "mlp_ratio": 2}
    config = t.Qwen2VLConfig(
        vision_config=vision, text_config={**_qwen2(), **ROPE, **more}, image_token_id=98, video_token_id=97,
        vision_start_token_id=95, vision_end_token_id=96,
    )  # fmt: skip
    return t.Qwen2VLForConditionalGeneration(config)


def qwen2_5_vl() -> Any:
    vision = {
        **QWEN_VISION, "hidden_size": 32, "out_hidden_size": 32, "intermediate_size": 32, "window_size": 16,
        "fullatt_block_indexes": [1],
    }  # fmt: skip
    config = t.Qwen2_5_VLConfig(
        vision_config=vision, text_config={**_qwen2(), **ROPE}, image_token_id=98, video_token_id=97,
        vision_start_token_id=95, vision_end_token_id=96,
    )  # fmt: skip
    return t.Qwen2_5_VLForConditionalGeneration(config)


def qwen3_vl() -> Any:
    vision = {
        **QWEN_VISION, "hidden_size": 32, "out_hidden_size": 32, "intermediate_size": 32,
        "num_position_embeddings": 64, "deepstack_visual_indexes": [0],
    }  # fmt: skip
    config = t.Qwen3VLConfig(
        vision_config=vision, text_config={**TEXT, **ROPE}, image_token_id=98, video_token_id=97,
        vision_start_token_id=95, vision_end_token_id=96,
    )  # fmt: skip
    return t.Qwen3VLForConditionalGeneration(config)


def internvl() -> Any:
    vision = t.InternVLVisionConfig(**{**VISION, "image_size": [16, 16], "patch_size": [2, 2]})
    config = t.InternVLConfig(vision_config=vision, text_config=t.Qwen2Config(**_qwen2()), image_token_id=98)
    return t.InternVLForConditionalGeneration(config)


def _idefics(config: Any, kind: Any, vision: Any) -> Any:
    made = config(vision_config={**VISION, "image_size": 32, "patch_size": 4, "model_type": vision},
                  text_config=_llama(), image_token_id=98, scale_factor=2, pad_token_id=0)  # fmt: skip
    return kind(made)


def paligemma(**more: Any) -> Any:
    text = {**TEXT, "model_type": "gemma", **more}
    config = t.PaliGemmaConfig(
        vision_config={**SIGLIP, "model_type": "siglip_vision_model", "projection_dim": 32}, text_config=text,
        image_token_index=98, projection_dim=32, hidden_size=32,
    )  # fmt: skip
    return t.PaliGemmaForConditionalGeneration(config)


def gemma3(window: int = 128) -> Any:
    kinds = ["sliding_attention", "full_attention"] * 2
    text = {**TEXT, "layer_types": kinds, "sliding_window": window, "query_pre_attn_scalar": 8}
    config = t.Gemma3Config(
        vision_config={**SIGLIP, "image_size": 32, "model_type": "siglip_vision_model"}, text_config=text,
        mm_tokens_per_image=16, image_token_index=98, boi_token_index=95, eoi_token_index=96,
    )  # fmt: skip
    return t.Gemma3ForConditionalGeneration(config)


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


# 16 of the whole image, then 2 tiles of 4 x 8 less one row of padding at top and bottom each, with newlines.
_ANYRES = [98] * (16 + 4 * 9)
_START = [95, *[98] * 16, 96]
HOSTS: dict[str, Tiny] = {
    "llava": Tiny(llava, lambda: [98] * 16, _images(3, 16, 16)),
    "llava_next": Tiny(llava_next, lambda: _ANYRES, _tiles),
    "llava_next_video": Tiny(llava_next_video, lambda: [97] * 12, _videos, video=True),
    "onevision": Tiny(onevision, lambda: _ANYRES, _tiles),
    "onevision_video": Tiny(onevision, lambda: [97] * 13, _videos, video=True),
    "qwen2_vl": Tiny(qwen2_vl, lambda: _START, _qwen_images, types="mm_token_type_ids"),
    "qwen2_5_vl": Tiny(qwen2_5_vl, lambda: _START, _qwen_images, types="mm_token_type_ids"),
    "qwen2_5_vl_video": Tiny(
        qwen2_5_vl, lambda: [95, *[97] * 8, 96], _qwen_videos, video=True, types="mm_token_type_ids"
    ),
    "qwen3_vl": Tiny(qwen3_vl, lambda: _START, _qwen_images, types="mm_token_type_ids"),
    "internvl": Tiny(internvl, lambda: [98] * 16, _images(3, 16, 16)),
    "idefics3": Tiny(
        lambda: _idefics(t.Idefics3Config, t.Idefics3ForConditionalGeneration, "idefics3_vision"),
        lambda: [98] * 16, _padded_images, language="model.text_model",
    ),
    "smolvlm": Tiny(
        lambda: _idefics(t.SmolVLMConfig, t.SmolVLMForConditionalGeneration, "smolvlm_vision"),
        lambda: [98] * 16, _padded_images, language="model.text_model",
    ),
    "paligemma": Tiny(paligemma, lambda: [98] * 16, _images(3, 16, 16), types="token_type_ids"),
    "gemma3": Tiny(gemma3, lambda: _START, _images(3, 32, 32), types="token_type_ids"),
}  # fmt: skip


def build(name: str, seed: int = 0) -> Any:
    """The model, in evaluation mode."""
    torch.manual_seed(seed)
    return ready(HOSTS[name].build())


def ready(model: Any) -> Any:
    """A model with weights that tell tokens apart, in evaluation mode."""
    with torch.no_grad():
        for key, p in model.named_parameters():
            if key.endswith("mm_input_projection_weight"):  # zeros, and so would be all visual tokens
                p.normal_(std=0.1)
    return livelier(model).eval()


def layers(name: str, model: Any) -> Any:
    """Its decoder layers."""
    return model.get_submodule(HOSTS[name].language).layers


def prompts(name: str, rows: Rows, seed: int = 1) -> dict[str, Any]:
    """A left-padded batch; see :func:`tests.vlm.tiny.prompts`."""
    host, g = HOSTS[name], torch.Generator().manual_seed(seed)
    sequences, counts = [], []
    for row in rows:
        ids: list[int] = []
        for part in row:
            ids += host.visual() if part == "image" else torch.randint(3, 90, (int(part),), generator=g).tolist()
        sequences.append(ids)
        counts.append(row.count("image"))
    longest = max(map(len, sequences))
    ids = torch.tensor([[0] * (longest - len(s)) + s for s in sequences])
    mask = torch.arange(longest) >= longest - torch.tensor([len(s) for s in sequences]).unsqueeze(1)
    batch: dict[str, Any] = {"input_ids": ids, "attention_mask": mask.long()}
    if host.types:
        batch[host.types] = (ids == 98).long() + 2 * (ids == 97).long()
        if name == "paligemma":  # zeros are the prefix, all of which sees all of it
            batch[host.types] = torch.zeros_like(ids)
    if sum(counts):
        batch |= host.pixels(counts, g)
    return batch
