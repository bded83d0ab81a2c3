"""Streams: what is asked of all kept frames is what the model says of the whole video; memory is bounded; nobody else
notices."""

from __future__ import annotations

import copy
import functools
import gc
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor

import tokred
from tests.vlm import hosts
from tokred.adapters.contract import attention_of
from tokred.adapters.tiny.vlm import IMAGE, VIDEO
from tokred.adapters.vlm.streams.families import LOOKS, REASONS
from tokred.adapters.vlm.streams.stream import Stream
from tokred.kv.turning import turned

PROMPT, QUESTION = [5, 6, 7], [8, 9, 10, 11]
# The shortest keys leave, after every frame.
KEYS = {"score": "key_norm", "budget": 24, "when": {"part": "when", "turns": True}}
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


SETTINGS = {
    "window": "stc budget=2 + streaming_llm budget=24",
    "groups": "streamingtom budget=2 + streamingtom_cache groups=3 most=6",
    "norms": ["streamingtom budget=2 saliency=norm", {"method": "kv", "parameters": KEYS}],
}


def held() -> int:
    """Bytes of all tensors that are alive, each storage once."""
    gc.collect()
    found = {}
    for one in gc.get_objects():
        if type(one) is Tensor:
            found[one.untyped_storage().data_ptr()] = one.untyped_storage().nbytes()
    return sum(found.values())


# All but one are for the matrix.
SOME = ["groups", *(pytest.param(name, marks=pytest.mark.hosts) for name in ("window", "norms"))]


@pytest.mark.parametrize("setting", SOME)
def test_memory_is_flat_over_frames(setting):
    stream, sizes = opened(method=SETTINGS[setting]), {}
    for t, one in enumerate(pixels(64)):
        stream.frame(one)
        if t in (31, 63):
            sizes[t] = stream.nbytes, stream.report().rows, held()
    del one
    assert len(stream) == 64
    assert sizes[31][:2] == sizes[63][:2]
    assert sizes[63][2] - sizes[31][2] <= 4096, "what grows is no stream"
    report = stream.report()
    assert (report.frames, report.seen, report.kept) == (64, 256, 128)
    assert report.rows <= 24
    assert stream.ask(QUESTION).ids == stream.ask(QUESTION).ids
    assert stream.nbytes == sizes[63][0]
    assert "64 frames, 256 visual tokens, 128 entered the cache (50%)" in str(report)


@pytest.mark.parametrize(
    "policy", ["streamingtom_cache groups=3 most=4", {"method": "kv", "parameters": {**KEYS, "budget": 8}}]
)
def test_a_frame_of_one_token_is_a_frame(policy):
    """What a model writes comes token by token too, and waits; frames are groups, and turns."""
    stream, rows = opened(method=["streamingtom budget=1 saliency=norm", policy]), []
    for one in pixels(12):
        assert len(stream.frame(one).kept) == 1
        rows.append(stream.report().rows)
    assert rows[-1] == rows[7] < len(PROMPT) + 8
    stream.ask(QUESTION, max_new_tokens=2)
    stream.frame(pixels(13)[12])
    assert stream.report().rows == rows[-1]


@pytest.mark.parametrize("setting", [None, *SOME])
def test_a_question_leaves_no_trace(setting):
    method = SETTINGS.get(setting)
    asked, silent = opened(method=method), opened(method=method)
    for t, one in enumerate(pixels(4)):
        a, b = asked.frame(one), silent.frame(one)
        assert a.number == t
        assert a.kept.tolist() == b.kept.tolist()
        if t % 3 == 0:
            asked.ask([12] * (t + 1), max_new_tokens=3)
    assert asked.report() == silent.report()
    first, second = (one.ask(QUESTION, logits=True) for one in (asked, silent))
    assert torch.equal(first.logits, second.logits)


