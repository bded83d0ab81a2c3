"""Worked examples of budgets, selection and fates; no host."""

from __future__ import annotations

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import tokred
from tokred.kernels.decode_attention import SENTINEL
from tokred.kv import (
    Adaptive,
    CacheSite,
    Growing,
    KeyNorm,
    Merge,
    Padding,
    Preference,
    Pyramid,
    Split,
    Squeeze,
    Uniform,
    When,
)
from tokred.kv.budgets.pyramid import original_rows
from tokred.kv.budgets.squeeze import cluster
from tokred.kv.parts import check_amount, parse_bytes
from tokred.kv.select import keep, kept_mask
from tokred.kv.site import Place


def flat_site(n: int, heads: int = 1, **more) -> CacheSite:
    return CacheSite(k=torch.zeros(1, heads, n, 4), v=torch.zeros(1, heads, n, 4), **more)


# ---------------------------------------------------------------- amounts


@pytest.mark.parametrize("bad", [0.0, 1.5, -0.1, 0, -3, True, None, "", "12 parsecs", "0 MiB", float("nan")])
def test_bad_amounts(bad):
    with pytest.raises((ValueError, TypeError), match="budget"):
        check_amount(bad)


def test_bytes():
    assert [parse_bytes(t) for t in ("64 MiB", "1.5GB", "300", "2 kib")] == [64 << 20, 1_500_000_000, 300, 2048]
    place = Place(heads=2, row_bytes=132)
    assert Uniform("132 kB").mean(10**6, place, 5) == 132_000 // (5 * 2 * 132)


def test_bytes_are_those_that_the_cache_holds():
    from tests.kv.tiny import build, prompt

    pytest.importorskip("transformers")
    model = tokred.apply(build("llama"), "knorm", budget="20 KiB")
    cache = tokred.kv_cache(model)
    model(prompt(60), past_key_values=cache)
    assert 19 * 1024 < cache.nbytes <= 20 * 1024
    assert tokred.report(model).bytes == cache.nbytes


def test_shares():
    assert [Uniform(0.5).mean(n, None, 1) for n in (6, 7, 1)] == [3, 3, 1]
    assert Uniform(0.07).mean(100, None, 1) == 7
    assert tokred.make("snapkv", budget=0.25, window=4).tokens(100, layer=0, depth=2) == 25
    assert tokred.make("snapkv", budget=0.25, window=40).tokens(100, layer=0, depth=2) == 40, "the window stays"


def test_what_cannot_hold_what_it_protects_is_refused():
    with pytest.raises(ValueError, match=r"32 tokens cannot hold the 0 first and 64 newest"):
        tokred.make("snapkv", budget=32)
    with pytest.raises(ValueError, match=r"3 tokens cannot hold the 4 first"):
        tokred.make("streaming_llm", budget=3)
    with pytest.raises(ValueError, match=r"must lie in \(0, 1\], got 1\.2"):
        tokred.make("h2o", budget=1.2)


# ---------------------------------------------------------------- layers


def test_pyramid():
    assert [Pyramid(0.5, 20, 8).share(96, None, i, 4) for i in range(4)] == [88, 61, 35, 8]
    assert [Pyramid(0.25, 4, 8).share(96, None, i, 4) for i in range(4)] == [24] * 4
    assert original_rows(56, 96, 8, 20, 4) == [88, 62, 36, 10]
    assert Pyramid(1.0, 20, 8).share(96, None, 0, 4) == 96


def test_preference_divides():
    budget = Preference(window=20)
    rows = budget.divide([1.0, 2.0, 3.0, 4.0], 200, 100, 4)
    assert [r - 20 for r in rows] == [32, 64, 96, 128]
    clipped = budget.divide([1.0, 1.0, 1.0, 30.0], 200, 100, 4)
    assert max(clipped) == 200
    assert abs(sum(r - 20 for r in clipped) - 320) <= 4, "what is clipped goes to the others"
    assert budget.divide([0.0, 0.0], 100, 40, 2) == (40, 40)


