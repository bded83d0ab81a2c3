"""Scores, budgets and fates choose in float32 from the first operation: half precision chooses the same rows."""

from __future__ import annotations

import pytest
import torch

import tokred
from tokred import kv
from tokred.kv import CacheSite, Padding, Preference

SCORES = [
    kv.ColumnSum(), kv.ColumnSum(0.9), kv.Observed(), kv.Window(4, 3), kv.Window(4, 3, "max"),
    kv.Window(4, 3, group="max"), kv.LastQuery(), kv.KeyNorm(), kv.KeyDifference(), kv.LagRelative(4, 1),
    kv.LagRelative(4, 1, cross_scoring=True), kv.Expected(8, 1), kv.Critical(kv.Window(4, 3)), kv.Critical("key_norm"),
    kv.Random(), kv.Recency(), kv.Gumbel(), kv.Dispersion(4, 200.0, 3), kv.Judges(4, 3),
]  # fmt: skip
BUDGETS = [kv.Uniform(20), kv.Adaptive(20), kv.Preference(20, window=4)]


class Turning:
    """A rotary embedding."""

    def __init__(self, dtype):
        angle = torch.arange(64.0)[:, None] * 0.1 ** torch.arange(8)
        self.cos, self.sin = (torch.cat([f(angle)] * 2, -1).to(dtype) for f in (torch.cos, torch.sin))

    def unrotate(self, q):
        cos, sin = self.cos[: q.shape[2]].float(), self.sin[: q.shape[2]].float()
        return q.float() * cos - torch.cat([-q[..., 8:], q[..., :8]], -1).float() * sin

    def mean(self, start, count):
        return self.cos[start : start + count].float().mean(0), self.sin[start : start + count].float().mean(0)


def sites(dtype, padded):
    """A site in half precision, and one with the same values as float32."""
    g = torch.Generator().manual_seed(0)
    n = 48
    q, k, v = (torch.randn(2, h, n, 16, generator=g).to(dtype) for h in (4, 2, 2))
    w = (torch.randn(24, 64, generator=g) / 8).to(dtype)
    mask = torch.arange(n) >= torch.tensor([[0], [9]])
    for cast in (lambda x: x, torch.Tensor.float):
        more = {"padding": Padding(mask)} if padded else {}
        yield CacheSite(
            q=cast(q), k=cast(k), v=cast(v), rope=Turning(dtype), projection=lambda cast=cast: cast(w),
            prompt=(4, 4), generated=n - 4, depth=1, **more,
        )  # fmt: skip


def chosen(policy, site):
    score, budget = policy.parts.score, policy.parts.budget
    score.observe(site)
    if isinstance(budget, Preference):
        rows = budget.divided(site, tuple((p,) for p in budget.preference(site)))
    else:
        rows = budget.rows(site)
    step = policy.shrink(site, score(site), rows)
    mask = torch.ones_like(step.representative, dtype=torch.bool) if step.mask is None else step.mask
    return step.representative.masked_fill(~mask, -1), step.target, score(site)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("score", SCORES, ids=lambda s: s.name)
def test_the_same_rows_in_half_precision(score, dtype, padded):
    for budget in BUDGETS:
        policy = tokred.make("kv", score=score, budget=budget, recent=1)
        (a, into, low), (b, other, high) = (chosen(policy, site) for site in sites(dtype, padded))
        assert low.dtype in (torch.float32, torch.float64)
        assert torch.equal(a, b), budget
        assert torch.equal(into, other)
        assert torch.allclose(low, high, atol=0, rtol=1e-5)


@pytest.mark.parametrize("metric", ["dot_product", "l2"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_same_residual_rows_in_half_precision(dtype, metric):
    policy = tokred.make("zeromerge", budget=20, dense=5, metric=metric)
    found = []
    for site in sites(dtype, False):
        site.rows["residual"] = (torch.arange(48) % 9 == 0).float().expand(2, 2, 48)[..., :45].new_zeros(2, 2, 48)
        site.rows["residual"][..., 3:8] = 1
        found.append(chosen(policy, site)[:2])
    assert torch.equal(found[0][0], found[1][0])
    assert torch.equal(found[0][1], found[1][1])


@pytest.mark.parametrize("score", SCORES, ids=lambda s: s.name)
def test_autocast_changes_no_choice(score):
    """As a session runs it: under autocast products of float32 would be half-precise."""
    from tokred.kernels.dispatch import without_autocast

    policy = tokred.make("kv", score=score, budget=20, recent=1)
    plain = chosen(policy, next(sites(torch.bfloat16, False)))[0]
    with torch.autocast("cpu", torch.bfloat16):
        site = next(sites(torch.bfloat16, False))
        with without_autocast(site.q):
            assert torch.equal(chosen(policy, site)[0], plain)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["expected_attention", "criticalkv", "zeromerge", "keyformer", "adakv"])
def test_a_model_under_autocast_chooses_in_float32(name, monkeypatch):
    pytest.importorskip("transformers")
    from tests.kv.tiny import build, prompt

    enabled, shrink = [], tokred.kv.CachePolicy.shrink

    def watched(self, *args):
        enabled.append(torch.is_autocast_enabled("cpu"))
        return shrink(self, *args)

    monkeypatch.setattr(tokred.kv.CachePolicy, "shrink", watched)
    more = {"criticalkv": {"score": kv.Window(4)}, "adakv": {"score": kv.Window(4)}}.get(name, {})
    model = tokred.apply(build("llama"), name, budget=9, **more)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        model(prompt(25))
    assert enabled
    assert not any(enabled)


UNEVEN = [
    ("snapkv", {"budget": 0.3, "window": 4}),
    ("snapkv", {"budget": 0.3, "window": 4, "store": "rectangle"}),
    ("h2o", {"budget": 12}),
    ("adakv", {"budget": 0.3, "score": kv.Window(4)}),
    ("adakv", {"budget": 0.3, "score": kv.Window(4), "store": kv.Tight("kivi")}),
    ("streaming_llm", {"budget": 12}),
    ("turbo", {}),
    ("mikv", {}),
]


AUTOCAST = [("llama", *one, dtype) for one in UNEVEN for dtype in (torch.bfloat16, torch.float16)]
AUTOCAST += [("deepseek_v2", *UNEVEN[0], torch.bfloat16)]  # whose scores are of queries in the space of latents


@pytest.mark.parametrize(("family", "name", "parameters", "dtype"), AUTOCAST)
def test_a_padded_batch_under_autocast(family, name, parameters, dtype):
    """Rotated queries and keys are float32 there, and values are not; attention takes them as PyTorch's own does."""
    pytest.importorskip("transformers")
    from tests.kv.tiny import build, padded

    ids, mask, _ = padded([20, 57, 33])
    more = torch.nn.functional.pad(mask, (0, 1), value=1)

    def steps() -> torch.Tensor:
        model = tokred.apply(build(family), name, **parameters)
        cache = tokred.kv_cache(model)
        model(ids, attention_mask=mask, **tokred.cache_kwargs(cache))
        return model(ids[:, -1:], attention_mask=more, **tokred.cache_kwargs(cache)).logits.float()

    with torch.no_grad():
        wanted = steps()
        with torch.autocast("cpu", dtype):
            found = steps()
    torch.testing.assert_close(found, wanted, atol=0.15, rtol=0.1)
