"""CDPruner: the card's examples, and the determinant itself."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import tokred
from tokred.methods.vlm.cdpruner import CDPruner, scaled, text_relevance
from tokred.vlm import VisualSite
from tokred.vlm.tools.greedy import determinant_points

S = torch.tensor([[1, 0.95, 0, 0.2], [0.95, 1, 0.05, 0.1], [0, 0.05, 1, 0.3], [0.2, 0.1, 0.3, 1]])
T = torch.tensor([[1, 0.9, 0.1, 0.4], [0.9, 1, 0.2, 0.3], [0.1, 0.2, 1, 0.6], [0.4, 0.3, 0.6, 1]])


def tokens(kernel: Tensor) -> Tensor:
    """``(1, N, N)`` features whose cosines are a given matrix."""
    return torch.linalg.cholesky(kernel.double())[None]


def test_worked_example():
    v = torch.tensor([[0.9, 0.8, 0.3, 0.5]])
    r = scaled(v)
    assert r[0].tolist() == pytest.approx([1.0000017, 0.8333351, 1.67e-6, 0.3333350], abs=2e-7)
    picks = determinant_points(tokens(S), 3, r)
    assert picks.order.tolist() == [[0, 3, 1]]
    assert picks.gain[0].tolist() == pytest.approx([1, 0.1067, 0.0618], abs=1e-4)
    assert picks.gain[0, :2].prod().item() == pytest.approx(0.10667, abs=1e-5)
    assert picks.chosen.tolist() == [[0, 1, 3]]
    assert determinant_points(tokens(S), 1, scaled(-v)).order.tolist() == [[2]]


def test_second_example_is_greedy_not_exhaustive():
    picks = determinant_points(tokens(T), 3)
    assert picks.order.tolist() == [[0, 2, 3]]
    assert picks.gain[0].tolist() == pytest.approx([1, 0.99, 0.5232], abs=1e-4)
    assert picks.gain.prod().item() == pytest.approx(0.518, abs=1e-3)
    assert torch.linalg.det(T[1:, 1:]).item() == pytest.approx(0.582, abs=1e-3)


def test_split_of_the_determinant_and_strength():
    r = torch.tensor([1, 0.5, 0.8, 0.9])
    kernel = (r[:, None] * T * r)[[0, 2]][:, [0, 2]]
    assert torch.logdet(kernel).item() == pytest.approx(-0.4563, abs=1e-4)
    for theta, alpha in ((0.25, 0.1667), (0.5, 0.5), (0.75, 1.5)):
        got = scaled(torch.tensor([[0, 0.5, 1.0]]), theta)
        assert got.log()[0].tolist() == pytest.approx([0, alpha / 2, alpha], abs=1e-4)
    assert scaled(torch.tensor([[0, 0.5, 1.0]]), 0.5)[0].tolist() == pytest.approx([1, 1.284, 1.6487], abs=1e-4)
    assert scaled(torch.full((1, 3), 0.4)).tolist() == [[1, 1, 1]]


def test_orthogonal_and_identical_tokens():
    picks = determinant_points(torch.eye(5)[None], 3)
    assert picks.order.tolist() == [[0, 1, 2]]
    assert picks.gain.prod().item() == 1
    r = torch.tensor([[0.1, 0.9, 0.5, 0.7, 0.3]])
    assert determinant_points(torch.eye(5)[None], 3, r).chosen.tolist() == [[1, 2, 3]]
    # One direction: the kernel is exhausted after a pick, and the rest goes by weight, then by place.
    same = determinant_points(torch.ones(1, 5, 2), 3, torch.tensor([[0.5, 0.2, 0.9, 0.5, 0.1]]))
    assert same.chosen.tolist() == [[0, 2, 3]]
    assert same.gain[0].tolist() == pytest.approx([0.81, 0, 0])
    assert determinant_points(torch.zeros(1, 4, 2), 2).chosen.tolist() == [[0, 1]]


@settings(max_examples=40, deadline=None)
@given(st.integers(2, 16), st.integers(1, 16), st.integers(0, 10**6))
def test_equals_the_greedy_definition(n, k, seed):
    g = torch.Generator().manual_seed(seed)
    k = min(k, n)
    x, r = torch.randn(1, n, 12, generator=g), torch.rand(1, n, generator=g) + 0.05
    u = x[0].double() / x[0].double().norm(dim=-1, keepdim=True)
    kernel = r[0].double()[:, None] * (u @ u.T) * r[0].double()
    for dense in (0, 2048):
        picks = determinant_points(x, k, r, dense=dense)
        order = picks.order[0].tolist()
        for t in range(k):
            before = order[:t]
            base = float(torch.linalg.det(kernel[before][:, before])) if t else 1.0
            gains = {
                j: float(torch.linalg.det(kernel[[*before, j]][:, [*before, j]])) / base
                for j in range(n)
                if j not in before
            }
            if max(gains.values()) < 1e-6:
                break
            assert gains[order[t]] >= max(gains.values()) - 1e-5
            assert picks.gain[0, t].item() == pytest.approx(gains[order[t]], abs=1e-5)
        assert len(set(picks.chosen[0].tolist())) == k


def test_samples_do_not_see_each_other_and_both_ways_agree():
    g = torch.Generator().manual_seed(0)
    x, text = torch.randn(3, 40, 16, generator=g), torch.randn(3, 5, 16, generator=g)
    text_mask = torch.tensor([[True] * 5, [True] * 3 + [False] * 2, [False] * 5])
    method = CDPruner(budget=10)
    kept = method.reduce(VisualSite(x=x, text=text, text_mask=text_mask)).representative
    for i in range(3):
        alone = VisualSite(x=x[i : i + 1], text=text[i : i + 1, : max(1, int(text_mask[i].sum()))])
        if i < 2:
            assert torch.equal(method.reduce(alone).representative, kept[i : i + 1])
    diverse = CDPruner(budget=10, relevance="none").reduce(VisualSite(x=x[2:])).representative
    assert torch.equal(diverse, kept[2:]), "without a text relevance is the same for all"
    assert torch.equal(determinant_points(x, 10, dense=0).chosen, determinant_points(x, 10).chosen)


def test_relevance_is_the_mean_cosine():
    g = torch.Generator().manual_seed(0)
    x, text = torch.randn(2, 7, 4, generator=g), torch.randn(2, 3, 4, generator=g)
    mask = torch.tensor([[True, True, True], [True, False, True]])
    u, w = (t / t.norm(dim=-1, keepdim=True) for t in (x, text))
    expected = torch.stack([(u[i] @ w[i][mask[i]].T).mean(-1) for i in range(2)])
    torch.testing.assert_close(text_relevance(x, text, mask), expected)
    assert text_relevance(x, text[:, :0], None).tolist() == [[0.0] * 7] * 2


def test_sign_turns_the_choice_and_attention_can_say_what_is_relevant():
    x = torch.eye(4)[None]
    text = torch.tensor([[[1.0, 0.5, 0.2, 0]]])
    kept = [CDPruner(budget=2, sign=s).reduce(VisualSite(x=x, text=text)).representative[0].tolist() for s in (1, -1)]
    assert kept == [[0, 1], [2, 3]]
    looked = torch.tensor([[0.1, 0.4, 0.2, 0.3]])
    method = CDPruner(budget=2, relevance="class")
    assert method.reduce(VisualSite(x=x, class_attention=looked)).representative.tolist() == [[1, 3]]
    assert method.reads == {"x", "class_attention"}
    assert CDPruner().reads == {"x", "text"}
    assert CDPruner(relevance="none").reads == {"x"}


@pytest.mark.parametrize(
    ("parameters", "match"),
    [
        ({"budget": 0.0}, "budget must be"),
        ({"sign": 0}, "sign must be 1 or -1"),
        ({"theta": 1.0}, "theta must be None or lie between 0 and 1"),
        ({"relevance": "clip"}, "relevance is 'clip'"),
    ],
)
def test_bad_parameters(parameters, match):
    with pytest.raises(ValueError, match=match):
        tokred.make("cdpruner", **parameters)


def test_relevance_is_scaled_image_by_image():
    """An image's smallest and largest value are its own, whoever is in the batch."""
    value = torch.tensor([[0.1, 0.2, 0.3], [10.0, 30.0, 20.0], [5.0, 5.0, 5.0]])
    both = scaled(value)
    torch.testing.assert_close(both[:2, :], torch.tensor([[0.0, 0.5, 1.0], [0.0, 1.0, 0.5]]), atol=1e-4, rtol=0)
    assert both[2].tolist() == [1.0, 1.0, 1.0]
    for i in range(3):
        assert torch.equal(scaled(value[i : i + 1])[0], both[i])
