"""Every method that acts on clips, by hand and on tiny models that take them: laws that hold for all of them."""

from __future__ import annotations

import copy
import functools
from typing import Any

import pytest
import torch
from torch import Tensor

import tokred
from tests.vlm import hosts, oracle
from tests.vlm.visual import kept
from tokred.adapters.vlm import records
from tokred.core.registry import methods as registered
from tokred.vlm import VisualSite, clips
from tokred.vlm.shots import Shots

NAMES = sorted(n for n, cls in registered.of("projector").items() if getattr(cls, "clips", False))
# Hosts that take clips; all but the first are for the matrix.
VIDEOS = ["onevision_video", "qwen2_5_vl_video", "llava_next_video", "internvl", "llava", "smolvlm"]
MATRIX = [VIDEOS[0], *(pytest.param(name, marks=pytest.mark.hosts) for name in VIDEOS[1:])]
RUNS = {"internvl", "llava", "smolvlm"}
# Methods that move features from tokens that leave into others, so that dropping is not masking.
MERGING = {"fastvid", "flashvid", "framefusion", "holitom", "prunevid", "streamingtom"}


def clip(
    b: int = 3, frames: int = 4, grid: tuple[int, int] = (3, 4), *, dtype: torch.dtype = torch.float32, seed: int = 0
) -> VisualSite:
    """Clips in which a part of each frame is nearly what it was before, with everything that methods read."""
    g = torch.Generator().manual_seed(seed)
    cells = grid[0] * grid[1]
    x = torch.randn(b, 1, cells, 16, generator=g).repeat(1, frames, 1, 1)
    moves = torch.rand(b, frames, cells, 1, generator=g) < 0.4
    x = (x + torch.where(moves, 1.0, 0.05) * torch.randn(x.shape, generator=g)).flatten(1, 2).to(dtype)
    scores = torch.rand(b, 2, frames * cells, generator=g).to(dtype)
    return VisualSite(
        x=x,
        tower=x,
        received=scores,
        class_attention=scores,
        grid=grid,
        frames=frames,
        shots=lambda: shots(scores, frames),
    )


def shots(scores: Tensor, frames: int) -> tuple[Shots, ...]:
    """Clips of which no frames merged, in one segment each."""
    every = torch.arange(frames), torch.ones(frames), ((0, frames - 1),)
    return tuple(Shots(*every, row) for row in scores.float().mean(1).unflatten(1, (frames, -1)))


def one(site: VisualSite, i: int) -> VisualSite:
    """A sample alone."""
    cut = {name: site._values[name][i : i + 1] for name in ("x", "tower", "received", "class_attention")}
    return VisualSite(**cut, grid=site.grid, frames=site.frames, shots=lambda: site.shots[i : i + 1])


def made(name: str) -> Any:
    return tokred.make(name, **registered.get(name).example)


def same(a: Any, b: Any, x: Tensor, i: int) -> None:
    """Two reductions of one sample (of ``b`` the ``i``-th) agree."""
    assert kept(a) == kept(b, i)
    assert torch.equal(a.index[0], b.index[i])
    real = [slice(None) if r.mask is None else r.mask[j] for r, j in ((a, 0), (b, i))]
    torch.testing.assert_close(a.merge(x[i : i + 1])[0, real[0]], b.merge(x)[i, real[1]])


@pytest.mark.parametrize("name", NAMES)
def test_samples_do_not_see_each_other(name):
    method, site = made(name), clip()
    found = method.reduce(site)
    assert found.slots < site.shape[1]
    for i in range(3):
        same(method.reduce(one(site, i)), found, site.x, i)
        assert kept(found, i) == sorted(kept(found, i))
        assert len(kept(found, i)) <= method.kept(4, 12)


@pytest.mark.parametrize("name", NAMES)
def test_nothing_to_remove_is_the_identity(name):
    assert tokred.make(name, **registered.get(name).nothing).reduce(clip()).trivial


@pytest.mark.parametrize("name", NAMES)
def test_images_stay_whole(name):
    site = clip(2, 1)
    assert made(name).reduce(VisualSite(x=site.x, grid=site.grid)).trivial


@pytest.mark.parametrize("frames", [1, 2, 3, 5])
@pytest.mark.parametrize("name", NAMES)
def test_clips_of_few_frames_and_odd_grids(name, frames):
    for grid in ((1, 1), (1, 3), (3, 5)):
        site = clip(2, frames, grid)
        found = made(name).reduce(site)
        for i in range(2):
            assert 1 <= len(kept(found, i)) <= max(1, made(name).kept(frames, grid[0] * grid[1]))
        assert found.merge(site.x).isfinite().all()


