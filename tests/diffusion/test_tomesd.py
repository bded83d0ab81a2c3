"""ToMeSD: the card's worked examples and invariants, without a denoiser."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import tokred
from tokred.diffusion.grid import cell_destinations, match_cells
from tokred.diffusion.site import AttentionSite, SublayerPlace, place_of, step_key

ANGLES = [0, 3, 90, 94, 7, 12, 99, 105, 180, 181, 270, 272, 184, 190, 275, 281]
VALUES = torch.arange(1.0, 17, dtype=torch.float64).view(1, 16, 1)


def features() -> torch.Tensor:
    turned = torch.tensor(ANGLES, dtype=torch.float64) * math.pi / 180
    return torch.stack([turned.cos(), turned.sin()], 1).unsqueeze(0)


def site(x: torch.Tensor, grid: tuple[int, int], factor: int = 1, **more) -> AttentionSite:
    return AttentionSite(x, SublayerPlace(grid[0] * grid[1], grid, factor), **more)


def test_fixed_destinations():
    plan = tokred.ToMeSD(ratio=0.5, use_rand=False).reduce(site(features(), (4, 4)))
    merged = plan.merge(VALUES)
    expected = torch.tensor([14, 16, 6, 8, 8 / 3, 14 / 3, 32 / 3, 38 / 3], dtype=torch.float64)
    torch.testing.assert_close(merged.flatten(), expected)
    e, d = 8 / 3, 14 / 3
    a, b = 32 / 3, 38 / 3
    restored = [e, e, d, d, e, 6, d, 8, a, a, b, b, a, 14, b, 16]
    torch.testing.assert_close(plan.unmerge(merged).flatten(), torch.tensor(restored, dtype=torch.float64))
    assert plan.representative[0].tolist() == [13, 15, 5, 7, 0, 2, 8, 10]


def test_a_ratio_above_the_cap_leaves_one_token_a_cell():
    method = tokred.ToMeSD(ratio=14 / 16, use_rand=False)
    merged = method.reduce(site(features(), (4, 4))).merge(VALUES)
    assert merged.flatten().tolist() == [3.5, 5.5, 11.5, 13.5]
    assert method.left(SublayerPlace(16, (4, 4), 1)) == 4


def test_given_offsets():
    sources, destinations = cell_destinations((4, 4), (2, 2), torch.tensor([0, 3, 1, 0]))
    assert destinations.tolist() == [0, 7, 9, 10]
    plan = match_cells(features(), sources, destinations, 8)
    a, b, c = 8 / 3, 38 / 3, 11.5
    restored = [a, a, 3, 4, a, 6, 7.5, 7.5, c, c, b, b, c, c, b, 16]
    expected = torch.tensor(restored, dtype=torch.float64)
    torch.testing.assert_close(plan.unmerge(plan.merge(VALUES)).flatten(), expected)


@pytest.mark.parametrize(
    ("grid", "destinations", "r", "left"),
    [((5, 5), 4, 10, 15), ((5, 5), 4, 21, 4), ((5, 5), 4, 24, 4), ((3, 5), 2, 0, 15)],
)
def test_odd_grids(grid: tuple[int, int], destinations: int, r: int, left: int):
    n = grid[0] * grid[1]
    sources, found = cell_destinations(grid, (2, 2), None)
    assert len(found) == destinations
    assert sorted([*sources.tolist(), *found.tolist()]) == list(range(n))
    plan = match_cells(torch.randn(2, n, 3), sources, found, r)
    assert plan.slots == left


@pytest.mark.parametrize(
    ("size", "n", "factor", "grid"),
    [
        *(((64, 64), 4096 // d**2, d, (64 // d, 64 // d)) for d in (1, 2, 4, 8)),
        ((128, 128), 4096, 2, (64, 64)),
        ((128, 128), 1024, 4, (32, 32)),
        ((65, 65), 1089, 2, (33, 33)),
        ((65, 65), 289, 4, (17, 17)),
        ((72, 40), 45, 8, (9, 5)),
        ((90, 90), 529, 4, (23, 23)),
    ],
)
def test_geometry(size: tuple[int, int], n: int, factor: int, grid: tuple[int, int]):
    assert place_of(n, size) == SublayerPlace(n, grid, factor)


def test_tokens_that_form_no_grid_are_refused():
    with pytest.raises(ValueError, match="77 tokens form no grid of a sample of 64 x 64"):
        place_of(77, (64, 64))


@settings(max_examples=40, deadline=None)
@given(
    h=st.integers(2, 9), w=st.integers(2, 9), sy=st.integers(1, 3), sx=st.integers(1, 3),
    ratio=st.floats(0, 0.99), seed=st.integers(0, 9),
)  # fmt: skip
def test_laws(h: int, w: int, sy: int, sx: int, ratio: float, seed: int):
    sy, sx = min(sy, h), min(sx, w)
    x = torch.randn(2, h * w, 4, generator=torch.Generator().manual_seed(seed))
    method = tokred.ToMeSD(ratio=ratio, sx=sx, sy=sy, seed=seed)
    plan = method.reduce(site(x, (h, w), step=seed))
    n = h * w
    expected = n - min(int(n * ratio), n - (h // sy) * (w // sx))
    assert plan.slots == expected == method.left(SublayerPlace(n, (h, w), 1))
    assert plan.trivial == (expected == n)
    constant = torch.full((2, n, 3), 0.3, dtype=torch.float64)
    torch.testing.assert_close(plan.unmerge(plan.merge(constant)), constant, rtol=0, atol=1e-15)
    z = x.double()
    once = plan.unmerge(plan.merge(z))
    torch.testing.assert_close(plan.unmerge(plan.merge(once)), once, rtol=0, atol=1e-14)
    # A sample's matches do not depend on its batch-mates, and destinations are the batch's.
    alone = method.reduce(site(x[1:], (h, w), step=seed))
    assert torch.equal(alone.index[0], plan.index[1])


def test_draws_depend_on_seed_step_and_block_alone():
    x = torch.randn(2, 64, 8)
    state = torch.get_rng_state()

    def index(seed: int = 0, step: int | torch.Tensor = 0, layer: int = 0) -> torch.Tensor:
        return tokred.ToMeSD(seed=seed).reduce(site(x, (8, 8), step=step, layer=layer)).index

    first = index()
    assert torch.equal(first, index())
    for other in (index(seed=1), index(step=1), index(layer=1)):
        assert not torch.equal(first, other)
    assert torch.equal(index(step=5), index(step=torch.tensor(5)))
    assert torch.equal(state, torch.get_rng_state())
    offsets = tokred.ToMeSD().offsets(site(torch.randn(1, 4096, 1), (64, 64)))
    assert offsets is not None
    assert offsets.bincount(minlength=4).min() > 200


def test_step_keys():
    assert step_key(7) == step_key(7.0) == int(step_key(torch.tensor([7, 7])))
    assert step_key(7) != step_key(8)
    assert step_key(None) == 0


def test_coarse_grids_are_left_alone():
    method = tokred.ToMeSD(max_downsample=2)
    x = torch.randn(1, 64, 4)
    assert method.reduce(site(x, (8, 8), factor=4)).trivial
    assert not method.reduce(site(x, (8, 8), factor=2)).trivial


def test_half_precision_decides_in_float32():
    x = torch.randn(1, 64, 8).bfloat16()
    a, b = (tokred.ToMeSD().reduce(site(t, (8, 8))) for t in (x, x.float()))
    assert torch.equal(a.index, b.index)
    assert a.merge(x).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"ratio": 1.0}, r"ratio must lie in \[0, 1\), got 1.0"),
        ({"ratio": -0.1}, "ratio must lie in"),
        ({"ratio": "half"}, "ratio must be a number"),
        ({"sx": 0}, "sx must be an integer of at least 1"),
        ({"sy": 1.5}, "sy must be an integer"),
        ({"max_downsample": 3}, "max_downsample is 3; allowed are 1, 2, 4, 8"),
        ({"merge_attn": False}, "one of merge_attn"),
        ({"share": "all"}, "share is 'all'"),
        ({"refresh": 0}, "refresh must be an integer of at least 1"),
    ],
)
def test_wrong_parameters(parameters: dict, message: str):
    with pytest.raises((ValueError, TypeError), match=message):
        tokred.ToMeSD(**parameters)


def test_cells_larger_than_the_grid():
    assert tokred.ToMeSD(sy=9).reduce(site(torch.randn(1, 64, 4), (8, 8))).trivial
    with pytest.raises(ValueError, match=r"cells of 9 x 2 tokens \(rows x columns\) are larger than the grid of 8 x 8"):
        cell_destinations((8, 8), (9, 2), None)


def test_another_stage_s_site():
    with pytest.raises(TypeError, match="needs a tokred"):
        tokred.ToMeSD().reduce(tokred.Site(x=torch.randn(1, 4, 2)))


def test_random_pruning_keeps_as_many():
    x = torch.randn(2, 64, 4)
    plan = tokred.RandomLatentPrune(ratio=0.75).reduce(site(x, (8, 8)))
    assert plan.slots == 16
    assert torch.equal(plan.representative[0], plan.representative[1])
    assert plan.representative[0].diff().min() > 0
    restored = plan.unmerge(plan.gather(x))
    kept = plan.representative[0]
    assert torch.equal(restored[:, kept], x[:, kept])
    assert restored.abs().sum(-1).ne(0).sum() == 32