def test_squeeze():
    s = [0.55, 0.60, 0.80, 0.84, 0.95, 0.97]
    assert cluster(s, 3) == [0, 0, 1, 1, 2, 2]
    assert Squeeze(0.4, 0.2).divide(s, 500, 1200) == (280, 280, 280, 280, 40, 40)
    assert Squeeze(0.4, 0.5).divide(s, 500, 1200) == (250, 250, 250, 250, 100, 100)
    assert Squeeze(0.9, 0.5).divide(s, 100, 540) == (100, 100, 100, 100, 70, 70)
    assert Squeeze(0.4, 1.0).divide(s, 500, 1200) == (200,) * 6, "p = 1 is the uniform budget"
    assert Squeeze(0.4, 0.2).divide([0.5, 0.5, 0.9], 100, 120) == (40, 40, 40), "fewer than three distinct values"
    one = torch.tensor([[1.0, 2, 2], [0, 3, 4]]), torch.tensor([[1.0, 2, 2], [4, 3, 0]])
    assert torch.cosine_similarity(*one, dim=-1).tolist() == pytest.approx([1, 0.36])


@given(st.lists(st.floats(0, 1), min_size=3, max_size=12), st.integers(10, 400), st.floats(0.05, 1))
@settings(deadline=None, max_examples=60)
def test_squeeze_laws(cosines, n, share):
    total = int(len(cosines) * n * share)
    budget = Squeeze(0.5, 0.35, least=1)
    rows = budget.divide(cosines, n, max(total, len(cosines)))
    assert sum(rows) == min(len(cosines) * n, max(total, len(cosines)))
    assert all(1 <= r <= n for r in rows)
    if len(set(cosines)) == len(cosines):
        order = random.Random(0).sample(range(len(cosines)), len(cosines))
        mixed = budget.divide([cosines[i] for i in order], n, max(total, len(cosines)))
        assert all(abs(mixed[j] - rows[i]) <= 1 for j, i in enumerate(order)), "remainders go to the first"


def test_clusters_are_the_best_there_are():
    import itertools

    rng = random.Random(1)
    for _ in range(20):
        x = sorted(rng.random() for _ in range(7))

        def cost(parts):
            return sum(sum((v - sum(p) / len(p)) ** 2 for v in p) for p in parts)

        best = min(cost([x[:i], x[i:j], x[j:]]) for i, j in itertools.combinations(range(1, 7), 2))
        labels = cluster(x, 3)
        mine = cost([[v for v, g in zip(x, labels, strict=True) if g == k] for k in range(3)])
        assert mine == pytest.approx(best, abs=1e-12)


def test_growing():
    budget = Growing(4, 2, 2)
    at = lambda g: budget.rows(flat_site(2 + g, prompt=(2,), generated=g))[0]  # noqa: E731
    assert [at(6), at(10), at(14)] == [6, 8, 10]
    big = Growing(1024, 4, 32)
    rows = [big.rows(flat_site(9, prompt=(100,), generated=g))[0] for g in (1056, 2080, 3104, 4128)]
    assert rows == [388, 644, 900, 1156]
    when = When(prefill=False, every=4, start=2)
    assert [g for g in range(1, 17) if when.due(2, 2 + g - 1, 2 + g)] == [6, 10, 14]
    with pytest.raises(ValueError, match="must be whole"):
        Growing(10, 4)


def test_rpc_timeline_on_a_model():
    pytest.importorskip("transformers")
    from tests.kv.tiny import build, prompt

    model = tokred.apply(build("llama"), "rpc", period=4, window=2, ratio=2, pool=1)
    cache = tokred.kv_cache(model)
    ids = prompt(2)
    held = []
    with torch.no_grad():
        model(ids, past_key_values=cache)
        before = cache.layers[0].keys
        for g in range(16):
            model(prompt(1, seed=g), past_key_values=cache)
            held.append(cache.layers[0].keys.shape[2])
    assert held == [3, 4, 5, 6, 7, 6, 7, 8, 9, 8, 9, 10, 11, 10, 11, 12]
    assert torch.equal(cache.layers[0].keys[:, :, :2], before), "the prompt stays, bit for bit"


# ---------------------------------------------------------------- heads


