"""Drawings of denoisers: what each sub-layer ran on, at its own resolution, step by step."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("diffusers")

import tokred
from tests.analysis.pages import NASTY, ran, sound
from tokred.adapters.tiny import diffusion as tiny
from tokred.analysis import viz


def drawn(kind, *methods, **options):
    return viz.denoiser(tiny.build(kind), tiny.inputs(kind), list(methods), **options)


def test_sites_are_those_of_the_report():
    model, given = tiny.build("unet"), tiny.inputs("unet")
    drawing = viz.denoiser(model, given, ["tomesd ratio=0.5 max_downsample=2", "todo factors=2"])
    for run, method in zip(
        drawing.runs, (tokred.ToMeSD(ratio=0.5, max_downsample=2), tokred.ToDo(factors=2)), strict=True
    ):
        with tokred.applied(model, method), torch.no_grad():
            model(**given)
            rows = {row.name: row for row in tokred.report(model).sublayers}
        for site, at in zip(drawing.sites, run.at, strict=True):
            row = rows[site.name]
            assert site.block == row.block + 1
            assert (row.tokens if at[0] is None else run.maps[at[0]].left) == row.left
            assert at[0] is None or len(run.maps[at[0]].groups) == row.tokens
    assert tokred.patched(model) == []
    grids = {found.grid for found in drawing.runs[0].maps}
    assert grids == {(16, 16), (8, 8)}


def test_groups_are_those_of_the_reduction():
    index = torch.tensor([[0, 1, 0, 2, -1, 2]])
    reduction = tokred.Reduction(
        representative=torch.tensor([[0, 1, 3]]), source=torch.tensor([[2, 5]]), target=torch.tensor([[0, 2]]), length=6
    )
    from tokred.analysis.viz.latent import _map
    from tokred.diffusion.site import SublayerPlace

    assert torch.equal(reduction.index, index)
    assert _map(SublayerPlace(6, (2, 3), 1), reduction, -1).groups.tolist() == [0, 1, 0, 3, -1, 3]
    # Two frames of 1 x 3 stand beside one another, which is the order that they had.
    clip = _map(SublayerPlace(6, (1, 3), 1, 2), reduction, 0)
    assert (clip.grid, clip.groups.tolist()) == ((1, 6), [0, 1, 0, 3, -1, 3])
    # Two frames of 3 x 1: token 1 of frame 0 comes behind token 0 of frame 1.
    clip = _map(SublayerPlace(6, (3, 1), 1, 2), reduction, 0)
    assert (clip.grid, clip.groups.tolist()) == ((3, 2), [0, 1, 2, -1, 0, 1])
    with pytest.raises(ValueError, match=r"sample must lie in -1\.\.0"):
        _map(SublayerPlace(6, (2, 3), 1), reduction, 1)


def test_queries_and_keys_are_drawn_apart():
    name = next(n for n in tokred.list_methods(stage="attention") if tokred.make(n).part == "heads")
    drawing = drawn("dit", tokred.make(name, **dict(type(tokred.make(name)).example)))
    assert {site.role for site in drawing.sites} <= {"queries", "keys"}


def test_steps_are_counted_and_chosen():
    model, given = tiny.build("unet"), tiny.inputs("unet")

    def run(denoiser):
        for t in (900, 700, 500, 300, 100):
            out = denoiser(**{**given, "timestep": torch.tensor(t)}).sample
        return out

    drawing = viz.denoiser(model, run, "tomesd ratio=0.5", steps=3)
    assert (drawing.count, drawing.steps) == (5, (1, 3, 5))
    assert all(len(at) == 3 for run in drawing.runs for at in run.at)
    with pytest.raises(ValueError, match="step must be one of 1, 3, 5"):
        drawing.figure(step=2)


@pytest.mark.hosts
@pytest.mark.parametrize("kind", [kind for kind in tiny.FAMILIES if kind not in ("unet", "dit")])
def test_every_family_is_drawn(kind):
    drawing = drawn(kind, "tomesd ratio=0.5 max_downsample=8")
    assert all(len(found.groups) == found.grid[0] * found.grid[1] for found in drawing.runs[0].maps)
    sound(drawing.html())


def test_the_page_and_the_figure(tmp_path):
    pytest.importorskip("matplotlib")
    image = pytest.importorskip("PIL.Image")
    drawing = drawn("unet", "tomesd ratio=0.5", "todo factors=2")
    page = sound(drawing.html(NASTY).replace("data:image/png;base64,", "data:"))
    assert page.all("h1")[0][1] == NASTY
    assert len(page.all("canvas")) == 2
    assert len(page.all("img")) == 3
    with image.open(drawing.save(tmp_path / "a.png", dpi=50)) as picture:
        assert min(picture.size) > 100
    with pytest.raises(ValueError, match="sites must lie in"):
        drawing.figure([99])


def test_the_page_in_a_browser(tmp_path):
    path = drawn("unet", "tomesd ratio=0.5").save(tmp_path / "a.html")
    lines = ran(
        path,
        """
        said(told(".count"));
        const canvas = document.querySelector("canvas");
        press(canvas, "ArrowDown");
        said(told(".group"));
        press(document.body, "ArrowRight");
        said(told(".count"));
        for (const value of ["groups", "image"]) {
          document.getElementById("view").value = value;
          document.getElementById("view").dispatchEvent(new Event("change"));
        }
        said(canvas.getContext("2d").getImageData(5, 5, 1, 1).data[3]);
        said(document.documentElement.scrollWidth <= innerWidth);
        """,
        width=500,
    )
    assert lines[0].endswith(": 128 of 256 tokens")
    assert lines[1].startswith("Token at row 1, column 1: ")
    assert lines[2] != lines[0]
    assert lines[3:] == ["255", "true"]


def test_what_came_out_is_a_picture():
    from tokred.analysis.viz.latent import picture_of

    assert picture_of(torch.rand(2, 3, 4, 5)).shape == (3, 4, 5)
    assert picture_of((torch.randn(1, 4, 4, 5),)).shape == (3, 4, 5)
    assert picture_of(torch.rand(1, 2, 3, 4, 5)).shape == (3, 4, 10)  # frames beside one another
    with pytest.raises(TypeError, match="no picture"):
        picture_of(torch.rand(4))


def test_bad_input_is_refused():
    model, given = tiny.build("unet"), tiny.inputs("unet")
    with pytest.raises(ValueError, match="steps must be at least 1"):
        viz.denoiser(model, given, "tomesd", steps=0)
    with pytest.raises(tokred.MissingInputError, match="'tome r=2' acts at stage 'block'"):
        viz.denoiser(model, given, "tome r=2")
    with pytest.raises(tokred.NothingRecordedError, match="reduced no sub-layer"):
        viz.denoiser(model, given, "tomesd ratio=0.0")
