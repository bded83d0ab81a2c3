"""Rows in host memory: the same bits as a rectangle, whatever the policy; and on the device only while a layer runs."""

from __future__ import annotations

import copy

import pytest
import torch

pytest.importorskip("transformers")

import transformers

import tokred
from tests.kv.test_store_models import GREEDY, LOGITS, NAMES, course, policies
from tests.kv.tiny import padded, prompt
from tokred.kv import Offloaded, Rectangle
from tokred.kv.stores.offload import Chain

SMALL = Offloaded(block=3)


pytestmark = pytest.mark.usefixtures("no_grad")


SOME = ("snapkv", "h2o", "global_merge")


@pytest.mark.parametrize("name", [n if n in SOME else pytest.param(n, marks=pytest.mark.hosts) for n in NAMES])
def test_the_same_bits_as_a_rectangle(model, name):
    ids, mask, _ = padded((29, 17))
    found = []
    for store in (SMALL, Rectangle()):
        tokred.apply(model, policies(store)[name])
        found.append(course(model, tokred.kv_cache(model), ids, mask, lambda cache: None))
        found.append(model.generate(ids, attention_mask=mask, num_beams=2, **GREEDY))
    assert all(map(torch.equal, found[0], found[2]))
    assert torch.equal(found[1], found[3])


@pytest.mark.parametrize("given", [{}, {"block": 1}, {"prefetch": False}])
def test_as_a_method_it_leaves_the_model_as_it_is(model, given):
    ids, mask, _ = padded((29, 17))
    plain = model.generate(ids, attention_mask=mask, **LOGITS)
    tokred.apply(model, "offloaded", **given)
    found = model.generate(ids, attention_mask=mask, **LOGITS)
    assert all(map(torch.equal, found.logits, plain.logits))
    drafts = {"prompt_lookup_num_tokens": 3, **GREEDY}
    ids = prompt(6).repeat(1, 4)
    assert torch.equal(model.generate(ids, **drafts), tokred.remove(model).generate(ids, **drafts))


def test_rows_are_on_the_device_while_their_layer_runs(model):
    tokred.apply(model, "offloaded", block=4)
    cache, here = tokred.kv_cache(model), []
    shelves = [layer.shelf for layer in cache.layers]

    def look(*_):
        here.append([shelf._whole is not None for shelf in shelves])

    hooks = [layer.self_attn.o_proj.register_forward_pre_hook(look) for layer in model.model.layers]
    hooks += [layer.self_attn.q_proj.register_forward_pre_hook(look) for layer in model.model.layers]
    for n in (20, 1, 1, 1):
        model(prompt(n), past_key_values=cache)
    for hook in hooks:
        hook.remove()
    assert not any(map(any, here)), "neither before the rows of this forward come, nor when the attention is over"
    # 23 rows: 20 went with the prompt, three wait for a fourth.
    assert [s._away.keys.shape[2] for s in shelves] == [20] * 3
    assert [s._tail[0].shape[2] for s in shelves] == [3] * 3
    assert all(s._tail[0].untyped_storage().nbytes() == s._tail[0].nbytes for s in shelves), "no view of all rows"
    row = cache.layer_rows()[0]
    assert (row.rows, row.away_bytes, row.bytes) == (23, row.dense_bytes * 20 // 23, row.dense_bytes)
    model(prompt(1), past_key_values=cache)
    assert [s._away.keys.shape[2] for s in shelves] == [24] * 3
    assert cache.nbytes == sum(row.away_bytes for row in cache.layer_rows())
    assert "in host memory" in str(tokred.report(model))


def test_the_next_layer_is_sent_for_and_what_is_stale_is_not_used(model, monkeypatch):
    sent, used, begin, bring = [], [], Chain.send_for_next, Chain.bring

    def send_for_next(self, number):
        begin(self, number)
        sent.extend(self._coming)

    def brought(self, number, away, device):
        found = self._coming.get(number)
        used.append(found is not None and found.source is away)
        return bring(self, number, away, device)

    monkeypatch.setattr(Chain, "send_for_next", send_for_next)
    monkeypatch.setattr(Chain, "bring", brought)
    tokred.apply(model, "offloaded")
    cache = tokred.kv_cache(model)
    model(prompt(20), past_key_values=cache)
    assert (sent, used) == ([0], []), "an empty layer has nothing to send"
    model(prompt(1), past_key_values=cache)
    assert (sent, used) == ([0, 1, 2, 0], [True] * 3)
    cache.crop(-5)  # of the prompt, while the first layer's rows are on their way
    used.clear()
    after = model(prompt(1, seed=4), past_key_values=cache).logits
    assert used == [False, True, True]
    other = tokred.kv_cache(model)
    model(prompt(20)[:, :16], past_key_values=other)
    assert torch.equal(model(prompt(1, seed=4), past_key_values=other).logits, after)


def test_snapshots_copies_and_more_samples(model):
    tokred.apply(model, "snapkv", budget=9, window=4, pool=3, store=SMALL)
    cache = tokred.kv_cache(model)
    model(prompt(26, 2), past_key_values=cache)
    kept, again = cache.snapshot(), copy.deepcopy(cache)
    first = course(model, cache, prompt(1, 2), None, lambda cache: None)
    cache.restore(kept)
    assert all(map(torch.equal, first, course(model, cache, prompt(1, 2), None, lambda cache: None)))
    assert all(map(torch.equal, first, course(model, again, prompt(1, 2), None, lambda cache: None)))
    cache.restore(kept)
    cache.batch_repeat_interleave(2)
    assert model(prompt(1, 4), past_key_values=cache).logits.shape[0] == 4
    cache.reset()
    assert cache.nbytes == 0


def test_a_hard_limit_counts_rows_wherever_they_are(model):
    peaks = []
    for store in (SMALL, Rectangle()):
        tokred.apply(model, tokred.Limited(tokred.make("h2o", store=store), "40 KiB", 16))
        cache = tokred.kv_cache(model)
        for part in prompt(96).split(16, 1):
            model(part, past_key_values=cache)
        peaks.append((cache.peak_bytes, [layer.width for layer in cache.layers]))
    assert peaks[0] == peaks[1]


def test_a_callers_cache_that_offloads_is_taken_over(model):
    cache = transformers.DynamicCache(config=model.config, offloading=False)
    cache.offloading = True
    wanted = model(prompt(20)).logits
    tokred.apply(model, "offloaded")
    assert torch.equal(model(prompt(20), past_key_values=cache).logits, wanted)
    assert cache.layer_rows()[0].away_bytes > 0


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"block": 0}, ValueError, "block must be an integer of at least 1, got 0"),
        ({"prefetch": 2}, TypeError, "prefetch must be True or False, got 2"),
    ],
)
def test_bad_parameters(given, error, message):
    with pytest.raises(error, match=message):
        tokred.make("offloaded", **given)
