"""Defaults of the methods for denoisers, as their cards have them."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import tokred
from tests.diffusion.tiny import inputs, run, sd15
from tokred.diffusion.site import AttentionSite, SublayerPlace

MERGING = {"max_downsample": 1, "sx": 2, "sy": 2, "use_rand": True, "merge_attn": True, "merge_crossattn": False,
           "merge_mlp": False}  # fmt: skip
CARDS: dict[str, dict[str, Any]] = {
    "tomesd": {"ratio": 0.5, **MERGING},
    "todo": {"factors": (2, 1), "mode": "nearest", "phase": 0, "switch": 0, "stop": 0, "secondary": "similarity"},
    "toma": {"ratio": 0.5, "tile": 8, "tau": 0.1, "steps_destination": 10, "steps_plan": 5, "cover": "block",
             "first_full": 2},
    "ibtm": {"ratio": 0.5, "pool": 0.5, **MERGING},
    "asymrnr": {"q": 0.3, "kv": 0.5, "cell": (2, 2, 2), "metric": "distance", "combine": "replace", "refresh": 3,
                "first_full": 2},
    "sdtm": {"ratio": 0.5, "spread": 0.2, "switch": 20},
    "vidtome": {"ratio": 0.9, "stride": 4, "max_downsample": 2, "first_full": 2},
    "catome": MERGING,
}  # fmt: skip


@pytest.mark.parametrize("name", list(CARDS))
def test_defaults(name: str):
    method = tokred.make(name)
    assert {key: getattr(method, key) for key in CARDS[name]} == CARDS[name]


@pytest.mark.parametrize("name", ["toma", "asymrnr"])
def test_two_steps_run_as_they_are(name: str):
    model, given = sd15(), inputs("sd15")
    before = {t: run(model, {**given, "timestep": t}) for t in (900, 800, 700)}
    tokred.apply(model, name)
    assert [torch.equal(run(model, {**given, "timestep": t}), before[t]) for t in before] == [True, True, False]


@pytest.mark.parametrize(("ratio", "left"), [(0.9, 6), (0.5, 31), (0.25, 47)])
def test_destinations_of_ibtm(ratio: float, left: int):
    """One for four tokens, but no more than are to be left; then every token that is left is one."""
    x, importance = torch.randn(2, 63, 5), torch.rand(2, 63)
    method = tokred.IBTM(ratio=ratio, use_rand=False)
    plan = method.reduce(AttentionSite(x, SublayerPlace(63, (9, 7), 1), guidance=importance))
    assert plan.slots == left
    count = min(16, left)
    destinations = plan.representative[:, left - count :]
    assert torch.equal(destinations, importance.topk(count, 1).indices.sort(1).values)
    assert (plan.target >= left - count).all(), "nothing merges into a token that stays alone"


@pytest.mark.parametrize(("side", "left"), [(3, 5), (5, 13), (4, 8)])
def test_tokens_of_a_tile_that_are_left(side: int, left: int):
    """Halves are rounded up."""
    assert tokred.ToMA(tile=side).left(SublayerPlace(side * side, (side, side), 1)) == left
