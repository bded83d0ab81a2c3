"""PPT: the card's worked examples and laws, and the method on a small model."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import tokred
from tokred.core.matching import mergeable
from tokred.encoder.importance import class_value

INF = math.inf
X = torch.arange(1.0, 7).view(1, 6, 1)
FLAT = [0.30, 0.14, 0.14, 0.14, 0.14, 0.14]
PEAKED = [0.10, 0.45, 0.25, 0.10, 0.06, 0.04]


def keys(*degrees: float) -> torch.Tensor:
    """``(1, 1, N, 2)`` unit vectors."""
    angles = torch.tensor(degrees).deg2rad()
    return torch.stack([angles.cos(), angles.sin()], dim=-1)[None, None]


def example(**options) -> tokred.Site:
    """Two images of a class token and five patches."""
    norms = torch.tensor([[1.0] * 6, [1, 1, 2, 1, 1, 1]]).view(2, 1, 6, 1)
    return tokred.Site(
        x=X.expand(2, -1, -1),
        k=keys(0, 10, 12, 90, 95, 40).expand(2, -1, -1, -1),
        v=norms,
        class_attention=torch.tensor([FLAT, PEAKED]),
        prefix=1,
        **options,
    )


def random_site(b=3, n=12, prefix=1, suffix=0, seed=0, **options) -> tokred.Site:
    g = torch.Generator().manual_seed(seed)
    q, k, v = (2 * torch.randn(b, 2, n, 4, generator=g) for _ in range(3))
    return tokred.Site(x=torch.randn(b, n, 3, generator=g), q=q, k=k, v=v, prefix=prefix, suffix=suffix, **options)


def test_example_scores_and_spread():
    scores = class_value(example())
    assert scores[0].tolist() == pytest.approx([0.2] * 5)
    assert scores[1].tolist() == pytest.approx([0.391304, 0.434783, 0.086957, 0.052174, 0.034783], abs=1e-6)
    assert scores.var(dim=1).tolist() == pytest.approx([0, 0.038412], abs=1e-6)
    assert tokred.PPT(threshold=0.01).prunes(scores).tolist() == [False, True]


def test_example_one_image_pools_and_one_prunes():
    r = tokred.PPT(r=2, threshold=0.01, blocks=(0,)).reduce(example())
    x = X.expand(2, -1, -1)
    assert r.merge(x)[0].flatten().tolist() == pytest.approx([1, 2.5, 4.5, 6])
    assert r.sizes()[0].tolist() == [1, 2, 2, 1]
    assert r.merge(x)[1].flatten().tolist() == [1, 3, 2, 4], "class, patch 2, patch 1, patch 3"
    assert r.sizes()[1].tolist() == [1, 1, 1, 1]
    assert r.groups() == [[[0], [1, 2], [3, 4], [5]], [[0], [2], [1], [3]]]
    assert r.index[1].tolist() == [0, 2, 1, 3, -1, -1]


def test_kept_tokens_keep_their_sizes_and_pruned_sizes_are_lost():
    size = torch.tensor([[1.0, 2, 3, 4, 5, 6]]).expand(2, -1)
    r = tokred.PPT(r=2, threshold=0.01, blocks=(0,)).reduce(example(sizes=size))
    assert r.sizes(size).tolist() == [[1, 5, 9, 6], [1, 3, 2, 4]]
    assert r.merge(X.expand(2, -1, -1), size)[0].flatten().tolist() == pytest.approx([1, 13 / 5, 41 / 9, 6])
    assert r.step(X.expand(2, -1, -1), size)[1].tolist() == r.sizes(size).tolist()


def test_sorted_pruning_keeps_the_order_of_the_sequence():
    r = tokred.PPT(r=2, threshold=0, sort=True).reduce(example())
    assert r.merge(X.expand(2, -1, -1))[1].flatten().tolist() == [1, 2, 3, 4]


@pytest.mark.parametrize(("share", "variance", "prunes"), [(0.12, 6.8047e-5, False), (0.125, 7.4099e-5, True)])
def test_one_dominant_patch(share, variance, prunes):
    n = 196
    scores = torch.full((1, n), (1 - share) / (n - 1))
    scores[0, 17] = share
    assert scores.var(dim=1).item() == pytest.approx(variance, rel=1e-4)
    assert tokred.PPT().prunes(scores).tolist() == [prunes]
    assert tokred.PPT(relative=True).prunes(scores).tolist() == [prunes], "the same switch at 196 patches"


def test_the_plain_variance_grows_as_tokens_go_and_the_relative_one_does_not():
    def scores(n: int) -> torch.Tensor:
        s = torch.ones(1, n)
        s[:, : n // 2] = 4.0  # the same relative spread for every even n
        return s / s.sum()

    assert [tokred.PPT().prunes(scores(n)).item() for n in (196, 146, 96, 48)] == [False, False, False, True]
    assert [tokred.PPT(relative=True).prunes(scores(n)).item() for n in (196, 146, 96, 48)] == [False] * 4
    squares = [(scores(n).var() * n * n).item() for n in (196, 48)]
    assert squares[0] == pytest.approx(squares[1], rel=0.02)


def test_half_precision_does_not_move_the_decision():
    """At the threshold the variance is near the smallest normal number of float16: it is taken in float32."""
    n, decisions = 196, []
    for share in (0.115, 0.120, 0.1216, 0.1218, 0.125, 0.13):
        attention = torch.full((1, n + 1), (1 - share) / (n - 1))
        attention[0, 5] = share
        v = torch.ones(1, 1, n + 1, 1)
        row = []
        for dtype in (torch.float64, torch.float32, torch.float16):
            site = tokred.Site(v=v.to(dtype), class_attention=attention, prefix=1)
            row.append(tokred.PPT().prunes(class_value(site)).item())
        decisions.append(row)
    assert all(len(set(row)) == 1 for row in decisions)
    assert {row[0] for row in decisions} == {True, False}


def test_threshold_zero_prunes_always():
    site = random_site()
    r = tokred.PPT(r=4, threshold=0).reduce(site)
    order = class_value(site).argsort(dim=1, descending=True, stable=True)[:, :7] + 1
    assert torch.equal(r.representative[:, 1:], order)
    assert (r.representative[:, 0] == 0).all()
    assert (r.target == -1).all()
    assert torch.equal(r.merge(site.x), site.x.gather(1, r.representative.unsqueeze(-1).expand(-1, -1, 3)))


def test_threshold_infinity_is_tome():
    site = random_site(sizes=torch.rand(3, 12) + 1)
    r, tome = tokred.PPT(r=4, threshold=INF).reduce(site), tokred.ToMe(r=4).reduce(site)
    assert torch.equal(r.index, tome.index)
    torch.testing.assert_close(r.merge(site.x, site.sizes), tome.merge(site.x, site.sizes))
    torch.testing.assert_close(r.sizes(site.sizes), tome.sizes(site.sizes))


@given(
    st.integers(1, 20), st.integers(1, 4), st.integers(0, 3), st.integers(0, 12), st.floats(0, 0.05), st.booleans(),
    st.integers(0, 2**31),
)  # fmt: skip
@settings(deadline=None, max_examples=60)
def test_laws(free, prefix, suffix, r, threshold, sort, seed):
    n = free + prefix + suffix
    site = random_site(4, n, prefix, suffix, seed)
    method = tokred.PPT(r=r, threshold=threshold, sort=sort, blocks=(0,))
    found = method.reduce(site)
    removed = min(r, mergeable(n, prefix, suffix))
    assert found.slots == n - removed == method.tokens(n, tokred.Place(layer=0, depth=1, prefix=prefix, suffix=suffix))
    # Protected tokens stand where they stood, alone, in both branches.
    index, sizes = found.index, found.sizes()
    for i in range(prefix):
        assert (index[:, i] == i).all()
    for i in range(suffix):
        assert (index[:, n - suffix + i] == found.slots - suffix + i).all()
    assert (sizes[:, :prefix] == 1).all()
    assert (sizes[:, found.slots - suffix :] == 1).all()
    # Every image is one or the other as a whole.
    dropped = (index < 0).sum(1)
    assert ((dropped == 0) | (dropped == removed)).all()
    assert torch.equal(sizes.sum(1), n - dropped.float())
    if removed:
        assert torch.equal(dropped == removed, method.prunes(class_value(site)))
    # Batch-mates do not matter, neither their order nor that they are there.
    for i in range(4):
        alone = tokred.Site(
            x=site.x[i : i + 1], q=site.q[i : i + 1], k=site.k[i : i + 1], v=site.v[i : i + 1], prefix=prefix,
            suffix=suffix,
        )  # fmt: skip
        assert torch.equal(method.reduce(alone).index, index[i : i + 1])


def test_a_batch_vote_decides_for_all():
    scores = class_value(example())  # variances 0 and 0.0384
    assert tokred.PPT(threshold=0.019, route="batch").prunes(scores).tolist() == [True, True]
    assert tokred.PPT(threshold=0.020, route="batch").prunes(scores).tolist() == [False, False]


def test_padding_takes_no_part():
    site = random_site(2, 13)
    mask = torch.ones(2, 13, dtype=torch.bool)
    mask[1, 9:] = False
    padded = {"x": site.x, "q": site.q, "k": site.k, "v": site.v, "prefix": 1, "mask": mask}
    alone = tokred.Site(x=site.x[1:, :9], q=site.q[1:, :, :9], k=site.k[1:, :, :9], v=site.v[1:, :, :9], prefix=1)
    for threshold in (0, INF):
        found = tokred.PPT(r=3, threshold=threshold).reduce(tokred.Site(**padded))
        assert found.slots == 10
        assert torch.equal(found.mask, mask.gather(1, found.representative))
        members = [g for g in found.groups()[1] if g]
        assert all(len({t < 9 for t in group}) == 1 for group in members), "padding and real tokens stay apart"
    real = mask[:, 1:]
    spread = class_value(tokred.Site(**padded))
    for relative in (False, True):
        for limit in (0.001, 0.01, 0.1, 1.0):
            method = tokred.PPT(threshold=limit, relative=relative)
            assert method.prunes(spread, real)[1] == method.prunes(class_value(alone))[0]


def test_nothing_to_remove_is_the_identity():
    assert tokred.PPT(r=0).reduce(random_site()).trivial
    assert tokred.PPT(r=5).reduce(random_site(n=2)).trivial, "half of one patch is none"
    assert tokred.PPT(r=5).reduce(random_site(n=1)).trivial


def test_counts_and_compute_of_the_published_setting():
    pytest.importorskip("timm")
    from tests.encoder.tiny_timm import without_weights

    method, n, counts = tokred.PPT(), 197, []
    for layer in range(12):
        n = method.tokens(n, tokred.Place(layer=layer, depth=12, prefix=1))
        counts.append(n)
    assert counts == [197] * 3 + [147] * 3 + [97] * 3 + [49] * 3
    found = tokred.flops(without_weights("deit_small_patch16_224"), "ppt", (3, 224, 224))
    assert found.tokens == counts
    assert found.gmacs == pytest.approx(2.941, abs=5e-4)


@pytest.mark.parametrize(
    ("parameters", "error", "match"),
    [
        ({"threshold": -1e-5}, ValueError, "threshold must be a number of at least 0, or None, got -1e-05"),
        ({"threshold": math.nan}, ValueError, "threshold must be"),
        ({"threshold": True}, ValueError, "threshold must be"),
        ({"threshold": "7e-5"}, ValueError, "threshold must be"),
        ({"r": -1}, ValueError, "r must not be negative, got -1"),
        ({"route": "vote"}, ValueError, "route is 'vote'; allowed are 'image', 'batch'"),
        ({"metric": "y"}, ValueError, "metric is 'y'"),
        ({"blocks": (-2,)}, ValueError, "blocks must be non-negative"),
    ],
)
def test_bad_parameters(parameters, error, match):
    with pytest.raises(error, match=match):
        tokred.PPT(**parameters)


class Spy(tokred.PPT):
    """Notes the spread of every image at every listed block."""

    seen: list[torch.Tensor] = []  # noqa: RUF012

    def prunes(self, scores, real=None):
        self.seen.append(scores.var(dim=1))
        return super().prunes(scores, real)


def between(model, x, **options) -> float:
    """A threshold that some images of the first listed block lie above and some below, far from all of them."""
    Spy.seen.clear()
    tokred.apply(model, Spy(**options))
    with torch.no_grad():
        model(x)
    tokred.remove(model)
    first = Spy.seen[0].sort().values
    gap = (first[1:] / first[:-1]).argmax()
    return float((first[gap] * first[gap + 1]).sqrt())


@pytest.mark.parametrize("family", ["vit", "vit-registers (DINOv2)", "deit-distilled", "eva02 (rope, swiglu)"])
def test_on_a_model_images_are_routed_one_by_one(family):
    pytest.importorskip("timm")
    from tests.encoder.tiny_timm import build, images
    from tokred.adapters.encoder.host import shared_of

    model, x = build(family), images(4)
    options = {"r": 5, "blocks": (0, 2)}
    threshold = between(model, x, **options)
    with torch.no_grad():
        plain = model(x)
        assert torch.equal(tokred.apply(model, "ppt", r=0)(x), plain)
        assert torch.equal(tokred.apply(model, "ppt", blocks=())(x), plain)
        tokred.apply(model, "ppt", threshold=threshold, **options)
        y = model(x)
        assert y.isfinite().all()
        first = shared_of(model)[0][2].last().steps[0]
        assert len(set((first.target < 0).all(1).tolist())) == 2, "one batch, two routes"
        for i in range(4):
            torch.testing.assert_close(model(x[i : i + 1]), y[i : i + 1], rtol=1e-4, atol=2e-5)
        order = torch.tensor([2, 0, 3, 1])
        torch.testing.assert_close(model(x[order]), y[order], rtol=1e-4, atol=2e-5)
        pooled = tokred.apply(model, "ppt", threshold=INF, **options)(x)
        tome = tokred.apply(model, "tome", r=[5, 0, 5], expose="none")(x)
        torch.testing.assert_close(pooled, tome, rtol=1e-4, atol=2e-5)
        assert torch.equal(tokred.remove(model)(x), plain)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_on_a_model(dtype):
    pytest.importorskip("timm")
    from tests.encoder.tiny_timm import build, images

    model, x = build("vit").to(dtype), images().to(dtype)
    for threshold in (0, 1e-3, INF):
        tokred.apply(model, "ppt", r=5, threshold=threshold)
        with torch.no_grad():
            y = model(x)
        assert y.dtype == dtype
        assert y.isfinite().all()


@pytest.mark.slow
def test_compiles_to_one_graph():
    """One graph for both routes: nothing is read on the host."""
    pytest.importorskip("timm")
    from tests.encoder.tiny_timm import build, images

    model, x = build("vit"), images(4)
    threshold = between(model, x, r=5, blocks=(0, 2))
    tokred.apply(model, "ppt", r=5, threshold=threshold, blocks=(0, 2))
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-5)
