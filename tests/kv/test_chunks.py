"""A prompt that comes in chunks leaves the rows that it leaves in one forward, whatever the score is taken over."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("transformers")

import tokred
from tests.kv.tiny import POLICIES, build, padded, prompt
from tokred import kv
from tokred.kv import When
from tokred.methods.kv.expected_attention import NOTES

# Windows are wider than a chunk, so that they reach into the one before.
WIDE = {
    "snapkv": tokred.make("snapkv", budget=14, window=11, pool=3),
    "max": tokred.make("snapkv", budget=14, window=11, pool=3, pooling="max"),
    "criticalkv": tokred.make("criticalkv", budget=14, score=kv.Window(11, 3)),
    "critical_expected": tokred.make("criticalkv", budget=14, score=kv.Expected(16, 2)),
    "pyramidkv": tokred.make("pyramidkv", budget=16, window=11, pool=3, beta=4),
    "adakv": tokred.make("adakv", budget=14, score=kv.Window(11, 3)),
    "cake": tokred.make("cake", budget=16, window=11, pool=3),
    "preference": tokred.make("kv", score="key_norm", budget=kv.Preference(16, window=11)),
    "expected_ada": tokred.make("kv", score=kv.Expected(16, 2), budget=kv.Adaptive(9), sinks=2),
    "decay": tokred.make("kv", score=kv.ColumnSum(0.7), budget=9),
    "gumbel": tokred.make("kv", score=kv.Gumbel(), budget=9, recent=2),
    "kvzip": tokred.make("kvzip", budget=0.4, chunk=9, sinks=2),
    "global": tokred.make("kv", score=kv.Window(11, 3), budget=kv.Global(14)),
}
CASES = {**{n: p for n, p in POLICIES.items() if n not in WIDE}, **WIDE}


pytestmark = pytest.mark.usefixtures("no_grad")


def rows(cache):
    return [None if layer.positions is None else layer.positions.tolist() for layer in cache.layers]


def read(model, ids, mask, size):
    """A cache after the prompt came in chunks of ``size``, and the logits of one more token."""
    cache, n = tokred.kv_cache(model, prompt=ids.shape[1], steps=4), ids.shape[1]
    whole = torch.ones_like(ids) if mask is None else mask
    position = (whole.cumsum(1) - 1).clamp(min=0)
    for start in range(0, n, size):
        part = slice(start, min(start + size, n))
        given = {} if mask is None else {"attention_mask": mask[:, : part.stop]}
        model(ids[:, part], position_ids=position[:, part], past_key_values=cache, **given)
    found = rows(cache)
    for step in range(3):
        mask = None if mask is None else torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
        given = {} if mask is None else {"attention_mask": mask}
        position = position[:, -1:] + 1
        model(prompt(1, len(ids), seed=60 + step), position_ids=position, past_key_values=cache, **given)
    return found, rows(cache), cache


@pytest.mark.parametrize("batch", ["one", "padded"])
@pytest.mark.parametrize("name", CASES)
def test_chunks_leave_the_rows_of_one_forward(name, batch):
    # Float64, so that sums in another order decide nothing.
    model = tokred.apply(build("llama", torch.float64), CASES[name])
    ids, mask, _ = padded((33, 21, 6)) if batch == "padded" else (prompt(33), None, None)
    whole = read(model, ids, mask, 33)
    assert any(r is not None for r in whole[1]) or name == "rpc", "something has been evicted"
    for size in (8, 5):
        parts = read(model, ids, mask, size)
        assert parts[0] == whole[0], size
        assert parts[1] == whole[1], size


def test_generate_cuts_the_prompt_likewise():
    model = tokred.apply(build("llama"), "expected_attention", budget=9, sinks=2, future=16)
    more = {"max_new_tokens": 4, "do_sample": False, "return_dict_in_generate": True}
    whole = model.generate(prompt(33), **more)
    parts = model.generate(prompt(33), prefill_chunk_size=8, **more)
    assert rows(whole.past_key_values) == rows(parts.past_key_values)
    assert torch.equal(whole.sequences, parts.sequences)


def test_statistics_are_those_of_all_queries():
    """Mean and covariance, by hand from all queries at once."""
    torch.manual_seed(0)
    q, k = torch.randn(2, 4, 19, 8), torch.randn(2, 2, 19, 8)
    mask = torch.arange(19) >= torch.tensor([[0], [7]])
    notes, score = {}, kv.Expected(future=5, sinks=2)

    class Still:
        def unrotate(self, x):
            return x

        def mean(self, start, count):
            return torch.ones(8), torch.zeros(8)

    for stop, start in ((6, 0), (7, 6), (19, 7)):
        site = kv.CacheSite(
            q=q[:, :, start:stop], k=k[:, :, :stop], v=k[:, :, :stop], notes=notes, rope=Still(),
            padding=kv.Padding(mask[:, :stop]),
        )  # fmt: skip
        score.observe(site)
    mean, cov = score._future_queries(site)
    for i, first in ((0, 2), (1, 9)):
        rest = q[i, :, first:]
        assert torch.allclose(mean[i], rest.mean(1), atol=1e-6)
        for head in range(4):
            assert torch.allclose(cov[i, head], torch.cov(rest[head].T, correction=0), atol=1e-6)


def test_statistics_are_forgotten_when_nothing_will_ask_for_them():
    for when, kept in ((When(), False), (When(every=2), True)):
        policy = tokred.make("kv", score=kv.Expected(16, 2), budget=9, when=when)
        model = tokred.apply(build("llama"), policy)
        cache = tokred.kv_cache(model, prompt=20)
        model(prompt(12), past_key_values=cache)
        assert set(NOTES) <= cache.layers[0].notes.keys()
        model(prompt(8), past_key_values=cache)
        assert (set(NOTES) <= cache.layers[0].notes.keys()) == kept
        assert kept or not cache.layers[0].notes
