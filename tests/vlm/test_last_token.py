"""A prompt that ends in an image: its last token stays, since what follows is told from it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import tokred
from tests.kinds import VISION_LANGUAGE, each
from tests.vlm import hosts, oracle, tiny
from tests.vlm.layered import columns_kept, layer_site
from tests.vlm.test_methods import MERGING, NAMES, SOME
from tests.vlm.uneven import Uneven, UnevenLayer
from tokred.core.place import Place
from tokred.core.reduction import Reduction
from tokred.vlm.in_llm import LayerMethod

ROWS: list[list[int | str]] = [[3, "image"], [2, "image", 1, "image"], [4, "image", 2], [9]]
LAYERS = [n for n in NAMES if tokred.make(n).stage == "layer"]


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny.llava()


@pytest.mark.parametrize("name", NAMES)
def test_it_stays(name, model):
    batch = tiny.prompts(ROWS)
    seeds = range(4) if name in LAYERS else range(1)
    for seed in seeds:
        batch["pixel_values"] = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(seed))
        tokred.apply(model, name, **SOME.get(name, {}))
        out = model(**batch, use_cache=True)
        visual = [row.visual for row in tokred.report(model).layers]
        tokred.remove(model)
        keeps = oracle.kept(out.past_key_values, batch["input_ids"].shape[1])
        assert keeps
        assert all(keep[:, -1].all() for keep in keeps.values())
        assert visual[-1][0] < 16, "others leave"
        if "budget" in SOME.get(name, {}) and name in LAYERS and not isinstance(SOME[name]["budget"], tuple):
            assert visual[-1][0] == SOME[name]["budget"], "it is one of those that stay"


@pytest.mark.parametrize("name", [n for n in NAMES if MERGING.get(n, {}) is not None])
def test_dropping_equals_masking(name, model):
    method = tokred.make(name, **(MERGING.get(name) or SOME.get(name, {})))
    oracle.agree(model, model.model.language_model.layers, method, tiny.prompts(ROWS), max_new_tokens=3)


@pytest.mark.parametrize("name", each(hosts.HOSTS, VISION_LANGUAGE))
def test_every_family(name):
    model, rows = hosts.build(name), [[3, "image"], [5]]
    for method in (Uneven(), UnevenLayer(), [tokred.make("downsample_visual", budget=2), UnevenLayer()]):
        if isinstance(method, list):
            tokred.apply(model, method)
            out = model(**hosts.prompts(name, rows), use_cache=True)
            keeps = oracle.kept(out.past_key_values, hosts.prompts(name, rows)["input_ids"].shape[1])
            tokred.remove(model)
        else:
            _, keeps = oracle.agree(model, hosts.layers(name, model), method, hosts.prompts(name, rows))
        assert all(keep[:, -1].all() for keep in keeps.values())


class Careless(LayerMethod):
    """A method that asks nobody: the first visual tokens."""

    name = "careless"
    merges = False

    def tokens(self, n: int, place: Place) -> int:
        return n // 2

    def choose(self, site: Any) -> Reduction:
        kept = ~site.visual | (site.visual.cumsum(1) <= 3)
        step = site.keep_columns(kept)
        if not self.merges:
            return step
        n = site.shape[1]
        everything = torch.arange(n).expand(len(kept), -1)
        target = torch.where(kept, -1, step.index.gather(1, torch.zeros_like(everything)))
        return Reduction(step.representative, everything, target, n, mask=step.mask, by_size=False)


@pytest.mark.parametrize("merges", [False, True])
def test_whatever_a_method_answers(merges):
    method = Careless()
    method.merges = merges
    rows = ["ttvvvvvvvvvvvvvvv", "--ttvvvvvvvvvvtt-", "----tttvvvvvvvvv-"]
    found = method.reduce(layer_site(rows, layer=3))
    assert 16 - 17 in columns_kept(found, 0)
    assert len(columns_kept(found, 0)) == 6
    assert 15 - 17 in columns_kept(found, 2), "padding behind the prompt is no token"
    site = layer_site(rows, layer=3)
    merged = found.merge(site.x)
    slot = found.representative[0].tolist().index(16)
    torch.testing.assert_close(merged[0, slot], site.x[0, 16])


@pytest.mark.parametrize("name", [n for n in LAYERS if n not in MERGING])
def test_padding_behind_the_prompt(name, model):
    """As batches for training are padded: the last token is the last real one."""
    left = tiny.prompts([[3, "image", 5], [2, "image", 1, "image", 4]])
    shift = [int((row == 0).sum()) for row in left["attention_mask"]]
    right = {
        k: torch.stack([row.roll(-n) for row, n in zip(left[k], shift, strict=True)])
        for k in left
        if k != "pixel_values"
    }
    tokred.apply(model, name, **SOME.get(name, {}))
    found = model(**right, pixel_values=left["pixel_values"]).logits
    alone = model(
        input_ids=right["input_ids"][:1, : 24], attention_mask=right["attention_mask"][:1, : 24],
        pixel_values=left["pixel_values"][:1],
    ).logits  # fmt: skip
    kept = tokred.report(model).layers[-1].tokens[0]
    tokred.remove(model)
    # Filler stands on the left, padding of the caller's on the right of it.
    torch.testing.assert_close(found[0, -kept:], alone[0, -kept:], rtol=1e-4, atol=1e-4)
