"""ATS: the card's worked examples and laws, and the method on a small model."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import tokred
from tokred.methods.encoder.ats import sample

EXAMPLE = [0.05, 0.40, 0.02, 0.25, 0.18, 0.10]
PEAKED = [0.01, 0.02, 0.02, 0.05, 0.10, 0.80]


def site(*scores: list[float], prefix=1, suffix=0, **options) -> tokred.Site:
    """Patches with these scores, behind a class token."""
    s = torch.tensor(scores)
    s = torch.nn.functional.pad(s, (prefix, suffix), value=0.3)
    x = torch.arange(s.shape[1], dtype=torch.float32).view(1, -1, 1).expand(len(scores), -1, -1)
    v = torch.ones(len(scores), 1, s.shape[1], 1)
    return tokred.Site(x=x, v=v, class_attention=s, prefix=prefix, suffix=suffix, **options)


def patches(found: tokred.Reduction, prefix=1, suffix=0) -> list[list[int]]:
    """The kept patches of each sample, in their order."""
    rows = found.representative[:, prefix : found.slots - suffix] - prefix
    mask = torch.ones_like(found.representative, dtype=torch.bool) if found.mask is None else found.mask
    return [row[m].tolist() for row, m in zip(rows, mask[:, prefix : found.slots - suffix], strict=True)]


def test_example():
    found = tokred.ATS(n=7, blocks=(0,)).reduce(site(EXAMPLE))
    assert patches(found) == [[0, 5, 4, 3, 1]]
    assert found.mask is None
    assert found.index.tolist() == [[0, 1, 5, -1, 4, 3, 2]]
    order, chosen = sample(torch.tensor([EXAMPLE]), 6, 6)
    assert order.tolist() == [[2, 0, 5, 4, 3, 1]]
    assert chosen.tolist() == [[False, True, True, True, True, True]]


def test_example_with_peaked_scores():
    assert patches(tokred.ATS(n=7).reduce(site(PEAKED))) == [[1, 4, 5]]


def test_uneven_batch():
    found = tokred.ATS(n=7).reduce(site(EXAMPLE, PEAKED))
    assert patches(found) == [[0, 5, 4, 3, 1], [1, 4, 5]]
    assert found.mask is not None
    assert found.mask.tolist() == [[True] * 6, [True] * 4 + [False] * 2]
    assert ((found.representative >= 0) & (found.representative < 7)).all()
    assert (found.representative[:, 1:] >= 1).all(), "padding repeats a patch, never a protected row"
    assert found.sizes().tolist() == [[1] * 6, [1, 1, 1, 1, 0, 0]]


def test_padding_does_not_change_the_sample():
    """The authors' code gives patches 5, 4, 3, 1, 2 here: padding of score 0 takes the place of the lowest score."""
    mask = torch.tensor([[True] * 7 + [False] * 2])
    assert patches(tokred.ATS(n=7).reduce(site([*EXAMPLE, 0.0, 0.0], mask=mask))) == [[0, 5, 4, 3, 1]]
    # Nor does what stands there, nor where it stands.
    assert patches(tokred.ATS(n=7).reduce(site([*EXAMPLE, 0.9, 0.3], mask=mask))) == [[0, 5, 4, 3, 1]]
    inside = torch.tensor([[True, False, True, True, True, False, True, True, True]])
    moved = [0.5, 0.05, 0.40, 0.02, 0.7, 0.25, 0.18, 0.10]
    assert patches(tokred.ATS(n=7).reduce(site(moved, mask=inside))) == [[1, 7, 6, 5, 2]]


@pytest.mark.parametrize("share", [0.25, 0.5, 0.75, 1.0])
def test_a_share_counts_the_image_s_own_tokens(share):
    g = torch.Generator().manual_seed(3)
    short, long = torch.rand(20, generator=g).tolist(), torch.rand(31, generator=g).tolist()
    mask = torch.ones(2, 32, dtype=torch.bool)
    mask[1, 21:] = False
    together = patches(tokred.ATS(n=share).reduce(site(long, [*short, *[0.5] * 11], mask=mask)))
    alone = [*patches(tokred.ATS(n=share).reduce(site(long))), *patches(tokred.ATS(n=share).reduce(site(short)))]
    assert together == alone
    for kept, count in zip(together, (32, 21), strict=True):
        assert 1 <= len(kept) <= max(8, round(share * count)) - 1


def test_levels_follow_the_length_that_the_model_started_with():
    """Without a cap a late block, which has fewer tokens left, still reads as many levels."""
    g = torch.Generator().manual_seed(0)
    scores = torch.rand(40, generator=g).tolist()
    few = patches(tokred.ATS().reduce(site(scores)))
    many = patches(tokred.ATS().reduce(site(scores, length=197)))
    assert len(few[0]) < len(many[0]) <= 39
    assert many == patches(tokred.ATS(n=197).reduce(site(scores)))


