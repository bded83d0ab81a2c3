"""The laws of ``SoftReduction``, on random shares and by hand."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tokred import Reduction
from tokred.adapters.encoder.state import TokenState
from tokred.core.soft import SoftReduction


def make(b=2, n=9, r=3, seed=0, prefix=1, **options) -> SoftReduction:
    """Random sources shared out over random keepers; the first ``prefix`` tokens are kept and receive nothing."""
    g = torch.Generator().manual_seed(seed)
    order = torch.stack([torch.randperm(n - prefix, generator=g) for _ in range(b)]) + prefix
    kept = torch.cat([torch.arange(prefix).expand(b, -1), order[:, r:].sort(1).values], 1)
    share = torch.randn(b, n - r, r, generator=g).softmax(1)
    share[:, :prefix] = 0
    share = share / share.sum(1, keepdim=True).clamp_min(1e-12)
    return SoftReduction.make(kept, order[:, :r], share, n, **options)


def dense(step: SoftReduction) -> torch.Tensor:
    """``(B, N, M)`` the matrix that :meth:`unmerge` multiplies by, in float64."""
    out = torch.zeros(*step.batch, step.length, step.slots, dtype=torch.float64)
    for b in range(step.batch[0]):
        for slot, token in enumerate(step.representative[b].tolist()):
            out[b, token, slot] = 1
        for i, token in enumerate(step.source[b].tolist()):
            out[b, token] = step.share[b, :, i].double()
    return out


def test_by_hand():
    share = torch.tensor([[[0.0], [0.25], [0.75]]])
    step = SoftReduction.make(torch.tensor([[0, 1, 3]]), torch.tensor([[2]]), share, 4)
    x = torch.tensor([[[1.0], [2.0], [8.0], [4.0]]])
    assert step.merge(x).flatten().tolist() == pytest.approx([1, (2 + 2) / 1.25, (4 + 6) / 1.75])
    assert step.sizes().tolist() == [[1, 1.25, 1.75]]
    size = torch.tensor([[1.0, 2.0, 4.0, 1.0]])
    assert step.merge(x, size).flatten().tolist() == pytest.approx([1, (4 + 8) / 3, (4 + 24) / 4])
    assert step.sizes(size).tolist() == [[1, 3, 4]]
    assert step.unmerge(torch.tensor([[[1.0], [2.0], [6.0]]])).flatten().tolist() == [1, 2, 5, 6]
    assert step.index.tolist() == [[0, 1, 2, 2]], "the largest share is what drawings see"
    assert step.groups() == [[[0], [1], [2, 3]]]


@given(st.integers(1, 3), st.integers(0, 3), st.integers(1, 8), st.integers(1, 8), st.integers(0, 2**31), st.booleans())
@settings(deadline=None, max_examples=60)
def test_merge_and_unmerge_are_one_matrix_and_mass_is_kept(b, prefix, r, rest, seed, sized):
    n = prefix + r + rest
    step = make(b, n, r, seed, prefix)
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(b, n, 4, generator=g, dtype=torch.float64)
    size = torch.rand(b, n, generator=g) + 0.5 if sized else None
    matrix, weight = dense(step), torch.ones(b, n) if size is None else size
    parts = matrix * weight.double().unsqueeze(-1)
    torch.testing.assert_close(step.sizes(size).double(), parts.sum(1), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(step.sizes(size).sum(1), weight.sum(1), rtol=1e-5, atol=1e-5)
    expected = parts.mT @ x / parts.sum(1).unsqueeze(-1)
    torch.testing.assert_close(step.merge(x, size), expected, rtol=1e-5, atol=1e-6)
    y = torch.randn(b, n - r, 3, generator=g, dtype=torch.float64)
    torch.testing.assert_close(step.unmerge(y), matrix @ y, rtol=1e-5, atol=1e-6)
    assert torch.equal(step.gather(step.unmerge(y)), y), "kept tokens get their very rows"
    assert torch.equal(step.merge(x, size)[:, :prefix], x[:, :prefix]), "what receives nothing stays"
    merged, sizes = step.step(x, size)
    assert torch.equal(merged, step.merge(x, size))
    assert torch.equal(sizes, step.sizes(size))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("autocast", [False, True])
def test_constants_stay_constant_in_every_type(dtype, autocast):
    step = make(n=40, r=11)
    x = torch.randn(2, 1, 5, dtype=torch.float64).expand(-1, 40, -1).to(dtype)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        merged = step.merge(x)
        back = step.unmerge(merged)
        sizes = step.sizes(torch.full((2, 40), 3.0))
    assert merged.dtype == back.dtype == dtype
    tolerance = {"rtol": 4 * torch.finfo(dtype).eps if dtype != torch.float64 else 1e-5, "atol": 1e-6}
    torch.testing.assert_close(merged, x[:, :29], **tolerance)
    torch.testing.assert_close(back, x, **tolerance)
    torch.testing.assert_close(sizes.sum(1), torch.full((2,), 120.0))


def test_a_duplicate_that_goes_wholly_to_its_twin_changes_nothing():
    x = torch.randn(1, 3, 8)
    x[:, 2] = x[:, 1]
    step = SoftReduction.make(torch.tensor([[0, 1]]), torch.tensor([[2]]), torch.tensor([[[0.0], [1.0]]]), 3)
    assert torch.equal(step.merge(x), x[:, :2])


def test_sizes_weigh_only_where_they_are_asked_for():
    x, size = torch.randn(2, 9, 4), torch.rand(2, 9) + 0.5
    plain = make(by_size=False)
    assert torch.equal(plain.merge(x, size), plain.merge(x))
    assert not torch.equal(make().merge(x, size), make().merge(x))
    assert torch.equal(plain.step(x, size)[1], make().sizes(size)), "sizes are counted all the same"


def test_keep_mode_takes_rows_and_still_counts():
    step, x = make(mode="keep"), torch.randn(2, 9, 4)
    assert torch.equal(step.merge(x), step.gather(x))
    assert torch.equal(step.merge(x, mode="mean"), make().merge(x))
    torch.testing.assert_close(step.sizes().sum(1), torch.full((2,), 9.0))


def test_gradients_reach_every_token_and_not_the_shares():
    x = torch.randn(2, 9, 4, dtype=torch.float64, requires_grad=True)
    step = make()
    assert torch.autograd.gradcheck(lambda t: step.merge(t), (x,))
    assert torch.autograd.gradcheck(lambda t: step.unmerge(t), (x.detach()[:, :6].requires_grad_(),))
    step.merge(x).sum().backward()
    assert (x.grad != 0).all()


def test_padding_neither_gives_nor_counts():
    share = torch.tensor([[[0.4, 0.0], [0.6, 0.0], [0.0, 0.0]]])
    mask = torch.tensor([[True, True, False]])
    step = SoftReduction.make(torch.tensor([[0, 1, 3]]), torch.tensor([[2, 4]]), share, 5, mask=mask)
    assert step.sizes().flatten().tolist() == pytest.approx([1.4, 1.6, 0])
    assert step.index[0].tolist() == [0, 1, 1, -1, -1]
    x = torch.randn(1, 5, 3)
    back = step.unmerge(step.merge(x))
    assert torch.equal(back[:, 4], torch.zeros(1, 3)), "padding gets nothing back"


def test_tokens_in_no_slot_are_filled():
    step = SoftReduction.make(torch.tensor([[0, 3]]), torch.tensor([[1]]), torch.tensor([[[0.5], [0.5]]]), 4)
    y, fill = torch.tensor([[[2.0], [4.0]]]), torch.full((1, 4, 1), 9.0)
    assert step.unmerge(y).flatten().tolist() == [2, 3, 0, 4]
    assert step.unmerge(y, fill=fill).flatten().tolist() == [2, 3, 9, 4]


def test_several_steps_are_undone_one_after_the_other():
    first, second, third = make(n=12, r=4, seed=1), make(n=8, r=2, seed=2), make(n=6, r=3, seed=3)
    x = torch.randn(2, 12, 5, dtype=torch.float64)
    state = TokenState(12)
    for step in (first, second, third):
        state, x = state.advance(step, x, keep_dropped=False)
    expected = dense(first) @ dense(second) @ dense(third) @ x
    torch.testing.assert_close(state.restore(x), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(state.size.sum(1), torch.full((2,), 12.0))
    # The mean at full length weighs each token by what it stands for.
    weighted = (x * state.size.double().unsqueeze(-1)).sum(1) / 12
    torch.testing.assert_close(state.restore(x).mean(1), weighted, rtol=1e-5, atol=1e-6)


def test_a_soft_and_a_hard_step_in_a_row():
    soft, hard = make(n=9, r=3), Reduction.from_index(torch.tensor([[0, 1, 1, 2, 3, 3], [0, 0, 1, 2, 2, 3]]), 4)
    x = torch.randn(2, 9, 5, dtype=torch.float64)
    state, y = TokenState(9).advance(soft, x, False)
    state, y = state.advance(hard, y, False)
    torch.testing.assert_close(state.restore(y), dense(soft) @ hard.unmerge(y), rtol=1e-5, atol=1e-6)
    assert state.composed().slots == 4
    assert state.composed().length == 9


def test_copies_and_devices_carry_the_shares():
    step, x = make(), torch.randn(2, 9, 4)
    for clone in (copy.deepcopy(step), pickle.loads(pickle.dumps(step)), step.to("cpu")):
        assert isinstance(clone, SoftReduction)
        assert torch.equal(clone.merge(x), step.merge(x))
    assert step.to("meta").share.device.type == "meta"


def test_errors_name_the_argument():
    step = make()
    with pytest.raises(ValueError, match=r"x must be \(2, 9\)"):
        step.merge(torch.randn(2, 8, 4))
    with pytest.raises(ValueError, match=r"y must be \(2, 6\)"):
        step.unmerge(torch.randn(2, 9, 4))
    with pytest.raises(ValueError, match="mode is 'sum'"):
        step.merge(torch.randn(2, 9, 4), mode="sum")
    with pytest.raises(ValueError, match="mode is 'mlerp'"):
        make(mode="mlerp")
    with pytest.raises(ValueError, match=r"share must be \(B, M, R\)"):
        SoftReduction.make(step.representative, step.source, step.share.mT, 9)
    with pytest.raises(ValueError, match="needs its shares"):
        SoftReduction(step.representative, step.source, step.target, 9).sizes()


def test_padding_is_not_written_over_the_token_that_it_names():
    representative = torch.tensor([[0, 1, 2], [0, 2, 0]])  # the last slot of the second sample is padding
    source, share = torch.tensor([[3], [0]]), torch.zeros(2, 3, 1)  # and so is its source
    share[0, 1] = 1
    mask = torch.tensor([[True, True, True], [True, True, False]])
    step = SoftReduction.make(representative, source, share, 4, mask=mask)
    y = torch.arange(1.0, 7).view(2, 3, 1)
    assert step.unmerge(y)[..., 0].tolist() == [[1, 2, 3, 2], [4, 0, 5, 0]]
