"""The benchmarks of caches on a tiny model: sums become figures with intervals, and work is timed by part."""

from __future__ import annotations

import math

import pytest
import torch

pytest.importorskip("transformers")

import tokred
from benchmarks.kv import feed, haystacks, quality, scoring
from tests.kv.tiny import build
from tokred.bench import results, timing
from tokred.bench.arms import BASE, Arm

WHERE = results.here("cpu", torch.float32) | {"model": "tiny"}


def ids(n: int, batch: int = 1) -> torch.Tensor:
    return torch.randint(3, 97, (batch, n), generator=torch.Generator().manual_seed(1))


def test_perplexity_has_an_interval() -> None:
    model, windows = build("llama"), ids(64, 2)
    every = [Arm(BASE, ""), *(Arm("snapkv", f"budget={b}", tokred.make("snapkv", budget=b, window=4)) for b in (0.5,))]
    found = list(quality.perplexity(model, windows, every))
    rows = results.records([row for record in quality.records(found, WHERE) for row in results.rows(record, "quality")])
    by = {r["method"]: r for r in rows if "perplexity" in r}
    with torch.no_grad():
        logits = model(windows).logits[:, 47:-1]
    losses = torch.nn.functional.cross_entropy(logits.flatten(0, 1), windows[:, 48:].flatten(), reduction="none")
    expected = results.mean("nll", float(losses.mean()), float(losses.std(correction=0)) / math.sqrt(len(losses)))
    for end in ("", "_low", "_high"):
        assert by[BASE][f"perplexity{end}"] == pytest.approx(math.exp(expected[f"nll{end}"]), rel=1e-4)
    assert by[BASE]["tokens_scored"] == 32
    assert by["snapkv"]["setting"] == "budget=0.5"
    assert {(r["length"], r["batch"]) for r in rows} == {(64, 1)}
    held = {r["method"]: r["bytes_window"] for r in rows if "bytes_window" in r}
    assert held["snapkv"] < held[BASE]


def test_keys_are_counted() -> None:
    arm = Arm("snapkv", "budget=0.25")
    found = [quality.Found(arm, "retrieval", "after", 1, 1024, right, 5) for right in (1, 3)]
    (record,) = quality.records(found, WHERE)
    assert (record["retrieval"], record["keys"]) == (0.4, 10)
    assert (record["retrieval_low"], record["retrieval_high"]) == results.wilson(0.4, 10)


def test_every_policy_of_the_benchmark_can_be_made() -> None:
    every = quality.arms(list(quality.POLICIES), quality.BUDGETS)
    assert len({arm.label for arm in every}) == len(every) == 1 + 4 * len(quality.POLICIES)
    assert every[0].method is None


def test_work_is_timed_by_part() -> None:
    model, watch = build("llama"), timing.Watch()
    names = ["snapkv window=8", "knorm", "h2o"]
    rows = scoring.measure(model, ids(48), names, 0.5, 2, watch)
    assert [f"{r['method']} {r['setting']}" for r in rows] == [
        "snapkv budget=0.5 window=8", "knorm budget=0.5", "h2o budget=0.5",
    ]  # fmt: skip
    for row in rows:
        assert 0 < row["score_ms"] < row["policy_ms"]
        assert row["select_ms"] > 0
        assert row["evict_ms"] > 0
        assert row["policy_share_low"] <= row["policy_share"] <= row["policy_share_high"]
    own = [vars(owner)[name] for owner, name, _ in feed.WORK]
    with feed.watched(watch):
        assert [vars(owner)[name] for owner, name, _ in feed.WORK] != own
    assert [vars(owner)[name] for owner, name, _ in feed.WORK] == own


def test_layers_are_fed_without_a_model() -> None:
    model, tokens = build("llama"), ids(40)
    prompt, _ = feed.read(model, tokens)
    policy = tokred.make("snapkv", budget=0.5, window=4)
    sites = [
        tokred.kv.CacheSite(q=x.q, k=x.k, v=x.v, scale=x.scale, layer=i, depth=len(prompt.layers))
        for i, x in enumerate(prompt.layers)
    ]
    held = sum(layer.nbytes for layer in feed.compressed(policy, sites))
    with tokred.applied(model, policy), torch.no_grad():
        assert held == feed.held_bytes(feed.read_in_parts(model, tokens))


def test_layers_with_windows_are_fed_what_they_would_have_read() -> None:
    model, tokens = build("gemma3"), ids(48)
    prompt, _ = feed.read(model, tokens)
    for policy in (tokred.make("snapkv", budget=0.25, window=4), tokred.make("h2o", budget=0.5)):
        with tokred.applied(model, policy), torch.no_grad():
            read = feed.read_in_parts(model, tokens[:, :40])
            fed = prompt.fill(tokred.kv_cache(model), 40)
            assert feed.held_bytes(fed) == feed.held_bytes(read)
            assert {type(layer).__name__ for layer in fed.layers} != {"TokLayer"}
            said = [model(tokens[:, 40:41], past_key_values=cache).logits for cache in (fed, read)]
        assert torch.allclose(*said, atol=1e-5)


def test_a_text_begins_as_its_model_wants() -> None:
    class Words:
        def __call__(self, text, add_special_tokens=True, **options):
            found = ([2] if add_special_tokens else []) + [3 + len(word) for word in text.split()]
            return type("Ids", (), {"input_ids": torch.tensor([found]) if options else found})

    assert haystacks.begin_of(Words()).tolist() == [2]
    (one,) = haystacks.haystacks(Words(), ids(90)[0], 64, 1)[0]
    assert one.context[0] == 2
    assert len(one.context) + len(one.question) == 64
