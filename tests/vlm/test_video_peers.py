"""DyCoke, FastVID and FlashVID: the cards' examples, and their definitions."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import tokred
from tests.vlm.visual import kept
from tokred.methods.vlm.fastvid import overlapping
from tokred.methods.vlm.flashvid import picks, trees
from tokred.vlm import VisualSite
from tokred.vlm.tools.cluster import density_peaks
from tokred.vlm.tools.video import cut, frame_similarity


def site(x: Tensor, scores: Tensor | None = None) -> VisualSite:
    frames, cells = x.shape[:2]
    scores = torch.rand(frames, cells, generator=torch.Generator().manual_seed(0)) if scores is None else scores
    return VisualSite(x=x.flatten(0, 1)[None], received=scores.reshape(1, 1, -1), frames=frames, grid=(1, cells))


def noise(frames: int, cells: int, c: int = 6, seed: int = 0) -> Tensor:
    return torch.randn(frames, cells, c, generator=torch.Generator().manual_seed(seed))


# ---------------------------------------------------------------------------- DyCoke


def test_dycokes_worked_example():
    x = torch.tensor(
        [
            [[1, 0], [0, 1], [1, 1]], [[1, 0.1], [1, 0], [1, 0.8]], [[1, 0], [0, 1], [1, -1]],
            [[0.5, 0.5], [0, 1], [1, -1]],
        ]
    )  # fmt: skip
    method = tokred.DyCoke(ratio=0.6)
    assert method.counts(4, 3) == [3, 1, 1, 1]
    assert kept(method.reduce(site(x))) == [0, 1, 2, 4, 8, 9]


def test_dycokes_counts():
    whole, official = tokred.DyCoke(), tokred.DyCoke(groups="official")
    assert whole.counts(8, 196) == [196, 58, 58, 58] * 2
    assert whole.kept(8, 196) == 740
    assert official.counts(8, 196) == [196, 58, 58, 58, 196, 58, 196, 58]
    assert official.kept(8, 196) == 878
    assert official.kept(32, 196) == 3098
    assert official.kept(9, 196) == 740
    assert whole.counts(9, 196)[-1] == 196, "the anchor of its group"
    assert whole.counts(7, 196)[-1] == 58, "against the fifth"
    assert whole.kept(1, 196) == official.kept(1, 196) == 196


def test_dycoke_keeps_the_first_of_frames_that_are_alike():
    assert kept(tokred.DyCoke(ratio=0.5).reduce(site(noise(1, 4).repeat(3, 1, 1)))) == [0, 1, 2, 3, 4, 5, 8, 9]


# ---------------------------------------------------------------------------- FastVID


def test_segments_of_fastvid():
    assert cut([0.95, 0.7, 0.93, 0.92, 0.88, 0.99, 0.96], 3, 0.9) == [(0, 1), (2, 4), (5, 7)]
    assert cut([0.95, 0.7, 0.93, 0.92, 0.95, 0.99, 0.96], 3, 0.9) == [(0, 1), (2, 3), (4, 7)], (
        "one more than are unlike"
    )
    assert cut([], 8, 0.9) == [(0, 0)]
    assert cut([1.0, 1.0], 8, 0.9) == [(0, 0), (1, 1), (2, 2)]


def test_fastvids_anchors():
    method = tokred.FastVID()
    assert method.split(196) == (12, 7)
    assert [method.anchors(n, 196) for n in (1, 3, 6)] == [([0], 7), ([2], 21), ([1, 5], 21)]
    assert method.kept(10, 196) == 190 == 10 * 12 + 7 + 21 + 2 * 21


def test_densities_of_the_card():
    points = torch.tensor([[0, 0], [0.1, 0], [0, 0.1], [3, 3], [3.1, 3]])[None]
    orders = [density_peaks(points, n, 3).centre[0].tolist() for n in (1, 2, 3, 4)]
    assert orders == [[0], [0, 3], [0, 1, 3], [0, 1, 2, 3]]


def test_an_anchor_and_its_members():
    x = torch.tensor([[1, 0], [0.8, 0.2], [0.9, 0.1]])
    method = tokred.FastVID()
    slots = method.slots(torch.tensor([0]), torch.tensor([0, 0, 0]), torch.tensor([0, 1, 2]))
    found = overlapping([slots], 3)
    assert found.merge(x[None])[0, 0].tolist() == pytest.approx([0.96, 0.04])
    assert found.sizes().tolist() == [[3]]
    # The second of two like anchors has no members.
    member, share = method.slots(torch.tensor([0, 1]), torch.tensor([0, 0]), torch.tensor([0, 1]))
    assert share[1].tolist() == [1, 0, 0]
    assert member[1, 0] == 1


def test_fastvid_equals_its_definition():
    """Slots one by one, from what the method says of segments and anchors."""
    x, scores = noise(6, 10, 5), torch.rand(6, 10)
    method = tokred.FastVID(budget=0.6, segments=2, tau=-1.0, step=2)
    found = method.reduce(site(x, scores))
    flat, expected = x.flatten(0, 1), {}
    salient, _ = method.split(10)
    best = scores.topk(salient, 1).indices.sort(1).values
    for t, row in enumerate(best.tolist()):
        expected |= {10 * t + j: flat[10 * t + j] for j in row}
    for first, last in cut(frame_similarity(x), 2, -1.0):
        rest = [10 * t + j for t in range(first, last + 1) for j in range(10) if j not in best[t].tolist()]
        which, some = method.anchors(last + 1 - first, 10)
        for t in which:
            mine = [i for i in rest if i // 10 == first + t]
            centre = [mine[j] for j in density_peaks(flat[mine][None], some, 4).centre[0].tolist()]
            cosine = (
                torch.nn.functional.normalize(flat[rest], dim=1) @ torch.nn.functional.normalize(flat[centre], dim=1).T
            )
            into = cosine.argmax(1)
            for j, a in enumerate(centre):
                expected[a] = 0.6 * flat[a] + 0.4 * flat[rest][into == j].mean(0)
    assert kept(found) == sorted(expected)
    torch.testing.assert_close(found.merge(site(x).x)[0], torch.stack([expected[i] for i in sorted(expected)]))


# ---------------------------------------------------------------------------- FlashVID


def test_flashvids_budgets():
    splits = [(196, 0.1, (18, 7)), (196, 0.25, (44, 18)), (169, 0.1, (16, 6))]
    for cells, budget, expected in splits:
        assert tokred.FlashVID(budget=budget, expansion=1.25).split(cells) == expected


def test_flashvids_segments():
    g = torch.tensor([[1, 0], [1, 0.1], [0, 1], [0.1, 1], [0.3, 1], [1, 1]])[:, None]
    similar = frame_similarity(g)
    assert similar == pytest.approx([0.9950, 0.0995, 0.9950, 0.9817, 0.8805], abs=1e-4)
    assert cut(similar, 1, 0.9) == [(0, 1), (2, 4), (5, 5)]
    assert cut(similar, 4, 0.9) == [(0, 1), (2, 3), (4, 4), (5, 5)]


def test_flashvids_picks():
    x = torch.tensor([[1, 0], [0.95, 0.2], [0, 1], [0.7, 0.7], [-1, 0.2]])[None]
    a = torch.tensor([[0.4, 0.1, 0.3, 0.15, 0.05]])
    assert picks(x, a, 3).tolist() == [[2, 0, 3]]
    assert picks(x, torch.ones(1, 5), 3).tolist() == [[4, 0, 2]]
    assert torch.equal(picks(x, 1e3 * a, 5), picks(x, a, 5))
    assert sorted(picks(x, a, 5)[0].tolist()) == [0, 1, 2, 3, 4]


TREE = torch.tensor([[[1, 0], [0, 1]], [[0.1, 1], [1, 0.1]], [[1, 0.2], [-1, 0]]])


def test_flashvids_trees():
    assert trees(TREE, 0.8, 6).tolist() == [0, 1, 1, 0, 0, 5]
    assert trees(TREE, 0.8, 0).tolist() == list(range(6)), "no link is allowed"
    assert trees(TREE, 0.8, 1).tolist() == [0, 1, 2, 3, 3, 5], "the strongest"
    # With the first token picked, its child is a root.
    points = TREE.clone()
    points[0, 0] = torch.tensor([-1.0, -1])
    assert trees(points, 0.8, 6).tolist() == [0, 1, 1, 3, 3, 5]


def test_values_of_flashvids_trees():
    method = tokred.FlashVID(budget=0.5, picked=0.0, segments=1, theta=-1.0)
    root, weight = method.joined(TREE, torch.arange(6).view(3, 2), 1)
    value = torch.zeros(6, 2).index_add_(0, root, weight[:, None] * TREE.flatten(0, 1))
    assert root.tolist() == [0, 1, 1, 0, 0, 5]
    assert value[0].tolist() == pytest.approx([1, 0.1])
    assert value[1].tolist() == pytest.approx([0.05, 1])
    assert value[5].tolist() == [-1, 0]


@pytest.mark.parametrize("clusters", ["roots", "tokens"])
def test_flashvid_counts_and_means(clusters):
    x = noise(1, 12).repeat(5, 1, 1) + 0.3 * noise(5, 12, seed=1)
    for budget, picked in ((0.25, 0.5), (0.5, 0.7), (0.75, 0.0)):
        method = tokred.FlashVID(budget=budget, picked=picked, segments=2, clusters=clusters)
        found = method.reduce(site(x))
        assert found.slots <= method.kept(5, 12)
        assert found.sizes().sum() == 60, "every token is in one slot"
        weight = found.merge(torch.ones(1, 60, 1))
        torch.testing.assert_close(weight, torch.ones_like(weight))
    same = tokred.FlashVID(budget=0.5, picked=1.0).reduce(site(x))
    assert same.slots == 5 * 6
    assert torch.equal(same.merge(site(x).x), site(x).x[:, kept(same)]), "picked ones are unchanged"


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("dycoke", {"ratio": 1.0}), ("dycoke", {"groups": "all"}), ("fastvid", {"step": 0}),
        ("fastvid", {"budget": 0.0}), ("fastvid", {"beta": -1}), ("flashvid", {"expansion": 0.5}),
        ("flashvid", {"clusters": "all"}),
        ("flashvid", {"segments": 0}),
    ],
)  # fmt: skip
def test_bad_parameters(name: str, wrong: dict[str, Any]):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        tokred.make(name, **wrong)
