"""PruneVid's merging: the card's examples."""

from __future__ import annotations

import pytest
import torch

import tokred
from tests.vlm.visual import kept
from tokred.methods.vlm.prunevid import refined, steady
from tokred.vlm import VisualSite


def site(x: torch.Tensor) -> VisualSite:
    return VisualSite(x=x.flatten(0, 1)[None], frames=x.shape[0], grid=(1, x.shape[1]))


def test_labels_become_runs():
    assert refined([0, 0, 1, 0, 2, 2, 1, 1, 0, 1]) == [0, 0, 0, 0, 2, 2, 1, 1, 1, 1]
    assert refined([0, 1, 2, 3]) == [0, 0, 0, 0]
    assert refined([1, 1, 2, 0, 0, 0]) == [1, 1, 0, 0, 0, 0], "the longer side"
    assert refined([3]) == [0]


def test_static_places_of_the_worked_example():
    x = torch.tensor([[[1, 0], [1, 0]], [[1, 0.2], [0, 1]], [[1, -0.2], [1, 1]]])
    assert steady(x).tolist() == pytest.approx([0.9614, 0.4714], abs=1e-4)
    found = tokred.PruneVid().reduce(site(x))
    assert found.groups()[0] == [[0, 2, 4], [1], [3], [5]]
    assert found.merge(site(x).x)[0, 0].tolist() == pytest.approx([1, 0])


def test_frames_that_are_alike_are_one_and_then_half():
    x = torch.randn(1, 20, 8, generator=torch.Generator().manual_seed(0)).repeat(4, 1, 1)
    found = tokred.PruneVid().reduce(site(x))
    assert found.slots == 10
    assert all(i < 20 for i in kept(found))
    assert sorted(len(group) % 4 for group in found.groups()[0]) == [0] * 10
    whole = tokred.PruneVid(clusters=1.0).reduce(site(x))
    assert kept(whole) == list(range(20))
    torch.testing.assert_close(whole.merge(site(x).x)[0], x[0])


def test_small_sets_are_not_clustered():
    x = torch.randn(2, 14, 32, generator=torch.Generator().manual_seed(0))
    assert tokred.PruneVid().reduce(site(x)).slots == 28
    assert tokred.PruneVid(least=13).reduce(site(x)).slots == 14


def test_cuts_are_found():
    g = torch.Generator().manual_seed(0)
    one, two = torch.randn(2, 1, 6, 8, generator=g)
    x = torch.cat([one.repeat(5, 1, 1), two.repeat(3, 1, 1)]) + 0.01 * torch.randn(8, 6, 8, generator=g)
    assert tokred.PruneVid(segments=0.25).runs(x) == [(0, 4), (5, 7)]


@pytest.mark.parametrize("wrong", [{"segments": 0.0}, {"clusters": 2.0}, {"least": 0}, {"neighbours": 0}])
def test_bad_parameters(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        tokred.make("prunevid", **wrong)
