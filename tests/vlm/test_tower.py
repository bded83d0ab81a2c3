"""What sites tell of the tower: attention equals the maps, tiles stand where the tower saw them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
import transformers as t
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import tokred
from tests.vlm import hosts, tiny
from tokred import adapters
from tokred.core.reduction import Reduction
from tokred.vlm.before_llm import Budgeted

SEEN: list[Any] = []
MAPS: list[torch.Tensor] = []


@dataclass(frozen=True)
class Look(Budgeted):
    """Notes its sites, and keeps all."""

    name: ClassVar[str] = "look"
    budget: int | float = 3
    what: str = "attention"

    @property
    def reads(self) -> frozenset[str]:
        return frozenset({"x", "grid", self.what})

    def choose(self, site: Any) -> Reduction:
        found = site.column_scores() if self.what == "attention" else site.class_attention_heads
        SEEN.append((site, found))
        return Reduction.identity((site.shape[0],), site.shape[1])


def _map(module: Any, query: Any, key: Any, value: Any, *masks: Any, scaling: Any = None, **options: Any) -> Any:
    scores = (query @ key.mT * scaling).softmax(-1)
    MAPS.append(scores)
    return (scores @ value).transpose(1, 2).contiguous(), None


@pytest.fixture
def maps():
    ALL_ATTENTION_FUNCTIONS.register("test_maps", _map)
    SEEN.clear()
    MAPS.clear()


@pytest.mark.parametrize("name", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen2_5_vl_video"])
def test_columns_of_towers_that_merge_patches(maps, name):
    model, batch = hosts.build(name), hosts.prompts(name, [[3, "image", 5, "image", 2]])
    tokred.apply(model, Look())
    model.model.visual.config._attn_implementation = "test_maps"
    model(**batch)
    ((site, found),) = SEEN
    assert found.shape == (2, 2, site.shape[1])
    frames = site.frames or 1
    grid, tower = site.grid, model.model.visual
    last = MAPS[-2 * frames :]
    patches = torch.cat([m[0].sum(1) for m in last], 1).view(2, 2, -1, 4).sum(-1).transpose(0, 1)
    if hasattr(tower, "window_size"):  # undo the order of the windows: 2 x 2 tokens each
        whole = patches.view(2, 2, frames, grid[0] // 2, grid[1] // 2, 2, 2)
        patches = whole.transpose(4, 5).reshape(2, 2, -1)
    torch.testing.assert_close(found, patches, rtol=1e-4, atol=1e-5)
    assert "attention" in adapters.find(model, "projector").supplies


@pytest.mark.parametrize("tower", ["clip", "dinov2"])
@pytest.mark.parametrize("what", ["attention", "class_attention"])
def test_columns_of_towers_with_a_class_token(maps, what, tower):
    model, batch = tiny.llava(tower=tower), tiny.prompts([[3, "image", 5], [2, "image", 4]])
    tokred.apply(model, Look(what=what))
    model.model.vision_tower.config._attn_implementation = "test_maps"
    model(**batch)
    ((_, found),) = SEEN
    whole = MAPS[1]  # the features are those of the last layer but one
    expected = whole.sum(2)[..., 1:] if what == "attention" else whole[:, :, 0, 1:]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_tiles_of_anyres():
    SEEN.clear()
    model, batch = hosts.build("llava_next"), hosts.prompts("llava_next", [[3, "image", 5]])
    tokred.apply(model, Look(what="class_attention"))
    model(**batch)
    tiles = [(site.tile, site.grid) for site, _ in SEEN]
    assert [(t.index, t.count, t.is_global) for t, _ in tiles] == [(0, 3, True), (1, 3, False), (2, 3, False)]
    assert [g for _, g in tiles] == [(4, 4), (4, 4), (4, 4)]
    with torch.no_grad():
        for site, _ in SEEN:  # each token is the projected feature of its own patch
            torch.testing.assert_close(site.project(site.tower), site.x, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("layer", "index"), [(-1, 2), (-3, 0), (1, 0), (2, 1), ([-3, -2], 1), ([1, 3], 2)])
def test_the_layer_whose_features_are_used(maps, layer, index):
    """By its number from the end or from the embeddings on, and the last of several."""
    model, batch = tiny.llava(), tiny.prompts([[3, "image", 5]])
    if isinstance(layer, list):
        torch.manual_seed(0)
        config = t.LlavaConfig(
            vision_config=t.CLIPVisionConfig(**tiny.VISION), text_config=t.LlamaConfig(**tiny.TEXT),
            image_token_id=tiny.IMAGE, vision_feature_layer=layer,
        )  # fmt: skip
        model = tiny.livelier(t.LlavaForConditionalGeneration(config)).eval()
    model.config.vision_feature_layer = layer
    tokred.apply(model, Look(what="class_attention"))
    model.model.vision_tower.config._attn_implementation = "test_maps"
    model(**batch)
    ((_, found),) = SEEN
    torch.testing.assert_close(found, MAPS[index][:, :, 0, 1:], rtol=1e-4, atol=1e-5)
