"""CAT: scores, policies, and methods that get a budget for each image."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import tokred
from tests.vlm.visual import check_laws, kept, visual
from tokred.methods.vlm.cat import CAT
from tokred.methods.vlm.divprune import DivPrune
from tokred.methods.vlm.fastervlm import FasterVLM
from tokred.methods.vlm.hired import HiRED
from tokred.methods.vlm.prumerge import PruMerge
from tokred.methods.vlm.visionzip import VisionZip
from tokred.methods.vlm.vscan import VScan
from tokred.vlm import VisualSite
from tokred.vlm.tools.budget import shared_out
from tokred.vlm.tools.complexity import SCORES, calibrated, compressed, effective_rank, redundancy, spread


def test_scores_at_their_ends():
    same, none = torch.ones(1, 9, 4) * 0.3, torch.zeros(1, 9, 4)
    assert effective_rank(same).item() == 0
    assert effective_rank(none).item() == 0
    line = torch.arange(9.0).view(1, 9, 1) * torch.ones(4)
    assert effective_rank(line).item() == pytest.approx(0, abs=1e-5)
    assert redundancy(same).item() == pytest.approx(0, abs=1e-6)
    assert redundancy(torch.eye(6)[None]).item() == 1
    assert spread(torch.ones(1, 7)).item() == pytest.approx(1)
    assert spread(torch.eye(7)[:1]).item() == 0
    g = torch.Generator().manual_seed(0)
    few = torch.randn(1, 40, 2, generator=g) @ torch.randn(2, 12, generator=g)
    many = torch.randn(1, 40, 12, generator=g)
    assert effective_rank(few) < 0.2 < 0.6 < effective_rank(many)
    assert redundancy(few) < redundancy(many)
    for name, (reads, score) in SCORES.items():
        if name != "pixels":
            found = score(visual(3))
            assert found.shape == (3,)
            assert ((found >= 0) & (found <= 1)).all()
            assert reads


def test_effective_rank_by_hand():
    x = torch.tensor([[1.0, 0, 0], [-1, 0, 0], [0, 2, 0], [0, -2, 0], [0, 0, 2], [0, 0, -2]])[None]
    p = torch.tensor([2.0, 8, 8]) / 18
    expected = (torch.exp(-(p * p.log()).sum()) - 1) / 2
    assert effective_rank(x).item() == pytest.approx(expected.item(), abs=1e-6)


def test_pixels():
    g = torch.Generator().manual_seed(0)
    flat = torch.full((64, 64), 7)
    ramp = torch.arange(64).expand(64, -1) * 4
    board = ((torch.arange(64).view(-1, 1) // 8 + torch.arange(64) // 8) % 2) * 255
    noise = torch.randint(0, 256, (64, 64), generator=g)
    found = compressed(torch.stack([flat, board, ramp, noise]).to(torch.uint8))
    assert found[:3].mul(8).tolist() == pytest.approx([0.0508, 0.1016, 0.2168], rel=0.15)
    assert found.tolist() == sorted(found.tolist())
    assert found[3] == 1
    with pytest.raises(ValueError, match="uint8"):
        compressed(torch.zeros(1, 4, 4))
    with pytest.raises(tokred.MissingInputError, match="does not supply 'pixels'"):
        CAT(score="pixels").reduce(visual(1))


def test_pool_arithmetic():
    assert shared_out([0.1, 0.5, 0.9, 0.3], 256, 0, 256) == [14, 71, 128, 43]
    assert shared_out([0, 0, 0], 10, 1, 9) == [4, 3, 3]
    assert shared_out([1, 9], 10, 0, 6) == [4, 6]
    assert shared_out([1, 1], 1, 2, 6) == [2, 2]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(0, 1), min_size=1, max_size=8), st.integers(0, 400), st.integers(0, 20), st.integers(0, 60))
def test_pool(weights, total, low, more):
    high = low + more
    found = shared_out(weights, total, low, high)
    assert all(low <= f <= high for f in found)
    if low * len(weights) <= total <= high * len(weights):
        assert sum(found) == total
    for i, a in enumerate(weights):
        for j, b in enumerate(weights):
            if a > b:
                assert found[i] >= found[j], "more to see, no fewer tokens"
            elif a == b and i < j:
                assert found[i] >= found[j]


@pytest.mark.parametrize("policy", ["linear", "levels"])
def test_more_to_see_never_means_fewer_tokens(policy):
    method = CAT(policy=policy, n_min=10, n_max=200, base=100)
    found = method.budgets(torch.linspace(0, 1, 50), 256)
    assert found == sorted(found)
    assert min(found) >= 10
    assert max(found) == 200
    ends = {"linear": [10, 105, 200], "levels": [25, 100, 200]}
    assert method.budgets(torch.tensor([0, 0.5, 1.0]), 256) == ends[policy]
    assert CAT(round_to=8).budgets(torch.tensor([0.1]), 256) == [40]
    assert CAT(round_to=16).budgets(torch.tensor([1.0]), 250) == [250]


def test_calibration_makes_scores_uniform():
    known = (0.2, 0.21, 0.25, 0.9)
    assert calibrated(torch.tensor(known), known).tolist() == pytest.approx([0, 1 / 3, 2 / 3, 1], abs=1e-6)
    assert calibrated(torch.tensor([0.0, 0.23, 2.0]), known).tolist() == pytest.approx([0, 0.5, 1])


@pytest.mark.parametrize(
    "inner",
    [
        FasterVLM(), DivPrune(), VisionZip(), VisionZip(contextual=6), VisionZip(merge="mean"), PruMerge(),
        PruMerge(plus=True), VScan(window=3, shallow=0), tokred.make("vispruner"), tokred.make("cdpruner"),
    ],
)  # fmt: skip
def test_every_image_gets_its_own_budget(inner):
    site = visual(4, c=24)  # more channels than tokens are asked for: past its rank a kernel has no best next token
    method = CAT(inner, score=lambda s: torch.tensor([1.0, 0.1, 0.3, 0.1]), n_min=3, n_max=36)
    assert method.budgets(method.scores(site), 36) == [36, 6, 13, 6]
    found = method.reduce(site)
    assert [len(kept(found, i)) for i in range(4)] == [36, 6, 13, 6]
    x = found.merge(site.x)
    torch.testing.assert_close(x[0], site.x[0])
    for i, n in ((1, 6), (2, 13), (3, 6)):
        own = inner.with_budget(n).reduce(site)
        assert kept(found, i) == kept(own, i)
        torch.testing.assert_close(x[i, :n], own.merge(site.x)[i])
    assert method.tower_layers == inner.tower_layers
    assert method.space == inner.space
    assert inner.reads <= method.reads


def test_pools_are_those_of_one_sample():
    g = torch.Generator().manual_seed(0)
    x = torch.cat([torch.randn(1, 30, 8, generator=g), torch.ones(1, 30, 8), torch.randn(1, 30, 8, generator=g)])
    method = CAT("divprune", policy="pool", total=24, n_min=4, score="redundancy")
    found = method.reduce(VisualSite(x=x, sample=(0, 0, 1)))
    assert [len(kept(found, i)) for i in range(3)] == [20, 4, 24]
    alone = method.reduce(VisualSite(x=x[2:]))
    assert kept(alone) == kept(found, 2)


def test_laws():
    check_laws(CAT("fastervlm", n_min=4, n_max=20), CAT("fastervlm", n_min=36))
    check_laws(CAT("divprune", score="attention", policy="levels", base=12, n_min=2, n_max=30), CAT(n_min=40))


@pytest.mark.parametrize(
    ("parameters", "error", "match"),
    [
        ({"selector": "tome"}, ValueError, "'tome' takes no budget for each image"),
        ({"selector": HiRED()}, ValueError, "'hired' takes no budget"),
        ({"selector": "cat"}, ValueError, "'cat' takes no budget"),
        ({"selector": 3}, TypeError, "selector must be a method or its name"),
        ({"score": "caption"}, ValueError, "score is 'caption'"),
        ({"policy": "steps"}, ValueError, "policy is 'steps'"),
        ({"n_min": 0}, ValueError, "n_min must be an integer of at least 1"),
        ({"n_min": 9, "n_max": 8}, ValueError, "n_max must be an integer of at least 9"),
        ({"thresholds": (0.7, 0.2)}, ValueError, "thresholds must be two numbers"),
        ({"calibration": (0.3,)}, ValueError, "calibration must be two finite scores"),
        ({"round_to": 0}, ValueError, "round_to"),
        ({"total": 0}, ValueError, "total must be"),
    ],
)
def test_bad_parameters(parameters, error, match):
    with pytest.raises(error, match=match):
        tokred.make("cat", **parameters)
