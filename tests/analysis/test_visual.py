"""Drawings of visual tokens: the ones that each decoder layer really sees, at the places of the picture they are of."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("transformers")

import tokred
import tokred.vlm
from tests.analysis.pages import NASTY, ran, sound
from tokred.adapters.tiny import vlm as tiny
from tokred.analysis import viz

TWO = [[3, "image", 4], [2, "image", 3]]


def drawn(name, rows, *methods, **options):
    return viz.vlm(tiny.build(name), tiny.prompts(name, rows), list(methods), tokens=3, **options)


def test_layers_see_what_the_report_counts():
    model, given = tiny.build("llava"), tiny.prompts("llava", TWO)
    drawing = viz.vlm(
        model, given, ["divprune budget=8 + fastv layer=2 ratio=0.5", "fastv layer=1 ratio=0.5"], tokens=3
    )
    first, second = drawing.views
    assert (first.grid, first.sample, second.sample) == ((4, 4), 0, 1)
    assert (given["input_ids"][1][second.columns] == tiny.IMAGE).all()
    methods = ([tokred.DivPrune(budget=8), tokred.FastV(layer=2, ratio=0.5)], [tokred.FastV(layer=1, ratio=0.5)])
    for run, several in zip(drawing.runs, methods, strict=True):
        with tokred.applied(model, several), torch.no_grad():
            model(**given)
            rows = tokred.report(model).layers
        for i, row in enumerate(rows):
            assert row.visual == tuple(int(run.mask(view)[i + 1].sum()) for view in drawing.views)
    assert drawing.changes() == [0, 1, 2, 3]
    assert tokred.patched(model) == []


def test_the_tokens_are_those_that_the_method_keeps():
    model, given = tiny.build("llava"), tiny.prompts("llava", TWO)
    drawing = viz.vlm(model, given, "uniform_visual budget=4", tokens=2)
    site = tokred.vlm.VisualSite(x=torch.zeros(1, 16, 1), grid=(4, 4))
    kept = tokred.UniformVisual(budget=4).reduce(site).representative[0]
    wanted = torch.zeros(16, dtype=torch.bool).index_fill(0, kept, True)
    for view in drawing.views:
        assert torch.equal(drawing.runs[0].mask(view), torch.stack([torch.ones_like(wanted), *[wanted] * 4]))


def test_the_answer_is_the_one_of_generate():
    model, given = tiny.build("llava"), tiny.prompts("llava", TWO)
    drawing = viz.vlm(model, given, "divprune budget=4", tokens=3)
    length = given["input_ids"].shape[1]
    with tokred.applied(model, "divprune", budget=4):
        out = model.generate(**given, max_new_tokens=3, do_sample=False)[:, length:]
    assert drawing.runs[0].answers == tuple(" ".join(map(str, row.tolist())) for row in out)
    # Of the prompts the text alone, without places of pictures and padding.
    assert [len(text.split()) for text in drawing.questions] == [7, 5]


def test_frames_of_a_video_are_drawn_apart():
    drawing = drawn("qwen2_5_vl_video", [[3, "image", 4]], "divprune budget=3")
    assert [(view.name, view.grid) for view in drawing.views] == [
        ("picture 1, frame 1", (2, 2)), ("picture 1, frame 2", (2, 2))
    ]  # fmt: skip
    assert sum(int(drawing.runs[0].mask(view)[-1].sum()) for view in drawing.views) < 8


def test_frames_that_come_as_images_are_one_clip():
    with tokred.vlm.clips([[2]]):
        drawing = drawn("llava", [[3, "image", 1, "image", 2]], "divprune budget=8")
    assert [view.name for view in drawing.views] == ["picture 1, frame 1", "picture 1, frame 2"]
    assert all(view.pixels.shape == (3, 16, 16) for view in drawing.views)
    assert not torch.equal(drawing.views[0].pixels, drawing.views[1].pixels)


@pytest.mark.hosts
@pytest.mark.parametrize("name", [name for name in tiny.FAMILIES if name != "llava"])
def test_every_family_is_drawn(name):
    drawing = drawn(name, [[3, "image", 4]], "divprune budget=4")
    assert drawing.views
    held = drawing.runs[0]
    assert all(int(held.mask(view)[0].sum()) == view.grid[0] * view.grid[1] for view in drawing.views)
    assert sum(int(held.mask(view)[-1].sum()) for view in drawing.views) < sum(v.columns.numel() for v in drawing.views)
    sound(drawing.html())


def test_patches_of_qwen_are_put_together_again():
    """A picture cut as its processor cuts it, in cells of 2 x 2 patches of 4 x 4 pixels, twice for two frames."""
    from tokred.analysis.viz.seen import _joined

    model = tiny.build("qwen2_5_vl")
    picture = torch.randn(3, 32, 32)
    x = picture.view(1, 3, 4, 2, 4, 4, 2, 4).expand(2, -1, -1, -1, -1, -1, -1, -1)
    patches = x.permute(2, 5, 3, 6, 1, 0, 4, 7).reshape(64, -1)
    (found,) = _joined(patches, torch.tensor([[1, 8, 8]]), model.model)
    assert torch.equal(found, picture.expand(2, -1, -1, -1))


def test_the_page_and_the_figure(tmp_path):
    pytest.importorskip("matplotlib")
    image = pytest.importorskip("PIL.Image")
    drawing = drawn("llava", TWO, "divprune budget=4", "fastv layer=2 ratio=0.5", pixels=torch.rand(2, 3, 20, 20))
    page = sound(drawing.html(NASTY))
    assert page.all("h1")[0][1] == NASTY
    assert len(page.all("canvas")) == 4
    assert [a["max"] for a, _ in page.all("input")] == ["4"]
    assert page.data["panels"][2]["at"] == [4, 5, 5, 5, 5]  # of the second prompt
    with image.open(drawing.save(tmp_path / "a.png", dpi=50)) as picture:
        assert min(picture.size) > 100
    with pytest.raises(ValueError, match=r"stages must lie in 0\.\.4"):
        drawing.figure([5])


def test_the_page_in_a_browser(tmp_path):
    path = drawn("llava", [[3, "image", 4]], "uniform_visual budget=4", "fastv layer=2 ratio=0.5").save(
        tmp_path / "a.html"
    )
    lines = ran(
        path,
        """
        const all = document.querySelectorAll(".count");
        const counts = function () { return Array.from(all, (c) => c.textContent).join("; "); };
        said(told("#where-0") + ": " + counts());
        for (let i = 0; i < 4; i += 1) press(document.body, "ArrowLeft");
        said(told("#where-0") + ": " + counts());
        document.getElementById("play-0").click();
        said(told("#play-0"));
        document.getElementById("play-0").click();
        for (let i = 0; i < 2; i += 1) press(document.body, "ArrowRight");
        said(told("#where-0") + ": " + counts());
        const canvas = document.querySelector("canvas");
        press(canvas, "ArrowDown");
        for (let i = 0; i < 4; i += 1) press(canvas, "ArrowRight");
        said(told(".group"));
        said(canvas.getContext("2d").getImageData(5, 5, 1, 1).data[3]);
        said(document.documentElement.scrollWidth <= innerWidth);
        """,
        width=500,
    )  # fmt: skip
    assert lines[:4] == [
        "layer 4 of 4: 4 of 16 visual tokens; 8 of 16 visual tokens",
        "the picture: 16 of 16 visual tokens; 16 of 16 visual tokens",
        "Stop",
        "layer 2 of 4: 4 of 16 visual tokens; 16 of 16 visual tokens",
    ]
    assert lines[4].startswith("Token at row 1, column 4: ")
    assert lines[5:] == ["255", "true"]


def test_bad_input_is_refused():
    model, given = tiny.build("llava"), tiny.prompts("llava", TWO)
    with pytest.raises(ValueError, match="must have input_ids"):
        viz.vlm(model, {"inputs_embeds": torch.zeros(1, 3, 32)}, "divprune budget=4")
    with pytest.raises(ValueError, match="tokens must be at least 1"):
        viz.vlm(model, given, "divprune budget=4", tokens=0)
    with pytest.raises(tokred.MissingInputError, match="'snapkv' acts at stage 'cache'"):
        viz.vlm(model, given, "snapkv")
    with pytest.raises(ValueError, match="pixels must be one a picture"):
        viz.vlm(model, given, "divprune budget=4", pixels=[torch.rand(3, 8, 8)], tokens=1)
    with pytest.raises(tokred.NothingRecordedError, match="no visual tokens"):
        viz.vlm(model, tiny.prompts("llava", [[5]]), "divprune budget=4", tokens=1)
