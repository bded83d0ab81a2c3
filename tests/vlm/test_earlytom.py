"""EarlyTom: the card's examples, laws of frames that merge, and towers against all frames run with what they became."""

from __future__ import annotations

import contextlib
import copy
import functools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

import tokred
from tests.vlm import hosts, oracle
from tokred.adapters.vlm.families import FACTS
from tokred.adapters.vlm.tower.blocks import tower_of
from tokred.methods.vlm.earlytom import EarlyTom, middle, running, similarities, windowed
from tokred.vlm import clips
from tokred.vlm.shots import Shots

ANGLES = torch.tensor([0, 0.2, 0.3, 0.35, 0.41, 0.5, 1.6, 1.7])
TURNING = torch.stack([ANGLES.cos(), ANGLES.sin()], 1).unsqueeze(1)
# A model whose clip is a video, one whose frames are rows of one sequence, one that is told its clips; and the others.
HOSTS = ["onevision_video", "qwen2_5_vl_video", "internvl"]
OTHERS = [
    "llava_next_video",
    "llava",
    "smolvlm",
    "idefics3",
    "paligemma",
    "gemma3",
    "qwen2_vl",
    "qwen3_vl",
    "qwen3_5_vl",
    "glm4v",
]
MATRIX = [*HOSTS, *(pytest.param(name, marks=pytest.mark.hosts) for name in OTHERS)]
# Everything of the first five frames is one segment, whose middle are three.
ONE = {"tau": -1.0, "layers": (0,)}


def test_segments_of_the_worked_example():
    similar = similarities(TURNING, 98)
    known, seen = 1.0, []
    for i in range(1, 7):
        known = 0.9 * similar(0, i) + 0.1 * known
        seen.append(known)
    assert seen == pytest.approx([0.9821, 0.9580, 0.9412, 0.9195, 0.8818, 0.0619], abs=1e-4)
    assert running(similar, 8, 0.8, 98, 0.9) == [(0, 5), (6, 7)]
    assert running(similarities(TURNING, 5), 8, 0.8, 5, 0.9) == [(0, 4), (5, 5), (6, 7)]


def test_frames_that_merge_in_the_worked_example():
    step = EarlyTom(tau=0.8, longest=98).merge_frames(TURNING)
    assert step.groups()[0] == [[0], [1], [2, 3], [4], [5], [6], [7]]
    assert step.weight[0, 2].item() == pytest.approx(0.5001, abs=1e-4)
    merged = step.merge(TURNING.flatten(1)[None])[0]
    assert merged[2].tolist() == pytest.approx([0.9474, 0.3192], abs=1e-4)
    assert torch.equal(merged[[0, 1, 3, 4, 5, 6]], TURNING.flatten(1)[[0, 1, 4, 5, 6, 7]])
    lost = EarlyTom(tau=0.8, longest=98, official=True).merge_frames(TURNING)
    assert lost.groups()[0] == [[0], [1], [2, 3], [5], [6], [7]]
    assert EarlyTom(tau=0.8, longest=5).merge_frames(TURNING).groups()[0] == [[0], [1], [2, 3], [4], [5], [6], [7]]


def test_equal_frames_merge_from_the_left():
    x = torch.randn(1, 3, 4).repeat(5, 1, 1)
    step = EarlyTom(longest=5).merge_frames(x)
    assert step.groups()[0] == [[0], [1, 2], [3], [4]]
    torch.testing.assert_close(step.merge(x.flatten(1)[None]).view(4, 3, 4), x[:4])


def test_the_last_pair_of_a_segment():
    """Ours halves it; in the released code its second frame counts nothing."""
    near = lambda i, j: 1.0 - 0.01 * (j - i)  # noqa: E731
    assert middle(near, 0, 3) == [(1, 1, 0.5), (2, 1, 0.5)]
    assert middle(near, 0, 3, official=True) == [(1, 1, 1.0), (2, 1, 0.0)]
    assert middle(near, 0, 2) == middle(near, 0, 2, official=True) == []


