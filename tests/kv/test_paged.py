"""Policies in a paged cache without transformers: the card's examples, and the rows of the transformers engine."""

from __future__ import annotations

import pytest
import torch

import tokred
from tests.kv.paged import Decision, PagedCache, PagedPolicy


def filled(cache: PagedCache, request: int, count: int, first: int) -> None:
    """Rows whose numbers are their positions."""
    cache.grow(request, count)
    rows = torch.arange(first, first + count).float()[None, :, None].expand(2, -1, 3)
    for layer in range(2):
        cache.write(request, layer, rows, rows + 100 * layer, -rows)


def everywhere(rows: list[int]) -> Decision:
    return Decision(7, torch.tensor(rows).expand(2, 2, -1))


def test_worked_examples_of_the_protocol():
    cache = PagedCache(2, 2, 3, page=4, pages=6)
    cache.open(7)
    filled(cache, 7, 6, 0)
    for position in range(6, 13):
        filled(cache, 7, 1, position)
    assert (cache.logical(7), cache.held[7], len(cache.tables[7])) == (13, 13, 4)
    cache.compact(everywhere([*range(6), 7, 10, 12]))
    assert (cache.held[7], cache.missing[7], len(cache.tables[7]), len(cache.free)) == (9, 4, 3, 3)
    assert cache.read(7, 1)[0][0, :, 0].tolist() == [100 + p for p in (*range(6), 7, 10, 12)]
    assert cache.logical(7) == 13
    assert cache.slot(cache.held[7]) == (2, 1)
    for position in range(13, 16):
        filled(cache, 7, 1, position)
    assert (cache.logical(7), cache.held[7]) == (16, 12)
    cache.compact(everywhere([*range(6), 6, 9, 11]))
    assert cache.read(7, 0)[1][1, :, 2].tolist() == [-p for p in (*range(6), 7, 13, 15)]
    assert (cache.missing[7], cache.held[7], cache.logical(7)) == (7, 9, 16)
    cache.close(7)
    assert len(cache.free) == 6


def test_lists_that_are_refused():
    cache = PagedCache(2, 2, 3, page=4)
    cache.open(7)
    filled(cache, 7, 13, 0)
    for rows in ([0, 12, 10], [0, 1, 1], [0, 13], [-1, 3]):
        with pytest.raises(ValueError, match="rows must be ascending"):
            cache.compact(everywhere(rows))
    with pytest.raises(ValueError, match="the newest 1 rows are not confirmed"):
        cache.compact(everywhere([0, 5, 11]), unconfirmed=1)
    assert cache.read(7, 0)[0][0, :, 0].tolist() == list(range(13)), "nothing has been moved"
    cache.compact(everywhere([0, 5, 12]), unconfirmed=1)
    assert cache.missing[7] == 10


POLICIES = {
    "knorm": {"budget": 9},
    "snapkv": {"budget": 9, "window": 4, "pool": 3},
    "tova": {"budget": 9},
    "h2o": {"budget": 9},
    "streaming_llm": {"budget": 9, "sinks": 2, "every": 3},
    "keydiff": {"budget": 9},
    "rpc": {"period": 4, "window": 2, "ratio": 2, "pool": 3},
    "rkv": {"budget": 11, "every": 4, "window": 3, "pool": 3},
    "rkv_kept": {"budget": 3, "every": 2, "window": 2, "pool": 1, "keep_prompt": True},
}


def policy_of(name: str):
    return tokred.make(name.partition("_kept")[0] if name.endswith("_kept") else name, **POLICIES[name])


def step(cache: PagedCache, policy: PagedPolicy, requests: list[int], given, prompt: bool = False):
    """One forward of some requests: ``given[request][layer]`` is q ``[H, M, D]``, k and v ``[Hk, M, D]``."""
    policy.step_begin(requests)
    out = {}
    for request in requests:
        cache.grow(request, given[request][0][0].shape[1])
        for layer, (q, k, v) in enumerate(given[request]):
            cache.write(request, layer, q, k, v)
            out[request, layer] = cache.attend(request, layer)
    before = {request: cache.logical(request) for request in requests}
    for decision in (policy.context_end if prompt else policy.step_end)(requests, cache):
        cache.compact(decision)
    assert all(cache.logical(request) == n for request, n in before.items())
    return out


