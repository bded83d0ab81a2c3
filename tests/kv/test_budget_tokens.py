"""Budgets in tokens and bytes allow as many rows after a short prompt as after a long one."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("transformers")

import tokred
from tests.kv.tiny import build, padded, prompt
from tokred import kv
from tokred.kv import When

pytestmark = pytest.mark.usefixtures("no_grad")


def budgets(amount):
    return {
        "uniform": kv.Uniform(amount),
        "pyramid": kv.Pyramid(amount, 4, 4),
        "squeeze": kv.Squeeze(amount),
        "preference": kv.Preference(amount, window=4),
        "adaptive": kv.Adaptive(amount),
        "adaptive_pyramid": kv.Adaptive(layers=kv.Pyramid(amount, 4, 4)),
        "global": kv.Global(amount),
    }


def held(budget, n: int = 23, steps: int = 8):
    """Rows of each layer, per head on average, after the prompt and each later token."""
    policy = tokred.make("kv", score="key_norm", budget=budget, when=When(every=1), recent=1)
    model = tokred.apply(build("llama"), policy)
    cache = tokred.kv_cache(model)
    model(prompt(n), past_key_values=cache)
    rows = [real_rows(cache)]
    for i in range(steps):
        model(prompt(1, seed=40 + i), past_key_values=cache)
        rows.append(real_rows(cache))
    return rows


def real_rows(cache):
    found = []
    for layer in cache.layers:
        positions = layer.positions
        real = layer.width * 2 if positions is None else int((positions < 10**6).sum())
        found.append(real / 2)
    return found


@pytest.mark.parametrize("amount", [5000, "1 GiB"])
@pytest.mark.parametrize("name", list(budgets(1)))
def test_a_short_prompt_goes_on_growing(name, amount):
    assert held(budgets(amount)[name]) == [[float(n)] * 3 for n in range(23, 32)]


@pytest.mark.parametrize("name", list(budgets(1)))
def test_what_is_reached_later_is_held(name):
    rows = held(budgets(26)[name])
    assert rows[:4] == [[float(n)] * 3 for n in range(23, 27)]
    for n, layers in zip(range(23, 32), rows, strict=True):
        assert sum(layers) == pytest.approx(3 * min(26, n), abs=2), "no more in all than was asked for, and no less"


@pytest.mark.parametrize("name", list(budgets(1)))
def test_second_turns_fill_what_the_first_left_free(name):
    policy = tokred.make("kv", score="key_norm", budget=budgets(30)[name], when=When(turns=True), recent=1)
    model = tokred.apply(build("llama"), policy)
    cache = tokred.kv_cache(model)
    for n, expected in ((20, 20), (8, 28), (9, 30)):
        model(prompt(n), past_key_values=cache)
        assert sum(real_rows(cache)) == pytest.approx(3 * expected, abs=2)


@pytest.mark.parametrize("name", ["squeeze", "preference", "global"])
def test_shares_stay_those_of_the_prompt(name):
    rows = held(budgets(0.5)[name])
    assert all(layers == rows[0] for layers in rows) or name == "global"
    assert all(sum(layers) <= sum(rows[0]) for layers in rows)


@pytest.mark.parametrize("method", ["squeezeattention", "h2o", "streaming_llm", "tova", "keyformer", "zeromerge"])
def test_methods_that_evict_at_every_step(method):
    model = tokred.apply(build("llama"), method, budget=5000)
    model.generate(prompt(23), max_new_tokens=6, do_sample=False, eos_token_id=None)
    assert [row.rows for row in tokred.report(model).layers] == [28] * 3


def test_what_a_layer_measured_follows_its_samples():
    """Layers' shares of a batch are those of each sample alone, also when the budget is reached long after."""
    policy = tokred.make("kv", score="key_norm", budget=kv.Preference(12, window=3), when=When(every=1), recent=1)
    model = tokred.apply(build("llama"), policy)
    ids, mask, alone = padded((20, 11))
    more = {"max_new_tokens": 9, "do_sample": False, "eos_token_id": None, "return_dict_in_generate": True}
    both = model.generate(ids, attention_mask=mask, **more).past_key_values
    for i, row in enumerate(alone):
        one = model.generate(row, **more).past_key_values
        for ours, theirs in zip(both.layers, one.layers, strict=True):
            positions = theirs.positions
            expected = theirs.width * 2 if positions is None else int((positions < 10**6).sum())
            assert int((ours.positions[i] < 10**6).sum()) == expected
    both.reorder_cache(torch.tensor([1, 1]))
    assert len(set(both.layers[0].clock.measured)) == 1
