"""What is kept from step to step: whose turn it is, what is in force, what guidance did."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import pytest
import torch

import tokred
from tests.diffusion.tiny import inputs, run, sd15
from tokred.adapters.diffusion.steps import Steps, on_grid
from tokred.diffusion.method import AttentionMethod
from tokred.diffusion.site import Step, SublayerPlace

PLACE = SublayerPlace(16, (4, 4), 1)


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


def test_plans_are_kept_from_the_step_on_that_a_method_came_in():
    class Halved(Late):
        def at(self, step: Step | None) -> AttentionMethod | None:
            return tokred.ToMeSD(refresh=2) if step is not None and step.noise < 0.5 else self

    steps, kept = Steps("diffusers UNet2DConditionModel"), []
    for time in (900, 700, 600, 400, 300, 200, 100):
        steps.turn(Halved(refresh=5), time, None)
        kept.append(bool(steps.plans))
        steps.plans["here"] = 1
    assert kept == [False, True, True, False, True, False, True]


def test_first_steps_as_they_are():
    model, given = sd15(), inputs("sd15")
    before = {t: run(model, {**given, "timestep": t}) for t in (90, 80, 70)}
    tokred.apply(model, "keymerge", max_downsample=8, cell=2, first_full=2)
    for _ in range(2):
        out = {t: run(model, {**given, "timestep": t}) for t in (90, 80, 70)}
        assert [torch.equal(out[t], before[t]) for t in (90, 80, 70)] == [True, True, False]


def test_images_of_few_steps_warn():
    model, given = sd15(), inputs("sd15")
    tokred.apply(model, "toma")
    run(model, {**given, "timestep": 900})
    run(model, {**given, "timestep": 400})
    with pytest.warns(
        UserWarning, match="'toma' leaves the first 2 steps of an image as they are, and the last image had"
    ):
        run(model, {**given, "timestep": 900})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(3):
            run(model, {**given, "timestep": 900})
            run(model, {**given, "timestep": 400})
        tokred.apply(model, "toma", first_full=1)
        for time in (900, 400, 900):
            run(model, {**given, "timestep": time})


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


@pytest.mark.parametrize("looks", [False, True])
@pytest.mark.parametrize("calls", [5, 13])
def test_tiles(calls: int, looks: bool):
    """Any number of forwards at one timestep: counts go by steps, plans stay those of their tile."""
    steps, method = Steps("diffusers UNet2DConditionModel"), tokred.ToMeSD(refresh=3)
    samples = torch.randn(5, calls, 1, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    for number, time in enumerate((900, 800, 700, 600, 950)):
        for tile in range(calls):
            steps.turn(method, time, samples[number, tile] if looks else None)
            assert steps.count == (0 if time == 950 else number)
            assert steps.plans == ({} if number in (0, 3, 4) else {"tile": tile})
            steps.plans["tile"] = tile
            assert steps.memory("here") == ({} if time in (900, 950) else {"tile": tile})
            steps.memory("here")["tile"] = tile
            steps.remember(samples[number, tile])


@pytest.mark.parametrize("calls", [1, 2])
def test_guidance_of_tiles(calls: int):
    """Each tile is compared with itself in the step before, whether guidance runs in one call or in two; a schedule
    that runs a timestep twice goes on."""
    g = torch.Generator().manual_seed(0)
    steps, method = Steps("diffusers UNet2DConditionModel"), tokred.IBTM()
    last: dict[int, torch.Tensor] = {}
    for number, time in enumerate((90, 80, 80, 70)):
        for tile in range(6):
            latent, parts = torch.randn(1, 3, 8, 8, generator=g), torch.randn(2, 1, 3, 8, 8, generator=g)
            for call in range(calls):
                force = steps.turn(method, time, latent.repeat(2 // calls, 1, 1, 1))
                assert (steps.count, steps.call) == (number, call)
                assert type(force) is (tokred.ToMeSD if number == 0 else tokred.IBTM)
                if number:
                    found: Any = steps.guidance(PLACE, 2 // calls, 3)
                    torch.testing.assert_close(found[:1], last[tile])
                steps.remember(parts.flatten(0, 1) if calls == 1 else parts[call])
            last[tile] = on_grid((parts[0] - parts[1]).abs(), PLACE, 3)


def test_guidance_in_pairs():
    """Panoramas run several views in a batch, each beside its unprompted one."""
    g = torch.Generator().manual_seed(0)
    steps, method = Steps("diffusers UNet2DConditionModel"), tokred.IBTM()
    predicted = torch.randn(6, 3, 8, 8, generator=g)
    for time in (90, 80):
        steps.turn(method, time, torch.randn(3, 3, 8, 8, generator=g).repeat_interleave(2, 0))
        if time == 90:
            steps.remember(predicted)
    found: Any = steps.guidance(PLACE, 6, 3)
    expected = on_grid((predicted[::2] - predicted[1::2]).abs(), PLACE, 3)
    torch.testing.assert_close(found, expected.repeat_interleave(2, 0))


def test_a_tile_that_comes_late_is_at_its_first_step():
    steps, method = Steps("diffusers UNet2DConditionModel"), tokred.IBTM(ratio=0.3)
    found = []
    for time, tiles in ((90, 1), (80, 1), (70, 2)):
        for _ in range(tiles):
            latent = torch.randn(1, 3, 8, 8).repeat(2, 1, 1, 1)
            found.append(type(steps.turn(method, time, latent)).__name__)
            steps.remember(torch.randn(2, 3, 8, 8))
    assert found[:3] == ["ToMeSD", "IBTM", "IBTM"]


def test_images_of_one_step_do_not_pile_up():
    """They run at one time for ever, as tiles do."""
    for method, sample in ((tokred.ToMeSD(refresh=3), None), (tokred.IBTM(), torch.zeros(1, 1, 2, 2))):
        steps = Steps("diffusers UNet2DModel")
        for number in range(700):
            steps.turn(method, 7, None if sample is None else sample + number)
            assert steps.plans == {}
            steps.plans["here"] = number
            steps.memory("here")["there"] = number
            steps.remember(torch.zeros(1))
        assert max(map(len, (steps.kept, steps.memories, steps.predicted, steps.layouts))) <= 257


def test_first_steps_and_kept_plans_of_tiles():
    """In a denoiser: the first steps run as they are, then every tile is reduced, and its plan is kept."""
    model, tiles, made = sd15(), [inputs("sd15", seed=i, batch=1) for i in range(7)], []
    before = {t: [run(model, {**given, "timestep": t}) for given in tiles] for t in (90, 80, 70, 60, 50)}
    original = tokred.KeyMerge.reduce
    settings = {"max_downsample": 8, "cell": 2, "first_full": 2, "refresh": 2}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokred.KeyMerge, "reduce", lambda self, site: (made.append(1), original(self, site))[1])
        tokred.apply(model, "keymerge", **settings)
        for _ in range(2):
            for t, expected in before.items():
                out = [run(model, {**given, "timestep": t}) for given in tiles]
                same = [torch.equal(a, b) for a, b in zip(out, expected, strict=True)]
                assert same == [t > 70] * 7, t
                assert len(made) == (0 if t > 70 else 14 if t > 50 else 28)
            made.clear()


@pytest.mark.parametrize("method", ["tomesd", "keymerge", "ibtm", "catome", "sdtm"])
def test_an_image_that_was_given_up_in_its_first_step(method: str):
    """What the next image begins at the same time with is its own, once it is known how many forwards a step has."""
    model, given = sd15(), inputs("sd15")
    tokred.apply(model, method, **({"refresh": 4} if method in ("tomesd", "keymerge") else {}))

    def image(seed: int, times: tuple[int, ...]) -> torch.Tensor:
        latent = torch.randn(given["sample"][:1].shape, generator=torch.Generator().manual_seed(seed))
        for t in times:
            both = torch.cat([latent] * 2)
            latent = latent - 0.1 * run(model, {**given, "sample": both, "timestep": t}).mean(0, keepdim=True)
        return latent

    wanted = image(1, (90, 80, 70, 60))
    image(7, (90,))
    assert torch.equal(image(1, (90, 80, 70, 60)), wanted)


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


def test_a_plan_made_in_inference_mode_serves_a_step_with_gradients():
    model, given = sd15().requires_grad_(True), inputs("sd15")
    tokred.apply(model, "toma", ratio=0.5, steps_plan=4, first_full=0)
    for i, mode in enumerate((torch.inference_mode, torch.no_grad, torch.enable_grad)):
        with mode():
            predicted = model(**(given | {"timestep": 900 - 100 * i})).sample
    predicted.sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