def positions(policy: PagedPolicy, request: int) -> list:
    return [held.positions[0].tolist() for held in policy.sessions[request][1]]


@pytest.mark.parametrize("name", POLICIES)
def test_neither_pages_nor_other_requests_matter(name):
    g = torch.Generator().manual_seed(0)
    draw = lambda m: [tuple(torch.randn(h, m, 4, generator=g) for h in (4, 2, 2)) for _ in range(2)]  # noqa: E731
    text = {r: [draw(n), *(draw(1) for _ in range(9))] for r, n in ((1, 17), (2, 6))}
    found = {}
    for page, together in ((16, True), (3, True), (5, False)):
        cache, policy = PagedCache(2, 2, 4, page=page, pages=40), PagedPolicy(policy_of(name), 2)
        for group in ([1, 2],) if together else ([1], [2]):
            for request in group:
                cache.open(request)
                policy.request_init(request, text[request][0][0][0].shape[1])
            for t in range(10):
                step(cache, policy, group, {r: text[r][t] for r in group}, prompt=t == 0)
        found[page] = [positions(policy, r) for r in (1, 2)], [cache.missing[r] for r in (1, 2)]
        assert found[page][1][0] > 0, "rows of the longer one have gone"
        for request in (1, 2):
            policy.request_finish(request)
            cache.close(request)
        assert len(cache.free) == 40
    assert found[16] == found[3] == found[5]
    policy.request_finish(1)  # aborted twice


@torch.no_grad()
@pytest.mark.parametrize("name", POLICIES)
def test_rows_and_answers_are_those_of_the_transformers_engine(name, monkeypatch):
    pytest.importorskip("transformers")
    from tests.kv.tiny import build, prompt
    from tokred.adapters.kv import attention

    model = tokred.apply(build("llama"), policy_of(name))
    heard, original = [], attention._attend

    def spy(call, layer, query, key, value, before):
        out = original(call, layer, query, key, value, before)
        k, v = (t[0, :, -query.shape[2] :].clone() for t in layer.newest)
        heard.append((query[0], k, v, out[0][0]))
        return out

    monkeypatch.setattr(attention, "_attend", spy)
    # A step by the way of all others, where what is attended to is seen.
    monkeypatch.setattr(attention, "_fits", lambda *args: False)
    theirs = tokred.kv_cache(model, prompt=20)
    pages, policy = PagedCache(3, 2, model.config.head_dim, page=4), PagedPolicy(policy_of(name), 3)
    pages.open(1)
    policy.request_init(1, 20)
    assert policy.touches_prompt == (name != "rkv_kept")
    for t in range(10):
        heard.clear()
        model(prompt(20 if t == 0 else 1, seed=70 + t), past_key_values=theirs)
        out = step(pages, policy, [1], {1: [one[:3] for one in heard]}, prompt=t == 0)
        for i, layer in enumerate(theirs.layers):
            slots = layer.positions
            slots = torch.arange(layer.seen).expand(2, -1) if slots is None else slots[0]
            assert positions(policy, 1)[i] == slots.tolist()
            assert torch.allclose(out[1, i].transpose(0, 1), heard[i][3], atol=1e-5)
            for ours, own in zip(pages.read(1, i), (layer.keys, layer.values), strict=True):
                assert torch.equal(ours, own[0])
    assert pages.missing[1] > 0
    assert pages.logical(1) == theirs.get_seq_length()


def test_what_an_engine_cannot_give_is_refused():
    for name, text in (("expected_attention", "needs rope"), ("kvzap", "needs hidden, module, projection"),
                       ("adakv", "different numbers of rows"), ("kvzip", "cannot run here"),
                       ("zeromerge", "cannot run here")):  # fmt: skip
        with pytest.raises(ValueError, match=text):
            PagedPolicy(tokred.make(name), 2)
    cache, policy = PagedCache(2, 2, 4), PagedPolicy(tokred.make("pyramidkv", budget=8, window=2, beta=4), 2)
    cache.open(1)
    policy.request_init(1, 20)
    given = [tuple(torch.randn(h, 20, 4) for h in (4, 2, 2)) for _ in range(2)]
    with pytest.raises(ValueError, match="layers with different numbers of rows"):
        step(cache, policy, [1], {1: given}, prompt=True)
