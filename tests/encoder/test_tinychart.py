"""TinyChart: the card's examples, and the order of the slots of any reduction."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import tokred
from tests.encoder.angles import check_compiled_and_trained, check_on_a_model, column
from tokred.core.matching import bipartite_soft_matching, bipartite_uneven_matching, raster_order
from tokred.core.soft import SoftReduction
from tokred.kernels.attention import attention

METRIC = torch.tensor([[1, 0], [0.9, 0.1], [0, 1], [0.1, 0.9], [0.7, 0.7], [1, 0.05]])[None, None]
SIX = column(6, 1)


def counts(n: int, r: int, depth: int) -> list[int]:
    method, found = tokred.TinyChart(r=r), [n]
    for layer in range(depth):
        found.append(method.tokens(found[-1], tokred.Place(layer=layer, depth=depth)))
    return found


# ---------------------------------------------------------------- the card's examples


def test_worked_example():
    r = tokred.TinyChart(r=2).reduce(tokred.Site(x=SIX, k=METRIC))
    assert r.merge(SIX).flatten().tolist() == [5, 2, 3.5, 3.5]
    assert r.sizes().tolist() == [[1, 1, 2, 2]]
    assert r.groups() == [[[4], [1], [2, 3], [0, 5]]]
    raster = tokred.TinyChart(r=2, order="raster").reduce(tokred.Site(x=SIX, k=METRIC))
    assert raster.groups() == [[[0, 5], [1], [2, 3], [4]]]
    assert raster.merge(SIX).flatten().tolist() == [3.5, 2, 3.5, 5]


def test_proportional_attention():
    q, k, v = (torch.tensor(t).view(1, 1, -1, 1) for t in ([2.0], [1, 1, 0.2], [3.0, 5, 1]))
    whole = attention(q, k, v, scale=1.0)
    assert whole.item() == pytest.approx(3.7249, abs=5e-5)
    merged_k, merged_v = torch.tensor([1, 0.2]).view(1, 1, -1, 1), torch.tensor([4.0, 1]).view(1, 1, -1, 1)
    assert attention(q, merged_k, merged_v, size=torch.tensor([[2.0, 1]]), scale=1.0).item() == pytest.approx(
        whole.item(), abs=1e-5
    )
    assert attention(q, merged_k, merged_v, scale=1.0).item() == pytest.approx(3.4961, abs=5e-5)
    assert tokred.TinyChart().proportional


def test_merged_copies_change_no_other_query():
    """Each key there three times: matching finds the copies, and attention with sizes is what it was."""
    g = torch.Generator().manual_seed(0)
    k, v = (torch.randn(1, 2, 4, 8, generator=g) for _ in range(2))
    q = torch.randn(1, 2, 5, 8, generator=g)
    rows = torch.tensor([0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3])
    k, v = k[:, :, rows], v[:, :, rows]
    r = tokred.TinyChart(r=6).reduce(tokred.Site(k=k))
    size = r.sizes()
    assert size.sum() == 12
    assert r.slots == 6
    fewer = [torch.stack([r.merge(t[:, h]) for h in range(2)], 1) for t in (k, v)]
    torch.testing.assert_close(attention(q, *fewer, size=size), attention(q, k, v), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("n", "r", "depth", "last"), [(2916, 84, 26, 732), (2916, 84, 27, 648), (729, 20, 26, 209)])
def test_token_counts(n, r, depth, last):
    assert counts(n, r, depth)[-1] == last


def test_never_below_one_token():
    assert counts(10, 3, 5) == [10, 7, 4, 2, 1, 1]
    assert tokred.TinyChart().reduce(tokred.Site(x=column(1), k=torch.ones(1, 1, 1, 2))).trivial


def test_cost_of_the_published_setting():
    found = counts(2916, 84, 26)
    assert tokred.TinyChart() == tokred.TinyChart(r=84)
    assert sum(found[:-1]) / 26 == 1866
    assert sum(n * n for n in found[:-1]) / (26 * 2916**2) == pytest.approx(0.456, abs=5e-4)
    assert sum(found[1:]) / (26 * 2916) == pytest.approx(0.611, abs=5e-4)


# ---------------------------------------------------------------- laws


@given(st.integers(1, 24), st.integers(0, 2), st.integers(0, 2), st.integers(0, 8), st.integers(0, 2**31))
@settings(deadline=None, max_examples=60)
def test_raster_order_over_several_steps(free, prefix, suffix, r, seed):
    g = torch.Generator().manual_seed(seed)
    n = prefix + free + suffix
    x, size, total = torch.randn(2, n, 3, generator=g), torch.ones(2, n), None
    method, plain = tokred.TinyChart(r=r, order="raster"), tokred.TinyChart(r=r)
    start = (x * size.unsqueeze(-1)).sum(1)
    for layer in range(3):
        site = tokred.Site(x=x, k=x.unsqueeze(1), sizes=size, prefix=prefix, suffix=suffix, layer=layer)
        step = method.reduce(site)
        assert sorted(step.groups()[0]) == sorted(plain.reduce(site).groups()[0]), "the same groups"
        x, size = step.step(x, size)
        total = step if total is None else total.then(step)
        first = [group[0] for group in total.groups()[1]]
        assert first == sorted(first)
        assert first[:prefix] == list(range(prefix))
        assert first[len(first) - suffix :] == list(range(n - suffix, n))
        assert (size.sum(1) == n).all()
        torch.testing.assert_close((x * size.unsqueeze(-1)).sum(1), start, rtol=1e-4, atol=1e-4)


def test_raster_order_keeps_padding_behind_and_the_suffix_last():
    metric = torch.randn(2, 12, 4, generator=torch.Generator().manual_seed(0))
    uneven = bipartite_uneven_matching(metric, lambda score: torch.tensor([3, 1]), prefix=1, suffix=1)
    ordered = raster_order(uneven, suffix=1)
    assert ordered.mask.tolist() == [[True] * 8 + [False] * 2 + [True], [True] * 11]
    for i in range(2):
        first = [g[0] for g in ordered.groups()[i] if g]
        assert first == sorted(first)
        assert sorted(map(tuple, ordered.groups()[i])) == sorted(map(tuple, uneven.groups()[i]))
    assert ordered.representative[:, -1].tolist() == [11, 11]
    dropping = tokred.Reduction.from_index(torch.tensor([[1, -1, 0, 1, 0]]), 2)
    assert raster_order(dropping).groups() == [[[0, 3], [2, 4]]]
    assert raster_order(dropping).index.tolist() == [[0, -1, 1, 0, 1]]
    same = tokred.Reduction.identity((2,), 4)
    assert raster_order(same) is same
    soft = SoftReduction.make(torch.tensor([[0]]), torch.tensor([[1]]), torch.ones(1, 1, 1), 2)
    with pytest.raises(TypeError, match="soft reduction"):
        raster_order(soft)


@given(st.integers(1, 20), st.integers(0, 2), st.integers(0, 2), st.integers(0, 2**31))
@settings(deadline=None, max_examples=60)
def test_uneven_matching_is_matching_of_each_sample(free, prefix, suffix, seed):
    g = torch.Generator().manual_seed(seed)
    n, place = prefix + free + suffix, {"prefix": prefix, "suffix": suffix}
    metric = torch.randn(3, n, 3, generator=g)
    r = torch.randint(0, free // 2 + 1, (3,), generator=g)
    both = bipartite_uneven_matching(metric, lambda score: r, **place)
    for i in range(3):
        alone = bipartite_soft_matching(metric[i : i + 1], int(r[i]), **place)
        groups = both.groups()[i]
        assert (groups if both.mask is None else [g for g in groups if g]) == alone.groups()[0]
    # Padding behind the free tokens changes nothing.
    real = torch.cat([torch.arange(prefix + free), torch.arange(n + 2 - suffix, n + 2)])
    padded = torch.randn(3, n + 2, 3, generator=g)
    padded[:, real] = metric
    mask = torch.zeros(3, n + 2, dtype=torch.bool)
    mask[:, real] = True
    seen = bipartite_uneven_matching(padded, lambda score: r, mask=mask, **place)
    if seen.trivial:
        assert (r == 0).all()
        return
    for i in range(3):
        groups = [[int((real == t).nonzero()) for t in group] for group in seen.groups()[i] if group]
        assert groups == bipartite_soft_matching(metric[i : i + 1], int(r[i]), **place).groups()[0]


# ---------------------------------------------------------------- parameters and models


def test_parameters():
    with pytest.raises(ValueError, match="order is 'spiral'; allowed are 'merge', 'raster'"):
        tokred.TinyChart(order="spiral")
    with pytest.raises(ValueError, match="r must not be negative"):
        tokred.TinyChart(r=-1)
    method = tokred.TinyChart(r=(8, -1), order="raster")
    assert tokred.from_dict(method.to_dict()) == method
    assert method.to_dict()["method"] == "tinychart"
    assert tokred.ToMe.name == "tome"


@pytest.mark.parametrize("order", ["merge", "raster"])
@pytest.mark.parametrize("family", ["vit", "vit-attention-pool (SigLIP)", "dinov3 (rope, registers)"])
def test_on_models(family, order):
    trace = check_on_a_model(family, tokred.TinyChart(r=4, order=order), tokred.TinyChart(r=0, order=order))
    first = [group[0] for group in trace.groups()[0]]
    assert (first == sorted(first)) == (order == "raster")


@pytest.mark.slow
@pytest.mark.parametrize("method", [tokred.TinyChart(r=4, order="raster")])
def test_compiles_and_trains(method):
    check_compiled_and_trained("vit-mean", method)
