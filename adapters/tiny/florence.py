"""A tiny Florence-2, whose prompt an encoder reads: 17 visual tokens an image, of a map of 4 x 4 and its mean."""

from __future__ import annotations

from typing import Any

import torch

from tokred.adapters.tiny.config import Config
from tokred.adapters.tiny.vlm import IMAGE, Rows
from tokred.adapters.tiny.weights import scattered

VISUAL = (IMAGE,) * 17
OPTIONS: dict[str, Any] = {
    "vision_config": {
        "depths": (1, 1), "embed_dim": (8, 16), "num_heads": (1, 2), "num_groups": (1, 2), "window_size": 2,
        "patch_size": (7, 3), "patch_stride": (4, 2), "patch_padding": (3, 1), "patch_prenorm": (False, True),
        "projection_dim": 32, "max_position_embeddings": 8, "drop_path_rate": 0.0,
    },
    "text_config": {
        "model_type": "bart", "d_model": 32, "encoder_layers": 3, "decoder_layers": 2, "encoder_attention_heads": 2,
        "decoder_attention_heads": 2, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "vocab_size": 99,
        "max_position_embeddings": 128, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
        "decoder_start_token_id": 2, "forced_eos_token_id": None,
    },
    "image_token_id": IMAGE,
}  # fmt: skip


def build(seed: int = 0) -> Any:
    """The model, in evaluation mode."""
    import transformers as t

    torch.manual_seed(seed)
    return scattered(t.Florence2ForConditionalGeneration(Config("Florence2Config", OPTIONS).make(t)))


def prompts(rows: Rows, seed: int = 1) -> dict[str, Any]:
    """A batch, padded on the right as BART has it: each row a list of text lengths and "image" entries.

    Returns:
        ``input_ids``, ``attention_mask`` and, where there are images, ``pixel_values``.
    """
    g = torch.Generator().manual_seed(seed)
    sequences: list[list[int]] = []
    for row in rows:
        ids: list[int] = []
        for part in row:
            ids += VISUAL if part == "image" else torch.randint(3, 90, (int(part),), generator=g).tolist()
        sequences.append(ids)
    longest = max(map(len, sequences))
    padded = torch.tensor([s + [0] * (longest - len(s)) for s in sequences])
    mask = torch.arange(longest) < torch.tensor([len(s) for s in sequences]).unsqueeze(1)
    batch: dict[str, Any] = {"input_ids": padded, "attention_mask": mask.long()}
    n = sum(row.count("image") for row in rows)
    return batch | ({"pixel_values": torch.randn(n, 3, 32, 32, generator=g)} if n else {})
