"""The laws of ``Reduction``, on random reductions and by hand."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tokred import Reduction


@st.composite
def reductions(draw, drops: bool = True, batch: int | None = None, n: int | None = None):
    """A random reduction of a small batch: any map of tokens to slots in which every slot has a member."""
    b = batch or draw(st.integers(1, 3))
    n = n or draw(st.integers(1, 12))
    m = draw(st.integers(1, n))
    seed = draw(st.integers(0, 2**31))
    g = torch.Generator().manual_seed(seed)
    rows = []
    for _ in range(b):
        order = torch.randperm(n, generator=g)
        slot = torch.randint(-1 if drops else 0, m, (n,), generator=g)
        slot[order[:m]] = torch.randperm(m, generator=g)
        rows.append(slot)
    return Reduction.from_index(torch.stack(rows), m)


def features(r: Reduction, channels: int = 3, seed: int = 0) -> torch.Tensor:
    return torch.randn(*r.batch, r.length, channels, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@given(reductions())
@settings(deadline=None, max_examples=60)
def test_sizes_count_what_was_not_dropped_and_mass_is_kept(r):
    x = features(r)
    kept = (r.index >= 0).double()
    size = torch.rand(*r.batch, r.length) + 0.5
    assert torch.equal(r.sizes().sum(-1), kept.sum(-1).float())
    torch.testing.assert_close(r.sizes(size).double().sum(-1), (size * kept).sum(-1), rtol=1e-5, atol=1e-6)
    mass = (r.merge(x, size) * r.sizes(size).double().unsqueeze(-1)).sum(-2)
    torch.testing.assert_close(mass, (x * (size * kept).double().unsqueeze(-1)).sum(-2), rtol=1e-5, atol=1e-5)


@given(reductions())
@settings(deadline=None, max_examples=60)
def test_merging_what_was_restored_gives_it_back(r):
    y = torch.randn(*r.batch, r.slots, 4, dtype=torch.float64)
    restored = r.unmerge(y)
    assert restored.shape == (*r.batch, r.length, 4)
    torch.testing.assert_close(r.merge(restored), y)
    torch.testing.assert_close(r.merge(restored, mode="max"), y)
    assert torch.equal(r.gather(restored), y)
    assert (restored[r.index < 0] == 0).all()


@given(reductions())
@settings(deadline=None, max_examples=40)
def test_index_groups_and_compact_form_agree(r):
    groups = r.groups()
    index = r.index.reshape(-1, r.length)
    for row, members in zip(index.tolist(), groups, strict=True):
        assert sorted(t for g in members for t in g) == [t for t, s in enumerate(row) if s >= 0]
        assert all(row[t] == s for s, g in enumerate(members) for t in g)
    again = Reduction.from_index(r.index, r.slots)
    assert torch.equal(again.index, r.index)
    for b, members in enumerate(groups):
        for s, g in enumerate(members):
            assert int(r.representative.reshape(-1, r.slots)[b, s]) in g


@given(st.data())
@settings(deadline=None, max_examples=40)
def test_composition_equals_two_steps(data):
    first = data.draw(reductions())
    second = data.draw(reductions(batch=first.batch[0], n=first.slots))
    both = first.then(second)
    x = features(first)
    size = torch.rand(*first.batch, first.length) + 0.5
    two = second.merge(first.merge(x, size), first.sizes(size))
    torch.testing.assert_close(both.merge(x, size), two, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(both.sizes(size), second.sizes(first.sizes(size)), rtol=1e-5, atol=1e-6)
    y = torch.randn(*second.batch, second.slots, 2)
    assert torch.equal(both.unmerge(y), first.unmerge(second.unmerge(y)))
    assert torch.equal(both.gather(x), second.gather(first.gather(x)))


@given(reductions(), st.integers(0, 100))
@settings(deadline=None, max_examples=30)
def test_permuting_the_batch_permutes_the_answer(r, seed):
    order = torch.randperm(r.batch[0], generator=torch.Generator().manual_seed(seed))
    permuted = Reduction(r.representative[order], r.source[order], r.target[order], r.length)
    x = features(r)
    assert torch.equal(permuted.merge(x[order]), r.merge(x)[order])


def test_identity_changes_nothing_bit_for_bit():
    r = Reduction.identity((2,), 5)
    x = torch.randn(2, 5, 3)
    assert torch.equal(r.merge(x), x)
    assert torch.equal(r.unmerge(x), x)
    assert torch.equal(r.sizes(), torch.ones(2, 5))
    assert r.groups() == [[[0], [1], [2], [3], [4]]] * 2


def test_state_composition_of_the_host_study():
    step1 = Reduction.from_index(torch.tensor([[0, 1, 1, 2, 3, 4, 4]]), 5)
    assert step1.representative.tolist() == [[0, 1, 3, 4, 5]]
    assert step1.sizes().tolist() == [[1, 2, 1, 1, 2]]
    both = step1.then(Reduction.from_index(torch.tensor([[0, 1, 1, 2, 3]]), 4))
    assert both.index.tolist() == [[0, 1, 1, 1, 2, 3, 3]]
    assert both.sizes().tolist() == [[1, 3, 1, 2]]
    assert both.representative.tolist() == [[0, 1, 4, 5]]
    y = torch.tensor([5.0, 7, 9, 11]).view(1, 4, 1)
    restored = both.unmerge(y)
    assert restored.flatten().tolist() == [5, 7, 7, 7, 9, 11, 11]
    assert both.gather(restored).flatten().tolist() == [5, 7, 9, 11]
    assert restored.mean().item() == pytest.approx(8.142857)


def test_uneven_samples_are_masked():
    r = Reduction.from_index(torch.tensor([[0, 1, 2, 2], [0, 0, 1, -1]]), 3)
    assert r.mask.tolist() == [[True, True, True], [True, True, False]]
    assert r.sizes().tolist() == [[1, 1, 2], [2, 1, 0]]
    x = torch.arange(8.0).view(2, 4, 1)
    assert r.merge(x)[0].flatten().tolist() == [0, 1, 2.5]
    assert r.merge(x)[1, :2].flatten().tolist() == [4.5, 6]
    assert r.index.tolist() == [[0, 1, 2, 2], [0, 0, 1, -1]]
    assert r.unmerge(r.merge(x))[1].flatten().tolist() == [4.5, 4.5, 6, 0]


def test_per_head_reductions_of_a_cache():
    kept = torch.tensor([[[0, 2], [1, 3]]])
    r = Reduction.keep(kept, 4)
    keys = torch.arange(8.0).view(1, 2, 4, 1)
    assert r.merge(keys).flatten().tolist() == [0, 2, 5, 7]
    assert r.batch == (1, 2)
    assert r.index.tolist() == [[[0, -1, 1, -1], [-1, 0, -1, 1]]]


def test_fill_restores_dropped_tokens():
    r = Reduction.keep(torch.tensor([[0, 2]]), 3)
    y = torch.tensor([[[1.0], [3.0]]])
    fill = torch.tensor([[[7.0], [8.0], [9.0]]])
    assert r.unmerge(y, fill=fill).flatten().tolist() == [1, 8, 3]


def test_bad_input_names_the_argument():
    with pytest.raises(ValueError, match=r"index must lie in \[-1, 2\)"):
        Reduction.from_index(torch.tensor([[0, 2]]), 2)
    with pytest.raises(ValueError, match="index must be int64"):
        Reduction.from_index(torch.tensor([[0.0, 1.0]]), 2)
    r = Reduction.identity((1,), 3)
    with pytest.raises(ValueError, match="x must be"):
        r.merge(torch.zeros(1, 4, 2))
    with pytest.raises(ValueError, match="y must be"):
        r.unmerge(torch.zeros(2, 3, 2))
    with pytest.raises(ValueError, match="mode is 'median'"):
        r.merge(torch.zeros(1, 3, 2), mode="median")
    with pytest.raises(ValueError, match="cannot be followed"):
        r.then(Reduction.identity((1,), 4))


def test_sizes_where_no_token_goes_into_another():
    kept, size = torch.tensor([[3, 0], [1, 2]]), torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8]]).double()
    mask = torch.tensor([[True, False], [True, True]])
    for own, found in ((None, [[1, 0], [1, 1]]), (size, [[4, 0], [6, 7]])):
        sizes = Reduction.keep(kept, 4, mask).sizes(own)
        assert sizes.dtype == torch.float32
        assert sizes.tolist() == found
