"""Models that hear: their cache is that of the language model inside, sounds among its rows."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("transformers")

import transformers

import tokred
from tests.kv.tiny import SMALL, prompt

GREEDY = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None}
SOUND, TOKENS = 96, 10


def qwen2_audio():
    """A tiny Qwen2-Audio: sounds of 40 frames become ten tokens."""
    t = transformers
    heard = {
        "d_model": 32, "encoder_layers": 1, "encoder_attention_heads": 2, "encoder_ffn_dim": 32, "num_mel_bins": 8,
        "max_source_positions": 20,
    }  # fmt: skip
    text = t.Qwen2Config(**{k: v for k, v in SMALL.items() if k != "head_dim"})
    torch.manual_seed(0)
    config = t.Qwen2AudioConfig(audio_config=heard, text_config=text, audio_token_index=SOUND)
    return t.Qwen2AudioForConditionalGeneration(config).eval()


def test_sounds_are_rows_as_others():
    model, ids = qwen2_audio(), prompt(24)
    ids[:, 3 : 3 + TOKENS] = SOUND
    sounds = torch.randn(1, 8, 40, generator=torch.Generator().manual_seed(0))
    given = {"input_ids": ids, "input_features": sounds, "feature_attention_mask": torch.ones(1, 40, dtype=torch.long)}
    with torch.no_grad():
        plain = model.generate(**given, **GREEDY)
        assert not torch.equal(model(**given).logits, model(**{**given, "input_features": -sounds}).logits)
        tokred.apply(model, "snapkv", budget=1.0)
        assert torch.equal(model.generate(**given, **GREEDY), plain)
        tokred.apply(model, "snapkv", budget=9, window=4)
        model.generate(**given, **GREEDY)
        assert [(row.seen, row.rows) for row in tokred.report(model).layers] == [(27, 12)] * 3
        assert torch.equal(tokred.remove(model).generate(**given, **GREEDY), plain)
