"""Stores with everything else: each works as plain rows do where it rounds nothing, or is refused with what to do."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

import transformers

import tokred
from tests.kv.test_store_models import course, policies
from tests.kv.tiny import build, padded, prompt
from tokred.kv import KIVI, Half, MiKV, Mustafar, NSNQuant, Offloaded, Oscar, Store, Tight, Turbo, Zones

STEPS: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None}
# Of each store settings that round nothing, and settings that do.
EXACT: dict[str, Store] = {
    "kivi": KIVI(bits=16, group_size=2, residual_length=4),
    "mikv": MiKV(high=0.3, low=16),
    "mustafar": Mustafar(0.0, 0.0, window=2),
    "nsnquant": NSNQuant(bits=16, window=4),
    "offloaded": Offloaded(block=3),
    "oscar": Oscar(bits=16, sinks=2, recent=3, block=2),
    "turbo": Turbo(bits=16),
    "tight": Tight(KIVI(bits=16, group_size=2, residual_length=4)),
}
ROUNDED: dict[str, Store] = {
    "half": Half(),
    "kivi": KIVI(bits=4, group_size=4, residual_length=4),
    "mikv": MiKV(high=0.3, low=4, high_bits=8),
    "mustafar": Mustafar(window=2),
    "nsnquant": NSNQuant(window=4),
    "oscar": Oscar(bits=4, sinks=2, recent=3, block=2),
    "turbo": Turbo(bits=4),
    "tight": Tight(KIVI(bits=4, group_size=4, residual_length=4)),
}
POLICIES = {"merge": "zeromerge", "every": "h2o", "heads": "adakv", "turns": "snapkv", "later": "global_merge"}
REFUSED = {
    ("mikv", "merge"): "the fate 'merge' needs a store that can average rows",
    ("mikv", "later"): "the fate 'merge' needs a store that can average rows",
    ("tight", "merge"): "the fate 'merge' needs a store that can average rows",
    ("tight", "later"): "the fate 'merge' needs a store that can average rows",
    **{("mikv", case): "needs a store that can take the newest rows back" for case in ("drafts", "assistant", "crops")},
}


@pytest.fixture(autouse=True)
def plain_torch(monkeypatch):
    monkeypatch.setenv("TOKRED_KERNELS", "torch")
    with torch.no_grad():
        yield


@functools.cache
def model_of(dtype: torch.dtype = torch.float32) -> Any:
    return build("llama", dtype)


def limited(store: Store | str) -> Any:
    return tokred.Limited(tokred.make("knorm", store=store), "60 KiB", 16)


def run(case: str, store: Store | str) -> list[torch.Tensor]:
    """What comes of one composition: logits, or tokens."""
    model = model_of()
    ids, mask, _ = padded((29, 17))
    if case == "limit":
        tokred.apply(model, limited(store))
        cache = tokred.kv_cache(model)
        found = [model(part, past_key_values=cache).logits for part in prompt(64).split(16, 1)]
        assert cache.peak_bytes <= 60 * 1024
        return found
    policy = policies(store)[POLICIES.get(case, "snapkv")]
    if case in ("drafts", "assistant", "crops"):
        policy = tokred.make("snapkv", budget=9, window=4, pool=3, store=store)
    tokred.apply(model, policy)
    if case == "beams":
        return [model.generate(ids, attention_mask=mask, num_beams=3, **STEPS)]
    if case == "drafts":
        return [model.generate(prompt(6).repeat(1, 4), prompt_lookup_num_tokens=3, **STEPS)]
    if case == "assistant":
        return [model.generate(prompt(6).repeat(1, 4), assistant_model=assistant(), **STEPS)]
    cache = tokred.kv_cache(model)
    if case == "crops":
        found = [model(ids, attention_mask=mask, past_key_values=cache).logits[mask.bool()]]
        for n, gone in ((7, 5), (6, 6), (1, 0)):
            mask = torch.cat([mask, torch.ones_like(mask[:, :n])], 1)
            found.append(model(prompt(n, 2, seed=n), attention_mask=mask, past_key_values=cache).logits)
            cache.crop(-gone)
            mask = mask[:, : mask.shape[1] - gone]
        return found
    return course(model, cache, ids, mask, lambda cache: None)


@functools.cache
def assistant() -> Any:
    return build("llama", seed=3, num_hidden_layers=1)


@functools.cache
def plain(case: str) -> list[torch.Tensor]:
    return run(case, "rectangle")


@pytest.mark.parametrize("case", [*POLICIES, "beams", "drafts", "assistant", "crops"])
@pytest.mark.parametrize("name", EXACT)
def test_what_rounds_nothing_is_plain_rows_or_refused(name, case):
    if (name, case) in REFUSED:
        with pytest.raises(ValueError, match=REFUSED[name, case]):
            run(case, EXACT[name])
        return
    found, wanted = run(case, EXACT[name]), plain(case)
    real = padded((29, 17))[1].bool()
    for i, (a, b) in enumerate(zip(found, wanted, strict=True)):
        both = (a[real], b[real]) if i == 0 and case in POLICIES else (a, b)
        assert torch.allclose(*both, atol=2e-5), f"forward {i}"


@pytest.mark.parametrize("name", ROUNDED)
def test_a_limit_is_never_passed(name):
    assert all(x.isfinite().all() for x in run("limit", ROUNDED[name]))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ROUNDED)
def test_half_precision(name, dtype):
    model, (ids, mask, _) = model_of(dtype), padded((29, 17))
    found = []
    for store in (ROUNDED[name], "rectangle"):
        tokred.apply(model, policies(store)["snapkv"])
        cache = tokred.kv_cache(model)
        found.append(course(model, cache, ids, mask, lambda cache: None))
        assert all(layer.keys.dtype == layer.values.dtype == dtype for layer in cache.layers)
    real = mask.bool()
    assert torch.equal(found[0][0][real], found[1][0][real]), "a prompt attends before its rows are rounded"
    assert all((a - b).abs().max() < 2.5 for a, b in zip(found[0][1:], found[1][1:], strict=True))


def quantised() -> Any:
    """A quantised cache as a caller hands it over: its back-ends are other packages, which taking over does without."""
    cache = transformers.QuantizedCache.__new__(transformers.QuantizedCache)
    transformers.Cache.__init__(cache, layers=[])
    return cache


@pytest.mark.parametrize("name", [n for n in ROUNDED if n != "half"])
def test_a_quantised_cache_is_taken_over_by_what_rounds_too(name):
    model = model_of()
    tokred.apply(model, policies(ROUNDED[name])["snapkv"])
    cache, own = quantised(), tokred.kv_cache(model)
    found = [model(prompt(20), past_key_values=one).logits for one in (cache, own)]
    assert torch.equal(*found)
    assert [layer.width for layer in cache.layers] == [9] * 3


@pytest.mark.parametrize("store", ["flat", "half", Zones()])
def test_a_quantised_cache_is_refused_by_what_does_not(store):
    model = model_of()
    policy = tokred.make("rdkv", budget=9, window=4) if isinstance(store, Zones) else policies(store)["snapkv"]
    tokred.apply(model, policy)
    with pytest.raises(TypeError, match=r"rows cannot be evicted from a QuantizedCache: .*'kivi'"):
        model(prompt(20), past_key_values=quantised())
