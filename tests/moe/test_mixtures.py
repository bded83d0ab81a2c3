"""Mixtures of experts of transformers whose experts run on fewer tokens."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("transformers")

import tokred
from tests.kinds import MIXTURES, each
from tokred import adapters, doctor
from tokred.adapters.moe import session
from tokred.adapters.tiny import kv, moe

FAMILIES = each(moe.FAMILIES, MIXTURES)


def logits_of(model: Any, ids: Tensor, **more: Any) -> Tensor:
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False, **more).logits  # type: ignore[no-any-return]


@pytest.mark.parametrize("family", FAMILIES)
def test_laws(family: str) -> None:
    (case,) = (case for case in doctor.choose(["moe"]) if case.family == family)
    (row,) = doctor.examine([case])
    assert not row.error
    assert set(row.broken) == {"nothing", "fewer", "dropped", "removed"}
    assert not row.complaints


@pytest.mark.parametrize("family", FAMILIES)
def test_capacity_for_all_is_the_model_bit_for_bit(family: str) -> None:
    plain, ids = moe.build(family), kv.prompt(19, 2)
    model = tokred.apply(copy.deepcopy(plain), "capacity_drop", gamma=8 / 2)
    assert torch.equal(logits_of(model, ids), logits_of(plain, ids))
    report = tokred.report(model)
    assert report.totals == {"pairs": 2 * 19 * 2 * len(report.layers), "dropped": 0, "without": 0}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_sample_does_not_depend_on_its_batch_where_that_is_asked_for(family: str) -> None:
    """Its tokens alone share a capacity, and padding takes no room from them."""
    model = tokred.apply(moe.build(family), "capacity_drop", gamma=0.75, over="sample")
    ids, mask, alone = kv.padded((21, 13))
    together = logits_of(model, ids, attention_mask=mask)
    assert tokred.report(model).dropped > 0
    for i, one in enumerate(alone):
        torch.testing.assert_close(together[i, ids.shape[1] - one.shape[1] :], logits_of(model, one)[0])
    tokred.apply(model, "capacity_drop", gamma=0.75)
    shared = logits_of(model, ids, attention_mask=mask)
    assert not torch.allclose(shared[0], logits_of(model, alone[0])[0], atol=1e-3), "the batch shares one by default"


def test_what_stands_in_padding_does_not_matter() -> None:
    model = tokred.apply(moe.build("mixtral"), "capacity_drop", gamma=0.75)
    ids, mask, _ = kv.padded((21, 13))
    found = logits_of(model, ids, attention_mask=mask)
    other = torch.where(mask.bool(), ids, 50)
    torch.testing.assert_close(logits_of(model, other, attention_mask=mask)[mask.bool()], found[mask.bool()])


@pytest.mark.parametrize("parameters", [{}, {"rounds": 2.0}, {"devices": 4}, {"empty": "fallback"}], ids=str)
@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm"])
def test_every_way_in_which_a_host_runs_experts_gives_the_same(implementation: str, parameters: dict[str, Any]) -> None:
    plain, ids = moe.build("qwen2_moe"), kv.prompt(19, 2)
    model = tokred.apply(copy.deepcopy(plain), "capacity_drop", gamma=0.5, **parameters)
    plain.set_experts_implementation("eager")
    expected = logits_of(tokred.apply(plain, "capacity_drop", gamma=0.5, **parameters), ids)
    model.set_experts_implementation(implementation)
    torch.testing.assert_close(logits_of(model, ids), expected)


def test_compiled_forwards_weigh_dropped_pairs_with_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Their shapes may not depend on values. (What decides is the same; the experts run on all pairs.)"""
    model, ids = tokred.apply(moe.build("qwen3_moe"), "capacity_drop", gamma=0.5), kv.prompt(19, 2)
    packed = logits_of(model, ids)
    rows: list[int] = []
    forward = session.on_pairs

    def seen(run: Any, states: Tensor, pairs: Tensor, weights: Tensor) -> Tensor:
        with monkeypatch.context() as m:
            m.setattr(torch.compiler, "is_compiling", lambda: True)
            return forward(lambda s, i, w: rows.append(len(s)) or run(s, i, w), states, pairs, weights)

    monkeypatch.setattr(session, "on_pairs", seen)
    torch.testing.assert_close(logits_of(model, ids), packed)
    assert set(rows) == {38}


def weights_of(family: str) -> tuple[Any, Any, Tensor]:
    """The router's shares of a layer as a host makes them, and what the patched one hands on."""
    plain, found = moe.build(family), {}
    layer = adapters.find(plain, "experts").layers[0]
    layer.router.register_forward_hook(lambda m, a, out: found.__setitem__("host", out))
    tokred.apply(plain, "capacity_drop", gamma=0.5)
    layer.experts.register_forward_pre_hook(lambda m, a: found.__setitem__("ours", a))
    logits_of(plain, kv.prompt(19, 2))
    return found["host"], found["ours"], torch.softmax(found["host"][0].float(), -1)


