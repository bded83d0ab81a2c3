"""Steps that evict one row for each that comes: the newest takes its place, and nobody can tell but by the clock."""

from __future__ import annotations

import copy

import pytest
import torch

pytest.importorskip("transformers")

import transformers

import tokred
from tests.kv.tiny import build, prompt
from tokred.kv import CachePolicy
from tokred.kv.queue import Queue, queue_of
from tokred.kv.select import lowest
from tokred.kv.stores.rectangle import RectangleShelf
from tokred.methods.kv.h2o import ColumnSum

POLICIES = {
    "h2o": {"budget": 9},
    "streaming_llm": {"budget": 9, "sinks": 2},
    "tova": {"budget": 9},
    "kv": {"budget": 9, "score": "key_norm", "when": tokred.kv.When(every=1)},
}
STEPS = (1, 1, 1, 1, 1, 3, 1, 1, 1)


pytestmark = pytest.mark.usefixtures("no_grad")


def begun(name: str, batch: int = 2, n: int = 20):
    """A patched model and a cache that holds a prompt."""
    model = tokred.apply(build("llama"), tokred.make(name, **POLICIES[name]))
    cache = tokred.kv_cache(model)
    model(prompt(n, batch), past_key_values=cache)
    return model, cache


def told(cache) -> list[torch.Tensor]:
    """All that can be seen of the rows, in order."""
    found = []
    for layer in cache.layers:
        found += [layer.positions.float(), layer.keys, layer.values, *layer.rows.values()]
    return found


