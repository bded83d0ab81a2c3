"""Selection in float32 from its first operation: values in half precision give the choice that they give in float32."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import tokred
from tests.vlm import tiny
from tests.vlm.test_methods import NAMES, SOME
from tokred.core.attention import Attention
from tokred.vlm import LayerSite, VisualSite
from tokred.vlm.in_llm import Prompt

PROJECTOR = [n for n in NAMES if tokred.make(n).stage == "projector"]
LAYER = [
    n
    for n in tokred.list_methods()
    if any(m.stage == "layer" and not hasattr(m, "decodes") for m in tokred.make(n).members)
]
N, GRID = 144, (12, 12)
MORE: dict[str, list[dict[str, Any]]] = {
    "cat": [
        {"selector": "divprune", "score": s, "n_min": 2, "n_max": 90}
        for s in ("features", "redundancy", "attention", "received", "outliers")
    ],
    "cdpruner": [{"budget": 40}, {"budget": 40, "relevance": "class"}, {"budget": 40, "relevance": "received"}],
    "divprune": [{"budget": 50, "metric": m, "init": i} for m in ("cos", "l1", "l2") for i in ("isolated", "medoid")],
    "fastervlm": [{"budget": 50}, {"budget": 50, "attention": "received"}],
    "fastkv": [{"tsp_layer": 1, "tsp_len": 30, "window": 4, "pooling": p} for p in ("max", "avg")],
    "fastv": [{"query": q, "heads": h} for q in ("last", "mean") for h in ("mean", "max")],
    "framefusion_layer": [{"cost": 0.7, "threshold": 0.0}],
    "hired": [{"budget": 0.3}],
    "prumerge": [{}, {"heads": "mean"}, {"budget": 30, "normalise": True}],
    "prumerge_plus": [{}, {"budget": 30}],
    "pyramiddrop": [{"layers": (2, 3, 4)}, {"layers": (2, 3, 4), "per_image": True}],
    "saint_layer": [{"start": 1, "end": 1, "tau": t, "K": 2} for t in (0.1, 0.3)],
    "saint_visual": [{"budget": 60, "layer": 1}],
    "sparsevlm": [
        {"layers": (1,), "budget": (50,)}, {"layers": (1,), "budget": "rank"},
        {"layers": (1,), "budget": (30,), "heads": "priority"},
        {"layers": (1,), "budget": (30,), "recycle": 1.0, "cluster": 4},
    ],
    "topv": [{"layer": 1, "budget": 50}],
    "visionzip": [{"budget": 60, "contextual": 30}, {"budget": 60, "contextual": 30, "attention": "received"}],
    "vispruner": [{"budget": 60}],
    "vscan": [{"budget": 60, "window": 4, "shallow": 0}],
    "vscan_layer": [{"budget": 50, "layer": 2}],
}  # fmt: skip
CASES = [(name, i) for name in [*PROJECTOR, *LAYER] for i in range(len(MORE.get(name, [SOME.get(name, {})])))]


class Maker:
    """Values that ``dtype`` can hold, in it or (``wide``) as float32."""

    def __init__(self, seed: int, dtype: torch.dtype, wide: bool) -> None:
        self.g = torch.Generator().manual_seed(seed)
        self.dtype = dtype
        self.wide = wide

    def __call__(self, *shape: int, kinds: int = 0) -> torch.Tensor:
        value = torch.randn(*shape, generator=self.g)
        if kinds:  # many tokens that are nearly alike: where rounding decides, it shows
            some = torch.randn(shape[0], kinds, shape[2], generator=self.g)
            value = some.repeat_interleave(shape[1] // kinds, 1) + 0.05 * value
        value = value.to(self.dtype)
        return value.float() if self.wide else value


def visual_site(seed: int, dtype: torch.dtype, *, wide: bool) -> VisualSite:
    made = Maker(seed, dtype, wide)
    heads = [(made(2, 4, 1 + N, 8), made(2, 4, 1 + N, 8)) for _ in range(3)]
    return VisualSite(
        x=made(2, N, 32, kinds=8), tower=made(2, N, 24, kinds=8), q=heads[1][0], k=heads[1][1], prefix=1,
        layer_heads=lambda i: heads[i], grid=GRID, text=made(2, 5, 32), text_mask=torch.ones(2, 5, dtype=torch.bool),
    )  # fmt: skip


def layer_site(seed: int, dtype: torch.dtype, *, wide: bool) -> LayerSite:
    made, length = Maker(seed, dtype, wide), N + 6
    visual = torch.zeros(2, length, dtype=torch.bool)
    visual[:, 2 : 2 + N] = True
    some = {which: Attention(made(2, 4, length, 8), made(2, 2, length, 8), causal=True) for which in ("own", "before")}
    return LayerSite(
        x=made(2, length, 32), visual=visual, **some, stream=(made(2, length, 32), made(2, length, 32)), layer=2,
        depth=6, prompt=Prompt(made(2, length, 32), visual, ~visual, torch.arange(length).expand(2, -1)),
        image=torch.arange(length).expand(2, -1) // 80,
        moment=torch.stack([torch.arange(length) % 80 // 40, torch.arange(length) % 40], -1).expand(2, -1, -1),
    )  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("name", "i"), CASES)
def test_choices_are_those_of_float32(name, i, dtype):
    settings = MORE.get(name, [SOME.get(name, {})])[i]
    for member in tokred.make(name, **settings).members:
        if member.stage == "cache":
            continue
        make = visual_site if member.stage == "projector" else layer_site
        acted = False
        for seed in range(4):
            half, full = (member.reduce(make(seed, dtype, wide=w)) for w in (False, True))
            acted |= not full.trivial
            alike(half, full)
            with torch.autocast("cpu", dtype=torch.bfloat16):
                alike(member.reduce(make(seed, dtype, wide=True)), full)
        assert acted


def alike(ours: Any, theirs: Any) -> None:
    for field in ("index", "representative", "weight", "share", "rest", "member"):
        a, b = getattr(ours, field, None), getattr(theirs, field, None)
        assert (a is None) == (b is None)
        assert a is None or torch.equal(a, b), field


@pytest.mark.parametrize("name", NAMES)
def test_autocast(name):
    """The model's own layers run as autocast has it, also where a method asks for their projections."""
    model, batch = tiny.llava(), tiny.prompts([[3, "image", 5], [2, "image", 1, "image", 4], [9]])
    tokred.apply(model, name, **SOME.get(name, {}))
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
        assert model(**batch).logits.isfinite().all()
    assert max(tokred.report(model).layers[-1].visual) < 32
