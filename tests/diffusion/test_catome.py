"""CA-ToMe: as many tokens as are alike, with samples told apart by a mask."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import tokred
from tests.diffusion.tiny import inputs, run, sd15
from tokred.diffusion.site import AttentionSite, SublayerPlace
from tokred.kernels.similarity_rows import unit


def site(x: torch.Tensor, grid: tuple[int, int], **more: Any) -> AttentionSite:
    return AttentionSite(x, SublayerPlace(grid[0] * grid[1], grid, 1), **more)


def clustered(b: int = 3, grid: tuple[int, int] = (7, 9)) -> torch.Tensor:
    """Samples of more and more different tokens."""
    g = torch.Generator().manual_seed(0)
    n = grid[0] * grid[1]
    centres = torch.randn(b, 4, 6, generator=g)
    which = torch.randint(4, (b, n), generator=g)
    noise = torch.randn(b, n, 6, generator=g) * torch.tensor([0.0, 0.3, 1.0])[:b].view(-1, 1, 1)
    return centres.gather(1, which.unsqueeze(-1).expand(-1, -1, 6)) + noise


def test_every_source_above_the_threshold_is_merged():
    x, grid = clustered(), (7, 9)
    method = tokred.CAToMe(threshold=0.95)
    plan = method.reduce(site(x, grid, step=2))
    assert plan.mask is not None
    kept = plan.mask.sum(1)
    assert kept[0] < kept[1] < kept[2] == plan.slots
    similarity = unit(x) @ unit(x).mT
    split = method._split.reduce(site(x[:1], grid, step=2)).representative[0, -12:]
    for b in range(3):
        groups = [g for g in plan.groups()[b] if g]
        assert sorted(t for g in groups for t in g) == list(range(63)), "nothing is dropped"
        for t in range(63):
            if t in split:
                continue
            best = similarity[b, t, split].max()
            assert any(t in g and len(g) > 1 for g in groups) == bool(best > 0.95)
    for b in range(3):
        alone = method.reduce(site(x[b : b + 1], grid, step=2))
        assert alone.mask is None
        assert torch.equal(alone.index[0], plan.index[b])
    torch.testing.assert_close(plan.unmerge(plan.merge(x))[0], x[0], rtol=1e-5, atol=1e-5)


def test_limits():
    x = torch.randn(2, 64, 5)
    assert tokred.CAToMe(threshold=1).reduce(site(x, (8, 8))).trivial
    assert tokred.CAToMe(threshold=1).idle
    assert tokred.CAToMe(threshold=0.99999).reduce(site(x, (8, 8))).trivial
    lowest = tokred.CAToMe(threshold=-0.9999).reduce(site(x, (8, 8)))
    assert lowest.slots == 16 == tokred.CAToMe().left(SublayerPlace(64, (8, 8), 1))
    assert lowest.mask is None


def test_attention_does_not_see_the_padding():
    """Samples that keep different numbers get what they would alone."""
    model, given = sd15(), inputs("sd15", batch=3)
    given["sample"] = given["sample"] * torch.tensor([0.01, 1, 3]).view(-1, 1, 1, 1)
    tokred.apply(model, "catome", threshold=0.9, max_downsample=8, merge_mlp=True, merge_crossattn=True, refresh=1)
    plans: list[tokred.Reduction] = []
    original = tokred.CAToMe.reduce

    def spied(self: Any, at: Any) -> tokred.Reduction:
        plans.append(original(self, at))
        return plans[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokred.CAToMe, "reduce", spied)
        whole = run(model, given)
    assert any(plan.mask is not None for plan in plans)
    parts = []
    for i in range(3):
        sub = {k: v[i : i + 1] if isinstance(v, torch.Tensor) else v for k, v in given.items()}
        parts.append(run(model, sub))
    torch.testing.assert_close(torch.cat(parts), whole, rtol=1e-4, atol=1e-5)


def test_processors_without_the_fused_attention_are_refused():
    from diffusers.models.attention_processor import AttnProcessor

    model, given = sd15(), inputs("sd15", batch=2)
    given["sample"] = given["sample"] * torch.tensor([0.01, 3]).view(-1, 1, 1, 1)
    model.set_attn_processor(AttnProcessor())
    tokred.apply(model, "catome", threshold=0.9, max_downsample=8)
    with pytest.raises(tokred.UnsupportedModelError, match="nor padding be left out"):
        run(model, given)
    tokred.apply(model, "asymrnr", first_full=0)
    with pytest.raises(tokred.UnsupportedModelError, match="queries or keys alone"):
        run(model, given)


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"threshold": 1.1}, r"threshold must lie in \(-1, 1\]"),
        ({"threshold": "high"}, "threshold must lie in"),
        ({"sy": 0}, "sy must be an integer of at least 1"),
        ({"merge_attn": False}, "one of merge_attn"),
        ({"refresh": 0}, "refresh must be an integer of at least 1"),
    ],
)
def test_wrong_parameters(parameters: dict, message: str):
    with pytest.raises((ValueError, TypeError), match=message):
        tokred.CAToMe(**parameters)
