"""A tiny thinker of Qwen2.5-Omni, with prompts of clips with sound: 16 tokens of video and 8 of sound each."""

from __future__ import annotations

from typing import Any

import torch

from tokred.adapters.tiny.config import Config
from tokred.adapters.tiny.vlm import IMAGE, NEWER_QWEN, QWEN2, ROPE, VIDEO, Rows
from tokred.adapters.tiny.weights import livelier

BEGIN, END, SOUND, SOUND_BEGIN, SOUND_END = 95, 96, 94, 92, 93
# Two windows of two frames each, four tokens a frame, and the sound of each behind it.
CLIP = (BEGIN, SOUND_BEGIN, *((VIDEO,) * 8 + (SOUND,) * 4) * 2, SOUND_END, END)
OPTIONS: dict[str, Any] = {
    "audio_config": {
        "num_mel_bins": 8, "encoder_layers": 2, "encoder_attention_heads": 2, "encoder_ffn_dim": 32, "d_model": 16,
        "n_window": 8, "output_dim": 32, "max_source_positions": 64,
    },
    "vision_config": {**NEWER_QWEN, "window_size": 16, "fullatt_block_indexes": [1]},
    "text_config": {**QWEN2, **ROPE},
    "image_token_index": IMAGE, "video_token_index": VIDEO, "audio_token_index": SOUND,
    "audio_start_token_id": SOUND_BEGIN, "audio_end_token_id": SOUND_END, "vision_start_token_id": BEGIN,
    "vision_end_token_id": END, "position_id_per_seconds": 2, "seconds_per_chunk": 2,
}  # fmt: skip


def known() -> bool:
    """True where transformers has the model."""
    import transformers.models.qwen2_5_omni.modeling_qwen2_5_omni as home

    return hasattr(home, "Qwen2_5OmniThinkerModel")


def build(seed: int = 0) -> Any:
    """The thinker, in evaluation mode."""
    import transformers as t

    torch.manual_seed(seed)
    config = Config("Qwen2_5OmniThinkerConfig", OPTIONS).make(t)
    return livelier(t.Qwen2_5OmniThinkerForConditionalGeneration(config)).eval()


def prompts(rows: Rows, seed: int = 1) -> dict[str, Any]:
    """A left-padded batch: each row a list of text lengths and "clip" entries.

    Returns:
        The arguments of a forward.
    """
    g = torch.Generator().manual_seed(seed)
    sequences = []
    for row in rows:
        ids: list[int] = []
        for part in row:
            ids += CLIP if part == "clip" else torch.randint(3, 90, (int(part),), generator=g).tolist()
        sequences.append(ids)
    longest = max(map(len, sequences))
    padded = torch.tensor([[0] * (longest - len(s)) + s for s in sequences])
    mask = torch.arange(longest) >= longest - torch.tensor([len(s) for s in sequences]).unsqueeze(1)
    n = sum(row.count("clip") for row in rows)
    return {
        "input_ids": padded,
        "attention_mask": mask.long(),
        "pixel_values_videos": torch.randn(n * 64, 3 * 2 * 4 * 4, generator=g),
        "video_grid_thw": torch.tensor([[4, 4, 4]] * n),
        "video_second_per_grid": torch.ones(n),
        "input_features": torch.randn(n, 8, 32, generator=g),
        "feature_attention_mask": torch.ones(n, 32, dtype=torch.long),
        "use_audio_in_video": True,
    }