def scored(b: int, t: int, seed: int, power: float) -> torch.Tensor:
    s = torch.rand(b, t, generator=torch.Generator().manual_seed(seed)) ** power
    return s / s.sum(1, keepdim=True)


@given(st.integers(1, 3), st.integers(2, 40), st.integers(1, 60), st.floats(0.1, 12), st.integers(0, 2**31))
@settings(deadline=None, max_examples=80)
def test_every_level_falls_on_its_nearest_token(b, t, levels, power, seed):
    scores = scored(b, t, seed, power)
    order, chosen = sample(scores, levels, levels)
    assert torch.equal(order, scores.argsort(dim=1, stable=True))
    # By the definition, in float64, with the distance of every level to every token.
    cdf = scores.double().gather(1, order).cumsum(1)
    f = (cdf - cdf[:, :1]) / (cdf[:, -1:] - cdf[:, :1])
    for row, picked in zip(f, chosen, strict=True):
        first = row[row > 0].min()
        y = torch.linspace(0, 1, levels, dtype=torch.float64) * (1 - first) + first if levels > 1 else row[-1:]
        distance = (row[None] - y[:, None]).abs()  # [levels, T]
        near = distance <= distance.min(1, keepdim=True).values + 1e-6
        assert near[:, picked].any(1).all(), "no level without its token"
        assert near.any(0)[picked].all(), "no token without a level"
    assert chosen[:, -1].all(), "the top score is always in the sample"
    assert not chosen[:, 0].any(), "no level reaches the lowest score"
    assert (chosen.sum(1) <= min(levels, t - 1)).all()


@given(st.integers(2, 30), st.integers(0, 10), st.integers(1, 40), st.integers(0, 2**31))
@settings(deadline=None, max_examples=40)
def test_a_sample_does_not_depend_on_padding_or_scale(t, padding, levels, seed):
    scores = scored(2, t, seed, 3)
    mask = torch.ones(2, t + padding + 1, dtype=torch.bool)
    mask[:, t + 1 :] = False
    method = tokred.ATS(n=levels + 1, blocks=(0,))
    plain = patches(method.reduce(site(*scores.tolist())))
    rest = torch.rand(2, padding)
    assert patches(method.reduce(site(*torch.cat([scores, rest], 1).tolist(), mask=mask))) == plain
    assert patches(method.reduce(site(*(scores * 4).tolist()))) == plain
    assert patches(method.reduce(site(*scores.flip(0).tolist()))) == plain[::-1]
    count = method.reduce(site(*scores.tolist())).slots
    assert count <= method.tokens(t + 1, tokred.Place(layer=0, depth=1, prefix=1))


def test_protected_tokens():
    found = tokred.ATS(n=10).reduce(site(EXAMPLE, PEAKED, prefix=3, suffix=1))
    assert patches(found, 3, 1) == [[0, 5, 4, 3, 1], [1, 4, 5]], "n counts all protected tokens: six levels again"
    assert found.representative[:, :3].tolist() == [[0, 1, 2]] * 2
    assert found.representative[:, -1].tolist() == [9] * 2
    assert found.mask is not None
    assert found.mask[:, -1].all()


def test_degenerate_scores():
    # No information at all: evenly spread.
    assert patches(tokred.ATS(n=5).reduce(site([0.0] * 5))) == [[1, 2, 3, 4]]
    # One patch has everything: nothing else is reached.
    assert patches(tokred.ATS(n=9).reduce(site([0.0, 0.0, 1.0, 0.0]))) == [[2]]
    # Equal scores: lower positions first.
    assert patches(tokred.ATS(n=3).reduce(site([0.25] * 4))) == [[1, 3]]
    # One level.
    assert patches(tokred.ATS(n=2).reduce(site(EXAMPLE))) == [[1]]
    # A sample of one patch among longer ones.
    mask = torch.tensor([[True] * 7, [True, True] + [False] * 5])
    assert patches(tokred.ATS(n=7).reduce(site(EXAMPLE, EXAMPLE, mask=mask))) == [[0, 5, 4, 3, 1], [0]]
    assert tokred.ATS().reduce(site([1.0])).trivial
    assert tokred.ATS().reduce(tokred.Site(x=torch.zeros(2, 1, 3), prefix=1)).trivial


