"""VisPruner: the card's example, and the rounds written as loops."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import tokred
from tests.vlm.visual import check_laws, kept
from tokred.methods.vlm.fastervlm import FasterVLM
from tokred.methods.vlm.vispruner import VisPruner
from tokred.vlm import VisualSite

SCORES = torch.tensor([[0.3, 0.05, 0.2, 0.1, 0.02, 0.08, 0.15, 0.1]])
X = torch.tensor([[1, 0], [1, 0.1], [0, 1], [0.1, 1], [1, 1], [1, 0.9], [-1, 0], [-0.9, 0.1]])[None]


def by_loops(scores: list[float], x: torch.Tensor, total: int, ratio: float, step: int) -> list[int]:
    order = sorted(range(len(scores)), key=lambda j: (-scores[j], j))
    important = int(total * ratio)
    unit = x.double() / x.double().norm(dim=-1, keepdim=True)
    chosen, rest = order[:important], order[important:]
    while len(rest) > total - important:
        a, b = rest[0::2], rest[1::2]
        r = min(step, len(rest) - (total - important), len(a))
        if not b:
            return sorted(chosen)
        best = [max(round(float(unit[i] @ unit[j]), 6) for j in b) for i in a]
        by = sorted(range(len(a)), key=lambda i: (-best[i], i))
        rest = [a[i] for i in by[r:]] + b
    return sorted(chosen + rest)


def site(scores: torch.Tensor = SCORES, x: torch.Tensor = X) -> VisualSite:
    return VisualSite(x=torch.zeros(1, x.shape[1], 3), tower=x, class_attention=scores)


def test_worked_example():
    assert kept(VisPruner(budget=4).reduce(site())) == [0, 2, 3, 5]
    assert kept(VisPruner(budget=3).reduce(site())) == by_loops(SCORES[0].tolist(), X[0], 3, 0.5, 8)


def test_odd_residuals_and_ends():
    for n in (3, 5, 7, 8):
        for budget in range(1, n):
            found = VisPruner(budget=budget).reduce(site(SCORES[:, :n], X[:, :n]))
            assert len(set(kept(found))) == budget
    assert kept(VisPruner(budget=4, important_ratio=1.0).reduce(site())) == kept(FasterVLM(budget=4).reduce(site()))
    assert VisPruner(budget=8).reduce(site()).trivial


def test_exact_copies_leave_first():
    x = torch.tensor([[1.0, 0], [0, 1], [1, 0], [0.6, 0.8], [1, 0], [-1, 0.3]])[None]
    scores = torch.tensor([[0.6, 0.5, 0.4, 0.3, 0.2, 0.1]])
    found = VisPruner(budget=5, important_ratio=0.0, step=1).reduce(site(scores, x))
    # Even places 0, 2 and 4 are compared with 1, 3 and 5: all three alike, so the first of them goes.
    assert kept(found) == [1, 2, 3, 4, 5]


@settings(max_examples=30, deadline=None)
@given(st.integers(4, 40), st.integers(1, 20), st.sampled_from([0.0, 0.3, 0.5]), st.integers(1, 9), st.integers(0, 999))
def test_equals_loops(n, budget, ratio, step, seed):
    g = torch.Generator().manual_seed(seed)
    scores, x = torch.rand(1, n, generator=g), torch.randn(1, n, 6, generator=g)
    budget = min(budget, n - 1)
    found = VisPruner(budget=budget, important_ratio=ratio, step=step).reduce(site(scores, x))
    expected = by_loops(scores[0].tolist(), x[0], budget, ratio, step)
    assert kept(found) == expected
    assert len(expected) == budget


def test_laws():
    check_laws(VisPruner(budget=9), VisPruner(budget=36))
    check_laws(VisPruner(budget=9, attention="received"), VisPruner(budget=1.0))


@pytest.mark.parametrize(
    ("parameters", "match"),
    [
        ({"important_ratio": 1.5}, r"important_ratio must lie in \[0, 1\]"),
        ({"step": 0}, "step must be an integer of at least 1, got 0"),
        ({"attention": "cls"}, "attention is 'cls'"),
        ({"budget": 0}, "budget must be"),
    ],
)
def test_bad_parameters(parameters, match):
    with pytest.raises(ValueError, match=match):
        tokred.make("vispruner", **parameters)
