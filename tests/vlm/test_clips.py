"""Clips: frames that come as images reach a method as one site with frames, where the caller says so."""

from __future__ import annotations

import contextlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, ClassVar

import pytest
import torch

import tokred
from tests.vlm import hosts, tiny
from tokred.adapters.vlm.layout import Part, Picture, Span, clip_of
from tokred.adapters.vlm.tower.film import as_pooled
from tokred.core.reduction import Reduction
from tokred.encoder.motion import feature_motion
from tokred.errors import MissingInputError
from tokred.vlm import VisualSite, clips
from tokred.vlm.before_llm import ProjectorMethod
from tokred.vlm.clips import said

# Families whose video is a list of images; SmolVLM's pictures are all tiles of a sample together.
FRAMED = ["internvl", "smolvlm", "llava"]
MORE = ["idefics3", "gemma3", "paligemma"]
# Families that take a video as what it is.
VIDEOS = ["llava_next_video", "onevision_video", "qwen2_5_vl_video"]


@dataclass(frozen=True)
class Watch(ProjectorMethod):
    """Notes its sites, and what they hand over, while they can be asked; keeps all but the first token of each."""

    name: ClassVar[str] = "watch"
    what: tuple[str, ...] = ("x",)
    sites: list[dict[str, Any]] = field(default_factory=list, compare=False)

    @property
    def reads(self) -> frozenset[str]:
        return frozenset(self.what) - {"tower"}

    def count(self, n: int) -> int:
        return n - 1

    def choose(self, site: VisualSite) -> Reduction:
        seen = {"frames": site.frames, "grid": site.known_grid, "samples": site.samples, "image": site.image}
        for name in self.what:
            seen[name] = site.column_scores() if name == "attention" else getattr(site, name)
        self.sites.append(seen)
        kept = torch.arange(1, site.shape[1]).expand(site.shape[0], -1)
        return Reduction.keep(kept, site.shape[1])


def watched(model: Any, batch: dict[str, Any], runs: Any, *what: str) -> list[dict[str, Any]]:
    method = Watch(what=("x", *what))
    with tokred.applied(model, method), torch.no_grad():
        if runs is None:
            model(**batch)
        else:
            with clips(runs):
                model(**batch)
    return method.sites


def shapes(sites: list[dict[str, Any]]) -> list[tuple[Any, ...]]:
    return [(s["frames"], s["grid"], s["samples"], s["image"], s["x"].shape[1]) for s in sites]


@pytest.mark.parametrize("name", [*FRAMED, *MORE])
def test_four_frames_are_one_site(name):
    model = hosts.build(name)
    batch = hosts.prompts(name, [[3, "image", 1, "image", 1, "image", 1, "image", 4]])
    apart = watched(model, batch, None)
    assert {s["frames"] for s in apart} == {None}
    together = watched(model, batch, [[4]])
    assert shapes(together) == [(4, (4, 4), (0,), (0,), 64)]
    assert torch.equal(together[0]["x"], torch.cat([s["x"].flatten(0, 1) for s in apart])[None])


@pytest.mark.parametrize("name", FRAMED)
def test_two_clips_in_a_batch_are_one_site(name):
    model = hosts.build(name)
    batch = hosts.prompts(name, [[2, *["image"] * 3, 4], [1, *["image"] * 3, 2]])
    assert shapes(watched(model, batch, [[3], [3]])) == [(3, (4, 4), (0, 1), (0, 0), 48)]


@pytest.mark.parametrize("name", FRAMED)
def test_clips_of_several_lengths_and_images_beside_them(name):
    model = hosts.build(name)
    batch = hosts.prompts(name, [["image", 2, *["image"] * 3, 4], [1, *["image"] * 2, 2], [4]])
    found = watched(model, batch, ([1, 3], (2,), ()))
    assert shapes(found) == [(None, (4, 4), (0,), (0,), 16), (3, (4, 4), (0,), (1,), 48), (2, (4, 4), (1,), (0,), 32)]


def test_two_clips_of_one_prompt_are_apart():
    model = hosts.build("internvl")
    batch = hosts.prompts("internvl", [[2, *["image"] * 4, 4]])
    assert shapes(watched(model, batch, [[2, 2]])) == [(2, (4, 4), (0, 0), (0, 1), 32)]
    assert shapes(watched(model, batch, [[1, 1, 2]]))[0] == (None, (4, 4), (0, 0), (0, 1), 16)


