"""SAINT inside and before a language model: the graph of its ViT form on visual tokens alone."""

from __future__ import annotations

import pytest
import torch

import tokred
from tests.encoder.angles import keys
from tests.vlm.layered import LAYOUT, check_laws, columns_kept, layer_site
from tests.vlm.visual import check_laws as check_visual_laws
from tests.vlm.visual import kept, visual
from tokred.core.attention import Attention
from tokred.methods.vlm.saint_vlm import SAINTLayer, SAINTVisual
from tokred.methods.vlm.vscan import VScanLayer
from tokred.vlm import LayerSite, VisualSite

# The worked example of SAINT's graph: patches 1 to 10, with text around them.
ANGLES = [0, 5, 10, 20, 60, 30, 90, 100, 150, 200]


def site(rows: list[list[float]], text: tuple[int, int] = (2, 1), layer: int = 8) -> LayerSite:
    longest = max(map(len, rows))
    full = [[77.0] * (longest - len(r) + text[0]) + r + [33.0] * text[1] for r in rows]
    n = len(full[0])
    seen = torch.tensor([[n - text[1] - len(r) <= j < n - text[1] for j in range(n)] for r in rows])
    mask = torch.tensor([[j >= longest - len(r) for j in range(n)] for r in rows])
    k = keys(*full)
    return LayerSite(
        x=torch.arange(float(n)).view(1, n, 1).expand(len(rows), -1, -1), visual=seen,
        before=Attention(k, k, causal=True), mask=None if bool(mask.all()) else mask, layer=layer, depth=32,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("tau", "k", "dropped"),
    [(0.9, 2, [3, 1]), (0.75, 2, [3, 1, 7]), (0.75, 1, [3, 1, 7, 5]), (0.7, 5, [])],
)
def test_worked_example(tau, k, dropped):
    found = SAINTLayer(tau=tau, K=k).reduce(site([ANGLES]))
    left = [0, 1, *(i + 1 for i in range(1, 11) if i not in dropped), 12]
    assert found.representative.tolist() == [left]
    graph = tokred.SAINT(tau=tau, K=k).reduce(tokred.Site(k=keys([0, *ANGLES]), prefix=1))
    assert sorted(graph.representative[0].tolist()) == [0, *(i for i in range(1, 11) if i not in dropped)]


def test_uneven_samples_and_batch_count():
    two = [0, 50, 100, 150, 200, 250, 300, 350, 40, 90]
    found = SAINTLayer(tau=0.75, K=1).reduce(site([ANGLES, two]))
    assert [len(columns_kept(found, i)) for i in range(2)] == [9, 10]
    votes = SAINTLayer(tau=0.75, K=1, count="batch").reduce(site([ANGLES, two]))
    assert votes.mask is None
    assert votes.slots == 10
    short = SAINTLayer(tau=0.75, K=1).reduce(site([ANGLES, two[:6]]))
    alone = SAINTLayer(tau=0.75, K=1).reduce(site([two[:6]]))
    assert [j for j in columns_kept(short, 1) if j >= -9] == columns_kept(alone, 0)
    assert columns_kept(short, 0) == columns_kept(SAINTLayer(tau=0.75, K=1).reduce(site([ANGLES])), 0)


def test_caps_and_places():
    one = site([ANGLES])
    assert SAINTLayer(tau=0.75, K=1, max_r=1).reduce(one).representative.shape[1] == 12
    assert SAINTLayer(tau=0.75, K=1, min_tokens=9).reduce(one).representative.shape[1] == 12
    assert SAINTLayer(tau=0.75, K=1, max_r=0).reduce(one).trivial
    acts = [i for i in range(32) if SAINTLayer().acts(576, tokred.Place(layer=i, depth=32))]
    assert acts == list(range(8, 18))
    with pytest.raises(ValueError, match="is 8, but the model has 8"):
        SAINTLayer().check(8)
    SAINTLayer().check(9)


def test_layer_laws():
    check_laws(SAINTLayer(start=2, end=2, tau=-2.0, K=1), SAINTLayer(tau=2.0, start=2, end=2), 3)
    check_laws(SAINTLayer(start=2, end=2, tau=0.4, K=2), SAINTLayer(tau=2.0, start=2, end=2), 3)


@pytest.mark.parametrize(("m", "left"), [(5, [0, 1, 5, 6, 7]), (3, [1, 6, 7])])
def test_full_graph_before_the_language_model(m, left):
    k = keys([0, 5, 10, 60, 62, 120, 200, 205])
    one = VisualSite(x=torch.zeros(1, 8, 2), k=k, layer_heads=lambda layer: (k, k))
    assert kept(SAINTVisual(budget=m, q=4, layer=2).reduce(one)) == left
    assert SAINTVisual(budget=8).reduce(one).trivial


def test_visual_laws_and_keys_without_the_class_token():
    check_visual_laws(SAINTVisual(budget=10, layer=1), SAINTVisual(budget=36))
    s = visual(1)
    k = s.layer_heads(1)[1][:, :, 1:]
    same = tokred.SAINT(form="full", M=10).reduce(tokred.Site(k=k, layer=0))
    assert kept(SAINTVisual(budget=10, layer=1).reduce(s)) == same.representative[0].tolist()
    assert SAINTVisual(layer=3).tower_layers == (3,)


def test_second_stage_of_vscan():
    s = layer_site(layer=16)
    found = VScanLayer(budget=4).reduce(s)
    scores = s.row_scores(1, of="own")
    for i, row in enumerate(LAYOUT):
        seen = [j for j, c in enumerate(row) if c == "v"]
        best = sorted(sorted(seen, key=lambda j: -float(scores[i, j]))[:4])
        assert [j + 17 for j in columns_kept(found, i) if row[j] == "v"] == best
    check_laws(VScanLayer(budget=0.4), VScanLayer(budget=1.0), 16)
    assert [VScanLayer().tokens(96, tokred.Place(layer=i, depth=28)) for i in (13, 14, 15)] == [96, 32, 96]
    with pytest.raises(ValueError, match="layer is 40"):
        VScanLayer(layer=40).check(32)
    for name, bad in (("layer", {"layer": 0}), ("budget", {"budget": 0})):
        with pytest.raises(ValueError, match=f"{name} must be"):
            VScanLayer(**bad)


@pytest.mark.parametrize(
    ("name", "parameters", "match"),
    [
        ("saint_layer", {"start": -1}, "start must be"),
        ("saint_layer", {"start": 5, "end": 4}, "end must be an integer of at least 5"),
        ("saint_layer", {"tau": "high"}, "tau must be a finite number"),
        ("saint_layer", {"K": 0}, "K must be"),
        ("saint_layer", {"gamma": 0}, "gamma must be positive"),
        ("saint_layer", {"count": "mean"}, "count is 'mean'"),
        ("saint_visual", {"q": 0}, "q must be"),
        ("saint_visual", {"layer": 1.5}, "layer must be an integer"),
        ("saint_visual", {"budget": 0.0}, "budget must be"),
    ],
)
def test_bad_parameters(name, parameters, match):
    with pytest.raises(ValueError, match=match):
        tokred.make(name, **parameters)
