"""Drawings of streams: the tokens that went in, and those that some layer still has a row of; and contact sheets."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("transformers")

import tokred
import tokred.vlm
from tests.analysis.pages import sound
from tokred.adapters.tiny import vlm as tiny
from tokred.analysis import viz
from tokred.analysis.viz import printed
from tokred.analysis.viz.watched import taken_apart

PROMPT, QUESTION = [5, 6, 7], [8, 9]
BOUNDED = "stc budget=2 + streaming_llm budget=12"


def frames(count: int, *side: int) -> torch.Tensor:
    return 0.1 * torch.randn(count, *(side or (3, 16, 16)), generator=torch.Generator().manual_seed(0)).cumsum(0)


def test_a_stream_is_drawn_as_it_went():
    model, video = tiny.build("onevision_video"), frames(6)
    methods = [BOUNDED, "stc budget=1", "streamingtom budget=2 + streamingtom_cache groups=2 most=2"]
    drawing = viz.stream(model, video, methods, prompt=PROMPT, question=QUESTION, tokens=3)
    for run, text in zip(drawing.runs, methods, strict=True):
        one = tokred.stream(model, text, prompt=PROMPT)
        seen = one.frames(video)
        entered = [run.mask(view)[1] for view in drawing.views]
        for frame, mask in zip(seen, entered, strict=True):
            assert torch.equal(mask.nonzero().flatten(), frame.kept)
        there = one.remembered()[len(PROMPT) :]
        assert torch.equal(run.held[2, 0][torch.cat(entered)], there)
        assert not (run.held[2] & ~run.held[1]).any()
        assert run.answers == (" ".join(map(str, one.ask(QUESTION, max_new_tokens=3).ids)),)
    first, every, grouped = drawing.runs
    # Nine rows of frames beside the prompt: the first rows for good, and the newest.
    assert first.held[2].sum() == 12 - len(PROMPT)
    assert first.mask(drawing.views[-1])[2].sum() == 2
    assert torch.equal(every.held[2], every.held[1])  # without a policy all stays
    assert [int(grouped.mask(view)[2].sum()) for view in drawing.views] == [0, 0, 0, 0, 2, 2]
    assert [(view.frame, view.grid) for view in drawing.views] == [(i + 1, (2, 2)) for i in range(6)]


def test_what_is_remembered_is_what_the_layers_hold():
    model, video = tiny.build("onevision_video"), frames(5)
    one = tokred.stream(model, "streaming_llm budget=8 sinks=4", prompt=PROMPT)
    one.frames(video)
    # The prompt, a token of the first frame, and the newest four.
    wanted = [True] * 4 + [False] * (3 + 20 - 8) + [True] * 4
    assert one.remembered().tolist() == wanted
    one.ask(QUESTION, max_new_tokens=2)
    assert one.remembered().tolist() == wanted


def test_the_sheet_has_the_frames_side_by_side():
    pytest.importorskip("matplotlib")
    model, video = tiny.build("onevision_video"), frames(7)
    drawing = viz.stream(model, video, [BOUNDED], prompt=PROMPT)
    sheet = drawing.sheet(columns=3)
    assert [axis.get_title() for axis in sheet.axes] == ["frame 1", "frame 4", "frame 7"] + [
        f"{int(drawing.runs[0].mask(drawing.views[i])[2].sum())} of 4" for i in (0, 3, 6)
    ]  # fmt: skip
    assert sheet.axes[0].get_ylabel() == "the frames"
    assert "dark: did not go in - orange: went in, and are forgotten" in " ".join(sheet.get_suptitle().split())
    assert "orange" not in drawing.sheet(1, columns=1).get_suptitle()
    page = sound(drawing.html())
    assert len(page.all("canvas")) == 7
    assert page.data["axes"][0]["labels"] == ["the frames", "entry", "the end of the stream"]
    with pytest.raises(ValueError, match=r"stage must lie in 1\.\.2, got 3"):
        drawing.sheet(3)
    with pytest.raises(ValueError, match="columns must be at least 1"):
        drawing.sheet(columns=0)


def test_tokens_that_left_later_are_tinted_and_others_struck_through():
    pixels = torch.full((3, 32, 32), 200, dtype=torch.uint8)
    there = torch.tensor([True, True, False, False])
    later = torch.tensor([False, True, False, False])
    found = printed.left_later(printed.kept(pixels, there, (2, 2)), later, (2, 2))
    half = found.shape[0] // 2
    assert (found[:half, :half] == 200).all()
    red, _, blue = found[:half, half:].reshape(-1, 3).mean(0)
    assert red > blue + 50
    assert found[half:].mean() < 100


def test_a_clip_in_one_prompt_is_a_sheet():
    pytest.importorskip("matplotlib")
    prompt = tiny.prompts("llava", [[3, *["image"] * 4, 4]])
    with tokred.vlm.clips([[4]]):
        drawing = viz.vlm(tiny.build("llava"), prompt, "divprune budget=0.5 + fastv layer=2 ratio=0.5", tokens=1)
    sheet = drawing.figure()
    assert [axis.get_title() for axis in sheet.axes] == [f"frame {i + 1}" for i in range(4)] + [
        f"{int(drawing.runs[0].mask(view)[-1].sum())} of 16" for view in drawing.views
    ]  # fmt: skip
    said = " ".join(sheet.get_suptitle().split())
    assert "dark: left before the language model - orange: left inside it, up to layer 4" in said
    assert len(drawing.figure([4]).axes) == 4  # a row a frame, as of pictures


@pytest.mark.parametrize(("name", "each"), [("onevision_video", 4), ("llava", 16), ("qwen2_5_vl_video", 4)])
def test_a_prompt_is_taken_apart(name, each):
    """What a stream is handed makes the frames that the prompt had."""
    from tests.vlm import test_streams as streams

    video = streams.pixels(3, name)
    given = streams.dense(name, video)
    apart = taken_apart(tiny.build(name), given)
    before, after = streams.around(name)
    assert (apart.prompt.tolist(), apart.question.tolist()) == (before, after)
    assert torch.equal(torch.stack(apart.frames), video)


def test_bad_input_is_refused():
    model, video = tiny.build("onevision_video"), frames(2)
    with pytest.raises(ValueError, match="frames is empty"):
        viz.stream(model, [], BOUNDED)
    with pytest.raises(ValueError, match="tokens must be at least 1"):
        viz.stream(model, video, BOUNDED, tokens=0)
    with pytest.raises(ValueError, match="there are 2 frames, got 3"):
        viz.stream(model, video, BOUNDED, pixels=torch.rand(3, 3, 8, 8))
    with pytest.raises(ValueError, match="'evs' cannot act on a stream"):
        viz.stream(model, video, [BOUNDED, "evs ratio=0.5"])
    ids = torch.tensor([[5, 6]])
    with pytest.raises(ValueError, match="has no clip"):
        taken_apart(model, {"input_ids": ids})
    with pytest.raises(ValueError, match="got 2 prompts"):
        taken_apart(model, {"input_ids": ids.expand(2, -1)})