def test_weights_sum_to_one_where_the_hosts_do() -> None:
    (_, host, _), (_, ids, weights), scores = weights_of("mixtral")
    kept = ids >= 0
    whole = kept.all(1)
    assert whole.any()
    assert torch.equal(weights[whole], host[whole]), "bit for bit where nothing was dropped"
    torch.testing.assert_close(weights.sum(1), kept.any(1).float())
    part = kept.any(1) & ~whole
    one = scores.gather(1, ids.clamp(min=0)) * kept
    torch.testing.assert_close(weights[part], (one / one.sum(1, keepdim=True))[part])
    assert not weights[~kept].any()


def test_weights_are_the_routers_own_where_the_hosts_are() -> None:
    (_, host, _), (_, ids, weights), _ = weights_of("qwen2_moe")
    torch.testing.assert_close(weights, host * (ids >= 0))


def test_gradients_reach_router_and_experts_of_what_is_left() -> None:
    model = tokred.apply(moe.build("mixtral"), "capacity_drop", gamma=0.5).train()
    model(input_ids=kv.prompt(19, 2), use_cache=False).logits.square().mean().backward()
    layer = adapters.find(model, "experts").layers[0]
    assert layer.router.weight.grad.abs().sum() > 0
    assert all(p.grad.isfinite().all() for p in layer.experts.parameters())


def test_padding_is_not_known_when_layers_run_again() -> None:
    model = moe.build("mixtral").train()
    model.gradient_checkpointing_enable()
    tokred.apply(model, "capacity_drop", gamma=0.75)
    ids, mask, _ = kv.padded((21, 13))
    with pytest.raises(tokred.UnsupportedModelError, match="gradient checkpointing runs layers of experts again"):
        model(input_ids=ids, attention_mask=mask, use_cache=False)
    model(input_ids=ids, attention_mask=torch.ones_like(mask), use_cache=False).logits.square().mean().backward()
    grads = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.gradient_checkpointing_disable()
    model.zero_grad()
    model(input_ids=ids, attention_mask=torch.ones_like(mask), use_cache=False).logits.square().mean().backward()
    for ours, plain in zip(grads, (p.grad for p in model.parameters() if p.grad is not None), strict=True):
        torch.testing.assert_close(ours, plain)


def test_a_single_token_that_is_decoded_loses_nothing() -> None:
    plain, ids = moe.build("mixtral"), kv.prompt(12)
    model = tokred.apply(copy.deepcopy(plain), "capacity_drop", gamma=0.5)
    found = model.generate(ids, max_new_tokens=3, do_sample=False)
    assert found.shape == (1, 15)
    report = tokred.report(model)
    assert (report.pairs, report.dropped) == (3 * 2, 0), "of the last step"
    assert torch.equal(logits_of(model, ids[:, :1]), logits_of(plain, ids[:, :1]))


def test_where_chooses_layers() -> None:
    plain, ids = moe.build("mixtral"), kv.prompt(19, 2)
    model = tokred.apply(plain, "capacity_drop", gamma=0.5, where=lambda name, block: name.startswith("layers.1"))
    logits_of(model, ids)
    assert [row.layer for row in tokred.report(model).layers] == [1]


def test_a_router_of_another_kind_is_refused() -> None:
    model = kv.build("deepseek_v3")
    with pytest.raises(tokred.UnsupportedModelError, match=r"DeepseekV3TopkRouter, whose scores are no plain softmax"):
        tokred.apply(model, "capacity_drop")
    row = next(row for row in tokred.supports(model) if row.method == "capacity_drop")
    assert not row.works


def test_other_refusals() -> None:
    with pytest.raises(tokred.MissingInputError, match=r"acts at stage 'experts', but .* offers only stage 'cache'"):
        tokred.apply(kv.build("llama"), "capacity_drop")
    with pytest.raises(ValueError, match="devices must divide the 8 experts, got devices=3"):
        tokred.apply(moe.build("mixtral"), "capacity_drop", devices=3)
    with pytest.raises(ValueError, match="expose is for methods of blocks; experts keep the stream as it is"):
        tokred.apply(moe.build("mixtral"), "capacity_drop", expose="all")
    model = moe.build("mixtral")
    model.config.distributed_config = type("Spread", (), {"enable_expert_parallel": True})()
    with pytest.raises(tokred.UnsupportedModelError, match="lie on several devices"):
        tokred.apply(model, "capacity_drop")


def test_a_router_that_answers_otherwise_is_noticed() -> None:
    model = moe.build("mixtral")
    layer = adapters.find(model, "experts").layers[0]
    layer.router.register_forward_hook(lambda m, a, out: (out[2], out[1], out[0]))
    tokred.apply(model, "capacity_drop", gamma=0.5)
    with pytest.raises(tokred.UnsupportedModelError, match="gave no logits, weights and ids"):
        logits_of(model, kv.prompt(9))


def test_a_cache_beside_it() -> None:
    """Both act on one model, each at its stage."""
    model = tokred.apply(moe.build("mixtral"), "snapkv budget=8 window=2 + capacity_drop gamma=0.5")
    with torch.no_grad():
        model(kv.prompt(20), use_cache=True)
    assert [one.stage for one in tokred.report(model).parts] == ["cache", "experts"]
