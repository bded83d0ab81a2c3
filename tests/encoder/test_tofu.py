"""ToFu: the card's worked examples and laws, and the method on a small model."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import tokred
from tokred.core.matching import mergeable
from tokred.methods.encoder.tofu import choose_switch, linearity

SEVEN = torch.arange(1.0, 8).view(1, 7, 1)


def keys(*degrees: float) -> torch.Tensor:
    """``(1, 1, N, 2)`` unit vectors."""
    angles = torch.tensor(degrees).deg2rad()
    return torch.stack([angles.cos(), angles.sin()], dim=-1)[None, None]


def seven(x: torch.Tensor = SEVEN, layer: int = 0, **options) -> tokred.Site:
    return tokred.Site(x=x, k=keys(0, 10, 12, 90, 95, 40, 33), prefix=1, layer=layer, depth=12, **options)


def pair(**options) -> tokred.Site:
    """Two tokens, [3, 0] and [0, 1], that pair."""
    return tokred.Site(
        x=torch.tensor([[[3.0, 0.0], [0.0, 1.0]]]), k=torch.ones(1, 1, 2, 2), layer=6, depth=12, **options
    )


def test_example_mlerp():
    found = tokred.ToFu(r=1).reduce(pair())
    merged = found.merge(pair().x)[0, 0]
    assert merged.tolist() == pytest.approx([2.846050, 0.948683], abs=1e-6)
    assert merged.norm().item() == pytest.approx(3)
    plain = tokred.ToFu(r=1, mode="mean").reduce(pair()).merge(pair().x)[0, 0]
    assert plain.tolist() == pytest.approx([1.5, 0.5])


def test_sizes_weigh_only_where_asked():
    size = torch.tensor([[1.0, 3.0]])
    x = pair().x
    plain, weighed = (tokred.ToFu(r=1, by_size=b).reduce(pair(sizes=size)) for b in (False, True))
    assert plain.merge(x, size)[0, 0].tolist() == pytest.approx([2.846050, 0.948683], abs=1e-6)
    assert plain.step(x, size)[0][0, 0].tolist() == pytest.approx([2.846050, 0.948683], abs=1e-6)
    assert weighed.merge(x, size)[0, 0].tolist() == pytest.approx([3 / 2**0.5, 3 / 2**0.5], abs=1e-5)
    for found in (plain, weighed):
        assert found.step(x, size)[1].tolist() == [[4]], "what a token stands for is counted either way"
    mean = tokred.ToFu(r=1, mode="mean").reduce(pair(sizes=size))
    assert mean.step(x, size)[0][0, 0].tolist() == pytest.approx([1.5, 0.5])


def test_the_switch():
    x = SEVEN.expand(-1, -1, 2) * torch.tensor([1.0, -2.0])
    early, late = (tokred.ToFu(r=2).reduce(seven(x, layer)) for layer in (5, 6))
    assert (early.mode, late.mode) == ("keep", "mlerp")
    tome = tokred.ToMe(r=2).reduce(seven(x))
    for found in (early, late):
        assert torch.equal(found.index, tome.index), "the matching is ToMe's"
    assert torch.equal(early.merge(x), early.gather(x)), "destinations are left as they are"
    assert early.merge(x)[0, :, 0].tolist() == [1, 7, 2, 4, 6]
    assert late.merge(x)[0, :, 0].tolist() == pytest.approx([1, 7, 3, 5, 6]), "parallel vectors: the longest"
    for switch, layer, mode in ((0, 0, "mlerp"), (12, 11, "keep"), (3, 2, "keep"), (3, 3, "mlerp")):
        assert tokred.ToFu(r=2, switch=switch).reduce(seven(x, layer)).mode == mode


def test_pruned_sources_take_their_destination_s_features():
    found = tokred.ToFu(r=2).reduce(seven())
    restored = found.unmerge(found.merge(SEVEN)).flatten().tolist()
    assert restored == [1, 2, 2, 4, 4, 6, 7]
    assert (found.index >= 0).all()


@pytest.mark.parametrize(("inherit", "sizes"), [(False, [1, 1, 1, 1, 1]), (True, [1, 1, 2, 2, 1])])
def test_destinations_inherit_sizes_where_asked(inherit, sizes):
    found = tokred.ToFu(r=2, inherit=inherit).reduce(seven())
    assert found.sizes().tolist() == [sizes]
    assert found.step(SEVEN)[1].tolist() == [sizes]
    own = torch.arange(1.0, 8).view(1, 7)
    expected = [1, 7, 5, 9, 6] if inherit else [1, 7, 2, 4, 6]
    assert found.sizes(own).tolist() == [expected]
    assert found.merge(SEVEN, own).flatten().tolist() == [1, 7, 2, 4, 6]


@given(st.integers(1, 16), st.integers(0, 2), st.integers(0, 2), st.integers(0, 10), st.integers(0, 2**31))
@settings(deadline=None, max_examples=60)
def test_laws(free, prefix, suffix, r, seed):
    n = free + prefix + suffix
    g = torch.Generator().manual_seed(seed)
    x, k = torch.randn(2, n, 5, generator=g), torch.randn(2, 2, n, 4, generator=g)
    removed = min(r, mergeable(n, prefix, suffix))
    for layer in (0, 1):
        options = {"k": k, "prefix": prefix, "suffix": suffix, "layer": layer, "depth": 2}
        method = tokred.ToFu(r=r)
        found = method.reduce(tokred.Site(x=x, **options))
        assert (
            found.slots
            == n - removed
            == method.tokens(n, tokred.Place(layer=layer, depth=2, prefix=prefix, suffix=suffix))
        )
        y, rows = found.merge(x), found.gather(x)
        assert torch.equal(y[:, :prefix], x[:, :prefix])
        assert torch.equal(y[:, found.slots - suffix :], x[:, n - suffix :])
        if layer == 0:
            assert torch.equal(y, rows)
            continue
        # The length of the longest member, also where the mean has none.
        norms = torch.zeros(2, found.slots).scatter_reduce(1, found.index, x.norm(dim=-1), "amax")
        torch.testing.assert_close(y.norm(dim=-1), norms, rtol=1e-5, atol=1e-6)
        alone = torch.zeros(2, found.slots).scatter_add(1, found.index, torch.ones(2, n)) == 1
        assert torch.equal(y[alone], rows[alone])
        assert torch.equal(found.merge(4 * x), 4 * y), "scaling the inputs scales the output; by a power of two exactly"
        same = x[:, :1].expand(-1, n, -1).contiguous()
        torch.testing.assert_close(found.merge(same), same[:, : found.slots], rtol=1e-6, atol=1e-6)


def test_opposite_members_fall_back_to_the_longest():
    site = tokred.Site(x=torch.tensor([[[2.0, 0.0], [-2.0, 0.0]]]), k=torch.ones(1, 1, 2, 2), layer=1, depth=2)
    assert tokred.ToFu(r=1).reduce(site).merge(site.x).norm().item() == 2


def test_padding_takes_no_part():
    g = torch.Generator().manual_seed(0)
    mask = torch.ones(2, 11, dtype=torch.bool)
    mask[1, 8:] = False
    for layer in (0, 11):
        site = tokred.Site(
            x=torch.randn(2, 11, 3, generator=g), k=torch.randn(2, 1, 11, 4, generator=g), prefix=1, mask=mask,
            layer=layer, depth=12,
        )  # fmt: skip
        found = tokred.ToFu(r=4, inherit=True).reduce(site)
        assert torch.equal(found.mask, mask.gather(1, found.representative))
        assert torch.equal(found.sizes(mask.float()).sum(1), mask.float().sum(1))


def test_compute_of_the_published_settings():
    pytest.importorskip("timm")
    from tests.encoder.tiny_timm import without_weights

    model = without_weights("vit_base_patch16_224")
    for r, gmacs in ((8, 13.10), (12, 10.91), (16, 8.77), (20, 7.13)):
        assert tokred.flops(model, "tofu", (3, 224, 224), r=r).gmacs == pytest.approx(gmacs, abs=5e-3)


# ---------------------------------------------------------------- linearity


def test_linearity_of_known_functions():
    g = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, 5, 4, generator=g), torch.randn(2, 5, 4, generator=g)
    weight = torch.randn(4, 3, generator=g)
    found = linearity(lambda x: x @ weight + 1, a, b)
    assert found.shape == (2, 5)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, torch.ones(2, 5), rtol=1e-5, atol=0)
    # There and back again: the path is twice as long as high, its ends coincide.
    one = torch.ones(1, 1)
    assert linearity(torch.abs, -one, one, points=5).item() == pytest.approx(0)
    # |x| from -1 to 3: three of four steps lead away from where it started.
    assert linearity(torch.abs, -one, 3 * one, points=5).item() == pytest.approx(2 / 4)
    # A quarter of a circle by many points: chord over arc.
    circle = linearity(lambda t: torch.cat([t.cos(), t.sin()], -1), 0 * one, one * torch.pi / 2, points=400)
    assert circle.item() == pytest.approx(2**0.5 / (torch.pi / 2), rel=1e-4)
    assert linearity(torch.zeros_like, a, b).tolist() == [[1] * 5] * 2, "constant"
    assert ((linearity(lambda x: (3 * x).sin(), a, b) > 0) & (linearity(lambda x: (3 * x).sin(), a, b) < 1)).all()
    assert linearity(lambda x: x * 2, a.half(), b.half()).dtype == torch.float32


def test_linearity_refuses():
    with pytest.raises(ValueError, match=r"one shape, got \(2, 3\) and \(2, 4\)"):
        linearity(torch.abs, torch.zeros(2, 3), torch.zeros(2, 4))
    with pytest.raises(ValueError, match="points must be at least 3, got 2"):
        linearity(torch.abs, torch.zeros(2, 3), torch.zeros(2, 3), points=2)


def test_the_switch_is_the_first_linear_block():
    assert choose_switch([0.2, 0.5, 0.8, 0.7, 0.9], 0.6) == 2
    assert choose_switch([0.2, 0.5], 0.5) == 2, "above, not at"
    assert choose_switch([0.9], 0.5) == 0
    with pytest.raises(ValueError, match=r"threshold must lie in \[0, 1\], got 2"):
        choose_switch([0.5], 2)


# ---------------------------------------------------------------- parameters, models


@pytest.mark.parametrize(
    ("parameters", "match"),
    [
        ({"switch": -1}, "switch must be a non-negative integer or None, got -1"),
        ({"switch": 2.0}, "switch must be"),
        ({"switch": True}, "switch must be"),
        ({"mode": "max"}, "mode is 'max'; allowed are 'mlerp', 'mean'"),
        ({"metric": "y"}, "metric is 'y'"),
        ({"r": -3}, "r must not be negative"),
    ],
)
def test_bad_parameters(parameters, match):
    with pytest.raises(ValueError, match=match):
        tokred.ToFu(**parameters)


def test_check():
    with pytest.raises(ValueError, match="switch is 13, but the model has 12 blocks"):
        tokred.ToFu(switch=13).check(12)
    tokred.ToFu(switch=12).check(12)


@pytest.mark.parametrize("family", ["vit", "vit-mean", "vit-registers (DINOv2)", "dinov3 (rope, registers)"])
@pytest.mark.parametrize("options", [{}, {"by_size": True, "inherit": True, "prop_attn": True}])
def test_on_a_model(family, options):
    pytest.importorskip("timm")
    from tests.encoder.tiny_timm import build, images
    from tokred.adapters.encoder.host import shared_of

    model, x = build(family), images(3)
    with torch.no_grad():
        plain = model(x)
        assert torch.equal(tokred.apply(model, "tofu", r=0, **options)(x), plain)
        tokred.apply(model, "tofu", r=4, **options)
        y = model(x)
        total = tokred.trace(model)
        steps = shared_of(model)[0][2].last().steps
        assert [step.mode for step in steps] == ["keep", "mlerp", "mlerp"]
        assert (total.index >= 0).all(), "every patch still has a token"
        for i in range(3):
            torch.testing.assert_close(model(x[i : i + 1]), y[i : i + 1], rtol=1e-4, atol=2e-5)
        assert torch.equal(tokred.remove(model)(x), plain)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_on_a_model(dtype):
    pytest.importorskip("timm")
    from tests.encoder.tiny_timm import build, images

    model, x = tokred.apply(build("vit").to(dtype), "tofu", r=5), images().to(dtype)
    with torch.no_grad():
        y = model(x)
        assert y.dtype == dtype
        assert y.isfinite().all()
        assert model(torch.zeros_like(x)).isfinite().all()
