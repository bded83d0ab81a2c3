"""Allocators: a threshold is a budget like any other, and the four that there are answer as their budgets say."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch

pytest.importorskip("transformers")

import tokred
from tests.kv.tiny import build, padded, prompt
from tokred.kernels.decode_attention import SENTINEL
from tokred.kv import Adaptive, Budget, CacheSite, Global, KeyNorm, Preference, Squeeze, Uniform
from tokred.kv.allocators import Allocator, Grant, Judged


@dataclass(frozen=True)
class Barrier(Budget):
    """Whatever scores above ``least`` stays."""

    name: ClassVar[str] = "barrier"
    headwise: ClassVar[bool] = True
    why_no_limit: ClassVar[str | None] = "its rows are as many as score well"

    least: float = 0.0

    @property
    def amount(self) -> float:
        return 0.5  # a share, to say that not everything stays

    def mean(self, n, place, depth) -> int:
        return n

    def start(self, depth: int) -> Allocator:
        return Above(self)


class Above(Allocator):
    """Counts them."""

    def __init__(self, budget: Barrier) -> None:
        self.budget = budget

    def after_layer(self, layer: Judged) -> dict[int, Grant]:
        stays = (layer.score > self.budget.least) | layer.guarded((1,) * layer.site.shape[0])
        stays = stays if layer.site.real is None else stays & layer.site.real
        counts = stays.sum(-1)
        return {layer.site.layer: Grant(tuple(counts.amax(1).tolist()), counts)}


pytestmark = pytest.mark.usefixtures("no_grad")


def test_a_threshold_by_hand():
    k = torch.tensor([[[1.0, 0], [0, 3], [2, 2], [0, 0.5]], [[4, 0], [4, 0], [4, 0], [4, 0]]])[None]
    policy = tokred.KVPolicy(score=KeyNorm(), budget=Barrier(-2.0), recent=1)
    step = policy.reduce(CacheSite(k=k, v=k))
    kept = [step.representative[0, h][step.mask[0, h]].tolist() for h in range(2)]
    assert kept == [[0, 3], [3]]


@pytest.mark.parametrize("store", ["flat", "rectangle", "half"])
@pytest.mark.parametrize("batch", ["one", "padded"])
def test_a_threshold_keeps_what_scores_above_it(batch, store):
    model = build("llama")
    ids, mask, _ = padded((29, 17)) if batch == "padded" else (prompt(29), None, None)
    tokred.apply(model, tokred.KVPolicy(score=KeyNorm(), budget=1.0))
    dense = tokred.kv_cache(model)
    model(ids, attention_mask=mask, past_key_values=dense)
    least = -float(torch.cat([layer.keys.norm(dim=-1).flatten() for layer in dense.layers]).median())
    tokred.apply(model, tokred.KVPolicy(score=KeyNorm(), budget=Barrier(least), recent=2, store=store))
    cache = tokred.kv_cache(model)
    model(ids, attention_mask=mask, past_key_values=cache)
    lengths = set()
    for ours, theirs in zip(cache.layers, dense.layers, strict=True):
        stays = -theirs.keys.norm(dim=-1) > least
        stays[:, :, -2:] = True
        stays = stays if mask is None else stays & mask.bool()[:, None]
        slots = ours.positions.masked_fill(ours.positions == SENTINEL, 29).long()
        kept = torch.zeros(*slots.shape[:2], 30, dtype=torch.bool).scatter_(2, slots, True)[..., :29]
        assert torch.equal(kept, stays)
        lengths.update(stays.sum(-1).flatten().tolist())
    assert len(lengths) > 3, "heads and layers hold what they need"
    made = model.generate(ids, attention_mask=mask, max_new_tokens=4, do_sample=False, eos_token_id=None)
    assert made.shape[1] == 33


def test_a_threshold_is_refused_where_others_are():
    with pytest.raises(ValueError, match="its rows are as many as score well"):
        tokred.Limited(tokred.KVPolicy(score=KeyNorm(), budget=Barrier()))
    policy = tokred.KVPolicy(score=KeyNorm(), budget="barrier")
    assert policy.budget == Barrier()


def judged(layer: int, depth: int, score: torch.Tensor | None = None) -> Judged:
    generator = torch.Generator().manual_seed(layer)
    q, k = torch.randn(2, 1, 4, 12, 8, generator=generator)
    site = CacheSite(q=q, k=k[:, :2], v=k[:, :2], layer=layer, depth=depth)
    score = torch.rand(1, 2, 12, generator=generator) if score is None else score
    return Judged(site, score, lambda rows: torch.zeros(1, 1, 12, dtype=torch.bool))


def test_most_budgets_answer_at_once():
    for budget in (Uniform(0.5), Adaptive(0.5)):
        assert not budget.deferred
        assert budget.start(3).after_layer(judged(1, 3)) == {1: Grant((6,))}


def test_a_cascade_cuts_earlier_layers_again():
    budget = Preference(0.5, window=2)
    allocator = budget.start(3)
    grants = [allocator.after_layer(judged(layer, 3)) for layer in range(3)]
    assert [sorted(g) for g in grants] == [[0], [0, 1], [0, 1, 2]]
    first = [g[0].rows[0] for g in grants]
    assert first[0] >= first[1] >= first[2]
    assert not any(g.final for each in grants for g in each.values())
    assert [len(g[0].measured[0]) for g in grants] == [1, 2, 3]
    later = allocator.after_layer(judged(1, 3)._replace(measured=grants[2][1].measured))
    assert later == {1: Grant(grants[2][1].rows)}
    allocator.begin()
    assert sorted(allocator.after_layer(judged(0, 3))) == [0]


def test_groups_wait_for_the_streams_of_all_layers():
    allocator = Squeeze(0.5).start(3)
    layers = [judged(i, 3) for i in range(3)]
    assert all(allocator.after_layer(layer) == {} for layer in layers)
    one = torch.ones(1)
    streams = {i: (one * c, one) for i, c in enumerate((0.2, 0.3, 0.9))}
    grants = allocator.after_forward(layers, streams)
    assert sum(g.rows[0] for g in grants.values()) == 18
    assert grants[2].rows < grants[0].rows
    kept = allocator.after_layer(layers[2]._replace(measured=grants[2].measured))
    assert kept[2].rows == grants[2].rows
    with pytest.raises(tokred.errors.TokredError, match="2 of 3 layers measured"):
        allocator.after_forward(layers, {i: streams[i] for i in range(2)})


def test_layers_together_share_by_their_scores():
    allocator = Global(0.5).start(2)
    low, high = torch.zeros(1, 2, 12), torch.ones(1, 2, 12)
    layers = [judged(0, 2, low), judged(1, 2, high)]
    assert allocator.after_layer(layers[0]) == {}
    grants = allocator.after_forward(layers, {})
    assert grants[0].counts.tolist() == [[0, 0]]
    assert grants[1].counts.tolist() == [[12, 12]]
    assert Global(1.0).start(2).after_forward(layers, {}) == {}
