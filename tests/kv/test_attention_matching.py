"""Attention Matching: the card's worked example, what a fit promises, and a fitted cache in a model."""

from __future__ import annotations

import math

import pytest
import torch

import tokred
from tests.kv.test_scores import site
from tokred.kernels.decode_attention import SENTINEL
from tokred.kv import CacheSite, Fit, Half, Padding
from tokred.kv.fitting import FITTED, REFERENCE, solve

RMS = [0.164875, 0.159209, 0.235222, 0.117698, 0.131753, 0.279454]
EXACT = {"sinks": 0, "recent": 0, "queries": "prompt", "ridge": 0.0}


def close(found, expected, abs=2e-5):
    assert found.flatten().tolist() == pytest.approx(expected, abs=abs)


def example(**more) -> CacheSite:
    """The fixture; its queries 1 to 5 are what the fit serves."""
    whole = site()
    return site(q=whole.q[:, :, 1:], **more)


def test_worked_example():
    policy, where = tokred.AttentionMatching(budget=3, **EXACT), example()
    close(policy.parts.score(where), RMS, 2e-6)
    step = policy.reduce(where)
    assert step.representative.tolist() == [[[0, 2, 5]]]
    values, weights = (where.notes[name] for name in FITTED)
    assert not set(REFERENCE) & set(where.notes)
    # The authors' code steps by an inexact eigenvalue.
    close(weights[0, 0, [0, 2, 5]], [3.609966, 0.049787, 1.780748], 3e-4)
    close(weights[0, 0, [0, 2, 5]].log(), [1.283698, -3, 0.577034], 3e-4)
    assert values[0, 0, [0, 2, 5]].flatten().tolist() == pytest.approx(
        [0.642049, 1.350794, 11.402194, -49.472542, 1.373824, 2.089693], rel=2e-3
    )
    assert torch.equal(values[0, 0, [1, 3, 4]], where.v[0, 0, [1, 3, 4]])


def answer(q, k, v, weights):
    share = ((q @ k.mT) / 2**0.5 + weights.log()).softmax(-1)
    return share, share @ v


def test_worked_example_of_an_answer():
    where = example()
    tokred.AttentionMatching(budget=3, **EXACT).reduce(where)
    values, weights = (t[0, 0, [0, 2, 5]] for t in (where.notes[name] for name in FITTED))
    later = torch.tensor([[0.5, 0.5]]), torch.tensor([[3.0, -1.0]])
    k = torch.cat([where.k[0, 0, [0, 2, 5]], later[0]])
    q = torch.tensor([1.0, 0.5])
    share, out = answer(q, k, torch.cat([values, later[1]]), torch.cat([weights, torch.ones(1)]))
    close(share, [0.573048, 0.011255, 0.282677, 0.133019], 1e-4)
    close(out, [1.283666, 0.674939], 1e-3)
    whole = answer(q, torch.cat([where.k[0, 0], later[0]]), torch.cat([where.v[0, 0], later[1]]), torch.ones(7))[1]
    close(whole, [1.295194, 0.673576], 2e-6)


def problem(n=60, total=20, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, total, generator=g) * 2, torch.randn(total, 3, generator=g)


def outputs(logits, values, chosen, factors, own):
    share = (logits[:, chosen].double().exp() * factors).float()
    return (share / share.sum(-1, keepdim=True)) @ own - logits.softmax(-1) @ values


def test_a_fit_is_no_worse_than_eviction():
    logits, values = problem()
    chosen = torch.arange(20) % 3 == 0
    factors, own = solve(logits, values, chosen, Fit(ridge=0.0))
    fitted = outputs(logits, values, chosen, factors, own).square().sum()
    assert fitted <= outputs(logits, values, chosen, factors, values[chosen]).square().sum()
    assert fitted < outputs(logits, values, chosen, torch.ones(7), values[chosen]).square().sum()
    shuffled = torch.randperm(60)
    again = solve(logits[shuffled], values, chosen, Fit(ridge=0.0))
    assert torch.allclose(again[1], own, atol=1e-4)
    scaled = solve(logits, values * 3, chosen, Fit(ridge=0.0))[1]
    assert torch.allclose(scaled, own * 3, atol=1e-4)
    moved = solve(logits, values + 5, chosen, Fit(ridge=0.0))[1]
    assert torch.allclose(moved, own + 5, atol=1e-3)


