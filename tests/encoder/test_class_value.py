"""``class_value``: class attention times value norm, the score that ATS and PPT share."""

from __future__ import annotations

import pytest
import torch

import tokred
from tokred.encoder.importance import class_value


def heads(b: int = 2, h: int = 3, n: int = 9, d: int = 4, seed: int = 0, kv: int | None = None):
    g = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(b, heads_, n, d, generator=g) for heads_ in (h, kv or h, kv or h))
    return q, k, v


def direct(q, k, v, free: slice, mask=None):
    """From the whole attention matrix, in float64."""
    q, k, v = q.double(), k.double(), v.double()
    k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], dim=1) for t in (k, v))
    logits = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
    if mask is not None:
        logits = logits.masked_fill(~mask[:, None, None], -torch.inf)
    a = logits.softmax(-1)[:, :, 0].sum(1)
    raw = (a * v.transpose(1, 2).flatten(2).norm(dim=-1))[:, free]
    if mask is not None:
        raw = raw * mask[:, free]
    return (raw / raw.sum(1, keepdim=True)).float()


@pytest.mark.parametrize(("prefix", "suffix"), [(1, 0), (2, 0), (5, 0), (1, 2), (8, 0)])
def test_the_class_row_alone_gives_what_the_whole_matrix_gives(prefix, suffix):
    q, k, v = heads()
    found = class_value(tokred.Site(q=q, k=k, v=v, prefix=prefix, suffix=suffix))
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, direct(q, k, v, slice(prefix, 9 - suffix)), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found.sum(1), torch.ones(2))


def test_grouped_value_heads_count_once_for_every_query_head():
    q, k, v = heads(h=6, kv=2)
    found = class_value(tokred.Site(q=q, k=k, v=v, prefix=1))
    torch.testing.assert_close(found, direct(q, k, v, slice(1, 9)), rtol=1e-5, atol=1e-6)


def test_padding_scores_nothing_and_changes_nothing():
    q, k, v = heads()
    mask = torch.tensor([[True] * 9, [True] * 6 + [False] * 3])
    found = class_value(tokred.Site(q=q, k=k, v=v, prefix=1, mask=mask))
    torch.testing.assert_close(found, direct(q, k, v, slice(1, 9), mask), rtol=1e-5, atol=1e-6)
    assert (found[1, 5:] == 0).all()
    alone = class_value(tokred.Site(q=q[1:, :, :6], k=k[1:, :, :6], v=v[1:, :, :6], prefix=1))
    torch.testing.assert_close(found[1:, :5], alone, rtol=1e-6, atol=1e-7)
    # Whatever stands in the padding.
    v[1, :, 6:] = torch.nan
    attention = torch.rand(2, 9)
    given = class_value(tokred.Site(x=v[:, 0], v=v, class_attention=attention, prefix=1, mask=mask))
    assert given.isfinite().all()
    assert (given[1, 5:] == 0).all()


@pytest.mark.parametrize("factor", [1e-3, 3.0, 1e4])
def test_a_common_factor_changes_nothing(factor):
    q, k, v = heads()
    scores = class_value(tokred.Site(q=q, k=k, v=v, prefix=1))
    scaled = class_value(tokred.Site(q=q, k=k, v=v * factor, prefix=1))
    torch.testing.assert_close(scaled, scores, rtol=1e-5, atol=0)


def test_no_value_at_all_means_all_alike():
    mask = torch.tensor([[True] * 5, [True] * 4 + [False]])
    site = tokred.Site(v=torch.zeros(2, 1, 5, 2), class_attention=torch.full((2, 5), 0.2), prefix=1, mask=mask)
    assert class_value(site).tolist() == [[0.25] * 4, [pytest.approx(1 / 3)] * 3 + [0]]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_any_type_of_values_is_scored_in_float32(dtype):
    v = heads(n=40)[2].to(dtype)
    attention = torch.rand(2, 40, generator=torch.Generator().manual_seed(0))
    found = class_value(tokred.Site(v=v, class_attention=attention, prefix=1))
    assert found.dtype == torch.float32
    raw = (attention.double() * v.double().transpose(1, 2).flatten(2).norm(dim=-1))[:, 1:]
    torch.testing.assert_close(found, (raw / raw.sum(1, keepdim=True)).float(), rtol=1e-6, atol=0)
    big = class_value(tokred.Site(v=torch.full_like(v, 300), class_attention=attention, prefix=1))
    assert big.isfinite().all(), "squares overflow half precision"


def test_carries_no_gradient():
    q, k, v = (t.requires_grad_() for t in heads())
    assert not class_value(tokred.Site(q=q, k=k, v=v, prefix=1)).requires_grad


def test_says_what_is_missing():
    with pytest.raises(tokred.MissingInputError, match="'v'"):
        class_value(tokred.Site(class_attention=torch.ones(1, 4), prefix=1))
