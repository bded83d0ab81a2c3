"""Grids and tiles of several images: each has its own, and attention is the tower's, whatever is cut away."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as t
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import tokred
from tests.vlm import hosts, oracle, tiny
from tests.vlm.layered import layer_site
from tests.vlm.test_methods import SOME
from tests.vlm.test_tower import MAPS, SEEN, Look, _map
from tokred.adapters.vlm.layout import fewer
from tokred.methods.vlm.topv import TopV, places
from tokred.vlm import LayerSite

GRIDDED = [
    "flash_vl",
    "nemotron",
    "vscan",
    "cat",
    "downsample_visual",
    "saint_visual",
    "uniform_visual",
    "hired",
    "prumerge",
]


def wide() -> Any:
    """LLaVA-NeXT whose images may be three tiles wide; one of 11 x 48 pixels has padding above and below."""
    torch.manual_seed(0)
    config = t.LlavaNextConfig(
        vision_config=t.CLIPVisionConfig(**tiny.VISION), text_config=t.LlamaConfig(**tiny.TEXT), image_token_id=98,
        image_grid_pinpoints=[[16, 48], [48, 16], [16, 16]],
    )  # fmt: skip
    return hosts.ready(t.LlavaNextForConditionalGeneration(config))


def wide_prompt(sizes: list[tuple[int, int]], text: int = 5) -> dict[str, Any]:
    g = torch.Generator().manual_seed(1)
    ids: list[int] = [7, 8, 9]
    for high, broad in sizes:
        rows = 4 if high > broad else max(1, round(12 * high / broad))
        visual = {(11, 48): 16 + 2 * 13, (48, 11): 16 + 12 * 3, (16, 16): 16 + 4 * 5}
        ids += [98] * visual.get((high, broad), 16 + rows * 13) + [11]
    ids += torch.randint(3, 90, (text,), generator=g).tolist()
    tiles = torch.randn(len(sizes), 4, 3, 16, 16, generator=g)
    return {"input_ids": torch.tensor([ids]), "pixel_values": tiles, "image_sizes": torch.tensor(sizes)}


@pytest.fixture
def maps():
    ALL_ATTENTION_FUNCTIONS.register("test_maps", _map)
    SEEN.clear()
    MAPS.clear()


@pytest.mark.parametrize("what", ["class_attention", "attention"])
def test_attention_of_padded_tiles_is_the_towers(maps, what):
    model, batch = wide(), wide_prompt([(11, 48)])
    tokred.apply(model, Look(what=what))
    model.model.vision_tower.config._attn_implementation = "test_maps"
    model(**batch)
    assert [site.grid for site, _ in SEEN] == [(4, 4), (2, 4), (2, 4), (2, 4)]
    for i, (site, found) in enumerate(SEEN):
        whole = MAPS[1][i]
        expected = whole.sum(1)[:, 1:] if what == "attention" else whole[:, 0, 1:]
        expected = expected if i == 0 else expected[:, 4:12]
        torch.testing.assert_close(found[0], expected, rtol=1e-4, atol=1e-5)
        assert site.k.shape[2] == site.q.shape[2] == 1 + site.shape[1]


def test_hired_and_prumerge_read_the_attention_of_the_whole_tile(maps):
    """The card: no renormalisation over the patches that are left."""
    model, batch = wide(), wide_prompt([(11, 48)])
    sites: list[Any] = []
    for name in ("hired", "prumerge"):
        method = tokred.make(name, **SOME[name])
        reduce = method.reduce

        def noted(site: Any, reduce: Any = reduce) -> Any:
            step = reduce(site)
            sites.append((site, step))
            return step

        object.__setattr__(method, "reduce", noted)
        tokred.apply(model, method)
        model(**batch)
        tokred.remove(model)
    heads = sites[1][0].tower_heads(-2)
    assert heads[1].shape[2] == 17
    scores = (heads[0][:, :, :1] @ heads[1].mT * heads[0].shape[-1] ** -0.5).softmax(-1)[:, :, 0, 1:][..., 4:12]
    torch.testing.assert_close(sites[1][0].class_attention_heads, scores, rtol=1e-4, atol=1e-6)
    site, step = sites[5]  # prumerge's second tile: one head of all channels
    q, k = (one.transpose(1, 2).flatten(2) for one in site.tower_heads(-1))
    attention = (q[:, :1] @ k.mT * q.shape[-1] ** -0.5).softmax(-1)[:, 0, 1:][:, 4:12]
    torch.testing.assert_close(
        step.rest, attention.masked_fill((step.index >= 0) & (step.index < step.slots - 1) & is_centre(step), 0)
    )


def is_centre(step: Any) -> torch.Tensor:
    """Which tokens stand for a slot that is no left-over."""
    found = torch.zeros(step.representative.shape[0], step.length, dtype=torch.bool)
    return found.scatter(1, step.representative[:, : int(step.rest_slot[0])], True)


@pytest.mark.parametrize("name", GRIDDED)
def test_images_of_several_shapes_do_not_meet(name):
    """Of each image of a prompt stays what stays where it is alone."""
    model = wide()
    sizes = [(11, 48), (16, 16), (48, 11), (11, 48)]
    batch, settings = wide_prompt(sizes), {"budget": 0.3, **SOME.get(name, {})}
    settings = SOME.get(name, settings)
    together = kept_of(model, name, settings, batch)
    place = 3
    for i, size in enumerate(sizes):
        alone = {**wide_prompt([size]), "pixel_values": batch["pixel_values"][i : i + 1]}
        own = kept_of(model, name, settings, alone)
        count = int((alone["input_ids"] == 98).sum())
        assert together[place : place + count].tolist() == own[3 : 3 + count].tolist()
        assert not own[3 : 3 + count].all()
        place += count + 1


def kept_of(model: Any, name: str, settings: dict[str, Any], batch: dict[str, Any]) -> torch.Tensor:
    tokred.apply(model, name, **settings)
    out = model(**batch, use_cache=True)
    tokred.remove(model)
    return oracle.kept(out.past_key_values, batch["input_ids"].shape[1])[0][0]


def test_grids_that_are_not_square():
    model, batch = hosts.build("qwen2_5_vl"), hosts.prompts("qwen2_5_vl", [[3, "image", 5]])
    batch["image_grid_thw"] = torch.tensor([[1, 4, 16]])
    seen: list[Any] = []
    method = tokred.make("uniform_visual", budget=4)
    choose = method.choose
    object.__setattr__(method, "choose", lambda site: (seen.append(site), choose(site))[1])
    tokred.apply(model, method)
    model(**batch)
    assert seen[0].grid == (2, 8)
    assert fewer((4, 16), 16) == (2, 8)
    assert fewer((7, 28), 196) == (7, 28)
    assert fewer((7, 28), 49) is None, "no square is made up"


def test_class_tokens_among_the_features():
    """LLaVA with the class token handed on: it is no patch, and attention is found all the same."""
    model, batch = tiny.llava(), tiny.prompts([[3, "image", 5]])
    batch["input_ids"] = torch.cat([batch["input_ids"][:, :3], torch.tensor([[98]]), batch["input_ids"][:, 3:]], 1)
    batch.pop("attention_mask")
    for name in ("fastervlm", "visionzip", "vispruner"):
        kept = []
        for strategy in ("default", "full"):
            model.config.vision_feature_select_strategy = strategy
            one = batch if strategy == "full" else {**batch, "input_ids": batch["input_ids"][:, 1:]}
            if strategy == "default":
                one["input_ids"] = torch.cat([batch["input_ids"][:, :3], batch["input_ids"][:, 4:]], 1)
            kept.append(kept_of(model, name, {"budget": 6}, one))
        assert kept[1][3], "the class token stays"
        assert kept[1][4:20].tolist() == kept[0][3:19].tolist()


def test_topv_places_every_image_on_its_own_grid():
    rows = ["tt" + "v" * 16 + "t" + "v" * 16 + "t" + "v" * 16 + "t" + "v" * 16 + "ttt"]
    image = torch.tensor([[0] * 19 + [1] * 17 + [2] * 17 + [3] * 19])
    site = layer_site(rows, layer=3)
    several = LayerSite(x=site.x, visual=site.visual, image=image, stream=site.stream, layer=3, depth=32)
    method = TopV(budget=20)
    columns = site.visual[0].nonzero().flatten()
    before, after = (s[:, columns].float() for s in site.stream)
    own = places((4, 4), 64)
    expected = method.select(method.importance(before, after, own), 20)
    found = method.reduce(several)
    assert [i for i in found.representative[0].tolist() if site.visual[0, i]] == columns[expected[0]].tolist()
    one = method.select(method.importance(before, after, places(None, 64)), 20)
    assert one.tolist() != expected.tolist(), "as one image of 8 x 8 it would be another choice"


def places_of(model: Any, batch: dict[str, Any], *before: Any) -> tuple[LayerSite, torch.Tensor]:
    seen: list[LayerSite] = []
    method = TopV(budget=0.5, layer=0)
    choose = method.choose
    object.__setattr__(method, "choose", lambda site: (seen.append(site), choose(site))[1])
    tokred.apply(model, [*before, method])
    model(**batch)
    tokred.remove(model)
    assert seen[0].placed
    return seen[0], seen[0].place  # type: ignore[return-value]


def test_places_of_images_in_a_model():
    model, batch = tiny.llava(), tiny.prompts([[3, "image", "image", 2, "image", 5], [2, "image", 4]])
    site, place = places_of(model, batch)
    square = places((4, 4), 16)
    for i, count in enumerate((3, 1)):
        torch.testing.assert_close(place[i][site.visual[i]], square.repeat(count, 1))  # type: ignore[arg-type]
    site, place = places_of(model, batch, tokred.make("random_visual", budget=9))
    assert site.visual.sum(1).tolist() == [27, 9]
    kept = tokred.make("random_visual", budget=9).reduce(LayerlessSite())
    (
        torch.testing.assert_close(place[1][site.visual[1]], square[kept.representative[0]]),
        "those that left have left gaps",
    )


class LayerlessSite(tokred.vlm.VisualSite):
    """An image of 16 tokens."""

    def __init__(self) -> None:
        super().__init__(x=torch.zeros(1, 16, 2))


def test_places_of_tiles():
    site, place = places_of(wide(), wide_prompt([(11, 48)]))
    found = place[0][site.visual[0]]
    torch.testing.assert_close(found[:16], places((4, 4), 16))  # type: ignore[arg-type]
    high = torch.cat([torch.cartesian_prod(torch.tensor([y]), torch.linspace(0, 1, 12)) for y in (0.0, 1.0)])
    rows = found[16:].view(2, 13, 2)
    torch.testing.assert_close(rows[:, :12].reshape(-1, 2), high)
    assert rows[:, 12].tolist() == [[0.0, 1.0], [1.0, 1.0]], "newlines end their rows"