def test_of_doubled_rows_one_of_each_is_exact():
    logits, values = problem(total=8)
    twice = torch.arange(8).repeat_interleave(2)
    factors, own = solve(logits[:, twice], values[twice], torch.arange(16) % 2 == 0, Fit(ridge=0.0))
    close(factors, [2.0] * 8, 1e-4)
    assert torch.allclose(own, values, atol=1e-4)
    # Both of each: columns are alike, and the shortest solution is taken.
    both = solve(logits[:, twice], values[twice], torch.ones(16, dtype=torch.bool), Fit(ridge=0.0))
    close(both[0], [1.0] * 16, 1e-4)


def test_guards_stay_and_are_not_fitted():
    torch.manual_seed(0)
    q, k, v = torch.randn(1, 4, 20, 8), torch.randn(1, 2, 20, 8), torch.randn(1, 2, 20, 8)
    policy = tokred.AttentionMatching(budget=8, queries="prompt", sinks=2, recent=3)
    where = CacheSite(q=q, k=k, v=v)
    step = policy.reduce(where)
    values, weights = (where.notes[name] for name in FITTED)
    guards = [0, 1, 17, 18, 19]
    assert all(set(guards) <= set(head) for head in step.representative[0].tolist())
    assert torch.equal(values[:, :, guards], v[:, :, guards])
    assert (weights[:, :, guards] == 1).all()
    changed = (weights != 1).sum(-1)
    assert changed.tolist() == [[3, 3]]
    # Behind padding: the same.
    pad = lambda x: torch.nn.functional.pad(x, (0, 0, 4, 0), value=7.0)  # noqa: E731
    mask = torch.arange(24)[None] >= 4
    behind = CacheSite(q=pad(q), k=pad(k), v=pad(v), padding=Padding(mask))
    assert (policy.reduce(behind).representative - 4).tolist() == step.representative.tolist()
    assert torch.allclose(behind.notes[FITTED[1]][..., 4:], weights, atol=1e-4)
    assert torch.allclose(behind.notes[FITTED[0]][..., 4:, :], values, atol=1e-3)


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ({"queries": "self"}, "queries is 'self'; allowed are 'repeat', 'prompt'"),
        ({"bound": 0.5}, "most must be at least 1 and finite, got 0.5"),
        ({"ridge": -1.0}, "ridge must be at least 0"),
        ({"steps": -1}, "steps must be"),
        ({"budget": 5}, "cannot hold the 4 first and 8 newest"),
    ],
)
def test_bad_input(given, text):
    with pytest.raises(ValueError, match=text):
        tokred.AttentionMatching(**given)


def test_a_fit_without_the_score_that_it_needs():
    with pytest.raises(tokred.MissingInputError, match="the score 'matched' leaves, and had none"):
        tokred.KVPolicy(score="key_norm", budget=3, fate="fit").reduce(site())


# ---------------------------------------------------------------- on a model


@pytest.fixture(scope="module")
def llama():
    pytest.importorskip("transformers")
    from tests.kv.tiny import build

    return build("llama", torch.float64)


@pytest.fixture(autouse=True)
def unpatched(request):
    yield
    if "llama" in request.fixturenames:
        tokred.remove(request.getfixturevalue("llama"))


def held(cache, sample, shift):
    return [
        [[p - shift for p in h if p != SENTINEL] for h in layer.positions[sample].tolist()] for layer in cache.layers
    ]


