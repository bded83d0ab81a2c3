"""Painting of merged patches: mean colours, outlines, dropped patches, on reductions that are known by hand."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("numpy")

import numpy as np

import tokred
from tokred.analysis.viz import draw as viz

P = viz.PATCH_PIXELS


def checker() -> torch.Tensor:
    """2 x 2 patches of one pixel each: grey levels 0, 100, 200 and 40."""
    return torch.tensor([[[0, 100], [200, 40]]], dtype=torch.uint8)


def patch(picture: np.ndarray, row: int, column: int) -> np.ndarray:
    return picture[row * P : (row + 1) * P, column * P : (column + 1) * P]


def reduction(*slots: int) -> tokred.Reduction:
    """A class token in slot 0, then the patches' slots."""
    return tokred.Reduction.from_index(torch.tensor([[0, *slots]]), max(slots) + 1)


def test_a_region_has_its_mean_colour():
    picture = viz.paint(checker(), reduction(1, 2, 1, 3), (2, 2), outline=False)
    assert picture.shape == (2 * P, 2 * P, 3)
    assert picture.dtype == np.uint8
    assert (patch(picture, 0, 0) == 100).all()  # patches 0 and 2, of 0 and 200
    assert (patch(picture, 1, 0) == 100).all()
    assert (patch(picture, 0, 1) == 100).all()
    assert (patch(picture, 1, 1) == 40).all()


def test_outlines_are_around_merged_regions_only_and_share_a_colour():
    picture = viz.paint(checker(), reduction(1, 2, 3, 1), (2, 2))
    first, last = patch(picture, 0, 0), patch(picture, 1, 1)
    assert (first == last).all()  # one token, two places
    colour = np.array(viz.palette(4)[1])
    assert (first[0] == colour).all()
    assert (first[:, -1] == colour).all()
    assert (first[P // 2, P // 2] == 20).all()  # mean of 0 and 40
    assert (patch(picture, 0, 1) == 100).all()  # alone
    assert (patch(picture, 1, 0) == 200).all()


def test_no_outline_runs_through_a_region():
    picture = viz.paint(checker(), reduction(1, 1, 2, 2), (2, 2))
    joint = picture[P // 2, P - 2 : P + 2]
    assert (joint == 50).all()


def test_dropped_patches_are_neither_filled_nor_outlined():
    kept = tokred.Reduction.keep(torch.tensor([[0, 1, 3, 4]]), 5)
    picture = viz.paint(checker(), kept, (2, 2))
    assert (patch(picture, 0, 0) == 0).all()
    assert (patch(picture, 1, 0) == 200).all()
    assert len(np.unique(patch(picture, 0, 1))) == 2  # darkened, crossed out


def test_colour_images_floats_and_samples():
    image = torch.zeros(3, 4, 4)
    image[0, :, :2] = 1
    index = torch.tensor([[0, 1, 1, 1, 1], [0, 1, 2, 3, 4]])
    both = tokred.Reduction.from_index(index, 5)
    mixed = viz.paint(image, both, (2, 2), outline=False)
    assert (mixed == np.array([128, 0, 0])).all()
    plain = viz.paint(image, both, (2, 2), sample=1)
    assert (plain == viz.enlarge(image, (2, 2))).all()
    assert (plain[0, 0] == (255, 0, 0)).all()


@pytest.mark.parametrize("width", [1, 2, 3])
def test_edges_are_a_region_less_its_erosion(width):
    groups = torch.zeros(12, 12, dtype=torch.int64)
    groups[:, 6:] = 1
    inside = ~viz.edges(groups, width)
    expected = torch.zeros(12, 12, dtype=torch.bool)
    expected[width:-width, width : 6 - width] = True
    expected[width:-width, 6 + width : -width] = True
    assert torch.equal(inside, expected)


@pytest.mark.parametrize(
    ("image", "grid", "sample", "words"),
    [
        (torch.zeros(2, 4, 4), (2, 2), 0, "image must be"),
        (torch.zeros(1, 4, 4), (3, 2), 0, "do not fit"),
        (torch.zeros(1, 4, 4), (2, 2), 1, "sample must lie"),
    ],
)
def test_what_does_not_fit_is_refused(image, grid, sample, words):
    with pytest.raises(ValueError, match=words):
        viz.paint(image, reduction(1, 2, 3, 4), grid, sample=sample)


def test_after_a_block_and_at_the_end():
    pytest.importorskip("timm")
    from tokred.bench.data.model import build

    model = build().eval()
    with pytest.raises(tokred.NothingRecordedError):
        viz.after(model)
    tokred.apply(model, "tome", r=10)
    with torch.inference_mode():
        model(torch.randn(2, 3, 112, 112))
    assert [viz.after(model, i).slots for i in (0, 2, 7)] == [187, 167, 117]
    assert torch.equal(viz.after(model).index, tokred.trace(model).index)
    with pytest.raises(ValueError, match="must lie in 0"):
        viz.after(model, 8)
