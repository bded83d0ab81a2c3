"""Streams: what is asked of all kept frames is what the model says of the whole video; memory is bounded; nobody else
notices."""

from __future__ import annotations

import functools
import gc
from typing import Any

import pytest
import torch
from torch import Tensor

import tokred
from tests.vlm import hosts
from tokred.adapters.kv.cache import TokCache
from tokred.adapters.tiny.vlm import IMAGE, VIDEO
from tokred.adapters.vlm.streams.families import LOOKS, REASONS
from tokred.adapters.vlm.streams.stream import Stream

PROMPT, QUESTION = [5, 6, 7], [8, 9, 10, 11]
# What stands around the frames of Qwen's videos.
AROUND = {"qwen2_vl": ([95], [96]), "qwen2_5_vl_video": ([95], [96])}
FAMILIES = ["onevision_video", "llava", "internvl", "llava_next_video", "qwen2_vl", "qwen2_5_vl_video"]
MATRIX = ["onevision_video", "qwen2_5_vl_video"]
MATRIX += [pytest.param(n, marks=pytest.mark.hosts) for n in FAMILIES if n not in MATRIX]


@functools.cache
def model_of(name: str) -> Any:
    return hosts.build(name)


def pixels(count: int, name: str = "onevision_video", seed: int = 0) -> Tensor:
    """Frames that change little by little."""
    g = torch.Generator().manual_seed(seed)
    side = (2, 3, 16, 16) if name.startswith("qwen") else (3, 16, 16)
    first, steps = torch.randn(side, generator=g), 0.4 * torch.randn(count, *side, generator=g)
    return first + steps.cumsum(0)


def around(name: str) -> tuple[list[int], list[int]]:
    before, after = AROUND.get(name, ([], []))
    return PROMPT + before, after + QUESTION


def patches(video: Tensor) -> Tensor:
    """Qwen's, as its processor makes them of a video ``(T, 2, 3, 16, 16)``: 4 x 4 patches of 4, joined by 2 x 2."""
    t = len(video)
    cells = video.reshape(t, 2, 3, 2, 2, 4, 2, 2, 4)
    return cells.permute(0, 3, 6, 4, 7, 2, 1, 5, 8).reshape(t * 16, 3 * 2 * 16)


def dense(name: str, video: Tensor) -> dict[str, Any]:
    """The whole video in one prompt."""
    before, after = around(name)
    t = len(video)
    kind = IMAGE if name in ("llava", "internvl") else VIDEO
    each = {"llava": 16, "internvl": 16}.get(name, 4)
    extra = 1 if name == "onevision_video" else 0
    ids = torch.tensor([[*before, *[kind] * (each * t + extra), *after]])
    batch: dict[str, Any] = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if name in ("llava", "internvl"):
        return batch | {"pixel_values": video}
    if not name.startswith("qwen"):
        return batch | {"pixel_values_videos": video[None]}
    grid = torch.tensor([[t, 4, 4]])
    types = 2 * (ids == VIDEO).long()
    return batch | {"pixel_values_videos": patches(video), "video_grid_thw": grid, "mm_token_type_ids": types}


def opened(name: str = "onevision_video", method: Any = None, **more: Any) -> Stream:
    return tokred.stream(model_of(name), method, prompt=around(name)[0], **more)


@torch.no_grad()
@pytest.mark.parametrize("name", MATRIX)
def test_a_stream_that_keeps_all_is_the_dense_model(name):
    model, video = model_of(name), pixels(5, name)
    stream = opened(name)
    stream.frames(video)
    answer = stream.ask(around(name)[1], max_new_tokens=4, logits=True)
    batch = dense(name, video)
    expected = model(**batch).logits[0, -1]
    torch.testing.assert_close(answer.logits[0], expected, rtol=1e-4, atol=1e-4)
    whole = model.generate(**batch, max_new_tokens=4, do_sample=False)[0, batch["input_ids"].shape[1] :].tolist()
    assert [*answer.ids, 2][:4] == [*whole, 2][:4]