@torch.no_grad()
@pytest.mark.parametrize("queries", ["repeat", "prompt"])
def test_batches_and_padding_change_nothing(llama, queries):
    from tests.kv.tiny import padded

    tokred.apply(llama, "attention_matching", budget=0.4, queries=queries, sinks=1, recent=2, chunk=9)
    ids, mask, alone = padded((26, 17))
    options = {"max_new_tokens": 5, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    both = llama.generate(ids, attention_mask=mask, **options)
    for i, row in enumerate(alone):
        one = llama.generate(row, **options)
        assert held(both.past_key_values, i, 26 - row.shape[1]) == held(one.past_key_values, 0, 0)
        assert all((a[i] - c[0]).abs().max() < 1e-3 for a, c in zip(both.logits, one.logits, strict=True))
        layer = one.past_key_values.layers[1]
        assert layer.weights.shape == layer.positions.shape
        assert (layer.weights[..., -5:] == 1).all(), "tokens that came since"
        assert not layer.notes


@torch.no_grad()
@pytest.mark.parametrize("queries", ["repeat", "prompt"])
def test_nothing_removed_is_bit_equal_and_a_fit_is_nearer_than_eviction(llama, queries):
    from tests.kv.tiny import prompt

    ids, more = prompt(40), prompt(12, seed=3)
    plain = llama(ids, use_cache=True)
    after = llama(more, past_key_values=plain.past_key_values).logits

    def run(**given):
        tokred.apply(llama, "attention_matching", queries=queries, sinks=1, recent=2, **given)
        cache = tokred.kv_cache(llama)
        first = llama(ids, past_key_values=cache).logits
        found = llama(more, past_key_values=cache).logits
        tokred.remove(llama)
        return first, found

    first, found = run(budget=1.0)
    assert torch.equal(first, plain.logits)
    assert torch.equal(found, after)
    fitted = run(budget=0.3)[1]
    evicted = run(budget=0.3, direct=True, bound=1.0, steps=0)[1]
    assert (fitted - after).square().mean() < (evicted - after).square().mean()


@torch.no_grad()
def test_weights_of_one_and_own_values_are_plain_eviction(llama):
    from tests.kv.tiny import prompt

    ids, more = prompt(30), prompt(1, seed=3)
    tokred.apply(llama, "attention_matching", queries="prompt", budget=10, sinks=1, recent=2, direct=True, bound=1.0)
    cache = tokred.kv_cache(llama)
    llama(ids, past_key_values=cache)
    assert all((layer.weights == 1).all() for layer in cache.layers)
    kept = [(layer.keys, layer.values, layer.positions) for layer in cache.layers]
    ours = llama(more, past_key_values=cache).logits
    tokred.remove(llama)
    plain = llama(ids, use_cache=True).past_key_values
    for (keys, values, slots), layer in zip(kept, plain.layers, strict=True):
        index = slots.long()[..., None]
        assert torch.equal(keys, layer.keys.gather(2, index.expand_as(keys)))
        assert torch.equal(values, layer.values.gather(2, index.expand_as(values)))
    assert ours.isfinite().all()


@torch.no_grad()
def test_stores_and_drafts(llama):
    from tests.kv.tiny import prompt

    with pytest.raises(ValueError, match="the fate 'fit' needs a store that can hold other values than came"):
        tokred.apply(llama, "attention_matching", budget=0.5, store=Half())
    with pytest.raises(ValueError, match="cannot hold a limit"):
        tokred.Limited(policy=tokred.AttentionMatching())
    tokred.apply(llama, "attention_matching", queries="prompt", budget=12, sinks=1, recent=2)
    ids = prompt(6).repeat(1, 4)
    greedy = llama.generate(ids, max_new_tokens=6, do_sample=False)
    assert torch.equal(llama.generate(ids, max_new_tokens=6, do_sample=False, prompt_lookup_num_tokens=3), greedy)
    beams = llama.generate(ids, max_new_tokens=4, num_beams=3, do_sample=False)
    assert beams.shape[1] == 28
    assert tokred.make("attention_matching").parts.fate.most == pytest.approx(math.e**3)


@torch.no_grad()
def test_uneven_heads_and_a_second_fit(llama):
    from tests.kv.tiny import padded

    budget = tokred.kv.Adaptive(0.4)
    ids, mask, _ = padded((24, 15))
    policy = tokred.KVPolicy(
        score=tokred.kv.Matched("prompt"), budget=budget, fate="fit", sinks=1, recent=2, when=tokred.kv.When(turns=True)
    )
    tokred.apply(llama, policy)
    cache = tokred.kv_cache(llama, layout="flat")
    llama(ids, attention_mask=mask, past_key_values=cache)
    more = torch.cat([mask, torch.ones_like(mask[:, :9])], 1)
    out = llama(ids[:, :9], attention_mask=more, past_key_values=cache)
    assert out.logits.isfinite().all()
    for layer in cache.layers:
        real = layer.positions != SENTINEL
        assert layer.weights[real].gt(0).all()
        assert layer.weights.shape == layer.positions.shape
