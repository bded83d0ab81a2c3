"""Half precision: a plan is that of the same values in float32, in every method for denoisers."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

import tokred
from tokred.core.tiles import TileReduction
from tokred.diffusion.method import AttentionMethod
from tokred.diffusion.site import AttentionSite, SublayerPlace
from tokred.methods.diffusion.sdtm import SDTMStage
from tokred.methods.diffusion.todo import SimilarKeys

FRAMES, GRID = 4, (9, 14)
METHODS: dict[str, AttentionMethod] = {
    "tomesd": tokred.ToMeSD(),
    "tomesd, deep": tokred.ToMeSD(ratio=0.74, use_rand=False),
    "todo": tokred.ToDo(factors=2, phase="cycle"),
    "todo, average": tokred.ToDo(factors=2, mode="average"),
    "todo, similar": SimilarKeys((2,)),
    "random": tokred.RandomLatentPrune(),
    "toma": tokred.ToMA(),
    "toma, hard": tokred.ToMA(tau=0, tile=5),
    "ibtm": tokred.IBTM(),
    "ibtm, fixed": tokred.IBTM(use_rand=False, ratio=0.3),
    "catome": tokred.CAToMe(threshold=0.3),
    "sdtm": SDTMStage(0.5, False),
    "sdtm, detail": SDTMStage(0.5, True),
    "vidtome": tokred.VidToMe(ratio=0.6),
    "keymerge": tokred.KeyMerge(),
    "keymerge, random": tokred.KeyMerge(choice="random", cell=2),
    "keymerge, first": tokred.KeyMerge(choice="first"),
    **{f"asymrnr, {metric}": tokred.AsymRnR(q=0.5, metric=metric) for metric in ("distance", "cosine", "dot")},
}


def test_every_method_is_here():
    names = [name for name in tokred.list_methods() if tokred.make(name).stage == "attention"]
    assert {name.partition(",")[0] for name in METHODS} | {"random_latent_prune"} == {*names, "random"}


@pytest.mark.parametrize("spread", [0.02, 1.0])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", list(METHODS))
def test_plans_are_those_of_float32(name: str, dtype: torch.dtype, spread: float):
    """Near and far tokens, of several samples."""
    method, g = METHODS[name], torch.Generator().manual_seed(0)
    frames = FRAMES if "frames" in method.reads or name.startswith("asymrnr") else 1
    n = frames * math.prod(GRID)
    place = SublayerPlace(n, GRID, 1, frames)
    base = torch.randn(1, 1, 16, generator=g)
    memories: list[dict[str, Any]] = [{}, {}]
    for step in range(3):
        x = (base + spread * torch.randn(3, n, 16, generator=g)).to(dtype)
        importance = torch.rand(3, n, generator=g)
        plans = []
        for values, memory in zip((x, x.float()), memories, strict=True):
            given: dict[str, Any] = {"step": step, "count": step, "memory": memory, "guidance": importance}
            if method.part == "heads":
                heads = values.unflatten(-1, (2, 8)).transpose(1, 2)
                sites = [AttentionSite(None, place, q=heads, k=heads, v=heads.flip(2), side=side, **given)
                         for side in ("queries", "keys")]  # fmt: skip
            else:
                sites = [AttentionSite(values, place, **given)]
            plans.append([method.reduce(site) for site in sites])
        for half, full in zip(*plans, strict=True):
            assert not half.trivial
            for part in ("representative", "source", "target", "mask"):
                a, b = getattr(half, part), getattr(full, part)
                assert (a is None) == (b is None)
                assert a is None or torch.equal(a, b), part
            if isinstance(half, TileReduction) and isinstance(full, TileReduction):
                for a, b in zip(half.tiles, full.tiles, strict=True):
                    assert torch.equal(a.share, b.share)


def test_sizes_weigh_as_in_float32():
    x = torch.randn(2, 64, 8, generator=torch.Generator().manual_seed(0)).bfloat16()
    for method in (tokred.KeyMerge(), tokred.AsymRnR(combine="mean", size_bias=True)):
        assert method.proportional
    plan = tokred.KeyMerge().reduce(AttentionSite(x, SublayerPlace(64, (8, 8), 1)))
    assert plan.sizes().dtype == torch.float32