@pytest.mark.parametrize("name", NAMES)
def test_tokens_that_are_no_frames(name):
    with pytest.raises(ValueError, match="48 tokens are no clip of 5 frames"):
        made(name).reduce(VisualSite(x=clip().x, frames=5, grid=(3, 4)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", NAMES)
def test_choices_are_those_of_float32(name, dtype):
    method = made(name)
    for seed in range(3):
        half = clip(2, 5, (4, 4), dtype=dtype, seed=seed)
        wide = VisualSite(
            x=half.x.float(), tower=half.x.float(), received=half._values["received"].float(),
            class_attention=half._values["class_attention"].float(), grid=(4, 4), frames=5,
            shots=lambda s=half: s.shots,
        )  # fmt: skip
        a, b = method.reduce(half), method.reduce(wide)
        assert torch.equal(a.index, b.index)
        assert a.merge(half.x).dtype == dtype
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(method.reduce(wide).index, b.index)


@functools.cache
def model_of(name: str) -> Any:
    return hosts.build(name)


def prompt(name: str) -> tuple[dict[str, Any], Any]:
    """Two prompts of other lengths, one with a clip, the other with two; and what to say of their pictures."""
    if name in RUNS:
        rows: hosts.Rows = [[3, "image", "image", "image", 5], [2, *["image"] * 3, 1, "image", "image", 4]]
        return hosts.prompts(name, rows), [[3], [3, 2]]
    return hosts.prompts(name, [[3, "image", 5], [2, "image", 1, "image", 4]]), None


class Said:
    """A model inside :func:`tokred.vlm.clips`."""

    def __init__(self, model: Any, runs: Any) -> None:
        self.model = model
        self.runs = runs

    def __call__(self, **given: Any) -> Any:
        if self.runs is None:
            return self.model(**given)
        with clips(self.runs):
            return self.model(**given)


@torch.no_grad()
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("host", MATRIX)
def test_on_a_model(host, name):
    model, (batch, runs) = model_of(host), prompt(host)
    method = made(name)
    if not next(row for row in tokred.supports(model) if row.method == name).works:
        with pytest.raises(tokred.MissingInputError, match="reads"):
            tokred.apply(model, method)
        return
    run = Said(model, runs)
    y = run(**batch).logits
    with tokred.applied(model, tokred.make(name, **registered.get(name).nothing)):
        assert torch.equal(run(**batch).logits, y)
    before = tuple(batch["input_ids"].eq(v).sum(1).tolist() for v in (97, 98))
    with tokred.applied(model, method):
        short = run(**batch).logits
        left = tokred.report(model).layers[0].visual
        assert torch.equal(run(**batch).logits, short)
    assert short.isfinite().all()
    assert all(0 < a < b + c for a, b, c in zip(left, *before, strict=True))
    assert torch.equal(run(**batch).logits, y)


@pytest.mark.parametrize("name", [n for n in NAMES if n not in MERGING])
@pytest.mark.parametrize("host", MATRIX)
def test_dropping_equals_masking(host, name):
    """Positions, those of several axes too, are what they were in the whole prompt."""
    model, (batch, runs) = model_of(host), prompt(host)
    if not next(row for row in tokred.supports(model) if row.method == name).works:
        pytest.skip(f"{host} does not hand over what {name} reads")
    if runs is None:
        oracle.agree(model, hosts.layers(host, model), made(name), batch, max_new_tokens=2)
        return
    with clips(runs):
        oracle.agree(model, hosts.layers(host, model), made(name), batch, max_new_tokens=2)


def test_images_and_a_video_in_one_prompt():
    """The image stays whole, whatever becomes of the clip beside it."""
    model = model_of("internvl")
    batch = hosts.prompts("internvl", [[3, "image", 2, *["image"] * 3, 5]])
    with tokred.applied(model, tokred.make("evs", ratio=0.5)), torch.no_grad(), clips([[1, 3]]):
        model(**batch)
        assert tokred.report(model).layers[0].visual == (16 + 24,)


def test_frames_that_nobody_named_are_no_silent_matter():
    model = model_of("internvl")
    batch = hosts.prompts("internvl", [[3, "image", "image", 5]])
    with tokred.applied(model, tokred.make("evs")), torch.no_grad():
        with pytest.warns(tokred.NothingRemovedWarning, match=r"takes the frames of a video as images.*clips"):
            model(**batch)
        assert tokred.report(model).layers[0].visual == (32,)


def test_a_family_without_videos_refuses():
    with pytest.raises(tokred.MissingInputError, match=r"reads frames"):
        tokred.apply(model_of("llava_next"), "evs")


def timed(model: Any) -> dict[str, Any]:
    """Qwen 3 VL's form of a video: the time of each frame stands before it, as text."""
    frame = [95, *[97] * 4, 96]
    ids = torch.tensor([[7, 8, 9, *frame, 11, 12, *frame, 13, 14, *frame, 15, 16, 17]])
    pixels = torch.randn(3 * 16, 3 * 2 * 4 * 4, generator=torch.Generator().manual_seed(0))
    return {
        "input_ids": ids, "attention_mask": torch.ones_like(ids), "mm_token_type_ids": 2 * (ids == 97).long(),
        "pixel_values_videos": pixels, "video_grid_thw": torch.tensor([[3, 4, 4]]),
    }  # fmt: skip


@torch.no_grad()
def test_features_of_a_video_are_not_noted_as_those_of_images_too():
    """Qwen 3 VL's getter of videos calls that of images."""
    model = copy.deepcopy(model_of("qwen3_vl"))
    batch = timed(model)
    with tokred.applied(model, made("evs")):
        model.model.get_video_features(batch["pixel_values_videos"], batch["video_grid_thw"])
        assert records.last_record(model.model, "video") is not None
        assert records.last_record(model.model, "image") is None


def test_times_between_the_frames_stay():
    model = model_of("qwen3_vl")
    batch = timed(model)
    _, keeps = oracle.agree(model, hosts.layers("qwen3_vl", model), made("evs"), batch, max_new_tokens=3)
    text = batch["input_ids"] != 97
    assert bool(keeps[0][text].all())
    assert int(keeps[0].sum()) == int(text.sum()) + 6