def test_adaptive_heads():
    score = torch.tensor([[[0.5, 0.1, 0.3, 0.05, 0.05, 0], [0.2, 0.18, 0.17, 0.16, 0.15, 0.14]]])
    for safe in (0.2, 0.0):
        counts = Adaptive(0.5, safe).heads(flat_site(6, 2), score, None, (3,))
        assert counts.tolist() == [[2, 4]]
        step = keep(score, None, None, counts, exact=True)
        rows = [[i for i, m in zip(*pair, strict=True) if m] for pair in zip(
            step.representative[0].tolist(), step.mask[0].tolist(), strict=True)]  # fmt: skip
        assert rows == [[0, 2], [0, 1, 2, 3]]


@given(st.integers(2, 20), st.integers(1, 4), st.floats(0, 1), st.floats(0.05, 1), st.integers(0, 2**31))
@settings(deadline=None, max_examples=60)
def test_adaptive_heads_share_the_layer_exactly(n, heads, safe, share, seed):
    score = torch.rand(1, heads, n, generator=torch.Generator().manual_seed(seed))
    rows = max(1, int(n * share))
    counts = Adaptive(share, safe).heads(flat_site(n, heads), score, None, (rows,))
    counts = torch.tensor([[rows] * heads]) if isinstance(counts, tuple) else counts
    assert int(counts.sum()) == rows * heads
    assert (counts >= min(rows, int(rows * safe))).all()
    assert (counts <= n).all()


def test_split_heads():
    budget = Split(((0.9, 0.1), (0.4, 0.6)), 0.5, sinks=2, recent=3)
    assert [budget.retrieves(i) for i in range(2)] == [(True, False), (False, True)]
    policy = tokred.make("duoattention", gates=((0.9, 0.1), (0.4, 0.6)), sinks=2, recent=3)
    step = policy.reduce(flat_site(10, 2, layer=0, depth=2))
    assert step.mask[0, 0].all()
    assert step.representative[0, 0].tolist() == list(range(10))
    assert step.representative[0, 1][step.mask[0, 1]].tolist() == [0, 1, 7, 8, 9]
    with pytest.raises(ValueError, match="gates has 2 rows, but 3 layers"):
        policy.check(3)
    assert tokred.make("duoattention").reduce(flat_site(10)).trivial


# ---------------------------------------------------------------- selection


@given(
    st.integers(1, 24),
    st.integers(1, 3),
    st.integers(1, 3),
    st.integers(1, 26),
    st.integers(0, 6),
    st.integers(0, 2**31),
)
@settings(deadline=None, max_examples=80)
def test_selection_laws(n, b, heads, count, pads, seed):
    g = torch.Generator().manual_seed(seed)
    score = torch.randint(0, 4, (b, heads, n), generator=g).float()  # many ties
    pads = min(pads, n - 1)
    real = (torch.arange(n) >= pads).expand(b, 1, n)
    guard = torch.arange(n)[None, None] >= n - 1
    kept = kept_mask(score, real, guard, (count,) * b)
    assert (kept.sum(-1) == min(count, n - pads)).all()
    assert not kept[..., :pads].any(), "padding is never kept"
    assert kept[..., -1].all(), "guarded rows come first"
    for i in range(b):
        for h in range(heads):
            chosen = kept[i, h]
            rest = [j for j in range(pads, n - 1) if not chosen[j]]
            for j in rest:
                better = [k for k in range(pads, n - 1) if chosen[k]]
                assert all(
                    score[i, h, k] > score[i, h, j] or (score[i, h, k] == score[i, h, j] and k < j) for k in better
                )
    step = keep(score, real, guard, (count,) * b, exact=False)
    assert ((step.representative[..., 1:] > step.representative[..., :-1]) | ~step.mask[..., 1:]).all(), "in order"


@given(st.integers(2, 20), st.integers(0, 2), st.integers(0, 2**31))
@settings(deadline=None, max_examples=40)
def test_one_row_less_is_the_same_without_sorting(n, guarded, seed):
    score = torch.randint(0, 3, (2, 3, n), generator=torch.Generator().manual_seed(seed)).float()
    guard = torch.arange(n)[None, None] >= n - min(guarded, n - 1)
    kept = kept_mask(score, None, guard, (n - 1,) * 2)
    step = keep(score, None, guard, (n - 1,) * 2, exact=True)
    assert torch.equal(step.index >= 0, kept)


