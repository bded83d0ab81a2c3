"""VisionZip: the card's examples, groups, and its laws."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import tokred
from tests.vlm.visual import check_laws, kept, visual
from tokred.methods.vlm.visionzip import VisionZip
from tokred.vlm import VisualSite

SCORES = torch.tensor([[0.05, 0.30, 0.10, 0.25, 0.20, 0.10]])
KEYS = torch.tensor([[1, 0.2], [0, 1], [1, 0.1], [0, 1], [0.1, 1], [0.3, 1]])[None, None]
HIDDEN = torch.tensor([[1, 0], [9, 9], [2, 0], [8, 8], [0, 4], [0, 2.0]])[None]


def site() -> VisualSite:
    return VisualSite(x=HIDDEN * 10, tower=HIDDEN, k=KEYS, class_attention=SCORES, class_token=False)


@pytest.mark.parametrize(("merge", "folded"), [("sum", [[3, 0], [0, 6]]), ("mean", [[1.5, 0], [0, 3]])])
def test_worked_example(merge, folded):
    found = VisionZip(budget=4, contextual=2, merge=merge).reduce(site())
    assert kept(found) == [1, 3, 0, 4]
    assert found.groups() == [[[1], [3], [0, 2], [4, 5]]]
    torch.testing.assert_close(found.merge(HIDDEN)[0, 2:], torch.tensor(folded, dtype=torch.float32))
    assert torch.equal(found.merge(HIDDEN)[0, :2], HIDDEN[0, [1, 3]])


def test_splits_and_targets():
    assert [VisionZip(budget=n).split(n) for n in (64, 128, 192)] == [(54, 10), (108, 20), (162, 30)]
    method = VisionZip(budget=64, cls="count")
    assert method.split(64) == (53, 10)
    assert method.count(576) == 63
    rest = torch.arange(523)[None]
    found = method.fold(torch.empty(1, 0, dtype=torch.long), rest, 10, torch.randn(1, 1, 576, 4), 576)
    assert kept(found) == list(range(0, 469, 52))
    assert VisionZip(budget=221, contextual=30).split(221) == (191, 30)


def test_ends():
    assert VisionZip(budget=6).reduce(site()).trivial
    alone = VisionZip(budget=3, contextual=0).reduce(site())
    assert kept(alone) == [1, 3, 4]
    assert alone.mode == "keep"
    assert VisionZip(contextual=0).reads == {"x", "class_attention"}
    assert VisionZip(space="x").reads == {"x", "k", "class_attention"}
    assert VisionZip(attention="received").reads == {"x", "k", "tower", "attention"}
    assert VisionZip(budget=1).reduce(site()).slots == 1


@settings(max_examples=25, deadline=None)
@given(st.integers(2, 35), st.integers(0, 34), st.sampled_from(["sum", "mean"]), st.integers(0, 50))
def test_groups(budget, contextual, merge, seed):
    contextual = min(contextual, budget - 1)
    s = visual(2, seed=seed)
    found = VisionZip(budget=budget, contextual=contextual, merge=merge).reduce(s)
    assert found.slots == budget
    for groups in found.groups():
        assert all(len(g) == 1 for g in groups[: budget - contextual])
        assert sum(len(g) for g in groups[budget - contextual :]) == (36 - budget + contextual if contextual else 0)
    metric = s.k[:, :, 1:].mean(1)
    unit = metric / metric.norm(dim=-1, keepdim=True)
    for i, groups in enumerate(found.groups()):
        targets = [int(r) for r in found.representative[i, budget - contextual :]]
        for slot, members in enumerate(groups[budget - contextual :]):
            for j in set(members) - {targets[slot]}:
                scores = [float(unit[i, j] @ unit[i, t]) for t in targets]
                assert scores[slot] >= max(scores) - 1e-5
    ones = torch.ones(2, 36, 3)
    made = found.merge(ones)
    more = [[1 + (merge == "sum" and len(g) > 1) for g in groups] for groups in found.groups()]
    torch.testing.assert_close(made[..., 0], torch.tensor(more, dtype=torch.float32))


def test_sum_is_the_target_and_the_mean_of_the_others():
    s = visual(1)
    found = VisionZip(budget=6, contextual=3).reduce(s)
    made = found.merge(s.tower)
    for slot, members in enumerate(found.groups()[0]):
        target = int(found.representative[0, slot])
        others = [j for j in members if j != target]
        expected = s.tower[0, target] + (s.tower[0, others].mean(0) if others else 0)
        torch.testing.assert_close(made[0, slot], expected)


def test_laws():
    check_laws(VisionZip(budget=9), VisionZip(budget=36))
    check_laws(VisionZip(budget=0.25, merge="mean", attention="received"), VisionZip(budget=1.0))


@pytest.mark.parametrize(
    ("parameters", "match"),
    [
        ({"contextual": -1}, "contextual .unless 0. must be"),
        ({"budget": 8, "contextual": 8}, "leaves no dominant token of 8"),
        ({"merge": "max"}, "merge is 'max'"),
        ({"cls": "keep"}, "cls is 'keep'"),
        ({"space": "llm"}, "space is 'llm'"),
        ({"budget": 0}, "budget must be"),
    ],
)
def test_bad_parameters(parameters, match):
    with pytest.raises(ValueError, match=match):
        tokred.make("visionzip", **parameters)
