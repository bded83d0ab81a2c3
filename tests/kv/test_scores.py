"""Worked examples of the scores, computed by hand or by the published score functions; no host."""

from __future__ import annotations

import math

import pytest
import torch

import tokred
from tokred.kernels.column_scores import column_statistics, row_lse
from tokred.kv import (
    CacheSite,
    ColumnSum,
    Critical,
    Dispersion,
    Expected,
    Gumbel,
    Judges,
    KeyDifference,
    KeyNorm,
    LagRelative,
    LastQuery,
    Observed,
    Padding,
    Preference,
    Random,
    Recency,
    Window,
)
from tokred.kv.pooling import pooled
from tokred.methods.kv.criticalkv import value_norms
from tokred.methods.kv.keyformer import gumbel, noisy_columns

K = [[1, 0], [0, 1], [1, 1], [0.5, -0.5], [-1, 0], [0, 2]]
V = [[1, 0], [2, 0], [0, 1], [1, 1], [0, 3], [2, 2]]
Q0 = [[0, 0], [1, 0], [0, 1], [1, 1], [1, 0], [0, 1]]
Q1 = [[0, 0], [0, 1], [1, 1], [-1, 0], [1, 1], [0.5, 0]]
PROJECTION = [[1, 0, 0, 1], [0, 1, 1, 0], [1, 1, 0, 0], [0, 0, 2, 0]]


class Still:
    """A rotary embedding that does not turn."""

    def unrotate(self, q):
        return q

    def mean(self, start, count):
        return torch.ones(2), torch.zeros(2)


def site(**more) -> CacheSite:
    """The fixture: one sample, two query heads over one key/value head, six tokens."""
    given = {
        "q": torch.tensor([[Q0, Q1]], dtype=torch.float32),
        "k": torch.tensor([[K]], dtype=torch.float32),
        "v": torch.tensor([[V]], dtype=torch.float32),
        "rope": Still(),
        "projection": lambda: torch.tensor(PROJECTION, dtype=torch.float32),
    }
    return CacheSite(**{**given, **more})


def left_padded(count: int = 3) -> CacheSite:
    """The fixture behind ``count`` slots of padding, whose keys and queries are large."""
    b = site()
    pad = lambda x: torch.cat([torch.full((*x.shape[:2], count, x.shape[3]), 7.0), x], 2)  # noqa: E731
    mask = torch.tensor([[False] * count + [True] * 6])
    return site(q=pad(b.q), k=pad(b.k), v=pad(b.v), padding=Padding(mask))


def close(found, expected):
    assert found.flatten().tolist() == pytest.approx(expected, abs=2e-6)


def kept(policy) -> set[int]:
    return set(policy.reduce(site()).representative.flatten().tolist())


HALF = {"budget": 0.5}
EXAMPLES = {
    "snapkv": (
        tokred.make("snapkv", window=2, pool=3, **HALF),
        [0.124335, 0.217189, 0.19597, 0.138626, 1.217189, 1.217189],
        {1, 4, 5},
    ),
    "tova": (tokred.make("tova", **HALF), [0.151579, 0.167418, 0.198863, 0.120773, 0.098053, 1.198863], {1, 2, 5}),
    "observed_attention": (
        tokred.make("observed_attention", **HALF),
        [0.387876, 0.293066, 0.331356, 0.153253, 0.07946, 0.263315],
        {0, 1, 2},
    ),
    "knorm": (tokred.make("knorm", **HALF), [-1, -1, -1.414214, -0.707107, -1, -2], {0, 1, 3}),
    "keydiff": (
        tokred.make("keydiff", **HALF),
        [-0.57735, -0.816497, -0.985599, 0.169102, 0.57735, -0.816497],
        {0, 3, 4},
    ),
    "expected_attention": (
        tokred.make("expected_attention", sinks=1, **HALF),
        [1.944556, 0.364993, 0.281446, 0.15687, 0.273548, 0.944556],
        {0, 1, 5},
    ),
}


@pytest.mark.parametrize("name", EXAMPLES)
def test_scores_and_kept_rows(name):
    policy, scores, rows = EXAMPLES[name]
    close(policy.scores(site()), scores)
    assert kept(policy) == rows


def test_last_rows_of_the_attention():
    found = site().columns(1, group="none")[0]
    close(found[0], [0.091982, 0.18655, 0.18655, 0.064589, 0.091982, 0.378346])
    close(found[1], [0.211175, 0.148285, 0.211175, 0.176958, 0.104124, 0.148285])