def test_streams_of_one_model_do_not_meet():
    """Nor does chunking matter: frames one by one, or some at a time."""
    methods = [SETTINGS["window"], SETTINGS["groups"]]
    made = [opened(method=method) for method in methods]
    videos = [pixels(4, seed=i) for i in range(len(made))]
    for first in range(0, 4, 2):
        for stream, video in zip(made, videos, strict=True):
            stream.frames(video[first : first + 2])
    for stream, video, method in zip(made, videos, methods, strict=True):
        alone = opened(method=method)
        alone.frames(video)
        assert torch.equal(alone.ask(QUESTION, logits=True).logits, stream.ask(QUESTION, logits=True).logits)


def traces(model: Any) -> list[Any]:
    """All that a patch could leave on a model."""
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    text = model.model.language_model.config._attn_implementation
    return [[type(m) for m in model.modules()], hooks, text, [m.training for m in model.modules()]]


@torch.no_grad()
@pytest.mark.parametrize("setting", [None, *SOME])
def test_the_model_is_as_it_was_between_frames(setting):
    model, batch = model_of("onevision_video"), dense("onevision_video", pixels(3))
    y = model(**batch).logits  # hosts hang hooks of their own in a first forward
    before = traces(model)
    stream = opened(method=SETTINGS.get(setting), reuse=None if setting == "groups" else 0.5)
    assert traces(model) == before
    stream.frames(pixels(3))
    stream.ask(QUESTION)
    assert traces(model) == before
    assert torch.equal(model(**batch).logits, y)
    parameters = sum(p.numel() for p in model.parameters())
    tokred.remove(model)
    assert sum(p.numel() for p in model.parameters()) == parameters


@pytest.mark.parametrize("setting", [None, *SOME])
def test_a_copy_goes_on_by_itself(setting):
    """What a copy looks at, its original has not seen; each has a model of its own, which is as it was in between."""
    model = model_of("onevision_video")
    stream = opened(method=SETTINGS.get(setting))
    stream.frames(pixels(3))
    wanted = stream.ask(QUESTION, logits=True).logits
    copied = copy.deepcopy(stream)
    assert torch.equal(copied.ask(QUESTION, logits=True).logits, wanted)
    copied.frames(pixels(2, seed=7))
    assert len(stream) == 3
    assert torch.equal(stream.ask(QUESTION, logits=True).logits, wanted)
    for one in (stream, copied):
        assert not tokred.patched(one._model)
        assert attention_of(one._model.config.text_config) == attention_of(model.config.text_config) == "sdpa"


def test_a_model_that_is_patched_meanwhile():
    """Between two frames the model is anybody's; at the next frame methods of somebody else are in the way."""
    model = hosts.build("onevision_video")
    stream = tokred.stream(model, "stc budget=2 + streaming_llm budget=40", prompt=[3, 4])
    stream.frame(torch.randn(3, 16, 16))
    for method in ("snapkv", "divprune", "fastv"):
        with tokred.applied(model, method):
            for act in (lambda: stream.frame(torch.randn(3, 16, 16)), lambda: stream.ask([5, 6])):
                with pytest.raises(ValueError, match=rf"patched with {method}, and a stream has its own methods"):
                    act()
    assert len(stream) == 1
    stream.frame(torch.randn(3, 16, 16))
    assert len(stream) == 2


def test_a_model_in_training_is_so_again():
    model = hosts.build("onevision_video").train()
    stream = tokred.stream(model, prompt=PROMPT)
    stream.frame(pixels(1)[0])
    assert all(m.training for m in model.modules())


def test_a_frame_that_breaks_off_leaves_the_stream_as_it_was(monkeypatch):
    stream, other = opened(method=SETTINGS["window"]), opened(method=SETTINGS["window"])
    video = pixels(3)
    for one in (stream, other):
        one.frames(video[:2])
    layers = hosts.layers("onevision_video", model_of("onevision_video"))
    monkeypatch.setattr(layers[2].mlp, "forward", _breaks)
    with pytest.raises(RuntimeError, match="broke"):
        stream.frame(video[2])
    monkeypatch.undo()
    for one in (stream, other):
        one.frame(video[2])
    assert torch.equal(stream.ask(QUESTION, logits=True).logits, other.ask(QUESTION, logits=True).logits)


def _breaks(*args: Any) -> Tensor:
    raise RuntimeError("broke off")


