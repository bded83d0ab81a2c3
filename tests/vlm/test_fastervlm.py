"""FasterVLM: the card's example and laws."""

from __future__ import annotations

import pytest
import torch

import tokred
from tests.vlm.visual import check_laws, kept, visual
from tokred.methods.vlm.fastervlm import FasterVLM
from tokred.vlm import VisualSite

ROWS = torch.tensor([[[0.1, 0.3, 0.05, 0.2, 0.25, 0.1], [0.2, 0.1, 0.15, 0.3, 0.05, 0.2]]])


def test_worked_example():
    site = VisualSite(x=torch.zeros(1, 6, 2), class_attention=ROWS)
    assert site.class_attention[0].tolist() == pytest.approx([0.15, 0.2, 0.1, 0.25, 0.15, 0.15])
    assert kept(FasterVLM(budget=3).reduce(site)) == [0, 1, 3], "0 beats 4 and 5 on the tie"
    turned = VisualSite(x=torch.zeros(1, 6, 2), class_attention=ROWS.flip(1))
    assert kept(FasterVLM(budget=3).reduce(turned)) == [0, 1, 3], "the order of the heads says nothing"
    assert kept(FasterVLM(budget=1).reduce(site)) == [3]


def test_counts():
    assert [FasterVLM(budget=share).count(576) for share in (0.25, 0.1, 0.05)] == [144, 58, 29]
    assert FasterVLM(budget=6).reduce(VisualSite(x=torch.zeros(1, 6, 2), class_attention=ROWS)).trivial
    assert FasterVLM().tokens(576, tokred.Place(layer=0, depth=1)) == 144
    assert FasterVLM().tokens(100, tokred.Place(layer=0, depth=1)) == 100


@pytest.mark.parametrize("attention", ["class", "received"])
def test_laws(attention):
    check_laws(FasterVLM(budget=7, attention=attention), FasterVLM(budget=1.0, attention=attention))


def test_towers_without_a_class_token():
    site = visual(classes=0)
    with pytest.raises(tokred.MissingInputError, match="no class token"):
        FasterVLM(budget=7).reduce(site)
    q, k = site.q, site.k
    received = (q @ k.mT / 2).softmax(-1).mean((1, 2))
    found = FasterVLM(budget=7, attention="received").reduce(site)
    assert [sorted(row.topk(7).indices.tolist()) for row in received] == [kept(found, i) for i in range(2)]
    assert FasterVLM(attention="received").reads == {"x", "attention"}


@pytest.mark.parametrize("budget", [0, -1, 0.0, 1.01, "64", None])
def test_bad_budgets(budget):
    with pytest.raises(ValueError, match="budget must be a number of tokens"):
        FasterVLM(budget=budget)


def test_settings_survive():
    assert tokred.from_dict(FasterVLM(budget=0.25).to_dict()) == FasterVLM(budget=0.25)
    with pytest.raises(ValueError, match="no padding"):
        FasterVLM(budget=1).reduce(VisualSite(x=torch.zeros(1, 4, 2), mask=torch.ones(1, 4).bool()))
    with pytest.raises(TypeError, match="VisualSite"):
        FasterVLM(budget=1).reduce(tokred.Site(x=torch.zeros(1, 4, 2)))