@pytest.mark.parametrize("settings", [{"tau": 2.0}, {"longest": 1}, {"longest": 3}])
def test_settings_that_merge_nothing(settings):
    x = torch.randn(9, 3, 4)
    method = EarlyTom(**settings)
    assert method.merge_frames(x).trivial
    spans = [e - s + 1 for s, e in method.segments(x)]
    assert max(spans) <= (1 if "tau" in settings else settings["longest"])
    assert sum(spans) == 9


@pytest.mark.parametrize("frames", [1, 2, 3, 4, 9, 40])
@pytest.mark.parametrize("official", [False, True])
def test_laws_of_three_passes(frames, official):
    g = torch.Generator().manual_seed(frames)
    x = torch.randn(1, 6, 8, generator=g) + torch.randn(frames, 6, 8, generator=g).cumsum(0) * 0.1
    method, shots, whole = EarlyTom(longest=98, tau=0.3, official=official), Shots.begin(frames), x
    for _ in range(3):
        ends = {t for span in method.segments(x) for t in span}
        step = method.merge_frames(x)
        assert ends <= {*step.representative[0].tolist()}, "first and last frame of every segment survive"
        x = step.merge(x.flatten(1)[None])[0].view(-1, 6, 8)
        shots = shots.then(step)
    assert len(shots.first) == len(x) <= frames
    mixed = torch.zeros(len(x), frames).index_put((shots.slot, torch.arange(frames)), shots.weight)
    mixed[:, shots.root < 0] = 0
    torch.testing.assert_close(mixed.sum(1), torch.ones(len(x)))
    torch.testing.assert_close(mixed @ whole.flatten(1), x.flatten(1))
    assert shots.first.tolist() == sorted(shots.first.tolist())
    assert official or bool((shots.root >= 0).all())
    assert len(x) < frames or frames < 4


def test_one_segment_and_far_apart():
    assert EarlyTom(tau=-1.0, longest=99).segments(torch.randn(20, 2, 3)) == ((0, 19),)


def test_windows_of_the_worked_example():
    scores = torch.tensor([[0.9, 0.8, 0.1, 0.2, 0.3, 0.05, 0.04, 0.9, 0.1, 0.2]])
    assert windowed(scores, 3).tolist() == [[0, 4, 7]]
    assert windowed(torch.zeros(1, 10), 3).tolist() == [[0, 4, 7]], "ties to the lower place"
    assert windowed(scores, 10).tolist() == [list(range(10))]


def test_counts_of_the_worked_example():
    """Of 24 frames left of 32, a tenth of all tokens."""
    root = torch.cat([torch.arange(24), torch.arange(8)])
    scores = torch.rand(24, 196)
    shots = Shots(root, torch.ones(32), tuple((4 * i, 4 * i + 3) for i in range(6)), scores)
    found = EarlyTom(budget=0.1).clip(shots, 196)
    frame = found.representative[0] // 196
    assert frame.bincount().tolist() == [27, 26, 26, 27] * 6
    first = found.representative[0][:27]
    assert first.tolist() == scores[0].topk(27).indices.sort().values.tolist()
    assert found.slots <= EarlyTom(budget=0.1).kept(32, 196)


def test_tokens_of_merged_frames_live_on():
    shots = Shots(torch.tensor([0, 1, 1, 3]), torch.tensor([1.0, 0.25, 0.75, 1.0]), ((0, 2),), torch.rand(3, 2))
    found = EarlyTom(budget=1.0).clip(shots, 2)
    assert found.groups()[0] == [[0], [1], [2, 4], [3, 5], [6], [7]]
    assert EarlyTom(budget=3).clip(shots, 2).slots == 3 * math.ceil(2 * 3 / 6)


# ---------------------------------------------------------------------------------------------------- inside models


@functools.cache
def model_of(name: str) -> Any:
    return hosts.build(name)