def test_h2o():
    score, where = ColumnSum(group="mean"), site()
    score.observe(where)
    close(score(where), [2.327255, 1.465329, 1.325422, 0.459758, 0.158921, 0.263315])
    assert kept(tokred.make("h2o", budget=3, recent=1)) == {0, 1, 5}


def test_streaming_llm():
    assert kept(tokred.make("streaming_llm", sinks=1, **HALF)) == {0, 4, 5}
    assert Recency()(site()).flatten().tolist() == list(range(6))


def test_key_difference_anchor():
    unit = torch.nn.functional.normalize(site().k, dim=-1).mean(2)
    close(unit, [0.235702, 0.333333])


def test_expected_attention_statistics():
    mean, cov = Expected(sinks=1)._future_queries(site())
    close(mean, [0.6, 0.6, 0.3, 0.6])
    close(cov, [0.24, -0.16, -0.16, 0.24, 0.56, 0.22, 0.22, 0.24])


def test_lag_relative():
    from tokred.methods.kv.lagkv import _relative

    part = site().k[:, :, 2:6], site().v[:, :, 2:6]
    close((_relative(part[0], 2) + _relative(part[1], 2)) / 2, [0.434221, 0.565779])
    close(LagRelative(2, 2)(site()), [1, 1, 0, 0.5, 1, 1])
    assert kept(tokred.make("lagkv", lag=2, sinks=2, **HALF)) == {0, 1, 4}
    raw = LagRelative(2, 2, cross_scoring=True)(site())
    close(raw, [1, 1, 0.434221, 0.565779, 1, 1])
    short = LagRelative(4, 2)(site())
    close(short, [1, 1, 2 / 4, 3 / 4, 1, 1])
    same = LagRelative(1, 0)(CacheSite(k=torch.ones(1, 1, 4, 2), v=torch.ones(1, 1, 4, 2)))
    assert same.isfinite().all(), "constant channels scale to zero"


def test_critical():
    close(value_norms(site()), [2.5, 5, 1.5, 4, 4.5, 8])
    policy = tokred.make("criticalkv", score=Window(2, 3), **HALF)
    where = site()
    score = Window(2, 3)(where)
    # The published code adds one to the window's scores; both window tokens are then above all others.
    protected = torch.where(where.stands_behind(2), score.amax() + 1, score)
    found = Critical(Window(2, 3)).refine(where, protected, None, (3,))
    assert math.isinf(found[0, 0, 4])
    expected = [0.311087, 1.086445, 0.294105, 0.554903]
    close(found[0, 0, :4], expected)
    close(((protected + 1e-4) * value_norms(where))[0, 0, 4], [5.477801])
    assert kept(policy) == {1, 4, 5}


def test_dispersion_and_preference():
    entropy, variance = Preference(window=2).measure(site())
    assert entropy == pytest.approx([4.844099], abs=2e-5)
    assert variance == pytest.approx([0.063494], abs=2e-6)
    assert Preference(window=2, tau1=1, tau2=1).preference(site()) == pytest.approx([0.307571], abs=2e-6)
    assert Preference(window=2, tau1=1.6, tau2=0.4).preference(site()) == pytest.approx([0.00272327], abs=1e-7)
    found = Dispersion(2, 200.0, 5)(site())
    close(found[..., :4], [1.151251, 1.427657, 1.427657, 0.992021])


def test_statistics_of_the_host_study():
    q = torch.tensor([[[[1.0, 0], [0, 1]]]])
    k = torch.tensor([[[[1.0, 0], [0, 1], [1, 1], [0.5, -0.5]]]])
    close(row_lse(q, k, causal=True), [1.620621, 1.750663])
    found = column_statistics(q, k, causal=True)
    close(found.sum, [0.574771, 0.549976, 0.753312, 0.121941])
    close(found.max, [0.401112, 0.3522, 0.401112, 0.121941])
    close(found.sum_squares - found.sum**2 / 2, [0.025868, 0.011923, 0.001196, 0.007435])


def test_random_is_the_same_for_heads_and_samples():
    where = CacheSite(k=torch.zeros(2, 3, 9, 4), v=torch.zeros(2, 3, 9, 4))
    found = Random(1)(where)
    assert (found == found[:1, :1]).all()
    assert (found != Random(2)(where)).any()


