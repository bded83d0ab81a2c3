"""TopV: transport, the card's example, recovery."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import tokred
from tests.vlm.layered import LAYOUT, check_laws, columns_kept, layer_site
from tokred.methods.vlm.topv import TopV, places
from tokred.vlm.tools.transport import transport


def plan(cost: torch.Tensor, eps: float, rounds: int) -> torch.Tensor:
    """The definition, in float64."""
    kernel = torch.exp(-cost.double() / eps)
    n, m = cost.shape
    v = torch.ones(m, dtype=torch.float64)
    for _ in range(rounds):
        u = 1 / n / (kernel @ v)
        v = 1 / m / (kernel.T @ u)
    return u[:, None] * kernel * v


def test_worked_example():
    c = torch.tensor([[0, 1], [1, 0], [0.5, 0.5]])
    p = plan(c, 0.5, 3)
    torch.testing.assert_close(
        p.float(), torch.tensor([[0.2936, 0.0397], [0.0397, 0.2936], [0.1667, 0.1667]]), atol=5e-5, rtol=0
    )
    found = transport(lambda i, j: c[None, i:j], 3, 2, eps=0.5, rounds=3)
    assert found[0].tolist() == pytest.approx([0.2936, 0.2936, 0.1667], abs=5e-5)
    assert TopV(recover=0.0).select(found, 2).tolist() == [[0, 1]]
    assert p.sum(0).tolist() == pytest.approx([0.5, 0.5])


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 12), st.integers(1, 12), st.integers(1, 4), st.floats(0.05, 1), st.integers(0, 99))
def test_transport_equals_its_definition(n, m, rounds, eps, seed):
    c = torch.rand(2, n, m, generator=torch.Generator().manual_seed(seed))
    for block in (1, 1 << 20):
        found = transport(lambda i, j: c[:, i:j], n, m, eps=eps, rounds=rounds, block=block)
        for i in range(2):
            torch.testing.assert_close(found[i].double(), plan(c[i], eps, rounds).amax(1), rtol=1e-4, atol=1e-6)
    moved = transport(lambda i, j: c[:, i:j] + 300, n, m, eps=eps, rounds=rounds)
    torch.testing.assert_close(moved, found, rtol=5e-3, atol=1e-5), "a constant added to all costs changes nothing"


def test_costs():
    source, target = torch.randn(1, 9, 5), torch.randn(1, 9, 5)
    place = places(None, 9)
    assert place.tolist() == [[y / 2, x / 2] for y in range(3) for x in range(3)]
    method = TopV(alpha=0.7, beta=0.3, gamma=0.2)
    f = torch.cdist(source, target)[0]
    far = torch.cdist(place, place).square()
    middle = (place - 0.5).norm(dim=-1)
    c = 0.7 * f / f.max() + 0.3 * (1 - torch.exp(-far / 0.5)) + 0.2 * middle / middle.max()
    expected = plan(c, 0.1, 3).amax(1)
    torch.testing.assert_close(method.importance(source, target, place)[0].double(), expected, rtol=1e-3, atol=1e-6)
    without = plan(0.7 * f / f.max(), 0.1, 3).amax(1)
    torch.testing.assert_close(method.importance(source, target)[0].double(), without, rtol=1e-3, atol=1e-6)
    assert places((2, 3), 12).shape == (12, 2)
    assert places((2, 3), 11) is None
    assert places(None, 12) is None
    assert TopV().importance(torch.zeros(1, 4, 2), torch.zeros(1, 4, 2)).isfinite().all()


def test_recovery_is_evenly_spaced():
    value = torch.arange(20.0, 0, -1)[None]
    assert TopV(recover=0.0).select(value, 10).tolist() == [list(range(10))]
    # Eight by importance; of the twelve others every sixth.
    assert TopV(recover=0.2).select(value, 10).tolist() == [[*range(8), 8, 14]]
    assert TopV(recover=1.0).select(value, 4).tolist() == [[0, 1, 7, 13]], "the best one always stays"
    assert TopV(recover=1.0).select(value, 1).tolist() == [[0]]


def test_reads_the_stream():
    site = layer_site(["tvvvvvvvvvtt"], layer=3)
    method = TopV(budget=4)
    found = method.reduce(site)
    before, after = site.stream
    importance = method.importance(before[:, 1:10].float(), after[:, 1:10].float(), places(None, 9))
    assert [j + 12 for j in columns_kept(found, 0)] == [0, *(method.select(importance, 4)[0] + 1).tolist(), 10, 11]


def test_laws():
    found = check_laws(TopV(budget=4), TopV(budget=1.0), 3)
    assert [len([j for j in columns_kept(found, i) if row[j] == "v"]) for i, row in enumerate(LAYOUT)] == [4, 4, 4]


@pytest.mark.parametrize(
    ("parameters", "match"),
    [
        ({"budget": 0}, "budget must be"),
        ({"layer": -1}, "layer must be an integer of at least 0"),
        ({"alpha": -1.0}, "alpha must be at least 0"),
        ({"eps": 0}, "eps must be above 0"),
        ({"iterations": 0}, "iterations must be"),
        ({"recover": 1.1}, "recover must lie"),
    ],
)
def test_bad_parameters(parameters, match):
    with pytest.raises(ValueError, match=match):
        tokred.make("topv", **parameters)
    with pytest.raises(ValueError, match="is 3, but the model has 3"):
        TopV().check(3)
