"""LTP: the card's worked examples and laws, and the method on small models."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import tokred
from tests.encoder.attention_matrices import matrix_site
from tokred.methods.encoder.ltp import base_threshold, mean_attention, soft_mask

ONE = [[0.7, 0.1, 0.1, 0.1], [0.4, 0.4, 0.1, 0.1], [0.5, 0.2, 0.2, 0.1], [0.25, 0.25, 0.25, 0.25]]
TWO = [[0.6, 0.2, 0.1, 0.1], [0.3, 0.5, 0.1, 0.1], [0.4, 0.2, 0.3, 0.1], [0.1, 0.2, 0.3, 0.4]]
PADDED = torch.tensor([[True, True, True, False]])


def site(**more) -> tokred.Site:
    return matrix_site(ONE, TWO, **more)


def kept(found: tokred.Reduction) -> list[list[int]]:
    mask = torch.ones_like(found.representative, dtype=torch.bool) if found.mask is None else found.mask
    return [row[m].tolist() for row, m in zip(found.representative, mask, strict=True)]


def test_worked_example():
    score = mean_attention(site())
    assert score[0].tolist() == pytest.approx([0.40625, 0.25625, 0.18125, 0.15625], abs=1e-6)
    theta = torch.tensor(0.17, requires_grad=True)
    soft = torch.sigmoid((score - theta) / 0.01)
    assert soft_mask(score, 0.17, 0.01)[0].tolist() == pytest.approx([1.0, 0.9998, 0.7549, 0.2018], abs=5e-5)
    soft.mean().backward()
    assert float(soft.detach().mean()) == pytest.approx(0.7391, abs=5e-5)
    assert float(theta.grad) == pytest.approx(-8.6571, abs=5e-4)
    rows = torch.tensor([[1.0, 2], [3, 4], [5, 6], [7, 8]]) * soft_mask(score, 0.17, 0.01)[0, :, None]
    expected = [1.0, 2.0, 2.9995, 3.9993, 3.7746, 4.5295, 1.4127, 1.6145]
    assert rows.flatten().tolist() == pytest.approx(expected, abs=1e-4)
    assert kept(tokred.LTP(thresholds=[0.17]).reduce(site())) == [[0, 1, 2]]


def test_worked_example_with_padding():
    """By real queries, and as the released code has it."""
    score = mean_attention(site(mask=PADDED))
    assert score[0].tolist() == pytest.approx([0.5370, 0.2963, 0.1667, 0], abs=5e-5)
    assert float(score.sum()) == pytest.approx(1)
    official = score * 3 / 4
    assert official[0].tolist() == pytest.approx([0.4028, 0.2222, 0.125, 0], abs=5e-5)
    assert kept(tokred.LTP(thresholds=[0.2]).reduce(site(mask=PADDED))) == [[0, 1]]
    assert kept(tokred.LTP(thresholds=[0.23]).reduce(site(mask=PADDED))) == [[0, 1]]
    assert kept(tokred.LTP(thresholds=[0.23], padded=4, min_keep=1).reduce(site(mask=PADDED))) == [[0]]


def test_base_thresholds():
    found = [base_threshold(0.01, layer, 12) for layer in (0, 3, 6, 9, 11)]
    assert found == pytest.approx([0, 0.0025, 0.005, 0.0075, 0.00917], abs=5e-6)
    assert [tokred.LTP().theta(layer, 12) for layer in (0, 3, 6, 9, 11)] == found
    assert not tokred.LTP().acts(50, tokred.Place(layer=0, depth=12))
    assert tokred.LTP().acts(50, tokred.Place(layer=1, depth=12))


@given(st.integers(2, 7), st.integers(0, 4), st.floats(0.01, 0.4), st.integers(0, 10_000))
@settings(max_examples=40, deadline=None)
def test_padding_changes_no_decision_and_scores_are_one_in_sum(n, more, theta, seed):
    g = torch.Generator().manual_seed(seed)
    a = torch.rand(1, 2, n, n, generator=g, dtype=torch.float64).softmax(-1)
    wide = torch.rand(1, 2, n + more, n + more, generator=g, dtype=torch.float64)
    wide[:, :, :n, :n] = a
    wide /= wide.sum(-1, keepdim=True)
    mask = torch.arange(n + more)[None] < n
    method = tokred.LTP(thresholds=[theta], min_keep=1)
    padded = matrix_site(*wide[0].tolist(), mask=mask)
    alone = matrix_site(*a[0].tolist())
    # Renormalised over the real keys, the padded matrix is the other.
    assert torch.allclose(mean_attention(padded)[:, :n], mean_attention(alone), atol=1e-5)
    assert float(mean_attention(padded).sum()) == pytest.approx(1, abs=1e-5)
    assert kept(method.reduce(padded)) == kept(method.reduce(alone))


def test_ties_the_floor_and_the_least():
    even = [[[0.25] * 4] * 4]
    assert kept(tokred.LTP(thresholds=[0.25 - 1e-6]).reduce(matrix_site(*even)))[0] == [0, 1, 2, 3]
    assert kept(tokred.LTP(thresholds=[0.9]).reduce(matrix_site(*even))) == [[0]]
    assert kept(tokred.LTP(thresholds=[0.9], min_keep=3).reduce(matrix_site(*even))) == [[0, 1, 2]]
    assert kept(tokred.LTP(thresholds=[0.9]).reduce(matrix_site(*even, prefix=1, suffix=1))) == [[0, 1, 3]]
    nothing = [[[1.0, 0, 0], [1.0, 0, 0], [1.0, 0, 0]]]
    assert kept(tokred.LTP(thresholds=[1e-9]).reduce(matrix_site(*nothing))) == [[0]], "below the floor"


def test_protected_tokens_stay_whatever_they_receive():
    shunned = [[[0.01, 0.33, 0.33, 0.33]] * 4]
    assert kept(tokred.LTP(thresholds=[0.3]).reduce(matrix_site(*shunned, prefix=1))) == [[0, 1, 2, 3]]
    assert kept(tokred.LTP(thresholds=[0.3], min_keep=1).reduce(matrix_site(*shunned))) == [[1, 2, 3]]


def test_nothing_below_the_threshold_is_the_identity():
    assert tokred.LTP(thresholds=[0.1]).reduce(site()).trivial


def test_samples_keep_different_numbers():
    both = torch.tensor([[ONE, TWO], [[[0.25] * 4] * 4] * 2]).tolist()
    found = tokred.LTP(thresholds=[0.17]).reduce(matrix_site(*both))
    assert kept(found) == [[0, 1, 2], [0, 1, 2, 3]]


def test_refusals():
    with pytest.raises(ValueError, match=r"theta_final must lie in \[0, 1\], got 1.5"):
        tokred.LTP(theta_final=1.5)
    with pytest.raises(ValueError, match=r"thresholds\[1\] must lie in"):
        tokred.LTP(thresholds=[0.1, -0.1])
    with pytest.raises(ValueError, match="min_keep must be an integer of at least 1, got 0"):
        tokred.LTP(min_keep=0)
    with pytest.raises(ValueError, match="thresholds has 2 entries, but the model has 12"):
        tokred.LTP(thresholds=[0.0, 0.1]).check(12)
    again = tokred.from_dict(tokred.LTP(thresholds=[0.0, 0.1], padded=128).to_dict())
    assert again == tokred.LTP(thresholds=(0.0, 0.1), padded=128)


# ---------------------------------------------------------------- in models


def test_a_vit_prunes_more_with_larger_thresholds_and_nothing_with_none():
    from tests.encoder.tiny_timm import build, images

    model, x = build("vit"), images()
    depth, found = len(model.blocks), []
    with torch.no_grad():
        y = model(x)
        for theta in (0.0, 0.036, 0.04):
            tokred.apply(model, "ltp", thresholds=[0.0] + [theta] * (depth - 1))
            z = model(x)
            assert torch.equal(z, y) == (theta == 0)
            found.append(sum(layer.tokens_out for layer in tokred.report(model).layers))
            for i in range(len(x)):
                torch.testing.assert_close(model(x[i : i + 1]), z[i : i + 1], rtol=1e-4, atol=2e-5)
    assert found[0] > found[1] > found[2]