@torch.no_grad()
def test_dropping_tokens_is_masking_them():
    """What stays stands where it stood: the dense model with the others hidden says the same."""
    model, video = model_of("onevision_video"), pixels(4)
    stream = opened(method="stc budget=2")
    kept = [one.kept.tolist() for one in stream.frames(video)]
    assert all(len(one) == 2 for one in kept)
    batch = dense("onevision_video", video)
    for t, some in enumerate(kept):
        for place in set(range(4)) - set(some):
            batch["attention_mask"][0, len(PROMPT) + 4 * t + place] = 0
    length = batch["input_ids"].shape[1]
    expected = model(**batch, position_ids=torch.arange(length)[None]).logits[0, -1]
    found = stream.ask(QUESTION, max_new_tokens=1, logits=True).logits[0]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_repacked_positions_count_what_stays():
    keep, repack = opened(method="stc budget=2"), opened(method="stc budget=2 positions=repack")
    for one in (keep, repack):
        one.frames(pixels(3))
    assert (keep._next, repack._next) == (len(PROMPT) + 12, len(PROMPT) + 6)
    with pytest.raises(ValueError, match="several axes"):
        opened("qwen2_5_vl_video", "stc budget=2 positions=repack")


def test_methods_for_images_see_each_frame():
    stream = opened(method="divprune budget=1")
    assert [len(one.kept) for one in stream.frames(pixels(3))] == [1, 1, 1]


@pytest.mark.parametrize("name", ["qwen2_5_vl_video", pytest.param("internvl", marks=pytest.mark.hosts)])
def test_streamingtom_on_other_families(name):
    saliency = "" if name.startswith("qwen") else " saliency=norm"
    stream = opened(name, f"streamingtom budget=2{saliency} + streamingtom_cache groups=2 most=3")
    found = stream.frames(pixels(6, name))
    assert [len(one.kept) for one in found] == [2] * 6
    assert len(stream.ask(around(name)[1], max_new_tokens=3).ids) <= 3
    assert stream.report().rows == len(around(name)[0]) + 3 * 2


class Words:
    """A tokenizer: a word is its number."""

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        assert not add_special_tokens
        return {"input_ids": [int(word) for word in text.split()]}

    def decode(self, ids: list[int]) -> str:
        return " ".join(map(str, ids))


def test_text_with_a_tokenizer():
    stream = tokred.stream(model_of("onevision_video"), prompt="5 6 7", tokenizer=Words())
    plain = opened()
    for one in (stream, plain):
        one.frames(pixels(2))
    answer = stream.ask("8 9 10 11")
    assert answer.ids == plain.ask(torch.tensor([QUESTION])).ids
    assert answer.text == " ".join(map(str, answer.ids))


def test_a_warning_beyond_the_positions_of_the_model():
    model = hosts.build("onevision_video")
    model.config.text_config.max_position_embeddings = 12
    stream = tokred.stream(model, prompt=PROMPT)
    stream.frames(pixels(2))
    with pytest.warns(tokred.TokredWarning, match="position 14, and .* was made for 12"):
        stream.frame(pixels(3)[2])


def test_positions_are_looked_at_near_the_end_alone(monkeypatch):
    """Looking waits for the device, at every token."""
    stream = opened()
    asked, own = [], torch.Tensor.max

    def most(x, *args, **kwargs):
        asked.append(x.dtype)
        return own(x, *args, **kwargs)

    monkeypatch.setattr(torch.Tensor, "max", most)
    stream.frames(pixels(2))
    stream.ask(torch.tensor([QUESTION]), max_new_tokens=2)
    assert torch.int64 not in asked


def test_every_family_is_told_of():
    from tokred.adapters.vlm.families import FACTS

    assert set(FACTS) == set(LOOKS) | set(REASONS)


