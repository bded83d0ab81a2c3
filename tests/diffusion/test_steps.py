"""What is kept from step to step: whose turn it is, what is in force, what guidance did."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch

import tokred
from tests.diffusion.tiny import inputs, run, sd15
from tokred.adapters.diffusion.steps import Steps, on_grid
from tokred.denoise import AttentionMethod, Place, Step

PLACE = Place(16, (4, 4), 1)


@dataclass(frozen=True)
class Late(tokred.ToMeSD):
    """Another method below half of the noise."""

    @property
    def stepwise(self) -> bool:
        return True

    def at(self, step: Step | None) -> AttentionMethod | None:
        return tokred.ToDo() if step is not None and step.noise < 0.5 else self


def test_steps_and_calls():
    steps, method = Steps("diffusers UNet2DConditionModel"), tokred.ToMeSD(refresh=2)
    seen = []
    for time in (900, 900, 800, 800, 700, 700, 950):
        steps.turn(method, torch.tensor([time, time]), None)
        seen.append((steps.count, steps.call, bool(steps.plans)))
        steps.plans["here"] = time
    assert [(count, call) for count, call, _ in seen] == [(0, 0), (0, 1), (1, 0), (1, 1), (2, 0), (2, 1), (0, 0)]
    assert [kept for _, _, kept in seen] == [False, False, True, True, False, False, False]


def test_what_is_in_force():
    steps = Steps("diffusers UNet2DConditionModel")
    found = [steps.turn(Late(refresh=3), t, None) for t in (900, 600, 400, 100)]
    assert [type(m) for m in found] == [Late, Late, tokred.ToDo, tokred.ToDo]
    steps.forget()
    steps.turn(Late(refresh=3), 600, None)
    steps.plans["here"] = 1
    steps.turn(Late(refresh=3), 400, None)
    assert not steps.plans, "plans of another method are not kept"
    flux = Steps("diffusers FluxTransformer2DModel")
    assert type(flux.turn(Late(), torch.tensor(0.9), None)) is Late


def test_first_steps_as_they_are():
    model, given = sd15(), inputs("sd15")
    before = {t: run(model, {**given, "timestep": t}) for t in (90, 80, 70)}
    tokred.apply(model, "keymerge", max_downsample=8, cell=2, first_full=2)
    for _ in range(2):
        out = {t: run(model, {**given, "timestep": t}) for t in (90, 80, 70)}
        assert [torch.equal(out[t], before[t]) for t in (90, 80, 70)] == [True, True, False]


@pytest.mark.parametrize("halves", [True, False])
def test_guidance(halves: bool):
    g = torch.Generator().manual_seed(0)
    steps, method = Steps("diffusers UNet2DConditionModel"), tokred.IBTM()
    latent, parts = torch.randn(2, 3, 8, 8, generator=g), torch.randn(2, 2, 4, 8, 8, generator=g)
    for time in (90, 80):
        if halves:
            steps.turn(method, time, torch.cat([latent, latent]))
            steps.remember(parts.flatten(0, 1))
        else:
            for part in parts:
                steps.turn(method, time, latent)
                steps.remember(part)
        latent = latent + 1
    found: Any = steps.guidance(PLACE, 4 if halves else 2, channels=3)
    expected = (parts[0] - parts[1])[:, :3].abs().mean(1)
    expected = torch.nn.functional.avg_pool2d(expected.unsqueeze(1), 2).flatten(1)
    torch.testing.assert_close(found, torch.cat([expected, expected]) if halves else expected)


def test_no_guidance():
    steps, method = Steps("diffusers UNet2DConditionModel"), tokred.IBTM()
    for time in (90, 80, 70):
        steps.turn(method, time, torch.randn(2, 3, 8, 8))
        steps.remember(torch.randn(2, 3, 8, 8))
    assert steps.guidance(PLACE, 2, 3) is None


def test_one_step_models_make_an_image_at_every_call():
    steps, method = Steps("diffusers UNet2DModel"), tokred.IBTM()
    for _ in range(3):
        steps.turn(method, 7, torch.randn(1, 3, 8, 8))
        assert (steps.count, steps.call) == (0, 0)


def test_maps_of_sequences():
    values = torch.randn(2, 16, 5)
    torch.testing.assert_close(on_grid(values, PLACE, 5), values.mean(-1))
