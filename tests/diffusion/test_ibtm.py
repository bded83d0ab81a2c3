"""IBTM: the card's worked example, and what a denoiser hands over from the step before."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

import tokred
from tests.diffusion.test_pipelines import image as pipeline_image
from tests.diffusion.test_pipelines import stable_diffusion
from tests.diffusion.tiny import MODELS, inputs, run, sd15
from tokred.diffusion.site import AttentionSite, Step, SublayerPlace


def site(x: torch.Tensor, grid: tuple[int, int], guidance: torch.Tensor | None, **more: Any) -> AttentionSite:
    return AttentionSite(x, SublayerPlace(grid[0] * grid[1], grid, 1), guidance=guidance, **more)


def test_the_card_s_example():
    turned = torch.tensor([0, 5, 50, 60, 12, 100, 95, 3.0], dtype=torch.float64) * math.pi / 180
    x = torch.stack([turned.cos(), turned.sin()], 1).unsqueeze(0)
    importance = torch.tensor([[0.9, 0.1, 0.8, 0.3, 0.7, 0.2, 0.6, 0.05]])
    method = tokred.IBTM(ratio=5 / 8, pool=0.5, sx=4, sy=1, use_rand=False)
    plan = method.reduce(site(x, (2, 4), importance))
    assert plan.groups() == [[[6], [0, 1, 4, 7], [2, 3, 5]]]
    assert method.left(SublayerPlace(8, (2, 4), 1)) == 3


@pytest.mark.parametrize(("ratio", "pool"), [(0.5, 0.5), (0.25, 0.5), (0.9, 0.3), (0.6, 1.0)])
def test_what_is_protected(ratio: float, pool: float):
    g = torch.Generator().manual_seed(0)
    x, importance = torch.randn(3, 63, 5, generator=g), torch.rand(3, 63, generator=g)
    method = tokred.IBTM(ratio=ratio, pool=pool)
    plan = method.reduce(site(x, (9, 7), importance, step=4))
    left = method.left(SublayerPlace(63, (9, 7), 1))
    assert plan.slots == left == 63 - math.floor(63 * ratio + 0.5)
    size = max(math.floor(63 * pool + 0.5), left)
    best = importance.topk(size, 1).indices
    for i in range(3):
        assert set(plan.representative[i].tolist()) <= set(best[i].tolist())
    alone = method.reduce(site(x[1:2], (9, 7), importance[1:2], step=4))
    assert torch.equal(alone.index[0], plan.index[1])
    torch.testing.assert_close(plan.unmerge(plan.merge(torch.ones(3, 63, 2))), torch.ones(3, 63, 2))


def test_equal_importance_goes_to_the_lower_index():
    x = torch.eye(8).unsqueeze(0)
    plan = tokred.IBTM(ratio=0.5, use_rand=False).reduce(site(x, (2, 4), torch.ones(1, 8)))
    assert sorted(plan.representative[0].tolist()) == [0, 1, 2, 3]


def test_draws():
    x, importance = torch.randn(1, 64, 4), torch.rand(1, 64)

    def destinations(**more: Any) -> list[int]:
        return tokred.IBTM().reduce(site(x, (8, 8), importance, **more)).representative[0, -16:].tolist()

    assert destinations(step=1) == destinations(step=1)
    assert destinations(step=1) != destinations(step=2)
    assert destinations(step=1) != destinations(step=1, layer=3)


def test_the_first_step_is_tomesd():
    method = tokred.IBTM(ratio=0.3, seed=5)
    assert method.at(Step(1.0, 0)) == tokred.ToMeSD(ratio=0.3, seed=5)
    assert method.at(Step(0.9, 1)) is method
    assert method.at(None) is method


def image(model: Any, given: dict[str, Any], calls: int, times: tuple[Any, ...] = (90, 80, 70)) -> list[torch.Tensor]:
    """An image of guidance in one batch (1) or in two calls (2), or without (0): the predictions of each step."""
    latent = given["sample"][:1]
    text = given["encoder_hidden_states"]
    out = []
    for t in times:
        if calls == 1:
            both = run(model, {"sample": torch.cat([latent] * 2), "encoder_hidden_states": text, "timestep": t})
        else:
            parts = [
                run(model, {"sample": latent, "encoder_hidden_states": text[i : i + 1], "timestep": t})
                for i in range(max(calls, 1))
            ]
            both = torch.cat(parts)
        out.append(both)
        latent = latent - 0.1 * both.mean(0, keepdim=True)
    return out


def test_guidance_in_one_batch_and_in_two_calls():
    model, given = sd15(), inputs("sd15")
    tokred.apply(model, "ibtm", max_downsample=2, merge_mlp=True)
    together = image(model, given, 1)
    assert tokred.report(model).reduced > 0
    apart = image(model, given, 2)
    for a, b in zip(together, apart, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    assert all(torch.equal(a, b) for a, b in zip(image(model, given, 1), together, strict=True)), "and again"
    tokred.apply(model, "tomesd", max_downsample=2, merge_mlp=True)
    plain = image(model, given, 1)
    assert torch.equal(plain[0], together[0])
    assert not torch.equal(plain[1], together[1])


def test_guidance_that_is_switched_off():
    """A pipeline goes on with half of the samples: one step still knows what guidance did, later ones say so."""
    model, given = sd15(), inputs("sd15")
    tokred.apply(model, "ibtm", max_downsample=2)
    image(model, given, 1, (90, 80))
    one = {**given, "sample": given["sample"][:1], "encoder_hidden_states": given["encoder_hidden_states"][:1]}
    assert run(model, {**one, "timestep": 70}).isfinite().all()
    with pytest.raises(tokred.MissingInputError, match="that step ran without guidance"):
        run(model, {**one, "timestep": 60})


def test_guidance_of_flux():
    """Its sample and its prediction are sequences of tokens."""
    model, given = MODELS["flux"](), inputs("flux")
    latent, out = given["hidden_states"][:1], []
    tokred.apply(model, "ibtm", max_downsample=2)
    for calls in (1, 2):
        for t in (0.9, 0.8):
            rows = [slice(0, 2)] if calls == 1 else [slice(0, 1), slice(1, 2)]
            for part in rows:
                count = part.stop - part.start
                sub = {key: given[key][part] for key in ("encoder_hidden_states", "pooled_projections")}
                sub |= {"hidden_states": latent.expand(count, -1, -1), "timestep": torch.full((count,), t)}
                out.append(run(model, {**given, **sub}))
    first, second, apart = out[0], out[1], out[2:]
    torch.testing.assert_close(torch.cat(apart[:2]), first, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(torch.cat(apart[2:]), second, rtol=1e-4, atol=1e-5)


def test_a_timestep_that_runs_twice():
    """Some schedulers run their second timestep twice."""
    model, given = sd15(), inputs("sd15")
    tokred.apply(model, "ibtm", max_downsample=2)
    for calls in (1, 2):
        out = image(model, given, calls, (90, 80, 80, 70))
        assert all(part.isfinite().all() for part in out)
        assert model.__dict__["_tokred"].steps.count == 3


def test_the_pool_is_where_guidance_acted():
    """The map that reaches the method is the difference of the step before, on the tokens' grid."""
    model, given = sd15(), inputs("sd15")
    seen: list[torch.Tensor] = []
    original = tokred.IBTM.reduce

    def spied(self: Any, at: Any) -> tokred.Reduction:
        seen.append(at.guidance)
        return original(self, at)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokred.IBTM, "reduce", spied)
        tokred.apply(model, "ibtm", max_downsample=2, share="resolution")
        out = image(model, given, 1, (90, 80))
    difference = (out[0][0] - out[0][1]).abs().mean(0)
    assert {tuple(s.shape) for s in seen} == {(2, 256), (2, 64)}
    for found in seen:
        side = math.isqrt(found.shape[1])
        expected = torch.nn.functional.avg_pool2d(difference[None, None], 16 // side).flatten()
        torch.testing.assert_close(found, expected.expand(2, -1))


def test_without_guidance():
    model, given = sd15(), inputs("sd15")
    tokred.apply(model, "ibtm")
    with pytest.raises(tokred.MissingInputError, match="give a guidance_scale above 1, or use 'tomesd'"):
        image(model, given, 0)
    # Two images without guidance are not the halves of one with it.
    tokred.apply(model, "ibtm")
    run(model, {**given, "timestep": 90})
    with pytest.raises(tokred.MissingInputError, match="guidance"):
        run(model, {**given, "timestep": 80})


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"ratio": 1.0}, r"ratio must lie in \[0, 1\)"),
        ({"pool": 0}, r"pool must lie in \(0, 1\]"),
        ({"sx": 0}, "sx must be an integer of at least 1"),
        ({"merge_attn": False}, "one of merge_attn"),
        ({"max_downsample": 3}, "max_downsample is 3"),
        ({"refresh": 0}, "refresh must be an integer of at least 1"),
    ],
)
def test_wrong_parameters(parameters: dict, message: str):
    with pytest.raises((ValueError, TypeError), match=message):
        tokred.IBTM(**parameters)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("scheduler", "settings"),
    [
        ("DDIMScheduler", {"clip_sample": False}),
        ("PNDMScheduler", {"skip_prk_steps": True}),
        ("EulerDiscreteScheduler", {}),
    ],
)
def test_in_a_pipeline(scheduler: str, settings: dict[str, Any]):
    import diffusers

    pipe = stable_diffusion(scheduler=getattr(diffusers, scheduler)(steps_offset=1, **settings))
    before = pipeline_image(pipe)
    tokred.apply(pipe, "ibtm", ratio=0.6, max_downsample=2)
    first, again = pipeline_image(pipe), pipeline_image(pipe)
    assert torch.equal(first, again), "the same seed gives the same image at every call"
    tokred.apply(pipe, "tomesd", ratio=0.6, max_downsample=2)
    assert not torch.equal(pipeline_image(pipe), first)
    tokred.apply(pipe, "ibtm")
    with pytest.raises(tokred.MissingInputError, match="guidance_scale above 1"):
        pipeline_image(pipe, guidance_scale=1.0)
    tokred.remove(pipe)
    assert torch.equal(pipeline_image(pipe), before)
