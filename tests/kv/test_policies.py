"""What each policy promises while a model runs."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("transformers")

import tokred
from tests.kv.tiny import POLICIES, build, padded, prompt
from tokred.adapters.kv.layer import TokLayer
from tokred.kernels.decode_attention import SENTINEL
from tokred.kv import CacheSite, Merge, When
from tokred.methods.kv.h2o import MASS

pytestmark = pytest.mark.usefixtures("no_grad")


def steps(model, cache, count: int, b: int = 1):
    """Feed ``count`` tokens, one at a time; yields after each."""
    for g in range(count):
        model(prompt(1, b, seed=50 + g), past_key_values=cache)
        yield g


@pytest.mark.parametrize(("name", "recent"), [("h2o", 4), ("keyformer", 2), ("tova", 1), ("streaming_llm", 7)])
def test_a_fixed_cache_stays_fixed(name, recent):
    model = tokred.apply(build("llama"), POLICIES[name])
    cache = tokred.kv_cache(model, steps=12)
    model(prompt(20, 2), past_key_values=cache)
    for _ in steps(model, cache, 12, 2):
        for layer in cache.layers:
            positions = layer.positions.long()
            assert positions.shape[2] == 9
            assert (positions[..., 1:] > positions[..., :-1]).all()
            assert torch.equal(positions[0, 0, -recent:], torch.arange(layer.seen - recent, layer.seen))
            if name == "streaming_llm":
                assert positions[0, 0, :2].tolist() == [0, 1]
            if name == "tova":
                assert (positions == positions[:, :1]).all(), "all heads agree"


def test_shares_are_those_of_the_prompt():
    model = tokred.apply(build("llama"), "h2o", budget=0.5)
    cache = tokred.kv_cache(model)
    model(prompt(20), past_key_values=cache)
    assert {cache.layers[0].keys.shape[2] for _ in steps(model, cache, 5)} == {10}


def test_a_budget_that_is_not_reached_is_filled_first():
    model = tokred.apply(build("llama"), "h2o", budget=14)
    cache = tokred.kv_cache(model)
    model(prompt(10), past_key_values=cache)
    assert [cache.layers[0].keys.shape[2] for _ in steps(model, cache, 8)] == [11, 12, 13, 14, 14, 14, 14, 14]


def test_a_row_that_leaves_the_recent_window_competes():
    """The published code of Keyformer drops it at once and for ever."""
    policy = tokred.make("h2o", budget=4, recent=2)
    k = torch.randn(1, 1, 5, 4)
    mass = torch.tensor([[[3.0, 2.0, 9.0, 0.5, 0.1]]])
    where = CacheSite(k=k, v=k, positions=torch.tensor([[[0, 1, 7, 8, 9]]], dtype=torch.int32), seen=10)
    # Slot 7 has just left the window of 8 and 9, and beats slot 1.
    assert policy.shrink(where, mass, (4,)).representative.tolist() == [[[0, 2, 3, 4]]]


def test_seeds_change_what_survives_and_nothing_else():
    model, ids = build("llama"), prompt(24)
    kept = []
    for seed in (0, 1):
        tokred.apply(model, "keyformer", budget=9, seed=seed)
        cache = tokred.kv_cache(model)
        logits = model(ids, past_key_values=cache).logits
        kept.append((logits, [layer.positions for layer in cache.layers]))
    assert torch.equal(kept[0][0], kept[1][0]), "the prompt's own attention has no noise"
    assert any(not torch.equal(a, b) for a, b in zip(kept[0][1], kept[1][1], strict=True))


def test_keyformer_learns_how_many_tokens_come():
    seen = []

    class Spy(tokred.kv.Gumbel):
        def temperature(self, step, steps):
            seen.append((step, steps))
            return super().temperature(step, steps)

    model = tokred.apply(build("llama"), "kv", score=Spy(), budget=9, when=When(every=1), recent=2)
    model.generate(prompt(20), max_new_tokens=5, do_sample=False, eos_token_id=None)
    assert seen[::3] == [(g, 5) for g in range(5)]


def test_accumulated_scores_are_those_of_the_whole_attention():
    """With room for everything, H2O's sums are the column sums of the attention of all queries so far."""
    model = tokred.apply(build("llama", torch.float64), "h2o", budget=100)
    cache, ids = tokred.kv_cache(model), prompt(12)
    model(ids[:, :9], past_key_values=cache)
    for i in range(9, 12):
        model(ids[:, i : i + 1], past_key_values=cache)
    plain = tokred.remove(model)
    plain.set_attn_implementation("eager")
    for layer, weights in zip(cache.layers, plain(ids, output_attentions=True).attentions, strict=True):
        expected = weights.double().sum(2).view(1, 2, 2, 12).sum(2)
        assert torch.allclose(layer.rows[MASS].double(), expected, atol=1e-6)


