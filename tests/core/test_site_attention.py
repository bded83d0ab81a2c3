"""What a site says of its attention: columns, page rank, other values, and the attention among some tokens alone."""

from __future__ import annotations

import pytest
import torch

import tokred


def make(b=2, h=4, hk=4, n=9, seed=0, **options) -> tuple[tokred.Site, torch.Tensor]:
    """A site and its attention matrices."""
    g = torch.Generator().manual_seed(seed)
    q, k = torch.randn(b, h, n, 6, generator=g), torch.randn(b, hk, n, 6, generator=g)
    scale = options.get("scale") or 6**-0.5
    logits = q @ k.repeat_interleave(h // hk, 1).mT * scale
    if "bias" in options:
        bias = options["bias"]
        logits = logits + (bias[:, None, None] if bias.ndim == 2 else bias[:, :, None])
    if "mask" in options:
        logits = logits.masked_fill(~options["mask"][:, None, None], -torch.inf)
    return tokred.Site(x=torch.zeros(b, n, 1), q=q, k=k, **options), logits.softmax(-1)


def options(kind: str) -> dict:
    g = torch.Generator().manual_seed(1)
    mask = torch.ones(2, 9, dtype=torch.bool)
    mask[0, 6:] = False
    return {
        "plain": {},
        "scale": {"scale": 0.3},
        "bias": {"bias": torch.randn(2, 9, generator=g)},
        "head bias": {"bias": torch.randn(2, 4, 9, generator=g)},
        "mask": {"mask": mask},
    }[kind]


KINDS = ["plain", "scale", "bias", "head bias", "mask"]


@pytest.mark.parametrize("hk", [4, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_columns_page_rank_and_other_values_are_those_of_the_matrix(kind, hk):
    site, a = make(hk=hk, **options(kind))
    real = torch.ones(2, 9) if site.mask is None else site.mask.float()
    start = torch.rand(2, 9)
    torch.testing.assert_close(site.column_scores(start), ((start * real)[:, None, None] @ a).squeeze(2))
    expected = (start * real)[:, None, None].expand(2, 4, 1, 9)
    for _ in range(3):
        expected = expected * real[:, None, None] @ a
    torch.testing.assert_close(site.attention.power(start, 3), expected.squeeze(2))
    torch.testing.assert_close(site.attention.power(start[:, None].expand(2, 4, 9), 3), expected.squeeze(2))
    values = torch.randn(2, 9, 5)
    torch.testing.assert_close(site.attention.attend(values), a @ values.unsqueeze(1))
    heads = torch.randn(2, 4, 9, 3)
    torch.testing.assert_close(site.attention.attend(heads), a @ heads)


@pytest.mark.parametrize("kind", KINDS)
def test_among_some_tokens_the_rows_are_renormalised(kind):
    site, a = make(hk=2, prefix=1, layer=3, depth=7, **options(kind))
    rows = torch.tensor([[0, 2, 3, 5], [0, 1, 7, 8]])
    part = site.among(rows)
    assert (part.prefix, part.layer, part.depth, part.shape) == (1, 3, 7, (2, 4))
    picked = torch.stack([a[i][:, r][:, :, r] for i, r in enumerate(rows)])
    picked = picked / picked.sum(-1, keepdim=True)
    torch.testing.assert_close(part.attention.attend(torch.eye(4).expand(2, 4, 4)), picked)
    weight = torch.rand(2, 4)
    torch.testing.assert_close(part.column_scores(weight), (weight[:, None, None] @ picked).squeeze(2))


def test_among_takes_the_keys_that_attention_uses():
    """Where keys are compared before rotary embedding, attention still is by the rotated ones."""
    site, _ = make()
    rotated = tokred.Site(x=site.x, q=site.q, k=torch.randn(2, 4, 9, 6), attention=site.attention)
    rows = torch.tensor([[0, 2, 3], [4, 5, 6]])
    torch.testing.assert_close(rotated.among(rows).column_scores(), site.among(rows).column_scores())
    torch.testing.assert_close(rotated.attention.power(torch.ones(9), 2), site.attention.power(torch.ones(9), 2))
    some = [one.sample(1, rows[1]) for one in (rotated, site)]
    assert torch.equal(*(one.column_scores() for one in some))
    assert not torch.equal(*(one.k for one in some))


def test_attention_is_made_when_it_is_asked_for():
    given, asked = make(prefix=1)[0].attention, []
    site = tokred.Site(x=torch.zeros(2, 9, 1), attention=lambda: asked.append(1) or given, prefix=1)
    assert asked == []
    assert torch.equal(site.class_attention, given.columns(rows=slice(0, 1)).mean(1))
    assert site.attention is given
    assert asked == [1]
    with pytest.raises(tokred.MissingInputError, match="does not supply 'q'"):
        tokred.Site(x=torch.zeros(2, 9, 1), attention=lambda: None).column_scores()


def test_padding_among_some_tokens():
    site, _ = make()
    rows, mask = torch.tensor([[0, 2, 3, 3], [4, 5, 6, 7]]), torch.tensor([[True, True, True, False], [True] * 4])
    padded = site.among(rows, mask).column_scores()
    one, _ = make()
    alone = one.among(torch.tensor([[0, 2, 3], [4, 5, 6]])).column_scores()
    torch.testing.assert_close(padded[0, :, :3], alone[0])
    assert (padded[0, :, 3] == 0).all()


def test_the_class_token_is_the_first_of_a_prefix_unless_said_otherwise():
    x = torch.zeros(1, 3, 1)
    assert tokred.Site(x=x, prefix=1).class_token
    assert not tokred.Site(x=x).class_token
    assert not tokred.Site(x=x, prefix=2, class_token=False).class_token
    q = torch.randn(1, 1, 3, 2)
    part = tokred.Site(x=x, q=q, k=q, prefix=2, class_token=False).among(torch.tensor([[0, 1]]))
    assert not part.class_token
    with pytest.raises(tokred.MissingInputError, match="does not supply 'q'"):
        tokred.Site(x=x).attention.attend(x)


def test_a_class_token_of_several_rows_looks_where_they_do_on_average():
    q, k = torch.randn(2, 2, 4, 7, 8).unbind(0)
    site = tokred.Site(x=torch.randn(2, 7, 8), q=q, k=k, prefix=3, class_token=3)
    expected = (q[:, :, :3] @ k.transpose(2, 3) / 8**0.5).softmax(-1).mean((1, 2))
    torch.testing.assert_close(site.class_attention, expected)
    assert not site.class_token, "no single row is one"
    torch.testing.assert_close(site.sample(1, torch.arange(7)).class_attention, expected[1:])
    assert site.among(torch.arange(7).expand(2, -1)).class_rows == 3
