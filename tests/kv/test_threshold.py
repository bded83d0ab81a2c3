"""A threshold as a budget: the card's worked example, and that it does not matter when rows are judged."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from torch import Tensor

import tokred
from tokred.kernels.decode_attention import SENTINEL
from tokred.kv import CacheSite, Score, Threshold, When

SCORES = (-1, -5, -3, -4, -2, -6, -1, -4.5, -3.9, -8)


@dataclass(frozen=True)
class Table(Score):
    """Scores by token, the same for all heads."""

    values: tuple[float, ...] = SCORES
    name: ClassVar[str] = ""

    def __call__(self, site: CacheSite) -> Tensor:
        return torch.tensor(self.values)[site.token.clamp(0, len(self.values) - 1)].float().expand(site.extent)


def policy(recent=2, sinks=0, when=None, **more):
    budget = Threshold(**{"tau": -4.0, **more})
    return tokred.KVPolicy(score=Table(), budget=budget, recent=recent, sinks=sinks, when=when)


def kept(method, positions: list[int], seen: int) -> list[int]:
    k = torch.zeros(1, 1, len(positions), 2)
    site = CacheSite(k=k, v=k, positions=torch.tensor([[positions]], dtype=torch.int32), seen=seen, prompt=(6,))
    step = method.reduce(site)
    rows = step.representative[0, 0]
    return [positions[i] for i in (rows if step.mask is None else rows[step.mask[0, 0]]).tolist()]


def test_worked_example():
    rows, found = list(range(6)), {}
    for seen in range(6, 11):
        rows = found[seen] = kept(policy(), rows, seen)
        rows = [*rows, seen]
    assert found == {
        6: [0, 2, 3, 4, 5],
        7: [0, 2, 3, 4, 5, 6],
        8: [0, 2, 3, 4, 6, 7],
        9: [0, 2, 3, 4, 6, 7, 8],
        10: [0, 2, 3, 4, 6, 8, 9],
    }
    assert kept(policy(), list(range(10)), 10) == found[10], "all as one prompt"


def test_a_bound_evicts_the_lowest():
    assert kept(policy(most=5), list(range(10)), 10) == [0, 4, 6, 8, 9]


def test_edges():
    ten = list(range(10))
    assert kept(policy(tau=math.inf, sinks=1), ten, 10) == [0, 8, 9]
    assert kept(policy(tau=-math.inf), ten, 10) == ten
    assert kept(policy(tau=math.inf, least=4), ten, 10) == [0, 6, 8, 9], "the best of those that are judged"
    assert set(kept(policy(tau=-3.0), ten, 10)) < set(kept(policy(tau=-4.0), ten, 10))
    assert Threshold(-math.inf).full
    assert not Threshold(-math.inf, most=5).full
    assert Threshold(-4.0).of("64 MiB") == Threshold(-4.0, most="64 MiB")
    given = tokred.KVPolicy(budget=Threshold(-2.5, most=400))
    assert tokred.from_dict(given.to_dict()) == given


@pytest.mark.parametrize(
    ("given", "kind", "text"),
    [
        ({"tau": math.nan}, ValueError, "tau must be a number"),
        ({"tau": "low"}, ValueError, "tau must be a number"),
        ({"most": 0.5}, TypeError, "most must be tokens"),
        ({"most": 3, "least": 4}, ValueError, "most must be at least least=4, got 3"),
        ({"most": "much"}, ValueError, "most must be bytes"),
    ],
)
def test_bad_input(given, kind, text):
    with pytest.raises(kind, match=text):
        Threshold(**given)


def test_without_a_bound_no_limit_is_held():
    given = {"score": "key_norm", "sinks": 1, "recent": 2}
    with pytest.raises(ValueError, match="cannot hold a limit: without most= its rows are as many as score high"):
        tokred.Limited(policy=tokred.KVPolicy(budget=Threshold(-4.0), **given), limit="1 MiB")
    assert tokred.Limited(policy=tokred.KVPolicy(budget=Threshold(-4.0, most=64), **given), limit="1 MiB")


# ---------------------------------------------------------------- on a model


@pytest.fixture
def llama():
    pytest.importorskip("transformers")
    from tests.kv.tiny import build

    return build("llama")


def slots(cache) -> list[list[list[int]]]:
    return [
        [[p for p in head if p != SENTINEL] for sample in layer.positions.tolist() for head in sample]
        for layer in cache.layers
        if layer.positions is not None
    ]


@torch.no_grad()
def middle(model, ids) -> float:
    """The median of the first layer's scores."""
    return -float(model(ids).past_key_values.layers[0].keys.norm(dim=-1).median())


@torch.no_grad()
def final(model, method, parts, ids, mask=None):
    """Slots of the rows after the tokens came in forwards of some sizes."""
    tokred.apply(model, method)
    cache, done = tokred.kv_cache(model, prompt=parts[0]), 0
    for m in parts:
        done += m
        given = {} if mask is None else {"attention_mask": mask[:, :done]}
        model(ids[:, done - m : done], past_key_values=cache, **given)
    return slots(cache)


def test_it_does_not_matter_when_rows_are_judged(llama):
    """Key norms are the row's own: a prompt of 24, one in two turns, one token at a time, four at a time."""
    from tests.kv.tiny import prompt

    ids = prompt(24)
    tau = middle(llama, ids)

    def of(**when):
        # The first layer's keys have been seen by nobody's eviction: its scores are the same in every order.
        return tokred.KVPolicy(score="key_norm", budget=Threshold(tau), sinks=1, recent=3, when=When(**when))

    whole = final(llama, of(), [24], ids)[0]
    assert 0 < sum(map(len, whole)) < 48
    assert final(llama, of(turns=True), [16, 8], ids)[0] == whole
    for every in (1, 4):
        assert final(llama, of(every=every), [16, *[1] * 8], ids)[0] == whole


def test_padding_changes_nothing(llama):
    from tests.kv.tiny import padded

    ids, mask, alone = padded((24, 15))
    model = llama.double()
    method = tokred.KVPolicy(score="key_norm", budget=Threshold(middle(model, alone[1])), sinks=1, recent=3)
    tokred.apply(model, method)
    made = model.generate(ids, attention_mask=mask, max_new_tokens=2, return_dict_in_generate=True)
    for i, row in enumerate(alone):
        one = model.generate(row, max_new_tokens=2, return_dict_in_generate=True)
        for ours, theirs in zip(made.past_key_values.layers[:1], one.past_key_values.layers[:1], strict=True):
            for head in range(2):
                shift = 24 - row.shape[1]
                found = [p - shift for p in ours.positions[i, head].tolist() if p != SENTINEL]
                assert found == [p for p in theirs.positions[0, head].tolist() if p != SENTINEL]
