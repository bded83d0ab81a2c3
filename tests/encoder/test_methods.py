"""The cards' worked examples and laws, without any host."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import tokred
from tokred.core.matching import bipartite_soft_matching, mergeable
from tokred.methods.encoder.evit import warm_up


def keys(degrees: list[float]) -> torch.Tensor:
    """``(1, 1, N, 2)`` unit vectors."""
    a = torch.tensor(degrees, dtype=torch.float64) * math.pi / 180
    return torch.stack([a.cos(), a.sin()], -1)[None, None].float()


def column(values) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float32).view(1, -1, 1)


SEVEN, EIGHT = column(range(1, 8)), column(range(1, 9))
ANGLES7 = [0, 10, 12, 90, 95, 40, 33]
ANGLES8 = [0, 10, 12, 90, 95, 40, 33, 60]


# ---------------------------------------------------------------- ToMe


def test_tome_example_1_merge_and_restore():
    r = tokred.ToMe(r=2).reduce(tokred.Site(x=SEVEN, k=keys(ANGLES7), prefix=1))
    assert r.merge(SEVEN).flatten().tolist() == [1, 7, 2.5, 4.5, 6]
    assert r.sizes().tolist() == [[1, 1, 2, 2, 1]]
    assert r.groups() == [[[0], [6], [1, 2], [3, 4], [5]]]
    assert r.unmerge(r.merge(SEVEN)).flatten().tolist() == [1, 2.5, 2.5, 4.5, 4.5, 6, 7]


def test_tome_example_2_second_step():
    first = tokred.ToMe(r=2).reduce(tokred.Site(x=SEVEN, k=keys(ANGLES7), prefix=1))
    x1, s1 = first.merge(SEVEN), first.sizes()
    second = tokred.ToMe(r=1).reduce(tokred.Site(x=x1, k=keys([0, 50, 52, 120, 200]), prefix=1, sizes=s1))
    x2 = second.merge(x1, s1)
    assert x2.flatten().tolist() == pytest.approx([1, 6, 4, 4.5])
    assert second.sizes(s1).tolist() == [[1, 1, 3, 2]]
    both = first.then(second)
    assert both.groups() == [[[0], [5], [1, 2, 6], [3, 4]]]
    assert both.unmerge(x2).flatten().tolist() == pytest.approx([1, 4, 4, 4.5, 4.5, 6, 4])


def test_tome_example_3_gradient():
    x = SEVEN.clone().requires_grad_()
    y = tokred.ToMe(r=2).reduce(tokred.Site(x=x, k=keys(ANGLES7), prefix=1)).merge(x)
    (y.flatten() * torch.arange(1.0, 6)).sum().backward()
    assert x.grad.flatten().tolist() == pytest.approx([1, 1.5, 1.5, 2, 2, 5, 2])


def test_tome_example_4_class_and_distillation():
    r = tokred.ToMe(r=2).reduce(tokred.Site(x=EIGHT, k=keys([0, 1, 2, 3, 50, 52, 80, 81]), prefix=2))
    assert r.merge(EIGHT).flatten().tolist() == [1, 2, 5, 3.5, 6, 7.5]
    assert r.unmerge(r.merge(EIGHT)).flatten().tolist() == [1, 2, 3.5, 3.5, 5, 6, 7.5, 7.5]


def test_tome_example_5_without_class_token():
    r = tokred.ToMe(r=2).reduce(tokred.Site(x=EIGHT, k=keys(ANGLES8)))
    assert r.merge(EIGHT).flatten().tolist() == [7, 1, 2.5, 4.5, 6, 8]


def test_tome_example_6_kth():
    site = tokred.Site(x=EIGHT, k=keys(ANGLES8))
    assert tokred.KthMerge(k=2).reduce(site).merge(EIGHT).flatten().tolist() == [2, 4.5, 6.5, 8]
    three = tokred.KthMerge(k=3).reduce(site)
    assert three.slots == 2
    assert float(three.sizes().sum()) == 8, "the trailing tokens are not lost"


def test_tome_example_8_schedules():
    from tokred.core.schedules import amounts

    assert amounts((16, -1), 12) == [32, 29, 26, 23, 20, 17, 14, 11, 8, 5, 2, 0]
    assert amounts((16, 1), 12) == [0, 2, 5, 8, 11, 14, 17, 20, 23, 26, 29, 32]
    assert amounts((8, -0.5), 12) == [12, 11, 10, 9, 9, 8, 7, 6, 6, 5, 4, 4]
    assert amounts([5, 4, 3], 12) == [5, 4, 3] + [0] * 9
    assert amounts([3, 1], 2) == [3, 1], "a list of two numbers is a list"
    assert amounts((4, -1), 1) == [4]
    assert sum(amounts((16, -1), 12)) == 187
    assert sum(amounts((8, -1), 24)) == 181


@pytest.mark.parametrize(
    ("n", "depth", "r", "last"),
    [(197, 24, 8, 7), (197, 12, 13, 41), (197, 12, 16, 11), (257, 32, 7, 33), (577, 24, 23, 25)],
)
def test_tome_example_9_token_counts(n, depth, r, last):
    method = tokred.ToMe(r=r)
    for layer in range(depth):
        n = method.tokens(n, tokred.Place(layer=layer, depth=depth, prefix=1))
    assert n == last


@given(st.integers(1, 40), st.integers(0, 5), st.integers(0, 3), st.integers(0, 30), st.integers(0, 2**31))
@settings(deadline=None, max_examples=80)
def test_matching_laws(free, prefix, suffix, r, seed):
    n = free + prefix + suffix
    g = torch.Generator().manual_seed(seed)
    metric = torch.randn(2, n, 4, generator=g)
    step = bipartite_soft_matching(metric, r, prefix=prefix, suffix=suffix)
    removed = min(r, mergeable(n, prefix, suffix))
    assert step.slots == n - removed
    index = step.index
    assert (index >= 0).all()
    assert (step.sizes().sum(1) == n).all()
    # Protected tokens stand where they stood, alone.
    for i in range(prefix):
        assert (index[:, i] == i).all()
    for i in range(suffix):
        assert (index[:, n - suffix + i] == step.slots - suffix + i).all()
    sizes = step.sizes()
    assert (sizes[:, :prefix] == 1).all()
    assert (sizes[:, step.slots - suffix :] == 1).all()
    order = torch.tensor([1, 0])
    assert torch.equal(bipartite_soft_matching(metric[order], r, prefix=prefix, suffix=suffix).index, index[order])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_degenerate_metrics_stay_finite_and_ties_go_to_the_lower_index(dtype):
    zero = torch.zeros(1, 6, 4, dtype=dtype)
    assert bipartite_soft_matching(zero, 2).source.tolist() == [[0, 2]]
    equal = torch.ones(1, 6, 4, dtype=dtype)
    step = bipartite_soft_matching(equal, 2)
    assert step.source.tolist() == [[0, 2]]
    assert step.merge(equal).isfinite().all()
    assert bipartite_soft_matching(torch.ones(1, 1, 4, dtype=dtype), 3).slots == 1


def test_sequential_split():
    r = tokred.ToMe(r=2, split="sequential").reduce(tokred.Site(x=EIGHT, k=keys([0, 90, 180, 270, 1, 91, 181, 271])))
    assert all(s < 4 for s in r.source.flatten().tolist())


def test_padding_is_never_merged_into_a_real_token():
    metric = torch.ones(1, 8, 4)
    mask = torch.tensor([[True] * 5 + [False] * 3])
    step = bipartite_soft_matching(metric, 2, mask=mask)
    index = step.index[0].tolist()
    assert all(len({mask[0, t].item() for t in g}) == 1 for g in step.groups()[0]), index


# ---------------------------------------------------------------- PiToMe

NINE = column(range(1, 10))
K9 = keys([0, 10, 15, 21, 28, 90, 130, 171, 200])
PITOME = {
    0.45: [-0.029996, -0.012482, 0.005548, 0.022392, -0.052373, -0.143579, -0.239565, -0.341214],
    0.0: [0.308881, 0.331202, 0.354717, 0.377643, 0.361640, 0.207379, 0.055738, -0.073853],
    0.9: [-0.328882, -0.316074, -0.304414, -0.295956, -0.377356, -0.431420, -0.488739, -0.557660],
}
MERGED = {
    (0.45, "plain"): ([1, 6, 7, 8, 9, 4.5, 2.5], [1, 1, 1, 1, 1, 2, 2]),
    (0.45, "bsm"): ([1, 8, 6, 4.5, 2.5, 7, 9], [1, 1, 1, 2, 2, 1, 1]),
    (0.0, "plain"): ([1, 2, 7, 8, 9, 6, 4], [1, 1, 1, 1, 1, 1, 3]),
    (0.0, "bsm"): ([1, 5, 8, 6, 3, 7, 9], [1, 1, 1, 1, 3, 1, 1]),
    (0.9, "plain"): ([1, 6, 7, 8, 9, 4.5, 2.5], [1, 1, 1, 1, 1, 2, 2]),
}


@pytest.mark.parametrize("margin", PITOME)
def test_pitome_energies(margin):
    found = tokred.PiToMe(ratio=0.75, margin=margin).energies(K9[:, 0, 1:])
    assert found[0].tolist() == pytest.approx(PITOME[margin], abs=2e-6)


@pytest.mark.parametrize(("margin", "form"), MERGED)
def test_pitome_examples(margin, form):
    r = tokred.PiToMe(ratio=0.75, margin=margin, form=form).reduce(tokred.Site(x=NINE, k=K9, prefix=1))
    x, size = MERGED[margin, form]
    assert r.merge(NINE).flatten().tolist() == pytest.approx(x)
    assert r.sizes().tolist() == [size]


def test_pitome_text_form():
    method = tokred.PiToMe(ratio=0.75, margin=0.5, form="halves", energy="gaussian")
    expected = [0.425045, 0.433887, 0.445733, 0.460707, 0.375156, 0.330722, 0.309208, 0.241203]
    assert method.energies(K9[:, 0, 1:])[0].tolist() == pytest.approx(expected, abs=2e-6)
    r = method.reduce(tokred.Site(x=NINE, k=K9, prefix=1))
    assert r.merge(NINE).flatten().tolist() == pytest.approx([1, 6, 7, 8, 9, 4, 2])
    assert r.sizes().tolist() == [[1, 1, 1, 1, 1, 3, 1]]


@pytest.mark.parametrize(
    ("ratio", "counts"),
    [(0.9, [178, 161, 145, 131, 118, 107, 97, 88, 80, 73, 66, 60]),
     (0.95, [188, 179, 171, 163, 155, 148, 141, 134, 128, 122, 116, 111])],
)  # fmt: skip
def test_pitome_token_counts(ratio, counts):
    n, found = 197, []
    for layer in range(12):
        n = tokred.PiToMe(ratio=ratio).tokens(n, tokred.Place(layer=layer, depth=12, prefix=1))
        found.append(n)
    assert found == counts


def test_pitome_protects_the_isolated_and_forms_follow_depth():
    r = tokred.PiToMe(ratio=0.75, margin=0.45, form="plain").reduce(tokred.Site(x=NINE, k=K9, prefix=1))
    assert r.sizes()[0, :5].tolist() == [1] * 5
    assert torch.equal(r.merge(NINE)[:, :5], r.gather(NINE)[:, :5])
    method = tokred.PiToMe(ratio=0.9)
    assert [method._form(i, 12) for i in (0, 5, 6, 11)] == ["bsm", "bsm", "plain", "plain"]
    equal = tokred.PiToMe(ratio=0.75, margin=0.3).energies(torch.ones(1, 5, 3))
    assert equal[0].tolist() == pytest.approx([0.7] * 5)


# ---------------------------------------------------------------- EViT

ATTENTION = torch.tensor([[0.0, 0.20, 0.30, 0.05, 0.15, 0.22, 0.08]])
PATCHES = column(range(7))


def test_evit_example():
    site = tokred.Site(x=PATCHES, class_attention=ATTENTION, prefix=1)
    r = tokred.EViT(kappa=0.5, blocks=(0,)).reduce(site)
    assert r.merge(PATCHES).flatten().tolist() == pytest.approx([0, 2, 5, 1, 1.23])
    assert r.representative[0, :4].tolist() == [0, 2, 5, 1]
    assert r.sizes().tolist() == [[1, 1, 1, 1, 3]]
    divided = tokred.EViT(kappa=0.5, blocks=(0,), normalise=True).reduce(site)
    assert divided.merge(PATCHES).flatten()[-1].item() == pytest.approx(4.392857)
    bare = tokred.EViT(kappa=0.5, blocks=(0,), fuse=False).reduce(site)
    assert bare.merge(PATCHES).flatten().tolist() == [0, 2, 5, 1]
    assert bare.index.tolist() == [[0, 3, 1, -1, -1, 2, -1]]


@pytest.mark.parametrize(("fuse", "counts"), [(True, [140, 100, 72]), (False, [139, 98, 69])])
def test_evit_token_counts(fuse, counts):
    n, found = 197, []
    for layer in range(12):
        n = tokred.EViT(kappa=0.7, fuse=fuse).tokens(n, tokred.Place(layer=layer, depth=12, prefix=1))
        found.append(n)
    assert [found[i] for i in (3, 6, 9)] == counts


def test_evit_laws():
    site = tokred.Site(x=PATCHES, class_attention=ATTENTION, prefix=1)
    assert tokred.EViT(kappa=1.0, blocks=(0,)).reduce(site).slots == 7
    scaled = tokred.Site(x=PATCHES, class_attention=ATTENTION * 3, prefix=1)
    method = tokred.EViT(kappa=0.5, blocks=(0,))
    assert torch.equal(method.reduce(scaled).representative, method.reduce(site).representative)
    q, k = torch.randn(2, 3, 7, 4), torch.randn(2, 3, 7, 4)
    computed = tokred.Site(x=PATCHES.expand(2, -1, -1), q=q, k=k, prefix=1).class_attention
    expected = (q[:, :, :1] @ k.transpose(-1, -2) / 2).softmax(-1).mean(1)[:, 0]
    torch.testing.assert_close(computed, expected)
    assert warm_up(0, 0.7, start=10, total=100) == 1.0
    assert warm_up(60, 0.7, start=10, total=100) == pytest.approx(0.85)
    assert warm_up(500, 0.7, start=10, total=100) == 0.7


# ---------------------------------------------------------------- random


def test_random_baselines_are_repeatable_and_alike_for_every_sample():
    x = torch.randn(3, 20, 4)
    site = tokred.Site(x=x, k=x[:, None], prefix=1)
    state = torch.random.get_rng_state()
    a = tokred.RandomMerge(r=6).reduce(site)
    assert torch.equal(torch.random.get_rng_state(), state), "the global generator is never touched"
    assert torch.equal(a.index, tokred.RandomMerge(r=6).reduce(site).index)
    assert not torch.equal(a.source, tokred.RandomMerge(r=6, seed=1).reduce(site).source)
    pruned = tokred.RandomPrune(r=6).reduce(site)
    assert pruned.slots == 14
    assert (pruned.representative.diff(dim=1) > 0).all(), "survivors keep their order"
    assert torch.equal(pruned.index[0], pruned.index[2])


# ---------------------------------------------------------------- parameters


@pytest.mark.parametrize(
    ("name", "parameters", "error", "match"),
    [
        ("tome", {"r": -1}, ValueError, "r must not be negative, got -1"),
        ("tome", {"r": 1.5}, TypeError, "r must be an integer, got 1.5"),
        ("tome", {"r": True}, TypeError, "r must be an integer"),
        ("tome", {"r": [3, -2]}, ValueError, r"r\[1\] must not be negative"),
        ("tome", {"r": (8, 2)}, ValueError, r"inflection of r must be a number in \[-1, 1\]"),
        ("tome", {"r": (8, 1, 2)}, TypeError, "must be a pair"),
        ("tome", {"metric": "keys"}, ValueError, "metric is 'keys'; allowed are 'k', 'q', 'v', 'x'"),
        ("tome", {"ratio": 0.5}, TypeError, "has no parameter 'ratio'; it has r, prop_attn"),
        ("pitome", {"ratio": 0}, ValueError, r"must lie in \(0, 1\], got 0"),
        ("pitome", {"margin": 2}, ValueError, r"margin must lie in \[-1, 1\]"),
        ("evit", {"kappa": 1.2}, ValueError, "kappa .the kept share. must lie"),
        ("evit", {"blocks": (-1,)}, ValueError, "blocks must be non-negative"),
        ("kth", {"k": 0}, ValueError, "k must be an integer of at least 1"),
        ("tomee", {}, tokred.UnknownMethodError, "did you mean 'tome'"),
    ],
)
def test_bad_parameters_get_a_clear_error(name, parameters, error, match):
    with pytest.raises(error, match=match):
        tokred.make(name, **parameters)


def test_a_site_says_what_it_lacks():
    with pytest.raises(tokred.MissingInputError, match="does not supply 'k'; it supplies x"):
        tokred.ToMe(r=2).reduce(tokred.Site(x=SEVEN))