# ---------------------------------------------------------------- pooling of a window, FastKV's form


def test_maximum_pooling_before_the_group():
    heads = torch.tensor(
        [
            [0.30, 0.10, 0.05, 0.20, 0.05, 0.10],
            [0.10, 0.40, 0.05, 0.05, 0.10, 0.05],
            [0.05, 0.05, 0.50, 0.05, 0.10, 0.05],
            [0.20, 0.05, 0.05, 0.05, 0.05, 0.40],
        ]
    )[None]
    found = pooled(site(), heads, 3, "max").view(1, 2, 2, 6).sum(2)
    close(found[0, 0], [0.70, 0.70, 0.60, 0.30, 0.30, 0.20])
    close(found[0, 1], [0.25, 0.70, 0.55, 0.55, 0.50, 0.50])
    close(pooled(site(), heads, 3, "avg").sum(1), [0.416667, 0.633333, 0.533333, 0.433333, 0.416667, 0.3])


def test_window_pools_each_head_before_it_takes_maxima():
    where = site()
    inside = where.stands_behind(2)
    rows = where.columns(2, group="none").masked_fill(inside, 0.0) / 2
    expected = torch.stack([pooled(where, rows[:, i : i + 1], 3, "max") for i in range(2)]).mean(0)
    assert torch.allclose(Window(2, 3, "max")(where), expected)


# ---------------------------------------------------------------- RPC


def test_judges_share_out_among_the_candidates():
    keys = torch.tensor([[[[1, 0], [0, 1], [1, 1], [2, 0], [0, 0], [0.5, 0.5], [5, 5], [9, 9]]]])
    q = torch.tensor([[[[1.0, 0], [0, 1]]]])
    where = CacheSite(q=q, k=keys, v=keys, prompt=(0,), generated=8)
    raw = Judges(2, 1, aggregation="group")(where)
    close(raw[..., :6].round(decimals=4), [0.2929, 0.3254, 0.4141, 0.4727, 0.2042, 0.2908])
    assert raw[..., 6:].abs().max() == 0
    found = Judges(2, 3, aggregation="group")(where)[..., :6]
    # The zeros behind the candidates are those of the window.
    close(found.round(decimals=4), [0.2061, 0.3441, 0.4041, 0.3637, 0.3225, 0.1650])
    assert set(found[0, 0].topk(3).indices.tolist()) == {1, 2, 3}
    assert set(raw[0, 0, :6].topk(3).indices.tolist()) == {1, 2, 3}
    assert set(found[0, 0].topk(2).indices.tolist()) == set(raw[0, 0, :6].topk(2).indices.tolist()) == {2, 3}


def test_the_prompt_is_no_candidate():
    where = site(q=site().q[:, :, -1:], prompt=(2,), generated=4)
    found = Judges(1, 1)(where)[0, 0]
    assert found[:2].abs().max() == 0
    assert found[5] == 0
    assert float(found.sum()) == pytest.approx(1.0)


# ---------------------------------------------------------------- Keyformer


def test_gumbel_noise_and_temperature():
    close(gumbel(torch.tensor([0.1, 0.5, 0.9])), [-0.834032, 0.366513, 2.250367])
    assert gumbel(torch.tensor([0.0, 1.0], dtype=torch.float64)).isfinite().all()
    score = Gumbel(1.0, 2.0)
    assert [score.temperature(t, 4) for t in range(6)] == [1, 1.25, 1.5, 1.75, 2, 2]
    assert score.temperature(7, None) == 1.0


def keyformer_site(logits, **more):
    """One head with the given logits: the keys are unit vectors, the queries the rows."""
    rows = torch.tensor(logits)[None, None]
    eye = torch.eye(rows.shape[-1])[None, None]
    return CacheSite(q=rows, k=eye, v=eye, scale=1.0, **more)


def noise(values):
    table = torch.tensor(values)[None, None]
    return lambda query, key: table


