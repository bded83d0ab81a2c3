"""ALGM: the card's examples, its laws, and the definition written as loops."""

from __future__ import annotations

import math
import statistics

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import tokred
from tests.encoder.angles import check_compiled_and_trained, check_on_a_model, real_groups, real_rows
from tokred.methods.encoder.algm import whole_windows, window_similarity

ALIKE = [[1, 0], [1, 0.1], [0.9, 0], [1, 0]]
UNLIKE = [[1, 0], [0, 1], [1, 1], [0, 1]]


def image(*windows: list[list[float]]) -> torch.Tensor:
    """``(1, 1 + 4 W, 2)``: a class token and 2 x 2 windows side by side, row by row."""
    w = torch.tensor(windows, dtype=torch.float32).view(len(windows), 2, 2, 2)
    patches = w.transpose(0, 1).reshape(1, -1, 2)
    return torch.cat([torch.zeros(1, 1, 2), patches], 1)


# ---------------------------------------------------------------- the card's examples


def test_window_similarities():
    x = image(ALIKE, UNLIKE)
    found = window_similarity(x[:, 1:], whole_windows(2, 4, 2))
    assert found[0].tolist() == pytest.approx([0.9975, 0.5202], abs=5e-5)


def test_windows_merge_into_their_mean():
    x = image(ALIKE, UNLIKE)
    r = tokred.ALGM().reduce(tokred.Site(x=x, grid=(2, 4), prefix=1))
    assert r.groups() == [[[0], [1, 2, 5, 6], [3], [4], [7], [8]]]
    assert r.representative.tolist() == [[0, 6, 3, 4, 7, 8]], "the last position of a window stands for it"
    assert r.merge(x)[0, 1].tolist() == pytest.approx([0.975, 0.025])
    assert r.sizes().tolist() == [[1, 4, 1, 1, 1, 1]]


def at_cosines(*cosines: float) -> torch.Tensor:
    """``(1, 2 A + 1, ...)`` tokens behind a class token: sources whose best destination has these cosines."""
    rows = [torch.zeros(2 * len(cosines))]
    for i, c in enumerate(cosines):
        source, destination = torch.zeros(2, 2 * len(cosines))
        source[2 * i] = 1
        destination[2 * i], destination[2 * i + 1] = c, math.sqrt(1 - c * c)
        rows += [destination, source]  # behind one class token, even positions are sources
    return torch.stack(rows).unsqueeze(0)


def test_adaptive_threshold_of_the_pairs():
    x = at_cosines(0.95, 0.60, 0.40, 0.92)
    method = tokred.ALGM()
    score = torch.tensor([[0.95, 0.60, 0.40, 0.92]])
    assert method._pairs(score, 4).tolist() == [2]
    r = method.reduce(tokred.Site(x=x, prefix=1, layer=4, depth=12))
    assert r.groups() == [[[0], [4], [6], [1, 2], [3], [5], [7, 8]]]
    theta = 0.7175 + 0.26437 / 5
    assert theta == pytest.approx(0.7704, abs=5e-5)
    for fixed, merged in ((theta, 2), (0.93, 1), (0.3, 4), (math.inf, 0)):
        assert tokred.ALGM(theta=fixed).reduce(tokred.Site(x=x, prefix=1, layer=4)).slots == 9 - merged
    # Block 1 would ask for 0.7175 + 0.2642 = 0.98, block 100 for 0.72.
    assert method._pairs(score, 0).tolist() == [0]
    assert method._pairs(score, 99).tolist() == [2]


def test_nothing_above_the_thresholds_is_the_identity():
    x = image(ALIKE, UNLIKE)
    method = tokred.ALGM(T=1.5, theta=math.inf)
    assert method.reduce(tokred.Site(x=x, grid=(2, 4), prefix=1)).trivial
    assert method.reduce(tokred.Site(x=x, grid=(2, 4), prefix=1, layer=4)).trivial
    assert not any(method.acts(9, tokred.Place(layer=i, depth=12)) for i in range(12))
    assert [tokred.ALGM().acts(9, tokred.Place(layer=i, depth=12)) for i in (0, 1, 4, 6)] == [True, False, True, False]
    assert [tokred.ALGM().acts(9, tokred.Place(layer=i, depth=24)) for i in (0, 4, 6)] == [True, False, True]
    assert [tokred.ALGM().acts(9, tokred.Place(layer=i, depth=2)) for i in (0, 1)] == [True, True]


# ---------------------------------------------------------------- counts


