"""Learned reduction inside the tower of a VLM: amounts, training, and the part of the page."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers as t

import tokred
from benchmarks.pages import markdown, trained
from benchmarks.vlm import learned
from benchmarks.zoo import vlm
from tokred import adapters
from tokred.bench import results
from tokred.bench.arms import BASE

TOWER = {"hidden_size": 32, "num_hidden_layers": 6, "num_attention_heads": 2, "image_size": 224, "patch_size": 14}
TEXT = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 64}


@pytest.fixture(scope="module")
def model() -> t.LlavaForConditionalGeneration:
    torch.manual_seed(0)
    config = t.LlavaConfig(
        vision_config=t.Dinov2Config(**TOWER), text_config=t.LlamaConfig(**TEXT), image_token_index=63,
        vision_feature_layer=-1,
    )  # fmt: skip
    return t.LlavaForConditionalGeneration(config).eval().requires_grad_(False)


def scenes(count: int) -> vlm.Scenes:
    g = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (count, 3, vlm.SIZE, vlm.SIZE), generator=g, dtype=torch.uint8)
    return vlm.Scenes(images, torch.arange(count) % 10, torch.rand(count, vlm.GRID, vlm.GRID, generator=g))


def test_amounts(model) -> None:
    tower = model.model.vision_tower
    host, one = adapters.find(tower), (1, 3, vlm.SIZE, vlm.SIZE)
    dense = sum(macs for _, _, macs in host.plan(None, one))
    for name in ("tome", "class_attention", "cropr", learned.EARLY):
        method = learned.at_share(name, 0.6, tower)
        assert 0.5 < sum(macs for _, _, macs in host.plan(method, one)) / dense <= 0.61, name
    assert learned.early(40, 6) == [13, 27, 0, 0, 0, 0]
    with pytest.raises(ValueError, match="vtm has no setting for 1% of the work"):
        learned.at_share("vtm", 0.01, tower)


@pytest.mark.parametrize("name", ["cropr", "bavit", "vtm"])
def test_what_a_method_owns_learns_alone(model, name: str) -> None:
    before = {k: v.clone() for k, v in model.state_dict().items()}
    some = scenes(4)
    goals = torch.zeros(4, vlm.GRID**2 + 1, TOWER["hidden_size"])
    method = learned.at_share(name, 0.6, model.model.vision_tower)
    torch.manual_seed(3)
    tokred.apply(model, method)
    start = [p.clone() for p in tokred.parameters(model)]
    tokred.remove(model)
    module = learned.learn(model, name, method, some, goals, steps=2, seed=3)
    assert any(not torch.equal(a, b) for a, b in zip(start, module.parameters(), strict=True))
    assert not module.training
    assert tokred.patched(model) == []
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    speed = learned.faster(model, {"it": learned.Arm(method, module)}, some.images, 2)
    assert list(map(len, speed.values())) == [2]


def test_records_and_the_page(tmp_path: Path) -> None:
    assert trained.learned_vlm(markdown.Results(tmp_path)) == trained.NOTHING
    one = {"share": 0.5, "left": 0.5, "work": 0.5, "setting": ""}
    rows = [
        {**one, "name": BASE, "share": 1.0, "hits": [1.0] * 4},
        *({**one, "name": learned.EARLY, "hits": hits} for hits in ([1.0, 1.0, 1.0, 0.0], [1.0, 1.0, 1.0, 1.0])),
        {**one, "name": "class_attention", "hits": [0.0] * 4, "faster": [1.5, 2.0, 2.5]},
    ]
    where = {"model": "m", "device": "a CPU", "threads": 1, "dtype": "float32", "versions": "tokred=0", "date": "today"}
    made = [*learned.records(rows, where)]
    assert [(r["method"], r["case"], r["exact_count"]) for r in made] == [
        (BASE, BASE, 4), ("cropr", learned.EARLY, 8), ("evit", "class_attention", 4),
    ]  # fmt: skip
    results.write(tmp_path / "vlm.csv", made, "learned")
    text = trained.learned_vlm(markdown.Results(tmp_path))
    assert text.startswith("All tokens: 100 (")
    assert "| `cropr_early` | 88 (0 to 100) | 50 | 50.0 |  |" in text
    assert "| 50 | 50.0 | 2.00 (1.75 to 2.25) |" in text
    assert text.endswith("At a half of the tower's work `cropr_early` answers most; level with it: `class_attention`.")