@pytest.mark.parametrize(("pool", "pooling"), [(1, "avg"), (3, "avg"), (3, "max")])
def test_window_scores_are_those_of_the_whole_attention(pool, pooling):
    """SnapKV by hand, from the matrix of attention weights."""
    model, ids, w, n = build("llama", torch.float64), prompt(30), 5, 30
    tokred.apply(model, "snapkv", budget=11, window=w, pool=pool, pooling=pooling)
    cache = tokred.kv_cache(model)
    model(ids, past_key_values=cache)
    plain = tokred.remove(model)
    plain.set_attn_implementation("eager")
    for layer, weights in zip(cache.layers, plain(ids, output_attentions=True).attentions, strict=True):
        rows = weights.double()[0, :, -w:, : n - w].mean(1)
        smooth = torch.nn.functional.avg_pool1d if pooling == "avg" else torch.nn.functional.max_pool1d
        score = smooth(rows, pool, 1, pool // 2).view(2, 2, n - w).mean(1)
        for head in range(2):
            best = sorted(score[head].argsort(descending=True, stable=True)[: 11 - w].tolist())
            assert layer.positions[0, head].tolist() == [*best, *range(n - w, n)]


# ---------------------------------------------------------------- layers


def test_pyramid_layers():
    model = tokred.apply(build("llama"), "pyramidkv", budget=0.5, window=4, beta=20)
    cache = tokred.kv_cache(model)
    model(prompt(40), past_key_values=cache)
    rows = [layer.keys.shape[2] for layer in cache.layers]
    assert rows == [tokred.kv.Pyramid(0.5, 20, 4).share(40, None, i, 3) for i in range(3)]
    assert rows[0] > rows[1] > rows[2]


def test_cake_never_holds_more_than_its_budget(monkeypatch):
    held = []
    original = TokLayer.apply

    def apply(self, step, merge_score):
        original(self, step, merge_score)
        held.append([layer.keys.shape[2] for layer in cache.layers if layer.positions is not None])

    monkeypatch.setattr(TokLayer, "apply", apply)
    model = tokred.apply(build("llama", num_hidden_layers=5), "cake", budget=12, window=4, pool=3)
    cache = tokred.kv_cache(model)
    model(prompt(60), past_key_values=cache)
    # Between two cuts of a cascade the layers before have not been cut yet; after it all fit.
    assert sum(held[-1]) <= 5 * 12 + 5
    assert all(rows[-1] >= 4 for rows in held)
    assert len(held) > 5, "earlier layers are cut again"
    assert not any("score" in layer.rows for layer in cache.layers)


def test_squeeze_takes_from_the_layer_whose_attention_does_nothing():
    model = build("llama", num_hidden_layers=6)
    model.model.layers[3].self_attn.o_proj.weight.zero_()
    tokred.apply(model, "squeezeattention", budget=0.5, sinks=1, factor=0.35)
    cache = tokred.kv_cache(model)
    model(prompt(40), past_key_values=cache)
    rows = [layer.keys.shape[2] for layer in cache.layers]
    assert sum(rows) == 6 * 20
    assert rows[3] == min(rows) == 7
    assert {tuple(sorted(m._forward_pre_hooks)) for m in tokred.remove(model).modules()} == {()}


@pytest.mark.parametrize("family", ["llama", "gemma3", "olmo2"])
def test_squeeze_measures_the_stream_around_the_attention(family):
    """Norms before the attention, around it, and behind it."""
    model = build(family)
    tokred.apply(model, "squeezeattention", budget=0.5, groups=2, sinks=1)
    cache = tokred.kv_cache(model)
    streams, finish = {}, cache.engine.finish
    cache.engine.finish = lambda: (streams.update(cache.engine.streams), finish())
    ids, mask, _ = padded((20, 12))
    before, added, chosen = {}, {}, [i for i, layer in enumerate(cache.layers) if not layer.is_sliding]
    for i in chosen:
        layer = model.model.layers[i]
        layer.register_forward_pre_hook(lambda m, a, i=i: before.update({i: a[0]}))
        last = layer.self_attn if family == "llama" else layer.post_attention_layernorm
        last.register_forward_hook(lambda m, a, o, i=i: added.update({i: o[0] if isinstance(o, tuple) else o}))
    model(ids, attention_mask=mask, past_key_values=cache)
    for place, i in enumerate(chosen):
        cosine = torch.cosine_similarity(before[i], before[i] + added[i], dim=-1)
        total, count = streams[place]
        assert torch.allclose(total, (cosine * mask).sum(1), atol=1e-5)
        assert count.tolist() == [20, 12]


# ---------------------------------------------------------------- merging


def test_weights_count_the_tokens_and_totals_are_conserved(monkeypatch):
    model = tokred.apply(build("llama"), "zeromerge", budget=9, dense=2, tail=3)
    totals: dict[int, torch.Tensor] = {}
    append = TokLayer.append

    def add(self, keys, values):
        totals[self.index] = totals.get(self.index, 0.0) + keys.double().sum(2)
        append(self, keys, values)

    monkeypatch.setattr(TokLayer, "append", add)
    cache = tokred.kv_cache(model)
    model(prompt(20), past_key_values=cache)
    for _ in steps(model, cache, 15):
        for layer in cache.layers:
            assert layer.keys.shape[2] == 9
            assert (layer.weights.sum(-1) == layer.seen).all()
            summed = (layer.weights.unsqueeze(-1) * layer.keys).double().sum(2)
            assert torch.allclose(summed, totals[layer.index], atol=1e-4)
            newest = layer.positions >= layer.seen - 2
            assert (newest.sum(-1) == 2).all()
            assert (layer.weights[newest] == 1).all()


def test_a_short_prompt_merges_at_its_first_overflow():
    model = tokred.apply(build("llama"), "zeromerge", budget=9, dense=2, tail=3)
    cache = tokred.kv_cache(model)
    model(prompt(7), past_key_values=cache)
    held = []
    for _ in steps(model, cache, 5):
        layer = cache.layers[0]
        held.append((layer.keys.shape[2], None if layer.weights is None else float(layer.weights.sum(-1).amax())))
    assert held == [(8, None), (9, None), (9, 10.0), (9, 11.0), (9, 12.0)]
    assert (cache.layers[0].rows["residual"].sum(-1) == 2).all()


def test_merging_goes_with_other_scores_and_times():
    model = build("llama")
    policy = tokred.make("kv", score="key_norm", budget=8, fate=Merge(2), when=When(every=3), sinks=1, recent=2)
    tokred.apply(model, policy)
    cache = tokred.kv_cache(model)
    ids, mask, _ = padded((20, 6))
    model(ids, attention_mask=mask, past_key_values=cache)
    for _ in steps(model, cache, 7, 2):
        pass
    for layer in cache.layers:
        real = layer.positions != SENTINEL
        assert torch.equal((layer.weights * real).sum(-1), torch.tensor([[27.0], [13.0]]).expand(-1, 2))


# ---------------------------------------------------------------- any with any


@pytest.mark.parametrize("score", ["column_sum", "window", "last_query", "key_norm", "key_difference", "lag_relative",
                                   "expected_attention", "critical", "observed", "random", "recency", "gumbel",
                                   "dispersion"])  # fmt: skip
def test_every_score_meets_every_budget_fate_and_time(score):
    made = {
        "window": tokred.kv.Window(4, 3), "critical": tokred.kv.Critical(tokred.kv.Window(4, 3)),
        "dispersion": tokred.kv.Dispersion(4, 200.0, 3), "lag_relative": tokred.kv.LagRelative(4, 1),
    }  # fmt: skip
    budgets = [
        tokred.kv.Uniform(0.5), tokred.kv.Uniform("6 KiB"), tokred.kv.Pyramid(10, 4, 4), tokred.kv.Adaptive(10),
        tokred.kv.Preference(10, window=4), tokred.kv.Squeeze(10),
        tokred.kv.Adaptive(safe=0.1, layers=tokred.kv.Pyramid(10, 4, 4)),
    ]  # fmt: skip
    model, (ids, mask, _) = build("llama"), padded((24, 13))
    for i, budget in enumerate(budgets):
        fate = Merge(1) if i % 2 else "evict"
        when = (When(), When(every=1), When(turns=True))[i % 3]
        policy = tokred.make("kv", score=made.get(score, score), budget=budget, fate=fate, when=when, sinks=1, recent=1)
        tokred.apply(model, policy)
        out = model.generate(ids, attention_mask=mask, max_new_tokens=4, do_sample=False, output_logits=True,
                             return_dict_in_generate=True)  # fmt: skip
        assert all(x.isfinite().all() for x in out.logits), (score, budget)
        rows = [layer.keys.shape[2] for layer in out.past_key_values.layers]
        assert max(rows) <= 27, (score, budget)
        assert min(rows) < 27, (score, budget)