def test_where_it_acts_and_how_many_it_leaves_at_most():
    method = tokred.ATS()
    assert [i for i in range(12) if method.acts(197, tokred.Place(layer=i, depth=12, prefix=1))] == list(range(3, 12))
    assert not method.acts(2, tokred.Place(layer=5, depth=12, prefix=1))
    assert method.tokens(197, tokred.Place(layer=3, depth=12, prefix=1)) == 196
    assert tokred.ATS(n=100).tokens(197, tokred.Place(layer=3, depth=12, prefix=1)) == 100
    assert tokred.ATS(n=0.5).tokens(197, tokred.Place(layer=3, depth=12, prefix=1)) == round(98.5)
    assert tokred.ATS(n=0.01).tokens(197, tokred.Place(layer=3, depth=12, prefix=1)) == 8, "a share leaves at least 8"
    listed = tokred.ATS(n=[None, 5, 0.5], blocks=(1, 2))
    assert [listed.tokens(21, tokred.Place(layer=i, depth=3, prefix=1)) for i in range(3)] == [21, 5, 10]
    listed.check(3)
    with pytest.raises(ValueError, match="n has 3 entries, but the model has 12 blocks"):
        listed.check(12)
    with pytest.raises(ValueError, match=r"blocks names \[12\]"):
        tokred.ATS(blocks=(12,)).check(12)


@pytest.mark.parametrize("wrong", [0, 1, -3, True, 1.5, 0.0, "8"])
def test_bad_counts(wrong):
    with pytest.raises(ValueError, match=r"n must be None, an integer of at least 2, or a share .a float. in \(0, 1\]"):
        tokred.ATS(n=wrong)
    with pytest.raises(ValueError, match=r"n\[1\] must be None"):
        tokred.ATS(n=[8, wrong])


FAMILIES = [
    "vit", "vit-registers (DINOv2)", "deit-distilled", "vit-parallel-scaling", "vit-mean-with-class (MAE)",
    "eva02 (rope, swiglu)", "rope-mixed", "beit (own bias)",
]  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("n", [None, 0.7])
def test_on_a_model_every_image_is_as_it_is_alone(family, n):
    pytest.importorskip("timm")
    from tests.encoder.tiny_timm import build, images

    model, x = build(family), images(4)
    with torch.no_grad():
        plain = model(x)
        assert torch.equal(tokred.apply(model, "ats", blocks=())(x), plain)
        tokred.apply(model, "ats", n=n)
        y = model(x)
        assert y.isfinite().all()
        total = tokred.trace(model)
        count = (total.index >= 0).sum(1)
        if n is None:
            assert count.min() < count.max(), "the count follows the image"
        assert total.slots == count.max()
        counted = tokred.flops(model, "ats", tuple(x.shape), n=n).tokens
        assert all(row.tokens_out <= at_most for row, at_most in zip(tokred.report(model).layers, counted, strict=True))
        for i in range(4):
            torch.testing.assert_close(model(x[i : i + 1]), y[i : i + 1], rtol=1e-4, atol=2e-5)
            assert torch.equal(tokred.trace(model).index >= 0, total.index[i : i + 1] >= 0)
        assert torch.equal(tokred.remove(model)(x), plain)


def test_selecting_rows_of_attention_is_pruning_after_it():
    """A kept token gathers from all tokens of its block: the block by hand, on the whole sequence, then cut."""
    pytest.importorskip("timm")
    from tests.encoder.tiny_timm import build, images

    model, x = build("vit"), images(1)
    tokred.apply(model, "ats", blocks=(2,))
    with torch.no_grad():
        y = model(x)
        kept = tokred.trace(model).representative[0]
        tokred.remove(model)
        z = model.norm_pre(model._pos_embed(model.patch_embed(x)))
        z = model.blocks[1](model.blocks[0](z))
        last = model.blocks[2]
        z = (z + last.attn(last.norm1(z)))[:, kept]
        z = z + last.mlp(last.norm2(z))
        torch.testing.assert_close(y, model.forward_head(model.norm(z)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_on_a_model(dtype):
    pytest.importorskip("timm")
    from tests.encoder.tiny_timm import build, images

    model, x = tokred.apply(build("vit").to(dtype), "ats"), images().to(dtype)
    with torch.no_grad():
        y = model(x)
        assert y.dtype == dtype
        assert y.isfinite().all()
        assert model(torch.zeros_like(x)).isfinite().all(), "all images alike"


def test_trains():
    pytest.importorskip("timm")
    from tests.encoder.tiny_timm import build, images

    model = tokred.apply(build("vit").train(), "ats")
    model(images()).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.slow
def test_compiled_batches_are_padded_to_the_bound_and_equal():
    pytest.importorskip("timm")
    from tests.encoder.tiny_timm import build, images

    model, x = tokred.apply(build("vit"), "ats", n=12), images()
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-5)