def filmed(name: str, frames: tuple[int, ...] = (7, 5), seed: int = 3) -> tuple[dict[str, Any], Any]:
    """A prompt for each clip of so many frames, which go from one picture slowly to another; and what to say of them.

    Prompts are of one length: fillers stand in front of the shorter ones.
    """
    video = hosts.HOSTS[name].video or name.startswith(("qwen", "glm"))
    g = torch.Generator().manual_seed(seed)

    def walk(count: int, *shape: int) -> Tensor:
        start, way = torch.randn(2, *shape, generator=g)
        return start + way * torch.linspace(0, 1, count).view(-1, *[1] * len(shape))

    if not video:
        rows: hosts.Rows = [[3, *["image"] * n, 5] for n in frames]
        batch = hosts.prompts(name, rows)
        pixels = batch["pixel_values"]
        moving = [walk(n, *pixels.shape[-3:]) for n in frames]
        if pixels.ndim == 5:
            for own, one in zip(pixels, moving, strict=True):
                own[: len(one)] = one
        else:
            batch["pixel_values"] = torch.cat(moving)
        return batch, [[n] for n in frames]
    if not name.startswith(("qwen", "glm")):
        assert len({*frames}) == 1, "videos of one batch are of one length"
        cells = 4
        extra = name == "onevision_video"
        ids = torch.tensor([[7, 8, *[hosts_video()] * (cells * n + extra), 9, 10, 11] for n in frames])
        pixels = torch.stack([walk(n, 3, 16, 16) for n in frames])
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values_videos": pixels}, None
    grids = [[n, 8, 4] if i else [n, 4, 4] for i, n in enumerate(frames)]
    rows = [[7, 8, 95, *[hosts_video()] * (t * h * w // 4), 96, 9, 10, 11] for t, h, w in grids]
    place = 98 if name == "glm4v" else hosts_video()  # GLM-4V's frames stand at places of images
    if name in ("qwen3_vl", "qwen3_5_vl", "glm4v"):  # the time of each frame stands before it
        rows = [[7, 8, *[*[95, *[place] * (h * w // 4), 96] * t], 9, 10] for t, h, w in grids]
    longest = max(map(len, rows))
    ids = torch.tensor([[0] * (longest - len(r)) + r for r in rows])
    pixels = torch.cat([walk(t, h * w, 3 * 2 * 4 * 4).flatten(0, 1) for t, h, w in grids])
    return {
        "input_ids": ids, "attention_mask": (ids != 0).long(), "mm_token_type_ids": 2 * (ids == place).long(),
        "pixel_values_videos": pixels, "video_grid_thw": torch.tensor(grids),
    }, None  # fmt: skip


def hosts_video() -> int:
    return 97


def prompt(name: str) -> tuple[dict[str, Any], Any]:
    return filmed(name, (6, 6) if name in ("onevision_video", "llava_next_video") else (7, 5))


def said(runs: Any) -> Any:
    return contextlib.nullcontext() if runs is None else clips(runs)


@contextlib.contextmanager
def copied(model: Any, method: EarlyTom, sizes: list[int]) -> Any:
    """Inside, the tower of an unpatched model runs all frames, each as what it and others became."""
    tower = tower_of(model.model, FACTS[type(model.model).__name__])

    def behind(module: Any, args: Any, output: Any) -> Any:
        x = output if isinstance(output, Tensor) else output[0]
        whole, found, start = x if x.ndim == 3 else None, [], 0
        per = 1 if whole is not None else 0
        for i, count in enumerate(sizes):
            area = per or grids[i]
            own = x[start : start + count * area]
            frames = own if per else own.view(count, area, -1)
            first = state[i].first
            step = method.merge_frames(frames[first])
            merged = step.merge(frames[first].flatten(1)[None])[0].view(-1, *frames.shape[1:])
            state[i] = state[i].then(step)
            found.append(merged[state[i].slot].view_as(own))
            start += count * area
        x = torch.cat(found)
        return x if isinstance(output, Tensor) else (x, *output[1:])

    grids = model.grids if hasattr(model, "grids") else []
    state = [Shots.begin(n) for n in sizes]
    handles = [tower.blocks[i].register_forward_hook(behind, prepend=True) for i in method.layers]
    try:
        yield state
    finally:
        for handle in handles:
            handle.remove()


def sizes_of(name: str, batch: dict[str, Any]) -> list[int]:
    if "video_grid_thw" in batch:
        return batch["video_grid_thw"][:, 0].tolist()
    return [6, 6] if "pixel_values_videos" in batch else [7, 5]


@torch.no_grad()
@pytest.mark.parametrize("name", MATRIX)
def test_towers_run_frames_that_became_one_once(name):
    """Generation equals that of a tower which runs all frames, each as what it became, with what left masked."""
    model, (batch, runs) = copy.deepcopy(model_of(name)), prompt(name)
    method = EarlyTom(budget=0.5, layers=(0, 1) if name == "qwen2_5_vl_video" else (0,), tau=-1.0)
    seen: list[int] = []
    tower = tower_of(model.model, FACTS[type(model.model).__name__])
    sizes = sizes_of(name, batch)
    model.grids = [int(h * w) for _, h, w in batch.get("video_grid_thw", torch.zeros(0, 3)).tolist()]
    with said(runs):
        tokred.apply(model, method)
        inner = tower.blocks[-1].get_submodule("mlp") if hasattr(tower.blocks[-1], "mlp") else tower.blocks[-1]
        handle = inner.register_forward_pre_hook(lambda m, a: seen.append(a[0].shape[0]))
        pruned = oracle.generate(model, batch, max_new_tokens=2)
        handle.remove()
        keeps = oracle.kept(pruned.past_key_values, batch["input_ids"].shape[1])
        tokred.remove(model)
        with copied(model, method, sizes) as state, oracle.masked(
            hosts.layers(name, model), keeps, batch["attention_mask"]
        ):  # fmt: skip
            expected = oracle.generate(model, batch, max_new_tokens=2)
    left = [len(one.first) for one in state]
    assert sum(left) < sum(sizes), "frames became one"
    areas = model.grids or [1] * len(sizes)
    at_last = left if len(tower.blocks) > 1 and method.layers[-1] < len(tower.blocks) - 1 else None
    if at_last is not None:
        assert seen[0] == sum(n * a for n, a in zip(at_last, areas, strict=True)), "and later blocks ran on fewer"
    assert pruned.sequences.tolist() == expected.sequences.tolist()
    for ours, theirs in zip(pruned.logits, expected.logits, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4 * max(1.0, float(theirs.abs().max())))


@torch.no_grad()
@pytest.mark.parametrize("name", MATRIX)
def test_nothing_to_remove_and_removal_are_exact(name):
    model, (batch, runs) = model_of(name), prompt(name)
    with said(runs):
        y = model(**batch).logits
        with tokred.applied(model, EarlyTom(budget=1.0, tau=2.0, layers=(0,))):
            assert torch.equal(model(**batch).logits, y)
        with tokred.applied(model, EarlyTom(budget=0.5, **ONE)):
            assert not torch.equal(model(**batch).logits[:, -1], y[:, -1])
        assert torch.equal(model(**batch).logits, y)


@torch.no_grad()
@pytest.mark.parametrize("name", ["qwen2_5_vl_video", "internvl"])
def test_clips_of_a_batch_do_not_see_each_other(name):
    """A prompt's logits are those that it has alone; in another order they follow."""
    model, (batch, runs) = model_of(name), filmed(name, (6, 6))
    found = {}
    for order in ([0, 1], [1, 0]):
        turned = {k: v[order] for k, v in batch.items() if v.shape[0] == 2}
        pixels = "pixel_values" if "pixel_values" in batch else "pixel_values_videos"
        cuts = [batch["video_grid_thw"].prod(1)[i].item() for i in (0, 1)] if runs is None else [6, 6]
        parts = batch[pixels].split(cuts)
        with said(runs), tokred.applied(model, EarlyTom(budget=0.5, **ONE)):
            found[order[0]] = model(**turned, **{pixels: torch.cat([parts[i] for i in order])}).logits[:, -1]
    torch.testing.assert_close(found[0], found[1].flip(0), rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_beams_images_and_features_made_before():
    """Copies of a sample share its clip; an image beside it stays whole; getters may run outside of the forward."""
    model, method = model_of("internvl"), EarlyTom(budget=0.5, **ONE)
    batch, _ = filmed("internvl", (6, 6))
    one = {k: v[:1] if v.shape[0] == 2 else v[:6] for k, v in batch.items()}
    with clips([[1, 5]]), tokred.applied(model, method):
        greedy = oracle.generate(model, one)
        # transformers 5.17 hands frames to the tower as 0, 0, 1, 1, ... for two beams, without a patch too.
        pixels = model._expand_inputs_for_generation(expand_size=2, **one)[1]["pixel_values"]
        if len(pixels) == len(one["pixel_values"]):
            beams = oracle.generate(model, one, num_beams=2)
            assert greedy.sequences.shape[1] == beams.sequences.shape[1]
        model(**one)
        assert tokred.report(model).layers[0].visual == (16 + 40,)
        features = model.model.get_image_features(one["pixel_values"])
        embeds = model.get_input_embeddings()(one["input_ids"])
        embeds[one["input_ids"] == 98] = torch.cat([*features.pooler_output])
        merged = model(inputs_embeds=embeds, attention_mask=one["attention_mask"]).logits[:, -1]
        torch.testing.assert_close(merged, model(**one).logits[:, -1])


def test_refusals():
    model = copy.deepcopy(model_of("internvl"))
    with pytest.raises(ValueError, match=r"block 23 of the vision tower.*take layers from 0 to 2"):
        tokred.apply(model, "earlytom")
    with pytest.raises(ValueError, match=r"'tome' leaves fewer tokens.*'earlytom' reads shots"):
        tokred.apply(model, [tokred.ToMe(r=2), EarlyTom(layers=(0,))])
    with pytest.raises(ValueError, match="at least one block"):
        EarlyTom(layers=())
    with pytest.raises(tokred.MissingInputError, match="reads frames, shots"):
        tokred.apply(model_of("llava_next"), EarlyTom(layers=(0,)))


def test_windows_of_the_tower_say_nothing_about_frames():
    """Scores are those of the first block behind that attends to whole frames."""
    model = copy.deepcopy(model_of("qwen2_5_vl_video"))
    tower = tower_of(model.model, FACTS["Qwen2_5_VLModel"])
    assert tower.whole == [1]
    assert tower.scored((0,)) == 1


def test_towers_that_are_computed_twice():
    model = copy.deepcopy(model_of("internvl"))
    batch, runs = filmed("internvl", (6,))
    tower = model.model.vision_tower.train()
    # The second name is that of older versions.
    getattr(tower, "activation_checkpointing_enable", tower.gradient_checkpointing_enable)({"use_reentrant": True})
    tokred.apply(model, EarlyTom(budget=0.5, **ONE))
    batch["pixel_values"].requires_grad_()
    with clips(runs), pytest.raises(tokred.UnsupportedModelError, match="computed twice"):
        model(**batch).logits.sum().backward()


def test_gradients_reach_the_tower():
    model = copy.deepcopy(model_of("internvl"))
    batch, runs = filmed("internvl", (6,))
    batch["pixel_values"].requires_grad_()
    with clips(runs), tokred.applied(model, EarlyTom(budget=0.5, **ONE)):
        model(**batch).logits[:, -1].sum().backward()
    assert bool((batch["pixel_values"].grad.flatten(1).abs().sum(1) > 0).all()), "of frames that became one, too"


def test_streams_refuse_it():
    with pytest.raises((ValueError, tokred.TokredError), match="earlytom"):
        tokred.stream(model_of("onevision_video"), "earlytom", layers=(0,))