@pytest.mark.parametrize(
    ("given", "error", "match"),
    [
        ({"method": "evs"}, ValueError, "'evs' cannot act on a stream: it looks at all frames"),
        ({"method": "cdpruner budget=2"}, ValueError, "reads the question"),
        ({"method": "fastv"}, ValueError, "'fastv' cannot act on a stream: it acts at stage 'layer'"),
        ({"method": "knorm budget=9"}, ValueError, "'knorm' acts at the end of a prompt alone"),
        ({"method": "streaming_llm budget=0.5"}, ValueError, "keeps a share of the tokens"),
        ({"method": "no_such"}, tokred.UnknownMethodError, "no method is named"),
        ({"method": "stc", "colour": 3}, TypeError, "colour"),
        ({"budget": 3}, TypeError, "parameters go with"),
        ({"reuse": 1.0}, ValueError, r"share must lie in \[0, 1\)"),
        ({"reuse": "much"}, TypeError, "reuse must be a share"),
        ({"method": "streamingtom budget=2", "reuse": 0.5}, ValueError, "reads attention of the tower"),
        ({"seconds": 0}, ValueError, "seconds must be above 0"),
        ({"prompt": "text"}, TypeError, "prompt is text"),
        ({"prompt": 1.5}, TypeError, "prompt must be ids"),
        ({"prompt": torch.zeros(2, 3).long()}, ValueError, "one stream at a time"),
    ],
)
def test_bad_settings(given, error, match):
    with pytest.raises(error, match=match):
        tokred.stream(model_of("onevision_video"), **given)


def test_bad_models():
    from tokred.adapters.tiny import kv, timm

    for model in (kv.build("llama"), timm.build("vit"), 3):
        with pytest.raises((tokred.UnsupportedModelError, TypeError), match="vision of transformers"):
            tokred.stream(model)
    with pytest.raises(tokred.UnsupportedModelError, match="cannot watch a stream: it cuts images into tiles"):
        tokred.stream(hosts.build("llava_next"))
    with pytest.raises(tokred.UnsupportedModelError, match="features of the tower cannot be used again"):
        tokred.stream(model_of("qwen2_5_vl_video"), reuse=0.5)
    model = hosts.build("onevision_video")
    with tokred.applied(model, "divprune", budget=2), pytest.raises(ValueError, match="is patched with divprune"):
        tokred.stream(model)


def test_bad_frames_and_questions():
    stream = opened()
    with pytest.raises(ValueError, match="no frame has come yet"):
        stream.ask(QUESTION)
    one = pixels(1)[0]
    with pytest.raises(TypeError, match="must be a tensor of floats"):
        stream.frame(one.to(torch.uint8))
    with pytest.raises(ValueError, match=r"must be \(channels, height, width\)"):
        stream.frame(one[0])
    stream.frame(one)
    with pytest.raises(ValueError, match=r"frame 1 are \(3, 8, 8\), those of the frames before \(3, 16, 16\)"):
        stream.frame(one[:, :8, :8])
    assert len(stream) == 1
    for wrong, error, match in (
        ("what?", TypeError, "question is text"),
        ([], ValueError, "question is empty"),
        (torch.zeros(2), TypeError, "question must be ids"),
    ):
        with pytest.raises(error, match=match):
            stream.ask(wrong)
    with pytest.raises(ValueError, match="max_new_tokens must be at least 1"):
        stream.ask(QUESTION, max_new_tokens=0)
    assert len(opened(method="stc budget=0.01").frame(one).kept) == 1, "at least one of each frame"
    qwen = opened("qwen2_5_vl_video")
    with pytest.raises(ValueError, match="sides that 8 divides, got 12 x 16"):
        qwen.frame(torch.randn(3, 12, 16))
    with pytest.raises(ValueError, match=r"or \(2, channels, height, width\)"):
        qwen.frame(torch.randn(3, 3, 16, 16))


def test_a_tower_that_was_patched_alone_is_refused():
    """It would put out fewer tokens than the model around it takes; applied to the whole model they are back."""
    for name in ("onevision_video", "internvl"):
        model = hosts.build(name)
        refused = pytest.raises(ValueError, match=r"tome acts on the vision tower alone.*on the whole model")
        with tokred.applied(model.model.vision_tower, tokred.ToMe(r=2)), refused:
            tokred.stream(model, prompt=[3, 4])
        with tokred.applied(model, tokred.ToMe(r=2)):
            stream = tokred.stream(model, prompt=[3, 4])
            stream.frames(torch.randn(2, 3, 16, 16))
            assert len(stream.ask([5, 6], max_new_tokens=2).ids) <= 2


