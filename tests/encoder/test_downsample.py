"""Plain down-sampling: cells of a coarser grid, whatever the patches show."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import tokred
from tokred.methods.encoder.downsample import Downsample, cells


def test_a_quarter_of_a_grid_is_the_mean_of_two_by_two():
    x = torch.arange(17.0).view(1, 17, 1)  # a class token and 4 x 4 patches
    step = tokred.make("downsample", keep=0.25).reduce(tokred.Site(x=x, prefix=1, grid=(4, 4)))
    assert step.groups()[0] == [[0], [1, 2, 5, 6], [3, 4, 7, 8], [9, 10, 13, 14], [11, 12, 15, 16]]
    assert step.merge(x).flatten().tolist() == [0, 3.5, 5.5, 11.5, 13.5]


@given(st.integers(1, 9), st.integers(1, 9), st.floats(0.01, 1), st.integers(0, 3), st.integers(0, 2))
@settings(deadline=None, max_examples=60)
def test_every_patch_has_a_cell_and_cells_differ_by_one_patch_a_side(rows, columns, keep, prefix, suffix):
    n = prefix + rows * columns + suffix
    x = torch.randn(2, n, 3)
    method = Downsample(keep=keep)
    step = method.reduce(tokred.Site(x=x, prefix=prefix, suffix=suffix, grid=(rows, columns)))
    coarse = method.coarse((rows, columns))
    assert step.slots == prefix + coarse[0] * coarse[1] + suffix
    assert (step.index >= 0).all()
    assert (step.sizes().sum(1) == n).all()
    assert torch.equal(step.merge(x)[:, :prefix], x[:, :prefix])
    per_row = cells((rows, columns), coarse).view(rows, columns)[:, 0].bincount()
    assert per_row[per_row > 0].max() - per_row[per_row > 0].min() <= rows
    if rows == columns:
        assert method.tokens(n, tokred.Place(layer=0, depth=3, prefix=prefix, suffix=suffix)) == step.slots


def test_on_a_model():
    pytest.importorskip("timm")
    from tests.encoder.tiny_timm import build, images

    model, x = build("vit"), images()
    with torch.no_grad():
        y = model(x)
        tokred.apply(model, "downsample", keep=1.0)
        assert torch.equal(model(x), y)
        tokred.apply(model, "downsample", keep=0.4)
        short = model(x)
        report = tokred.report(model)
        assert torch.allclose(model(x[:1]), short[:1], atol=1e-5)
    assert report.layers[0].tokens_out == 1 + 9
    assert not torch.allclose(short, y)


@pytest.mark.parametrize(
    ("parameters", "text"),
    [({"keep": 0}, "keep"), ({"keep": 1.5}, "keep"), ({"block": -1}, "block"), ({"block": True}, "block")],
)
def test_bad_parameters(parameters, text):
    with pytest.raises(ValueError, match=text):
        tokred.make("downsample", **parameters)


def test_a_block_that_does_not_exist_and_a_missing_grid():
    with pytest.raises(ValueError, match="block is 12"):
        Downsample(keep=0.5, block=12).check(12)
    with pytest.raises(tokred.MissingInputError, match="grid"):
        Downsample(keep=0.5).reduce(tokred.Site(x=torch.randn(1, 8, 2), prefix=1))