@pytest.mark.parametrize("name", FRAMED)
def test_the_tokens_of_a_clip_leave_where_they_stand(name):
    """One token of the clip leaves, not one of each frame; decoding goes on from there."""
    model = hosts.build(name)
    batch = hosts.prompts(name, [[3, "image", 1, "image", 4]])
    with tokred.applied(model, Watch()), clips([[2]]):
        out = model.generate(**batch, max_new_tokens=3, do_sample=False)
        report = tokred.report(model)
    assert out.shape[1] == batch["input_ids"].shape[1] + 3
    assert {row.columns for row in report.layers} == {batch["input_ids"].shape[1] - 1}


def test_several_sequences_of_a_prompt_share_its_runs():
    model = hosts.build("internvl")
    batch = hosts.prompts("internvl", [[3, *["image"] * 2, 4], [1, *["image"] * 3, 4]])
    method = Watch()
    with tokred.applied(model, method), clips([[2], [1, 2]]):
        model.generate(**batch, max_new_tokens=2, do_sample=False, num_beams=2)
    assert {(s["frames"], s["samples"], s["image"]) for s in method.sites} >= {
        (2, (0, 1, 2, 3), (0, 0, 1, 1)),
        (None, (2, 3), (0, 0)),
    }


def test_attention_of_a_clip_is_that_of_its_frames():
    model = hosts.build("llava")
    batch = hosts.prompts("llava", [[3, *["image"] * 3, 4], [2, *["image"] * 3, 4]])
    what = ("class_attention", "attention", "tower")
    apart = watched(model, batch, None, *what)[0]
    together = watched(model, batch, [[3], [3]], *what)[0]
    assert torch.equal(together["tower"], apart["tower"].reshape(2, 48, -1))
    assert torch.allclose(together["class_attention"], apart["class_attention"].reshape(2, 48))
    heads = apart["attention"].shape[1]
    expected = apart["attention"].view(2, 3, heads, 16).transpose(1, 2).reshape(2, heads, 48)
    assert torch.allclose(together["attention"], expected)


