"""Methods without a schedule, at stages whose tokens are not counted beforehand: the amount alone is searched."""

from __future__ import annotations

import pytest
import torch

import tokred
from tests.tune.planted import counted
from tokred.tuning.engine import Engine

pytest.importorskip("diffusers")
tiny = pytest.importorskip("tokred.adapters.tiny.diffusion")


def test_a_denoiser(monkeypatch):
    monkeypatch.setattr(Engine, "times", counted(lambda engine, method: 1 - 0.6 * method.ratio))
    model = tiny.build("sd15")
    data = []
    for seed in range(16):
        given = tiny.inputs("sd15", batch=1, seed=seed)
        data.append({**given, "timestep": torch.tensor([7])})
    found = tokred.tune(
        model, data, "cosine", speedup=1.2, methods=["tomesd"], trials=6, samples=8, rounds=3, progress=False
    )
    assert found.stage == "attention"
    assert found.method.name == "tomesd"
    assert found.met
    # The share of the time is 0.1 + 0.9 * (1 - 0.6 ratio): as little is merged as the speed allows.
    assert found.method.ratio == pytest.approx((1 - 1 / 1.2) / 0.54, abs=0.03)
    assert not tokred.patched(model)