# ---------------------------------------------------------------- the prompt behind frames that have left


def first_keys(stream: Stream) -> list[Tensor]:
    return [layer.keys[:, :, : len(PROMPT)].clone() for layer in stream._cache.layers]


@pytest.mark.parametrize(
    ("setting", "by"),
    [
        ("streaming_llm budget=19 sinks=3", 16),  # four frames of four tokens, of eight
        ("stc budget=2 + streaming_llm budget=11 sinks=3", 16),  # positions are those of whole frames
        ("uniform_visual budget=2 positions=repack + streaming_llm budget=11 sinks=3", 8),
        ("streaming_llm budget=20 sinks=4", 15),
        ("streamingtom budget=2 + streamingtom_cache groups=2 most=4", 16),
    ],
)
def test_the_prompt_moves_up_behind_frames_that_have_left(setting, by):
    """It stands right before the oldest frame, as it does in a video that begins there."""
    video = pixels(8)
    stays, moves = opened(method=setting, positions="video"), opened(method=setting)
    for stream in (stays, moves):
        stream.frames(video)
    angle = model_of("onevision_video").model.language_model.rotary_emb.inv_freq.float()
    steps = torch.full((1, len(PROMPT)), by)
    for old, new in zip(first_keys(stays), first_keys(moves), strict=True):
        # Both saw the same prompt, which no frame has changed.
        torch.testing.assert_close(new, turned(old, steps, angle), rtol=1e-4, atol=1e-4)
    assert moves.nbytes > stays.nbytes, "keys as they came are held, too"
    before = first_keys(moves)
    first = moves.ask(QUESTION, max_new_tokens=2, logits=True).logits
    assert not torch.allclose(first, stays.ask(QUESTION, max_new_tokens=2, logits=True).logits, atol=1e-4)
    assert all(torch.equal(a, b) for a, b in zip(before, first_keys(moves), strict=True))


def test_nothing_moves_before_a_frame_has_left_whole():
    video = pixels(5)
    stays, moves = (opened(method="streaming_llm budget=19 sinks=3", positions=p) for p in ("video", "contiguous"))
    for t, one in enumerate(video):
        for stream in (stays, moves):
            stream.frame(one)
        same = [torch.equal(a, b) for a, b in zip(first_keys(stays), first_keys(moves), strict=True)]
        assert all(same) if t < 4 else not any(same)


def test_positions_are_refused_where_the_prompt_cannot_move():
    for setting, why in (
        (None, "no policy of the cache lets frames leave"),
        ("offloaded", "cannot let its first rows stand elsewhere"),
    ):
        with pytest.raises(ValueError, match=f"positions='contiguous' moves the prompt .*{why}"):
            opened(method=setting, positions="contiguous")
        opened(method=setting)  # and where nobody asks for it, it stays
    with pytest.raises(ValueError, match="stand in several axes"):
        opened("qwen2_vl", "streaming_llm budget=24", positions="contiguous")
    with pytest.raises(ValueError, match="positions is 'cache'; allowed are 'contiguous', 'video'"):
        opened(method="streaming_llm budget=24", positions="cache")


def test_a_stream_may_be_longer_than_the_model_was_made_for():
    """What stands behind frames that have left is no further away than the model knows."""
    model = model_of("onevision_video")
    most = model.config.text_config.max_position_embeddings
    video = pixels(8)
    try:
        model.config.text_config.max_position_embeddings = 28
        with warnings.catch_warnings():
            warnings.simplefilter("error", tokred.TokredWarning)
            opened(method="streaming_llm budget=19").frames(video)
        with pytest.warns(tokred.TokredWarning, match="was made for 28"):
            opened(method="streaming_llm budget=19", positions="video").frames(video)
    finally:
        model.config.text_config.max_position_embeddings = most
