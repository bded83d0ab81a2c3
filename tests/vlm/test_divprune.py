"""DivPrune: the card's examples, and the greedy definition written as loops."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import tokred
from tokred.methods.vlm.divprune import DivPrune
from tokred.vlm import VisualSite
from tokred.vlm.tools.greedy import farthest_points

SIX = torch.tensor([[1, 0], [0.98, 0.2], [0, 1], [0.1, 1], [-1, 0.1], [0.7, 0.7]])[None]
LINE = torch.tensor([0.0, 1, 4, 9, 10]).view(1, 5, 1)


def distances(x: Tensor, metric: str) -> Tensor:
    """``(N, N)`` float64."""
    x = x.double()
    if metric == "cos":
        x = x / x.norm(dim=-1, keepdim=True).clamp_min(1e-12)
        return 1 - x @ x.T
    return (x[:, None] - x[None]).abs().pow(1 if metric == "l1" else 2).sum(-1) ** (1 if metric == "l1" else 0.5)


def obeys(x: Tensor, picks: list[int], metric: str) -> bool:
    """Whether every pick is a best one by the definition, float32 errors aside."""
    d = distances(x, metric)
    n = len(d)
    alone = [min((float(d[i, j]) for j in range(n) if j != i), default=0.0) for i in range(n)]
    values = [alone] + [[min(float(d[i, s]) for s in picks[:t]) for i in range(n)] for t in range(1, len(picks))]
    slack = 1e-5 * max(1.0, float(d.max()))
    open_ = set(range(n))
    for pick, value in zip(picks, values, strict=True):
        if pick not in open_ or value[pick] < max(value[i] for i in open_) - slack:
            return False
        open_.remove(pick)
    return True


def test_worked_example():
    picks = farthest_points(SIX, 3)[0].tolist()
    assert picks[:2] == [4, 0]
    assert picks[2] in (2, 3)
    kept = DivPrune(budget=3).reduce(VisualSite(x=SIX)).representative[0].tolist()
    assert kept == sorted(picks)
    d = distances(SIX[0], "cos")
    least = min(d[i, j] for i, j in itertools.combinations(picks, 2))
    assert least == pytest.approx(0.9005, abs=1e-4)
    best = max(min(d[i, j] for i, j in itertools.combinations(c, 2)) for c in itertools.combinations(range(6), 3))
    assert least == pytest.approx(float(best), abs=1e-4)


def test_points_on_a_line():
    assert farthest_points(LINE, 3, metric="l1")[0].tolist() == [2, 4, 0]
    assert farthest_points(LINE, 3, metric="l2", dense=0)[0].tolist() == [2, 4, 0]


def test_duplicates_are_picked_once_each():
    x = torch.tensor([[1.0, 0], [1, 0], [0, 1], [0, 1]])[None]
    for dense in (0, 2048):
        assert farthest_points(x, 4, dense=dense)[0].tolist() == [0, 2, 1, 3]
        assert farthest_points(torch.ones(1, 5, 3), 5, dense=dense)[0].tolist() == [0, 1, 2, 3, 4]


def test_counts_and_ends():
    method = DivPrune()
    assert [method.count(n) for n in (576, 2340)] == [56, 229]
    assert DivPrune(budget=6).reduce(VisualSite(x=SIX)).trivial
    assert DivPrune(budget=1.0).reduce(VisualSite(x=SIX)).trivial
    assert DivPrune(budget=1).reduce(VisualSite(x=SIX)).representative.tolist() == [[4]]
    assert DivPrune(budget=0.01).reduce(VisualSite(x=SIX)).representative.tolist() == [[4]]


@settings(max_examples=40, deadline=None)
@given(st.integers(2, 24), st.integers(1, 24), st.sampled_from(["cos", "l1", "l2"]), st.integers(0, 10**6))
def test_equals_the_greedy_definition(n, k, metric, seed):
    g = torch.Generator().manual_seed(seed)
    x = torch.randint(-2, 3, (1, n, 3), generator=g).float() if seed % 2 else torch.randn(1, n, 5, generator=g)
    k = min(k, n)
    for dense in (0, 2048):
        picks = farthest_points(x, k, metric=metric, dense=dense)[0].tolist()
        assert len(set(picks)) == k
        assert obeys(x[0], picks, metric)


@settings(max_examples=20, deadline=None)
@given(st.integers(4, 8), st.integers(0, 10**6))
def test_at_least_half_of_the_optimum_and_never_increasing(n, seed):
    x = torch.randn(1, n, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    d = distances(x[0] / x[0].norm(dim=-1, keepdim=True), "l2")
    picks = farthest_points(x / x.norm(dim=-1, keepdim=True), 3, metric="l2")[0].tolist()
    value = min(float(d[i, j]) for i, j in itertools.combinations(picks, 2))
    best = max(
        min(float(d[i, j]) for i, j in itertools.combinations(c, 2)) for c in itertools.combinations(range(n), 3)
    )
    assert value >= best / 2 - 1e-9
    picks = farthest_points(x, n)[0].tolist()
    d = distances(x[0], "cos")
    mins = [min(float(d[picks[t], s]) for s in picks[:t]) for t in range(1, n)]
    assert all(a >= b - 1e-6 for a, b in itertools.pairwise(mins))


def test_scaling_permutation_batch_and_half_precision():
    x = torch.randn(3, 30, 8, generator=torch.Generator().manual_seed(1))
    kept = farthest_points(x, 9)
    assert torch.equal(farthest_points(x * torch.rand(3, 30, 1).add(0.1), 9), kept)
    order = torch.randperm(30)
    assert torch.equal(order[farthest_points(x[:, order], 9)], kept)
    for i in range(3):
        assert torch.equal(farthest_points(x[i : i + 1], 9), kept[i : i + 1])
    half = x.bfloat16()
    assert torch.equal(farthest_points(half, 9), farthest_points(half.double(), 9))


def test_the_two_ways_agree_and_the_starts():
    x = torch.randn(2, 50, 16, generator=torch.Generator().manual_seed(3))
    for metric in ("cos", "l1", "l2"):
        for start in ("isolated", "medoid", 7):
            a, b = (farthest_points(x, 12, metric=metric, start=start, dense=d) for d in (0, 2048))
            assert torch.equal(a, b)
    d = distances(x[0], "cos")
    assert farthest_points(x, 1, start="medoid")[0].item() == int(d.sum(1).argmin())
    assert farthest_points(x, 1, start=7).tolist() == [[7], [7]]


@pytest.mark.parametrize(
    ("parameters", "match"),
    [
        ({"budget": 0}, "budget must be a number of tokens"),
        ({"budget": 1.5}, "got 1.5"),
        ({"budget": True}, "got True"),
        ({"metric": "dot"}, "metric is 'dot'"),
        ({"init": "first"}, "init .* is 'first'"),
        ({"init": -1}, "init"),
    ],
)
def test_bad_parameters(parameters, match):
    with pytest.raises(ValueError, match=match):
        tokred.make("divprune", **parameters)
    with pytest.raises(ValueError, match="start is token 9"):
        DivPrune(budget=2, init=9).reduce(VisualSite(x=SIX))
