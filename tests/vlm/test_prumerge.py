"""PruMerge and PruMerge+: the card's examples, the definition as loops, and its laws."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import tokred
from tests.vlm.visual import check_laws, kept, visual
from tokred.methods.vlm.prumerge import PruMerge, PruMergePlus
from tokred.vlm.tools.scores import outliers

X = torch.tensor([[1, 0], [0, 1], [2, 0], [0, 2.0]])[None]
A = torch.tensor([[0.5, 0.3, 0.15, 0.05]])
KEYS = torch.tensor([[1, 0], [0, 1], [1, 0.1], [0.1, 1]])[None]


@pytest.mark.parametrize(
    ("a", "n"),
    [
        ([0.02, 0.02, 0.03, 0.03, 0.03, 0.04, 0.04, 0.05, 0.34, 0.40], 2),
        ([0.01, 0.01, 0.02, 0.02, 0.02, 0.03, 0.03, 0.30, 0.26, 0.30], 0),
        ([0.1, 0.1, 0.1, 0.1, 0.6], 1),
        ([0.2] * 5, 0),
    ],
)
def test_outliers(a, n):
    a = torch.tensor([a])
    assert outliers(a).tolist() == [n]
    assert outliers(a * 8).tolist() == [n], "a common factor changes nothing"
    assert PruMerge().centres(a).sum().item() == max(1, n)


def test_worked_example():
    found = PruMerge(budget=3, k_c=2).absorb(A, KEYS)
    assert kept(found) == [0, 1, 3]
    torch.testing.assert_close(found.merge(X), torch.tensor([[[1.3, 0.1], [0.3, 1.1], [0.3, 0.1]]]))
    assert found.members()[0, :2].tolist() == [[0, 2, 3], [1, 3, 2]]
    assert found.groups() == [[[0, 2], [1], [3]]]
    assert found.sizes().tolist() == [[2, 1, 1]]
    divided = PruMerge(budget=3, k_c=2, normalise=True).absorb(A, KEYS).merge(X)
    torch.testing.assert_close(divided[0, :2], torch.tensor([[1.1429, 0.1429], [0.6, 0.8]]), atol=5e-5, rtol=0)


@pytest.mark.parametrize(("n", "grid"), [(32, 96), (40, 144)])
def test_grid_of_plus(n, grid):
    a = torch.full((1, 576), 0.001)
    a[0, 575 - n : 575] = 0.02 + torch.arange(n) / 1e4
    centres = PruMergePlus().centres(a)[0].nonzero().flatten().tolist()
    assert outliers(a).tolist() == [n]
    stride = 576 // n // 3
    candidates = list(range(0, 575, stride))
    assert len(candidates) == grid
    assert centres == sorted(set(candidates) | set(range(575 - n, 575)))
    found = PruMergePlus(k_c=3).absorb(a, torch.randn(1, 576, 4))
    assert found.slots == len(centres) + 1


@settings(max_examples=20, deadline=None)
@given(
    st.integers(3, 30),
    st.integers(1, 40),
    st.booleans(),
    st.booleans(),
    st.sampled_from([None, 0.4, 5]),
    st.integers(0, 99),
)
def test_equals_loops(n, k_c, normalise, plus, budget, seed):
    g = torch.Generator().manual_seed(seed)
    a = torch.randn(2, n, generator=g).mul(2).softmax(-1)
    keys, x = torch.randn(2, n, 5, generator=g), torch.randn(2, n, 3, generator=g)
    method = PruMerge(budget=budget, k_c=k_c, normalise=normalise, plus=plus)
    if not method.acts(n, tokred.Place(layer=0, depth=1)):
        return
    found = method.absorb(a, keys)
    made = found.merge(x)
    unit = keys.double() / keys.double().norm(dim=-1, keepdim=True)
    for i in range(2):
        centres = method.centres(a)[i].nonzero().flatten().tolist()
        rest = [j for j in range(n) if j not in centres]
        slots = kept(found, i)
        assert slots[: len(centres)] == centres
        assert slots[len(centres) :] == rest[-1:]
        if budget is not None:
            assert len(slots) == method.count(n)
        for slot, c in enumerate(centres):
            near = sorted((j for j in range(n) if j != c), key=lambda j: -round(float(unit[i, c] @ unit[i, j]), 7))[
                :k_c
            ]
            own = float(a[i, c]) if normalise else 1.0
            total = own * x[i, c] + sum(a[i, j] * x[i, j] for j in near)
            total = total / (own + float(a[i, near].sum())) if normalise else total
            torch.testing.assert_close(made[i, slot], total, atol=1e-5, rtol=1e-4)
        if rest:
            left = sum(a[i, j] * x[i, j] for j in rest)
            left = left / float(a[i, rest].sum()) if normalise else left
            torch.testing.assert_close(made[i, len(centres)], left, atol=1e-5, rtol=1e-4)
        assert found.sizes()[i].sum().item() == n


def test_orders_and_bounds():
    a = torch.tensor([[0.02, 0.40, 0.03, 0.03, 0.03, 0.04, 0.04, 0.05, 0.02, 0.34]])
    keys = torch.randn(1, 10, 4)
    assert kept(PruMerge().absorb(a, keys)) == [1, 9, 8]
    assert kept(PruMerge(order="attention").absorb(a, keys)) == [1, 9, 8]
    assert kept(PruMerge(order="attention").absorb(a.flip(1), keys)) == [8, 0, 9]
    assert kept(PruMerge(max_tokens=1).absorb(a, keys)) == [1, 9]
    assert kept(PruMerge(min_tokens=3).absorb(a, keys)) == [1, 7, 9, 8]
    assert kept(PruMerge(budget=2).absorb(a, keys)) == [1, 9]


def test_uneven_counts_and_attention_of_the_last_layer():
    site = visual(4)
    q, k = (t.transpose(1, 2).flatten(2) for t in site.layer_heads(-1))
    a = ((q[:, :1] @ k.mT) * q.shape[-1] ** -0.5).softmax(-1)[:, 0, 1:]
    found = PruMerge().reduce(site)
    expected = PruMerge().absorb(a, k[:, 1:])
    for i in range(4):
        assert kept(found, i) == kept(expected, i)
    torch.testing.assert_close(found.merge(site.tower), expected.merge(site.tower))
    counts = outliers(a).clamp_min(1)
    assert [len(kept(found, i)) for i in range(4)] == (counts + 1).tolist()
    assert len(set(counts.tolist())) > 1
    mean = PruMerge(heads="mean").reduce(site)
    by_head = site.layer_class_attention(-1).mean(1)
    assert [len(kept(mean, i)) for i in range(4)] == (outliers(by_head).clamp_min(1) + 1).tolist()


@pytest.mark.parametrize(
    "method", [PruMerge(), PruMergePlus(max_tokens=2), PruMerge(budget=9), PruMergePlus(budget=0.3)]
)
def test_laws(method):
    check_laws(method, PruMerge(budget=1.0), seed=3)


def test_gradients_and_towers_without_a_class_token():
    site = visual(1)
    x = site.tower.clone().requires_grad_()
    PruMerge().reduce(site).merge(x).square().sum().backward()
    assert x.grad.isfinite().all()
    assert x.grad.abs().sum() > 0
    with pytest.raises(tokred.MissingInputError, match="no class token"):
        PruMerge().reduce(visual(classes=0))
    with pytest.raises(ValueError, match="'sum' and 'keep'"):
        PruMerge().reduce(site).merge(site.x, mode="max")


@pytest.mark.parametrize(
    ("parameters", "match"),
    [
        ({"budget": 1}, "budget must be at least 2"),
        ({"budget": 0.0}, "budget must be a number of tokens"),
        ({"k_c": 0}, "k_c must be an integer of at least 1"),
        ({"whisker": 0}, "whisker must be positive"),
        ({"min_tokens": 4, "max_tokens": 3}, "max_tokens must be an integer of at least 4"),
        ({"heads": "max"}, "heads is 'max'"),
        ({"order": "random"}, "order is 'random'"),
    ],
)
def test_bad_parameters(parameters, match):
    with pytest.raises(ValueError, match=match):
        tokred.make("prumerge_plus", **parameters)


@pytest.mark.parametrize("budget", [None, 9])
def test_the_grid_follows_the_centres(budget):
    """In the authors' order: centres by falling attention, then the grid's own tokens as they stand, then the rest."""
    g = torch.Generator().manual_seed(3)
    attention = torch.rand(2, 24, generator=g) * 0.01
    attention[0, [20, 3, 11]] = torch.tensor([0.9, 0.5, 0.7])
    attention[1, [1, 22]] = torch.tensor([0.4, 0.8])
    method = PruMerge(plus=True, order="attention", k_c=3, budget=budget)
    found = method.absorb(attention, torch.randn(2, 24, 4, generator=g))
    chosen, first = method.centres(attention), method.by_attention(attention)
    for i in range(2):
        rows = found.representative[i] if found.mask is None else found.representative[i, found.mask[i]]
        centres = sorted(first[i].nonzero().flatten().tolist(), key=lambda j: -float(attention[i, j]))
        grid = (chosen[i] & ~first[i]).nonzero().flatten().tolist()
        assert centres[:2] == [[20, 11], [22, 1]][i]
        assert grid == sorted(grid)
        assert len(grid) > 2
        assert rows[:-1].tolist() == centres + grid
