"""VoMix: the card's worked examples and laws, without any host."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import tokred
from tokred.core.soft import SoftReduction


def keys(*degrees: float) -> torch.Tensor:
    """``(1, 1, N, 2)`` unit vectors."""
    a = torch.tensor(degrees, dtype=torch.float64) * math.pi / 180
    return torch.stack([a.cos(), a.sin()], -1)[None, None].float()


SIX = keys(0, 4, 10, 90, 97, 45)
VALUES = torch.arange(1.0, 7).view(1, 6, 1)


def site(**options) -> tokred.Site:
    return tokred.Site(**{"x": VALUES, "k": SIX, **options})


def test_example_1_votes_and_selection():
    method = tokred.VoMix(r=0.34)
    found = method.votes(SIX[:, 0]) / 1e6
    assert found[0].tolist() == pytest.approx([0.997564, 1.992086, 0.819152, 0.992546, 0.992546, 0], abs=1e-6)
    step = method.reduce(site())
    assert step.source.tolist() == [[1, 0]]
    assert step.representative.tolist() == [[2, 3, 4, 5]]


def test_example_2_mixing_weights():
    step = tokred.VoMix(r=0.34).reduce(site())
    expected = [[0.916579, 0.941360], [0.000088, 0.000050], [0.000026, 0.000015], [0.083306, 0.058575]]
    for row, wanted in zip(step.share[0].tolist(), expected, strict=True):
        assert row == pytest.approx(wanted, abs=1e-6)
    assert step.sizes()[0].tolist() == pytest.approx([2.857939, 1.000138, 1.000041, 1.141882], abs=1e-6)
    mixed = step.merge(VALUES).flatten().tolist()
    assert mixed == pytest.approx([2.020518, 3.999674, 4.999863, 5.451692], abs=1e-6)


def test_example_3_a_flat_temperature_blurs():
    mixed = tokred.VoMix(r=0.34, tau=1.0).reduce(site()).merge(VALUES)
    assert mixed.flatten().tolist() == pytest.approx([2.329730, 3.412809, 4.251427, 4.281776], abs=1e-6)


def test_example_4_equal_scores_go_to_the_lower_index():
    assert tokred.VoMix(r=0.5).reduce(site()).source.tolist() == [[1, 0, 3]]


def test_example_5_less_than_one_token_is_the_identity():
    step = tokred.VoMix(r=0.16).reduce(site())
    assert step.trivial
    assert step.slots == 6


def test_counted_votes():
    assert tokred.VoMix(r=0.5, vote="count").votes(SIX[:, 0]).tolist() == [[1e6, 2e6, 1e6, 1e6, 1e6, 0]]
    assert tokred.VoMix(r=0.5, vote="count").reduce(site()).source.tolist() == [[1, 0, 2]]


def test_limits_of_the_temperature():
    hard = tokred.VoMix(r=0.34, tau=1e-6).reduce(site())
    assert torch.equal(hard.share, torch.tensor([[[1.0, 1.0], [0, 0], [0, 0], [0, 0]]]))
    even = tokred.VoMix(r=0.34, tau=1e6).reduce(site())
    torch.testing.assert_close(even.share, torch.full((1, 4, 2), 0.25), rtol=1e-5, atol=0)


def test_sizes_enter_the_mix_where_they_are_tracked():
    size = torch.tensor([[2.0, 1, 1, 1, 1, 3]])
    step = tokred.VoMix(r=0.34, track_size=True).reduce(site(sizes=size))
    w = step.share[0]
    own = torch.tensor([1.0, 1, 1, 3])
    total = own + w @ torch.tensor([1.0, 2.0])
    torch.testing.assert_close(step.sizes(size)[0], total)
    expected = (own * torch.tensor([3.0, 4, 5, 6]) + w @ torch.tensor([2.0, 2.0])) / total
    torch.testing.assert_close(step.merge(VALUES, size).flatten(), expected)
    untracked = tokred.VoMix(r=0.34).reduce(site(sizes=size))
    assert torch.equal(untracked.merge(VALUES, size), untracked.merge(VALUES))


@given(st.integers(1, 30), st.integers(0, 4), st.integers(0, 2), st.floats(0, 0.5), st.integers(0, 2**31))
@settings(deadline=None, max_examples=60)
def test_laws(free, prefix, suffix, r, seed):
    n = prefix + free + suffix
    g = torch.Generator().manual_seed(seed)
    x, k = torch.randn(2, n, 5, generator=g), torch.randn(2, 3, n, 4, generator=g)
    method = tokred.VoMix(r=r)
    step = method.reduce(tokred.Site(x=x, k=k, prefix=prefix, suffix=suffix))
    removed = math.floor(round(r * free, 9))
    assert step.slots == n - removed == method.tokens(n, tokred.Place(layer=0, depth=1, prefix=prefix, suffix=suffix))
    if removed == 0:
        assert step.trivial
        return
    assert isinstance(step, SoftReduction)
    torch.testing.assert_close(step.share.sum(1), torch.ones(2, removed))
    torch.testing.assert_close(step.sizes().sum(1), torch.full((2,), float(n)), rtol=1e-5, atol=1e-4)
    assert (step.representative.diff(dim=1) > 0).all(), "retained tokens keep their order"
    end = n - suffix
    protected = [*range(prefix), *range(end, n)]
    slots = [*range(prefix), *range(step.slots - suffix, step.slots)]
    assert torch.equal(step.merge(x)[:, slots], x[:, protected]), "protected tokens are untouched, bit for bit"
    assert not set(step.source.flatten().tolist()) & set(protected)
    # A sample alone gets what it gets among others.
    alone = method.reduce(tokred.Site(x=x[1:], k=k[1:], prefix=prefix, suffix=suffix))
    assert torch.equal(alone.source, step.source[1:])
    torch.testing.assert_close(alone.share, step.share[1:], rtol=1e-5, atol=1e-6)


def test_permuting_tokens_permutes_groups():
    g = torch.Generator().manual_seed(3)
    x, k = torch.randn(1, 17, 5, generator=g), torch.randn(1, 2, 17, 4, generator=g)
    order = torch.cat([torch.tensor([0]), torch.randperm(16, generator=g) + 1])
    method = tokred.VoMix(r=0.3)
    plain = method.reduce(tokred.Site(x=x, k=k, prefix=1))
    moved = method.reduce(tokred.Site(x=x[:, order], k=k[:, :, order], prefix=1))
    assert [order[i].item() for i in moved.source[0].tolist()] == plain.source[0].tolist()
    torch.testing.assert_close(moved.unmerge(moved.merge(x[:, order])), plain.unmerge(plain.merge(x))[:, order])


def test_padding_takes_no_part_and_changes_no_sample():
    g = torch.Generator().manual_seed(0)
    x, k = torch.randn(1, 12, 5, generator=g), torch.randn(1, 2, 12, 4, generator=g)
    method = tokred.VoMix(r=0.3)
    alone = method.reduce(tokred.Site(x=x[:, :8], k=k[:, :, :8], prefix=1))
    mask = torch.ones(2, 12, dtype=torch.bool)
    mask[0, 8:] = False
    padded = method.reduce(tokred.Site(x=x.expand(2, -1, -1), k=k.expand(2, -1, -1, -1), prefix=1, mask=mask))
    assert padded.slots == 12 - 3
    assert padded.mask.sum(1).tolist() == [alone.slots, 9]
    assert torch.equal(padded.representative[0][padded.mask[0]], alone.representative[0])
    real = padded.merge(x.expand(2, -1, -1))[0][padded.mask[0]]
    torch.testing.assert_close(real, alone.merge(x[:, :8])[0])
    assert torch.equal(padded.unmerge(padded.merge(x.expand(2, -1, -1))).isfinite().all(), torch.tensor(True))
    torch.testing.assert_close(padded.sizes().sum(1), torch.tensor([8.0, 12.0]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_degenerate_keys_stay_finite_and_ties_go_to_the_lower_index(dtype):
    for k in (torch.zeros(1, 2, 6, 4, dtype=dtype), torch.ones(1, 2, 6, 4, dtype=dtype)):
        step = tokred.VoMix(r=0.34).reduce(tokred.Site(x=torch.ones(1, 6, 3, dtype=dtype), k=k))
        assert step.source.shape == (1, 2)
        assert step.source[0, 0] == 0
        assert step.merge(torch.ones(1, 6, 3, dtype=dtype)).isfinite().all()
        torch.testing.assert_close(step.share.sum(1), torch.ones(1, 2))


@pytest.mark.parametrize(
    ("parameters", "match"),
    [
        ({"r": 0.6}, r"r is the share mixed away and must lie in \[0, 0.5\], got 0.6"),
        ({"r": -0.1}, "got -0.1"),
        ({"r": True}, "got True"),
        ({"tau": 0}, "tau must be a positive number, got 0"),
        ({"tau": float("inf")}, "tau must be a positive number"),
        ({"vote": "sum"}, "vote is 'sum'; allowed are 'weighted', 'count'"),
        ({"prop_attn": True}, "prop_attn needs track_size=True"),
    ],
)
def test_bad_parameters_get_a_clear_error(parameters, match):
    with pytest.raises(ValueError, match=match):
        tokred.make("vomix", **parameters)


def test_token_counts_and_settings():
    n, found = 197, []
    for layer in range(12):
        n = tokred.VoMix().tokens(n, tokred.Place(layer=layer, depth=12, prefix=1))
        found.append(n)
    assert found[0] == 197 - 19
    assert 0.27 < (found[-1] - 1) / 196 < 0.31, "0.9 to the 12th power, but for rounding down"
    method = tokred.VoMix(r=0.2, track_size=True, prop_attn=True)
    assert tokred.from_dict(method.to_dict()) == method
    assert method.proportional
    assert not tokred.VoMix().proportional
