"""Random-deep schedule: the card's examples, shares, and what stays."""

from __future__ import annotations

import pytest
import torch

import tokred
from tests.vlm import tiny
from tests.vlm.layered import LAYOUT, check_laws, columns_kept, layer_site
from tokred.methods.vlm.random_deep import RandomDeep


def kept(layer: int, seed: int) -> list[int]:
    site = layer_site(["v" * 12 + "tt"], layer=layer)
    found = RandomDeep(layer=layer, share=1 / 3, seed=seed).reduce(site)
    return [14 + j for j in columns_kept(found, 0)][:-2]


def test_worked_examples():
    assert kept(21, 0) == [0, 1, 2, 11]
    assert kept(22, 0) == [3, 5, 8, 9]
    assert kept(21, 1) == [0, 1, 10, 11]
    assert RandomDeep(layer=21).base_share(0.5, 28) == pytest.approx(0.5714, abs=5e-5)
    assert RandomDeep(share=0.1).base_share(0.5, 28) == pytest.approx(0.6452, abs=5e-5)
    assert RandomDeep(share=0).base_share(0.5, 28) == pytest.approx(0.6667, abs=5e-5)
    with pytest.raises(ValueError, match=r"share of 0.9 cannot be reached: .* it is 0.75"):
        RandomDeep(layer=21, share=0).base_share(0.9, 28)


def test_defaults():
    assert RandomDeep().at(28) == 21
    assert RandomDeep().at(1) == 1
    assert [RandomDeep().left(n) for n in (0, 1, 2, 3, 4)] == [0, 1, 1, 2, 2], "half up"


@pytest.mark.parametrize("share", [0.0, 0.3, 0.5])
def test_laws(share):
    found = check_laws(RandomDeep(layer=3, share=share), RandomDeep(layer=3, share=1.0), 3)
    for i, row in enumerate(LAYOUT):
        left = [j for j in columns_kept(found, i) if row[j] == "v"]
        assert len(left) == int(row.count("v") * share + 0.5)


def test_samples_of_one_length_lose_the_same():
    found = RandomDeep(layer=3).reduce(layer_site(["tvvvvvvtt", "ttvvvvvvt"], layer=3))
    first, second = (columns_kept(found, i) for i in range(2))
    assert [j for j in second if j < -1][2:] == [j + 1 for j in first if j < -2][1:]


def test_no_visual_token_is_left_below():
    model, batch = tiny.llava(), tiny.prompts([[3, "image", 5], [2, "image", 1]])
    tokred.apply(model, "random_deep", layer=2, share=0.0)
    with torch.no_grad():
        cache = model(**batch).past_key_values
    assert [layer.keys.shape[2] for layer in cache.layers] == [24, 24, 8, 8]
    assert [row.visual for row in tokred.report(model).layers] == [(16, 16), (16, 16), (0, 0), (0, 0)]


@pytest.mark.parametrize(
    ("parameters", "match"),
    [({"layer": 0}, "layer must be"), ({"share": 1.5}, "share must lie"), ({"seed": -1}, "seed must be")],
)
def test_bad_parameters(parameters, match):
    with pytest.raises(ValueError, match=match):
        tokred.make("random_deep", **parameters)