def close(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return all(torch.allclose(x, y, atol=1e-5) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("name", POLICIES)
def test_rows_are_those_that_would_have_been_moved(name, monkeypatch):
    runs = []
    for swaps in (True, False):
        if not swaps:
            monkeypatch.setattr(RectangleShelf, "swaps", False)
            monkeypatch.setattr(tokred.kv.stores.flat.FlatShelf, "swaps", False)
        model, cache = begun(name)
        outs, moved = [], False
        for i, m in enumerate(STEPS):
            outs.append(model(prompt(m, 2, seed=30 + i), past_key_values=cache).logits)
            moved |= any(layer.mixed for layer in cache.layers)
            if i == 3:
                cache.reorder_cache(torch.tensor([1, 1]))
        assert moved == swaps
        runs.append([*outs, *told(cache)])
    assert close(*runs)


EVERY = tokred.kv.When(every=1)
QUICK = {
    "h2o": tokred.make("h2o", budget=9),
    "h2o by a share": tokred.make("h2o", budget=0.5, recent=3),
    "streaming_llm": tokred.make("streaming_llm", budget=9, sinks=2),
    "streaming_llm without sinks": tokred.make("streaming_llm", budget=0.4, sinks=0),
    "decay": tokred.make("kv", score=ColumnSum(0.9), budget=9, sinks=1, recent=3, when=EVERY),
    "newest guarded": tokred.make("kv", score="recency", budget=9, recent=4, when=EVERY),
}


def watched(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether each step that is asked for was taken without a site, as they come."""
    found: list[bool] = []
    due, act = Queue.due, Queue.act

    def asked(self, *args):
        found.append(False)
        return due(self, *args)

    def taken(self, *args):
        found[-1] = act(self, *args)
        return found[-1]

    monkeypatch.setattr(Queue, "due", asked)
    monkeypatch.setattr(Queue, "act", taken)
    return found


@pytest.mark.parametrize("name", QUICK)
def test_steps_without_a_site_do_what_those_with_one_do(name, monkeypatch):
    def run():
        model = tokred.apply(build("llama"), QUICK[name])
        cache = tokred.kv_cache(model)
        outs = [model(prompt(20, 2), past_key_values=cache).logits]
        for i, m in enumerate(STEPS):
            outs.append(model(prompt(m, 2, seed=30 + i), past_key_values=cache).logits)
            if i == 3:
                cache.reorder_cache(torch.tensor([1, 1]))
        return [*outs, *told(cache)]

    with monkeypatch.context() as patch:
        taken = watched(patch)
        quick = run()
    assert sum(taken) >= 7 * 2, "most steps of both layers need no site"
    monkeypatch.setattr(Queue, "due", lambda *args: None)
    assert close(quick, run())


@pytest.mark.parametrize("sinks", [0, 2])
def test_places_turn_as_often_as_they_like(sinks, monkeypatch):
    """The oldest row's place is the newest's, in turn; whoever looks in between finds rows in order."""

    def run():
        model = tokred.apply(build("llama"), "streaming_llm", budget=6, sinks=sinks)
        cache = tokred.kv_cache(model)
        outs = [model(prompt(12, 2), past_key_values=cache).logits]
        for i in range(22):
            outs.append(model(prompt(1, 2, seed=30 + i), past_key_values=cache).logits)
            if i == 9:
                cache.restore(cache.snapshot())
            if i in (12, 15):
                outs += told(cache)
            if i == 18:
                cache.reorder_cache(torch.tensor([1, 0]))
        assert all(layer.width == 6 for layer in cache.layers)
        return [*outs, *told(cache)]

    turned = run()
    monkeypatch.setattr(Queue, "due", lambda *args: None)
    assert close(turned, run())


def test_rows_come_into_the_room_behind_the_others():
    model = tokred.apply(build("llama"), "snapkv", budget=24, window=4)
    cache = tokred.kv_cache(model)
    dense = transformers.DynamicCache(config=model.config)
    plain = build("llama")
    kept = model(prompt(24, 2), past_key_values=cache).logits, plain(prompt(24, 2), past_key_values=dense).logits
    places: list[set[int]] = []
    for i in range(12):
        ids = prompt(1, 2, seed=i)
        kept = model(ids, past_key_values=cache).logits, plain(ids, past_key_values=dense).logits
        assert torch.equal(*kept), "whatever room there is"
        places.append({layer.newest[0].data_ptr() for layer in cache.layers})
    assert len({frozenset(one) for one in places}) <= 4, "few of twelve tokens copy what there is"
    layer = cache.layers[0]
    assert layer.width == 36
    assert layer.nbytes > 2 * layer.keys.nbytes, "room is held, and counted"
    kept = cache.snapshot()
    again = [model(prompt(1, 2, seed=50), past_key_values=cache).logits]
    cache.restore(kept)
    again.append(model(prompt(1, 2, seed=50), past_key_values=cache).logits)
    assert torch.equal(*again)


def test_a_budget_in_bytes_has_no_room():
    model = tokred.apply(build("llama"), "snapkv", budget="1 MiB", window=4)
    cache = tokred.kv_cache(model)
    for m in (20, 1, 1, 1, 1):
        model(prompt(m), past_key_values=cache)
    assert all(layer.nbytes == layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)


def test_scores_that_mean_something_else_are_asked_for_with_a_site():
    assert queue_of(tokred.make("h2o", budget=9), 2) is not None
    assert queue_of(tokred.make("observed_attention", budget=9), 2) is None
    assert queue_of(tokred.make("kv", score="observed", budget=9, when=EVERY), 2) is None, "divides the sum"
    assert queue_of(tokred.make("kv", score="recency", budget=9, when=EVERY), 2) is not None
    assert queue_of(tokred.make("kv", score="recency", budget="1 MiB", when=EVERY), 2) is None
    assert queue_of(tokred.make("tova", budget=9), 2) is None


def test_padding_is_looked_at_with_a_site(monkeypatch):
    model = tokred.apply(build("llama"), "streaming_llm", budget=9, sinks=2)
    done = watched(monkeypatch)
    cache = tokred.kv_cache(model)
    mask = torch.ones(2, 20, dtype=torch.long)
    mask[0, :5] = 0
    for m in (20, 1, 1):
        mask = mask if m == 20 else torch.nn.functional.pad(mask, (0, m), value=1)
        model(prompt(m, 2), attention_mask=mask, past_key_values=cache)
    assert not any(done)
    assert all(layer.width == 9 for layer in cache.layers)


def test_no_row_is_copied():
    model, cache = begun("h2o")
    for i in range(3):
        model(prompt(1, 2, seed=i), past_key_values=cache)
    before = [layer.newest[0].data_ptr() for layer in cache.layers]
    for i in range(3):
        model(prompt(1, 2, seed=i), past_key_values=cache)
    assert [layer.newest[0].data_ptr() for layer in cache.layers] == before
    assert all(layer.width == 9 for layer in cache.layers)


def test_snapshots_and_copies_stay_as_they_were():
    model, cache = begun("h2o")
    for i in range(2):
        model(prompt(1, 2, seed=i), past_key_values=cache)
    kept, other = cache.snapshot(), copy.deepcopy(cache)
    first = [model(prompt(1, 2, seed=50 + i), past_key_values=cache).logits for i in range(3)]
    cache.restore(kept)
    assert all(torch.equal(a, b) for a, b in zip(told(cache), told(other), strict=True))
    cache.restore(kept)
    again = [model(prompt(1, 2, seed=50 + i), past_key_values=cache).logits for i in range(3)]
    there = [model(prompt(1, 2, seed=50 + i), past_key_values=other).logits for i in range(3)]
    assert close(again, first)
    assert close(there, first)


def test_rows_that_somebody_has_looked_at_stay_as_they_were():
    model, cache = begun("h2o")
    for i in range(4):
        model(prompt(1, 2, seed=i), past_key_values=cache)
        seen = [(layer.keys, layer.values) for layer in cache.layers]
        kept = copy.deepcopy(seen)
    for i in range(2):
        model(prompt(1, 2, seed=i), past_key_values=cache)
    for ours, theirs in zip(seen, kept, strict=True):
        assert torch.equal(ours[0], theirs[0])
        assert torch.equal(ours[1], theirs[1])


def test_tensors_of_inference_mode_and_of_gradients_are_not_written_to():
    model = tokred.apply(build("llama"), "h2o", budget=9)
    with torch.inference_mode():
        cache = tokred.kv_cache(model)
        for i in (20, 1, 1):
            model(prompt(i), past_key_values=cache)
    for i in range(3):
        model(prompt(1, seed=i), past_key_values=cache)
    with torch.enable_grad():
        losses = [model(prompt(1, seed=i), past_key_values=cache).logits.sum() for i in range(3)]
        sum(losses).backward()


def test_of_equal_rows_the_newest_goes_wherever_it_stands():
    score = torch.tensor([[[1.0, 0.0, 2.0, 0.0, 0.0], [3.0, 1.0, 1.0, 2.0, 2.0]]])
    slots = torch.tensor([[[4, 7, 1, 2, 5], [0, 6, 3, 4, 5]]], dtype=torch.int32)
    assert lowest(score, None, slots).flatten().tolist() == [1, 1]
    guard = torch.tensor([[[False, True, False, False, False]]])
    assert lowest(score, guard, slots).flatten().tolist() == [4, 2]


def test_policies_for_which_order_or_room_matters_move_rows():
    def swaps(name: str, **options) -> bool:
        policy = tokred.make(name, **options)
        assert isinstance(policy, CachePolicy)
        return policy.swaps

    assert swaps("h2o", budget=9)
    assert not swaps("h2o", budget="1 MiB"), "a limit in bytes has no room for the place that waits"
    assert not swaps("snapkv", budget=80), "its windows read the newest rows in order"
    assert not swaps("zeromerge", budget=9), "rows are averaged"
    assert not swaps("kv", budget=tokred.kv.Adaptive(9), score="column_sum"), "heads hold different numbers"