def test_more_budget_never_loses_a_row():
    torch.manual_seed(0)
    k = torch.randn(2, 2, 30, 8)
    where = CacheSite(k=k, v=k)
    before = None
    for budget in (3, 8, 15, 29):
        kept = tokred.make("knorm", budget=budget).reduce(where).index >= 0
        assert before is None or (kept | ~before).all()
        before = kept


# ---------------------------------------------------------------- merging


def test_merge_examples():
    k = torch.tensor([[[[1.0, 0], [0, 1], [1, 1], [2, 0], [0, 2], [1, -1]]]])
    v = torch.tensor([[[[0.0, 1], [2, 3], [4, 5], [6, 7], [8, 9], [10, 11]]]])
    score = torch.tensor([[[0.9, 0.1, 0.5, 0.2, 0.3, 0.8]]])
    where = CacheSite(k=k, v=v)
    where.rows["mass"] = score
    policy = tokred.make("zeromerge", budget=4, tail=2, dense=1, alpha=0.6)
    step = policy.shrink(where, score, (4,))
    # Ours are in the order of positions; the residual row stands at its newest member's.
    assert step.groups() == [[[0], [1, 2, 3], [4], [5]]]
    assert torch.allclose(step.merge(k)[0, 0], torch.tensor([[1, 0], [1, 2 / 3], [0, 2], [1, -1]]), atol=1e-6)
    assert torch.allclose(step.merge(v)[0, 0], torch.tensor([[0.0, 1], [4, 5], [8, 9], [10, 11]]))
    assert step.sizes()[0, 0].tolist() == [1, 3, 1, 1]
    assert step.merge(score.unsqueeze(-1), mode="max")[0, 0, :, 0].tolist() == pytest.approx([0.9, 0.5, 0.3, 0.8])


@pytest.mark.parametrize(
    ("alpha", "weights", "output"),
    [
        (0.0, [0.261658, 0.163307, 0.331206, 0.080522, 0.163307], [5.971261, 6.807954]),
        (0.6, [0.406561, 0.131258, 0.266205, 0.064719, 0.131258], [5.584393, 6.453135]),
        (1.0, [0.515306, 0.107205, 0.217424, 0.052859, 0.107205], [5.294059, 6.186854]),
    ],
)
def test_merged_rows_in_the_attention(alpha, weights, output):
    from tokred.adapters.kv.attention import attend

    k = torch.tensor([[[[1, 2 / 3], [1, 0], [0, 2], [1, -1], [0.5, 0.5]]]])
    v = torch.tensor([[[[4.0, 5], [0, 1], [8, 9], [10, 11], [9, 9]]]])
    w = torch.tensor([[[3.0, 1, 1, 1, 1]]])
    q = torch.tensor([[[[1.0, 1]]]])
    where = CacheSite(q=q, k=k, v=v, weights=w, alpha=alpha)
    assert where.columns()[0, 0].tolist() == pytest.approx(weights, abs=2e-6)
    out = attend(q, k, v, None, (alpha * w.log())[:, :, None], 2**-0.5, None)
    assert out.flatten().tolist() == pytest.approx(output, abs=1e-5)


def test_merge_update_example():
    """Decay, victim, and the weighted mean of the step after the prompt."""
    k = torch.tensor([[[[1, 2 / 3], [1, 0], [0, 2], [1, -1], [0.5, 0.5]]]])
    v = torch.tensor([[[[4.0, 5], [0, 1], [8, 9], [10, 11], [9, 9]]]])
    w = torch.tensor([[[3.0, 1, 1, 1, 1]]])
    policy = tokred.make("zeromerge", budget=4, tail=2, dense=1, alpha=0.6)
    where = CacheSite(
        q=torch.tensor([[[[1.0, 1]]]]), k=k, v=v, weights=w, alpha=0.6, seen=7,
        positions=torch.tensor([[[3, 0, 4, 5, 6]]], dtype=torch.int32),
    )  # fmt: skip
    where.rows["mass"] = torch.tensor([[[0.5, 0.9, 0.3, 0.8, 0.0]]])
    where.rows["residual"] = torch.tensor([[[1.0, 0, 0, 0, 0]]])
    policy.parts.score.observe(where)
    mass = where.rows["mass"]
    assert mass.flatten().tolist() == pytest.approx([0.896561, 1.013258, 0.560205, 0.848719, 0.131258], abs=2e-6)
    step = policy.shrink(where, mass, (4,))
    assert step.groups() == [[[0, 2], [1], [3], [4]]]
    assert step.merge(k, w)[0, 0, 0].tolist() == pytest.approx([0.75, 1])
    assert step.merge(v, w)[0, 0, 0].tolist() == pytest.approx([5, 6])
    assert step.sizes(w)[0, 0].tolist() == [4, 1, 1, 1]


