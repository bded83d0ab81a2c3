"""VidToMe: the card's worked example, and passes down to one frame."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

import tokred
from tests.diffusion.tiny import CLIPS, MODELS, inputs, run
from tests.kinds import DENOISERS, each
from tokred.diffusion.site import AttentionSite, SublayerPlace


def site(x: torch.Tensor, frames: int, grid: tuple[int, int], **more: Any) -> AttentionSite:
    return AttentionSite(x, SublayerPlace(frames * grid[0] * grid[1], grid, 1, frames), **more)


def drawing(rnd: int, stride: int) -> Any:
    """A site's draws, of which the first names this frame."""
    return lambda self, n, seed: torch.full((n,), (rnd + 0.5) / stride, dtype=torch.float64)


def test_the_card_s_example(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(AttentionSite, "uniform", drawing(1, 3))
    turned = torch.tensor([0, 90, 10, 70, 42, 95.0]) * math.pi / 180
    x = torch.stack([turned.cos(), turned.sin()], 1).unsqueeze(0)
    method = tokred.VidToMe(ratio=0.75)
    plan = method.reduce(site(x, 3, (1, 2)))
    assert plan.groups() == [[[4], [0, 2], [1, 3, 5]]]
    assert method.left(SublayerPlace(6, (1, 2), 1, 3)) == 3
    merged = plan.merge(torch.arange(6.0).view(1, 6, 1))
    assert merged.flatten().tolist() == [4, 2, 3], "the destination stands for its sources"


@pytest.mark.parametrize("frames", [2, 3, 4, 5, 8, 13, 16])
@pytest.mark.parametrize("ratio", [0.9, 0.5])
def test_passes(frames: int, ratio: float):
    g = torch.Generator().manual_seed(frames)
    x = torch.randn(2, frames * 12, 5, generator=g)
    method = tokred.VidToMe(ratio=ratio)
    plan = method.reduce(site(x, frames, (3, 4), step=1))
    assert plan.slots == method.left(SublayerPlace(frames * 12, (3, 4), 1, frames))
    left, expected = frames, 12 * frames
    while left > 1:
        taken = left // min(4, left)
        expected -= int((left - taken) * 12 * ratio)
        left = taken
    assert plan.slots == expected
    assert (plan.index >= 0).all()
    alone = method.reduce(site(x[1:], frames, (3, 4), step=1))
    assert torch.equal(alone.index[0], plan.index[1])
    constant = torch.full_like(x, 0.3)
    assert torch.equal(plan.unmerge(plan.merge(constant)), constant)
    other = method.reduce(site(x, frames, (3, 4), step=4))
    same = method.reduce(site(x, frames, (3, 4), step=1))
    assert torch.equal(same.index, plan.index)
    assert frames == 2 or not torch.equal(other.index, plan.index)


def test_all_tokens_of_other_frames_stand_in_the_last_frame():
    """Equal frames: at a share near one everything ends in one frame, each token at its own place."""
    frame = torch.nn.functional.normalize(torch.randn(1, 12, 7, generator=torch.Generator().manual_seed(0)), dim=-1)
    x = frame.repeat(1, 8, 1)
    plan = tokred.VidToMe(ratio=0.999).reduce(site(x, 8, (3, 4)))
    groups = [g for g in plan.groups()[0] if len(g) > 1]
    assert all(len({t % 12 for t in g}) == 1 for g in groups)
    torch.testing.assert_close(plan.unmerge(plan.merge(x)), x)


def test_a_single_frame_and_small_shares():
    x = torch.randn(1, 12, 3)
    assert tokred.VidToMe().reduce(site(x, 1, (3, 4))).trivial
    assert tokred.VidToMe(stride=1).idle
    assert tokred.VidToMe(ratio=0.01).reduce(site(torch.randn(1, 24, 3), 2, (3, 4))).trivial


@pytest.mark.parametrize("kind", each(list(CLIPS), DENOISERS))
def test_clips(kind: str):
    model, given = MODELS[kind](), inputs(kind)
    tokred.apply(model, "vidtome", ratio=0.5, max_downsample=8, first_full=0)
    out = run(model, given)
    assert out.isfinite().all()
    rows = [row for row in tokred.report(model).sublayers if row.role == "self"]
    assert rows
    assert all(row.left < row.tokens for row in rows)


def test_images_have_no_frames():
    with pytest.raises(tokred.MissingInputError, match="'vidtome' reads frames"):
        tokred.apply(MODELS["sd15"](), "vidtome")


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"ratio": 1.0}, r"ratio must lie in \[0, 1\)"),
        ({"stride": 0}, "stride must be an integer of at least 1"),
        ({"max_downsample": 0}, "max_downsample must be an integer of at least 1"),
        ({"share": "all"}, "share is 'all'"),
    ],
)
def test_wrong_parameters(parameters: dict, message: str):
    with pytest.raises((ValueError, TypeError), match=message):
        tokred.VidToMe(**parameters)