def test_class_tokens_among_the_features_stay():
    """LLaVA hands on the tower's class token too where it is told to: a frame has one token that is no patch."""
    model = hosts.build("llava")
    model.config.vision_feature_select_strategy = model.model.config.vision_feature_select_strategy = "full"
    batch = hosts.prompts("llava", [[3, "image", "image", 2]])
    ids = batch["input_ids"]
    ids = torch.cat([ids[:, :3], torch.full((1, 34), tiny.IMAGE), ids[:, -2:]], 1)
    batch |= {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    apart = watched(model, batch, None, "class_attention", "tower")[0]
    together = watched(model, batch, [[2]], "class_attention", "tower")[0]
    assert together["frames"] == 2
    for name in ("x", "tower", "class_attention"):
        assert torch.allclose(together[name][0], apart[name].flatten(0, 1)), name


def test_motion_is_how_much_the_towers_features_change():
    model = hosts.build("llava")
    batch = hosts.prompts("llava", [[3, *["image"] * 3, 4]])
    batch["pixel_values"][1] = batch["pixel_values"][0]
    found = watched(model, batch, [[3]], "motion", "tower")[0]
    first, _, third = found["tower"][0].view(3, 16, -1)
    still = torch.zeros(16)
    assert torch.allclose(found["motion"], torch.cat([still, still, (third - first).abs().mean(-1)])[None])
    assert found["motion"].dtype == torch.float32


@pytest.mark.parametrize("name", VIDEOS)
def test_videos_have_motion_too(name):
    model = hosts.build(name)
    found = watched(model, hosts.prompts(name, [[3, "image", 4]]), None, "motion")[0]
    assert found["frames"] > 1
    n = found["x"].shape[1]
    assert found["motion"].shape == (1, n)
    if name.startswith("qwen"):  # the tower's features are those that enter the language model
        assert torch.equal(found["motion"], feature_motion(found["x"], found["frames"]))


def test_an_image_does_not_move():
    model = hosts.build("llava")
    with pytest.raises(MissingInputError, match="motion"):
        watched(model, hosts.prompts("llava", [[3, "image", 4]]), None, "motion")


def test_feature_motion():
    x = torch.tensor([[[0.0, 0.0], [1.0, 1.0], [2.0, 0.0], [1.0, 1.0], [2.0, 4.0], [1.0, 0.0]]])
    assert feature_motion(x, 3).tolist() == [[1.0, 0.0, 1.0, 0.0, 2.0, 0.5]]
    assert feature_motion(x.half(), 1).tolist() == [[0.0] * 6]
    with pytest.raises(ValueError, match="frames is 4"):
        feature_motion(x, 4)


def test_a_method_runs_on_clips():
    """Cells of two frames and 2 x 2 tokens, which no single image has."""
    model = hosts.build("internvl")
    batch = hosts.prompts("internvl", [[3, *["image"] * 4, 4]])
    with tokred.applied(model, tokred.make("nemotron", s=2, tubelet=2)), torch.no_grad(), clips([[4]]):
        model(**batch)
        left = tokred.report(model).layers[0].visual
    assert left == (8,)


@pytest.mark.parametrize("runs", [[], 4, [4], [[0]], [[True]], [[2.0]], ["4"], None])
def test_bad_runs(runs):
    with pytest.raises(ValueError, match="runs is"), clips(runs):
        pass


def test_runs_that_do_not_fit():
    model = hosts.build("internvl")
    batch = hosts.prompts("internvl", [[3, *["image"] * 4, 4]])
    with pytest.raises(ValueError, match=r"runs has \[3\] for a sample, 3 pictures together.* sees 4"):
        watched(model, batch, [[3]])
    with pytest.raises(ValueError, match="runs has 2 rows, but the batch 1 samples"):
        watched(model, batch, [[4], [4]])


def test_frames_of_several_sizes_are_no_clip():
    some = [Picture(n, (Part(Span.line(0, n), (2, n // 2)),)) for n in (4, 6)]
    with pytest.raises(ValueError, match=r"different sizes, 4 and 6 visual tokens on grids \(2, 2\) and \(2, 3\)"):
        clip_of(some)
    tiled = Picture(8, (Part(Span.line(0, 4)), Part(Span.line(4, 4))))
    with pytest.raises(ValueError, match="cut into tiles"):
        clip_of([tiled, tiled])


@pytest.mark.parametrize(("name", "why"), [("qwen2_vl", "takes videos as"), ("llava_next", "cuts images into tiles")])
def test_families_without_frames_as_images_refuse(name, why):
    model = hosts.build(name)
    with pytest.raises(ValueError, match=why):
        watched(model, hosts.prompts(name, [[3, "image", "image", 4]]), [[2]])


@pytest.mark.parametrize("what", ["k", "tower_layers"])
def test_the_towers_own_keys_are_those_of_single_frames(what):
    model = hosts.build("llava")
    batch = hosts.prompts("llava", [[3, "image", "image", 4]])
    method = Watch(what=(what,))
    with (
        tokred.applied(model, method),
        pytest.raises(MissingInputError, match=f"reads {what}.* each frame of a clip"),
        clips([[2]]),
    ):
        model(**batch)


def test_runs_end_with_the_block_that_says_them():
    model = hosts.build("internvl")
    batch = hosts.prompts("internvl", [[3, "image", "image", 4]])
    with clips([[2]]):
        with contextlib.suppress(ValueError), clips([[1, 1]]):
            assert [s["frames"] for s in watched(model, batch, None)] == [None]
            raise ValueError
        assert [s["frames"] for s in watched(model, batch, None)] == [2]
    assert [s["frames"] for s in watched(model, batch, None)] == [None]


def test_runs_are_those_of_one_thread():
    with clips([[2]]), ThreadPoolExecutor(1) as pool:
        assert pool.submit(said).result() is None
        assert said() == ((2,),)


@pytest.mark.parametrize("side", [4, 3])
def test_scores_of_pooled_frames_are_pooled_as_the_features_are(side):
    """Means of 2 x 2 patches, and between them where a side is odd, as LLaVA-OneVision has it."""
    core = hosts.build("onevision_video").model
    core.config.vision_config.image_size = 4 * side
    scores = torch.rand(3, 5, side * side, generator=torch.Generator().manual_seed(0))
    expected = core.apply_pooling(scores.mT).mT
    torch.testing.assert_close(as_pooled(scores, (2, 2)), expected)


@pytest.mark.parametrize("name", ["onevision_video", "llava_next_video"])
def test_pooled_frames_have_scores_of_their_own(name):
    """A clip's are those of its frames; another frame changes no other's."""
    model, batch = hosts.build(name), hosts.prompts(name, [[3, "image", 4]])
    before = watched(model, batch, None, "attention")[0]["attention"]
    batch["pixel_values_videos"][0, 1] += 1
    after = watched(model, batch, None, "attention")[0]["attention"]
    assert before.shape == (1, 2, 12)
    same = torch.isclose(before, after, atol=1e-6).view(2, 3, 4).all(0).all(-1)
    assert same.tolist() == [True, False, True]
    # Cells of four patches: what the patches of a frame receive adds up to the number of queries.
    per_cell = 4 * before.view(2, 3, 4).sum(-1)
    assert bool((per_cell <= 17.001).all())
    assert bool((per_cell > 12).all())