def test_counts_per_image_and_of_the_batch():
    x = torch.cat([image(ALIKE, UNLIKE, ALIKE), image(UNLIKE, UNLIKE, ALIKE), image(ALIKE, ALIKE, ALIKE)])
    site = tokred.Site(x=x, grid=(2, 6), prefix=1)
    each = tokred.ALGM().reduce(site)
    assert each.mask.sum(1).tolist() == [13 - 6, 13 - 3, 13 - 9]
    assert [len(g) for g in real_groups(each, 2)] == [1, 4, 4, 4]
    least = tokred.ALGM(count="batch").reduce(site)
    assert least.mask is None
    assert least.slots == 10
    none = torch.cat([x, image(UNLIKE, UNLIKE, UNLIKE)])
    assert tokred.ALGM(count="batch").reduce(tokred.Site(x=none, grid=(2, 6), prefix=1)).trivial
    assert real_rows(tokred.ALGM().reduce(tokred.Site(x=none, grid=(2, 6), prefix=1)), 3) == list(range(13))


def test_pairs_of_the_batch_are_the_fewest_at_the_mean_threshold():
    a, b = at_cosines(0.95, 0.60, 0.40, 0.92), at_cosines(0.99, 0.98, 0.97, 0.2)
    # Means .7175 and .785, deviations .2642 and .3901: theta is .75125 + .3271 / 5 = .8167 for both.
    both = tokred.ALGM(count="batch").reduce(tokred.Site(x=torch.cat([a, b]), prefix=1, layer=4))
    assert both.slots == 7
    assert both.mask is None
    each = tokred.ALGM().reduce(tokred.Site(x=torch.cat([a, b]), prefix=1, layer=4))
    assert each.mask.sum(1).tolist() == [7, 6]


# ---------------------------------------------------------------- laws


