"""Pixel shuffle, stitching, and the methods that compress cells: the card's examples and laws."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import tokred
from tests.vlm.visual import check_laws, kept, visual
from tokred.methods.vlm.flash_vl import FlashVL, Nemotron
from tokred.vlm import VisualSite
from tokred.vlm.tools.shuffle import FlashConnector, NemotronConnector, pixel_shuffle, pixel_unshuffle
from tokred.vlm.tools.stitch import overlap_of, shares, stitch, unstitch, weights

SIXTEEN = torch.arange(16.0).view(1, 16, 1)


def test_worked_example():
    v2 = [[0, 1, 4, 5], [2, 3, 6, 7], [8, 9, 12, 13], [10, 11, 14, 15]]
    assert pixel_shuffle(SIXTEEN, (4, 4))[0].tolist() == v2
    assert pixel_shuffle(SIXTEEN, (4, 4), layout="v1")[0].tolist() == [v2[0], v2[2], v2[1], v2[3]]


@pytest.mark.parametrize("layout", ["v1", "v2"])
@settings(max_examples=20, deadline=None)
@given(st.integers(1, 3), st.integers(1, 3), st.integers(1, 4), st.integers(1, 5))
def test_shuffle_is_a_bijection(layout, rows, columns, s, c):
    grid = (rows * s, columns * s)
    x = torch.randn(2, grid[0] * grid[1], c)
    y = pixel_shuffle(x, grid, s, layout)
    assert y.shape == (2, rows * columns, c * s * s)
    assert torch.equal(pixel_unshuffle(y, grid, s, layout), x)
    torch.testing.assert_close(y.square().sum((1, 2)), x.square().sum((1, 2)))


def test_reference_chain_and_odd_sides():
    x = torch.randn(2, 4, 6, 3)  # rows, columns
    b, w, h, c = 2, 4, 6, 3
    chain = x.view(b, w, h // 2, c * 2).permute(0, 2, 1, 3).reshape(b, h // 2, w // 2, c * 4)
    assert torch.equal(pixel_shuffle(x.flatten(1, 2), (4, 6), layout="v1"), chain.flatten(1, 2))
    assert torch.equal(pixel_shuffle(x.flatten(1, 2), (4, 6)), chain.permute(0, 2, 1, 3).flatten(1, 2))
    odd = torch.arange(15.0).view(1, 15, 1)
    y = pixel_shuffle(odd, (3, 5))
    assert y[0, 2].tolist() == [4, 4, 9, 9]
    assert y[0, 5].tolist() == [14, 14, 14, 14]
    assert torch.equal(pixel_unshuffle(y, (3, 5)), odd)
    with pytest.raises(ValueError, match="got s=2 and 3 x 4"):
        pixel_shuffle(odd, (3, 4))


def test_connectors():
    x = torch.randn(2, 16, 6)
    assert FlashConnector(6, 10)(x, (4, 4)).shape == (2, 4, 10)
    nemotron = NemotronConnector(6, 10, hidden=12)
    assert nemotron(x, (4, 4)).shape == (2, 4, 10)
    assert not any("bias" in name for name, _ in nemotron.named_parameters())
    z = nemotron.norm(pixel_shuffle(x, (4, 4)))
    first, _, second = nemotron.layers
    torch.testing.assert_close(nemotron(x, (4, 4)), (z @ first.weight.T).relu() ** 2 @ second.weight.T)


# ---------------------------------------------------------------- stitching


def test_ramp_of_two_tiles():
    w = shares(2, 4, 2)
    assert w.tolist() == [[1, 2, 2, 1, 0, 0], [0, 0, 1, 2, 2, 1]]
    assert (w / w.sum(0))[0, 2:4].tolist() == pytest.approx([2 / 3, 1 / 3])
    assert overlap_of(32) == 4
    # In the middle row of three the nearest border decides: 1 and 0 rows or columns away.
    both = weights(1, 2, (3, 4), 2)
    assert both.shape == (2, 3, 6)
    assert both[0, 1, 2:4].tolist() == pytest.approx([2 / 3, 1 / 3])
    assert both[0, 0, 2:4].tolist() == pytest.approx([1 / 2, 1 / 2])


@pytest.mark.parametrize("blend", ["ramp", "mean", "nearest"])
@settings(max_examples=20, deadline=None)
@given(st.integers(1, 3), st.integers(1, 3), st.integers(2, 6), st.integers(0, 2))
def test_tiles_of_one_map_give_that_map_back(blend, rows, columns, side, overlap):
    overlap = min(overlap, (side - 1) // 2)
    high, wide = (n * (side - overlap) + overlap for n in (rows, columns))
    canvas = torch.randn(2, high * wide, 3)
    tiles = unstitch(canvas, rows, columns, (side, side), overlap)
    assert tiles.shape == (2, rows * columns, side * side, 3)
    torch.testing.assert_close(stitch(tiles, rows, columns, (side, side), overlap, blend), canvas)
    w = weights(rows, columns, (side, side), overlap, blend)
    torch.testing.assert_close(w.sum(0), torch.ones(high, wide))
    constant = stitch(torch.ones_like(tiles), rows, columns, (side, side), overlap, blend)
    torch.testing.assert_close(constant, torch.ones_like(canvas))
    if overlap == 0:
        assert torch.equal(w, (w > 0).float())


def test_nearest_takes_the_first_of_two_and_bad_values_are_refused():
    w = weights(1, 2, (1, 3), 1, "nearest")
    assert w[:, 0].tolist() == [[1, 1, 1, 0, 0], [0, 0, 0, 1, 1]]
    with pytest.raises(ValueError, match="at most half"):
        weights(1, 2, (4, 4), 3)
    with pytest.raises(ValueError, match="blend is 'max'"):
        weights(1, 2, (4, 4), 1, "max")
    with pytest.raises(ValueError, match=r"share must lie in \[0, 0.5\)"):
        overlap_of(32, 0.5)
    with pytest.raises(ValueError, match="do not fit"):
        stitch(torch.zeros(1, 3, 16, 2), 1, 2, (4, 4), 1)


# ---------------------------------------------------------------- methods


def test_cells_become_means():
    site = VisualSite(x=SIXTEEN, tower=SIXTEEN, grid=(4, 4))
    found = FlashVL().reduce(site)
    assert found.merge(SIXTEEN).flatten().tolist() == [2.5, 4.5, 10.5, 12.5]
    torch.testing.assert_close(found.merge(SIXTEEN)[..., 0], pixel_shuffle(SIXTEEN, (4, 4)).mean(-1))
    assert kept(found) == [0, 2, 8, 10]
    assert FlashVL(s=4).reduce(site).merge(SIXTEEN).flatten().tolist() == [7.5]
    odd = torch.arange(15.0).view(1, 15, 1)
    found = FlashVL().reduce(VisualSite(x=odd, grid=(3, 5)))
    assert found.groups()[0][2] == [4, 9]
    assert found.groups()[0][5] == [14]
    assert FlashVL().count(16) == 4
    assert FlashVL().count(25) == 9


def test_frames():
    x = torch.arange(24.0).view(1, 24, 1)
    site = VisualSite(x=x, grid=(2, 4), frames=3)
    assert FlashVL().reduce(site).merge(x).flatten().tolist() == [2.5, 4.5, 10.5, 12.5, 18.5, 20.5]
    assert Nemotron(tubelet=2).reduce(site).merge(x).flatten().tolist() == [6.5, 8.5, 18.5, 20.5]
    assert Nemotron(s=1, tubelet=3).reduce(site).merge(x).flatten().tolist() == [8, 9, 10, 11, 12, 13, 14, 15]
    assert Nemotron(s=1).reduce(site).trivial


def test_laws():
    check_laws(FlashVL(), FlashVL(s=1))
    check_laws(Nemotron(), Nemotron(s=1))
    assert FlashVL().reads == {"x", "grid", "tower"}
    assert FlashVL(space="x").reads == {"x", "grid"}
    with pytest.raises(tokred.MissingInputError, match="grid"):
        FlashVL().reduce(VisualSite(x=visual(1).x))


@pytest.mark.parametrize(
    ("name", "parameters", "match"),
    [
        ("flash_vl", {"s": 3}, "s must be 1, 2 or 4"),
        ("flash_vl", {"space": "y"}, "space is 'y'"),
        ("nemotron", {"tubelet": 0}, "tubelet must be an integer of at least 1"),
    ],
)
def test_bad_parameters(name, parameters, match):
    with pytest.raises(ValueError, match=match):
        tokred.make(name, **parameters)