def test_leftovers_are_cut_into_near_equal_runs():
    score = torch.tensor([[[9.0, 0, 0, 0, 0, 0, 0, 0, 9]]])
    where = flat_site(9)
    step = Merge(3).reduce(where, score, None, (5,))
    assert step.groups() == [[[0], [1, 2, 3], [4, 5], [6, 7], [8]]]
    assert where.rows["residual"].flatten().tolist() == [0, 0, 0, 1, 0, 1, 0, 1, 0]


@given(st.integers(6, 30), st.integers(1, 3), st.integers(0, 4), st.integers(0, 2**31))
@settings(deadline=None, max_examples=60)
def test_merging_conserves_totals(n, dense, pads, seed):
    g = torch.Generator().manual_seed(seed)
    k = torch.randn(2, 2, n + pads, 4, generator=g, dtype=torch.float64)
    mask = torch.ones(2, n + pads, dtype=torch.bool)
    mask[1, :pads] = False
    where = CacheSite(k=k, v=k, padding=Padding(mask).until(n + pads))
    score = torch.rand(2, 2, n + pads, generator=g)
    guard = where.stands_behind(1)
    step = Merge(dense).reduce(where, score, guard, (n - 1 if n > dense + 3 else n,) * 2)
    real = mask[:, None, :, None].expand(-1, 2, -1, 4)
    sizes = step.sizes()
    merged = step.merge(k) * sizes.unsqueeze(-1)
    assert torch.allclose(merged.sum(2), (k * real).sum(2), atol=1e-6)
    assert torch.equal(sizes.sum(-1), real[..., 0].sum(2).float())


def test_a_residual_row_of_equal_members_is_exact():
    pytest.importorskip("transformers")
    from tokred.adapters.kv.attention import attend

    torch.manual_seed(0)
    k, v, q = torch.randn(1, 1, 5, 4), torch.randn(1, 1, 5, 4), torch.randn(1, 1, 1, 4)
    k[:, :, 1:4], v[:, :, 1:4] = k[:, :, 1:2], v[:, :, 1:2]
    rows = torch.tensor([0, 1, 4])
    bias = torch.tensor([[[[1.0, 3, 1]]]]).log()
    a = attend(q, k, v, None, None, 0.5, None)
    assert torch.allclose(attend(q, k[:, :, rows], v[:, :, rows], None, bias, 0.5, None), a, atol=1e-6)


# ---------------------------------------------------------------- parts


def test_parts_are_checked():
    with pytest.raises(ValueError, match="did you mean 'window'"):
        tokred.make("kv", score="windw")
    with pytest.raises(TypeError, match="score must be a score"):
        tokred.make("kv", score=Uniform(0.5))
    with pytest.raises(ValueError, match="pool must be odd"):
        tokred.make("snapkv", pool=4)
    with pytest.raises(ValueError, match="smaller than period"):
        tokred.make("rpc", period=8, window=8)
    assert tokred.make("kv", score=KeyNorm(), budget="adaptive").parts.budget == Adaptive()


def test_empty_rows_are_no_candidates():
    where = CacheSite(
        k=torch.zeros(1, 1, 4, 2), v=torch.zeros(1, 1, 4, 2), seen=9, ragged=True,
        positions=torch.tensor([[[0, 5, SENTINEL, 8]]], dtype=torch.int32),
    )  # fmt: skip
    assert where.real.tolist() == [[[True, True, False, True]]]
    assert kept_mask(torch.tensor([[[1.0, 1, 9, 1]]]), where.real, None, (2,)).tolist() == [
        [[True, True, False, False]]
    ]