def test_keyformer_example():
    inf = 0.0  # what stands behind the diagonal is masked
    prompt = keyformer_site([[1, inf, inf, inf], [0, 1, inf, inf], [2, 0, 1, inf], [0, 1, 0, 1.0]])
    drawn = noise([[0, 0, 0, 0], [0.5, -0.5, 0, 0], [0, 0.2, 0.1, 0], [0.3, 0.1, -0.2, 0.0]])
    found = noisy_columns(prompt, 1.0, drawn)
    close(found, [2.307248, 0.985867, 0.362408, 0.344477])
    close(prompt.columns(group="sum"), [2.068653, 1.186618, 0.379199, 0.365529])
    policy = tokred.make("keyformer", budget=3, recent=1)
    prompt.rows["mass"] = found
    assert policy.shrink(prompt, found, (3,)).representative.flatten().tolist() == [0, 1, 3]
    step = keyformer_site([[0.5, 1, 0, 2.0]])
    p = noisy_columns(step, 1.25, noise([[0.1, -0.1, 0.2, 0]]))
    close(p, [0.164955, 0.209699, 0.119782, 0.505564])
    total = p + torch.cat([found[..., [0, 1, 3]], torch.zeros(1, 1, 1)], -1)
    close(total, [2.472203, 1.195566, 0.464259, 0.505564])
    assert policy.shrink(step, total, (3,)).representative.flatten().tolist() == [0, 1, 3]
    assert policy.shrink(step, total, (4,)).trivial


def test_keyformer_without_noise_is_h2o():
    torch.manual_seed(0)
    q, k = torch.randn(2, 4, 12, 8), torch.randn(2, 2, 12, 8)
    for noise_kind in ("none", "constant"):
        a, b = CacheSite(q=q, k=k, v=k), CacheSite(q=q, k=k, v=k)
        Gumbel(1.0, 1.0, noise=noise_kind).observe(a)
        ColumnSum().observe(b)
        assert torch.allclose(a.rows["mass"], b.rows["mass"], atol=1e-5)


def test_keyformer_noise_knows_neither_blocks_nor_batch_nor_padding(monkeypatch):
    import importlib

    module = importlib.import_module("tokred.methods.kv.keyformer")
    torch.manual_seed(0)
    q, k = torch.randn(2, 4, 12, 8), torch.randn(2, 2, 12, 8)
    whole = CacheSite(q=q, k=k, v=k)
    Gumbel(seed=3).observe(whole)
    alone = CacheSite(q=q[1:], k=k[1:], v=k[1:])
    Gumbel(seed=3).observe(alone)
    assert torch.allclose(alone.rows["mass"], whole.rows["mass"][1:], atol=1e-6)
    monkeypatch.setattr(module, "_BLOCK", 100)
    small = CacheSite(q=q, k=k, v=k)
    Gumbel(seed=3).observe(small)
    assert torch.allclose(small.rows["mass"], whole.rows["mass"], atol=1e-5)
    other = CacheSite(q=q, k=k, v=k)
    Gumbel(seed=4).observe(other)
    assert not torch.allclose(other.rows["mass"], whole.rows["mass"], atol=1e-3)
    drawn = Gumbel(seed=3).draw(whole, torch.arange(400).view(1, 1, 400, 1), torch.arange(400).view(1, 1, 1, 400))
    assert float(drawn.mean()) == pytest.approx(0.5772, abs=0.02)
    assert float(drawn.std()) == pytest.approx(1.2825, abs=0.02)


def test_a_site_holds_the_attention_of_its_newest_queries():
    where = left_padded()
    made = where.attention
    assert (made.causal, made.count) == (True, where.q.shape[2])
    assert torch.equal(made.columns(group="mean"), where.columns())
    assert all(torch.equal(a, b) for a, b in zip(made.statistics(), where.statistics(), strict=True))


# ---------------------------------------------------------------- all scores

SCORES = [
    ColumnSum(), ColumnSum(0.9), Observed(), Window(2, 3), Window(2, 3, "max"), LastQuery(), KeyNorm(), KeyDifference(),
    LagRelative(2, 1), Expected(sinks=1), Critical("key_norm"), Random(), Recency(), Gumbel(), Dispersion(2, 200.0, 3),
]  # fmt: skip


@pytest.mark.parametrize("score", SCORES, ids=lambda s: s.name)
def test_left_padding_changes_no_score(score):
    plain, behind = site(), left_padded()
    for where in (plain, behind):
        score.observe(where)
    a, b = score(plain).float(), score(behind).float()[..., 3:]
    assert torch.allclose(a, b, atol=1e-6), score


@pytest.mark.parametrize("score", SCORES, ids=lambda s: s.name)
def test_scores_are_written_down_and_read_back(score):
    policy = tokred.make("kv", score=score, budget=64)
    again = tokred.from_dict(policy.to_dict())
    assert again == policy
