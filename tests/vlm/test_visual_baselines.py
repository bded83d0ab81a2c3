"""The baselines between tower and language model: exact counts, places, and what they average."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tokred.methods.vlm.visual_baselines import DownsampleVisual, RandomVisual, UniformVisual, coarser, spots
from tokred.vlm.before_llm import VisualSite


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 3), st.data())
def test_counts_are_exact_and_places_ascend(rows, columns, frames, data):
    n = rows * columns * frames
    count = data.draw(st.integers(1, n))
    found = spots((rows, columns), n, count).tolist()
    assert len(found) == count
    assert found == sorted(set(found))
    assert all(0 <= i < n for i in found)
    cells = coarser((rows, columns), count)
    assert 1 <= cells[0] * cells[1] <= count
    assert cells[0] <= rows
    assert cells[1] <= columns


def test_evenly_spaced():
    assert spots((4, 4), 16, 4).tolist() == [5, 7, 13, 15]
    assert spots((1, 9), 9, 3).tolist() == [1, 4, 7]
    assert coarser((24, 24), 64) == (8, 8)
    assert coarser((12, 24), 32) == (4, 8)


def test_what_they_answer():
    x = torch.arange(32.0).view(1, 16, 2).repeat(2, 1, 1)
    site = VisualSite(x=x, grid=(4, 4))
    random = RandomVisual(budget=5).reduce(site)
    assert random.representative.shape == (2, 5)
    assert torch.equal(random.representative[0], random.representative[1])
    assert not torch.equal(random.representative, RandomVisual(budget=5, seed=1).reduce(site).representative)
    assert UniformVisual(budget=0.25).reduce(site).representative[0].tolist() == [5, 7, 13, 15]
    coarse = DownsampleVisual(budget=5).reduce(site)
    torch.testing.assert_close(coarse.merge(x)[0], x[0].view(2, 2, 2, 2, 2).mean((1, 3)).view(4, 2))
    two = VisualSite(x=x, grid=(2, 4), frames=2)
    assert DownsampleVisual(budget=4).reduce(two).groups()[0] == [
        [0, 1, 4, 5],
        [2, 3, 6, 7],
        [8, 9, 12, 13],
        [10, 11, 14, 15],
    ]
    for method in (RandomVisual(budget=16), UniformVisual(budget=1.0), DownsampleVisual(budget=16)):
        assert method.reduce(site).trivial


@pytest.mark.parametrize("budget", [0, 1.5, "8"])
def test_bad_budgets(budget):
    with pytest.raises(ValueError, match="budget"):
        RandomVisual(budget=budget)