def by_loops(x: torch.Tensor, h: int, w: int, k: int, threshold: float) -> list[list[int]]:
    """The local step on ``(h * w, C)``, in float64."""
    u = (x / x.norm(dim=-1, keepdim=True)).double()
    found = []
    for i in range(h // k):
        for j in range(w // k):
            cell = [(i * k + a) * w + j * k + b for a in range(k) for b in range(k)]
            pairs = [float(u[p] @ u[q]) for p in cell for q in cell if p != q]
            found.append((statistics.mean(pairs), cell))
    merged = [cell for mean, cell in sorted(found, key=lambda f: -f[0]) if mean >= threshold]
    gone = {p for cell in merged for p in cell}
    return merged + [[p] for p in range(h * w) if p not in gone]


@given(st.integers(1, 7), st.integers(1, 7), st.integers(2, 3), st.floats(-0.2, 0.4), st.integers(0, 2**31))
@settings(deadline=None, max_examples=60)
def test_local_step_is_its_definition_on_any_grid(h, w, k, threshold, seed):
    x = torch.randn(3, h * w, 3, generator=torch.Generator().manual_seed(seed))
    method = tokred.ALGM(T=threshold, k=k)
    r = method.reduce(tokred.Site(x=x, grid=(h, w)))
    y = r.merge(x)
    assert (r.index >= 0).all(), "every column of the source map sums to one"
    restored = r.unmerge(y)
    for i in range(3):
        groups = real_groups(r, i)
        assert groups == by_loops(x[i], h, w, k, threshold)
        for group in groups:
            assert torch.equal(restored[i, group], restored[i, group[:1]].expand(len(group), -1))
            torch.testing.assert_close(restored[i, group[0]], x[i, group].mean(0))


@given(st.integers(1, 20), st.integers(0, 2), st.integers(0, 2), st.integers(0, 2**31))
@settings(deadline=None, max_examples=60)
def test_global_step_merges_what_reaches_the_threshold(free, prefix, suffix, seed):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(3, prefix + free + suffix, 3, generator=g)
    r = tokred.ALGM().reduce(tokred.Site(x=x, prefix=prefix, suffix=suffix, layer=4))
    u = (x / x.norm(dim=-1, keepdim=True)).double()
    rows = range(prefix, prefix + free)
    sources, destinations = [i for i in rows if i % 2 == 0], [i for i in rows if i % 2]
    for i in range(3):
        merged = 0
        if sources and destinations:
            best = [max(float(u[i, s] @ u[i, d]) for d in destinations) for s in sources]
            theta = statistics.mean(best) + (statistics.stdev(best) / 5 if len(best) > 1 else 0)
            # A single source is its own mean; rounding may not decide.
            merged = len(best) if len(best) == 1 else sum(b >= theta for b in best)
        assert len(real_groups(r, i)) == prefix + free + suffix - merged
        assert real_groups(r, i)[:prefix] == [[p] for p in range(prefix)]


def test_padding_takes_no_part():
    g = torch.Generator().manual_seed(0)
    x = torch.randn(2, 14, 4, generator=g)
    mask = torch.ones(2, 14, dtype=torch.bool)
    mask[1, 9:13] = False
    r = tokred.ALGM().reduce(tokred.Site(x=x, mask=mask, prefix=1, suffix=1, layer=4))
    rows = mask[1].nonzero().flatten()
    alone = tokred.ALGM().reduce(tokred.Site(x=x[1:, rows], prefix=1, suffix=1, layer=4))
    assert real_groups(r, 1) == [[rows[t].item() for t in group] for group in real_groups(alone, 0)]
    windows = tokred.ALGM(T=-1).reduce(tokred.Site(x=x, mask=mask, prefix=1, suffix=1, grid=(3, 4)))
    for i, rest in enumerate(([9, 10, 11, 12, 13], [13])):
        groups = real_groups(windows, i)
        assert groups[0] == [0]
        assert sorted(groups[1:3]) == [[1, 2, 5, 6], [3, 4, 7, 8]]
        assert groups[3:] == [[t] for t in rest]
    mask[1, 8] = False
    windows = tokred.ALGM(T=-1).reduce(tokred.Site(x=x, mask=mask, prefix=1, suffix=1, grid=(3, 4)))
    assert real_groups(windows, 1)[1:] == [[1, 2, 5, 6], [3], [4], [7], [13]], "a window with padding does not merge"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_equal_and_zero_tokens(dtype):
    equal = tokred.ALGM().reduce(tokred.Site(x=torch.ones(1, 16, 3, dtype=dtype), grid=(4, 4)))
    assert equal.representative.tolist() == [[5, 7, 13, 15]], "ties go to the lower index"
    assert tokred.ALGM().reduce(tokred.Site(x=torch.zeros(1, 16, 3, dtype=dtype), grid=(4, 4))).trivial
    assert tokred.ALGM().reduce(tokred.Site(x=torch.ones(1, 1, 3, dtype=dtype), grid=(1, 1))).trivial
    assert tokred.ALGM().reduce(tokred.Site(x=torch.ones(1, 1, 3, dtype=dtype), layer=4)).trivial


def test_tokens_that_left_their_grid_are_refused():
    with pytest.raises(tokred.MissingInputError, match="15 tokens are not a grid of 4 x 4"):
        tokred.ALGM().reduce(tokred.Site(x=torch.ones(1, 15, 3), grid=(4, 4)))


# ---------------------------------------------------------------- parameters and models


@pytest.mark.parametrize(
    ("parameters", "match"),
    [
        ({"T": None}, "T must be a number, got None"),
        ({"T": math.nan}, "T must be a number"),
        ({"theta": "mean"}, "theta must be a number"),
        ({"k": 1}, "k must be an integer of at least 2, got 1"),
        ({"local_block": -1}, "local_block must be an integer of at least 0"),
        ({"local_block": 3, "global_block": 3}, "global_block must lie behind local_block 3, got 3"),
        ({"count": "mean"}, "count is 'mean'; allowed are 'image', 'batch'"),
    ],
)
def test_bad_parameters(parameters, match):
    with pytest.raises(ValueError, match=match):
        tokred.ALGM(**parameters)


def test_settings_and_depth():
    method = tokred.ALGM(T=0.9, theta=0.8, global_block=7, count="batch", prop_attn=True)
    assert tokred.from_dict(method.to_dict()) == method
    assert method.proportional
    assert not tokred.ALGM().proportional
    with pytest.raises(ValueError, match="global_block is 7, but the model has 6 blocks"):
        method.check(6)


@pytest.mark.parametrize("family", ["vit", "vit-mean", "vit-registers (DINOv2)", "rope-mixed"])
@pytest.mark.parametrize("prop_attn", [False, True])
def test_on_models(family, prop_attn):
    method = tokred.ALGM(T=0.15, prop_attn=prop_attn)
    trace = check_on_a_model(family, method, tokred.ALGM(T=2, theta=2))
    assert len({len(real_rows(trace, i)) for i in range(3)}) > 1, "the images keep the same number: choose others"


@pytest.mark.slow
@pytest.mark.parametrize("method", [tokred.ALGM(T=0.15), tokred.ALGM(T=0.15, count="batch")])
def test_compiles_and_trains(method):
    check_compiled_and_trained("vit-mean", method)
