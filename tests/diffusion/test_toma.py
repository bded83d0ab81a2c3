"""ToMA: the card's worked examples and invariants, without a denoiser."""

from __future__ import annotations

import math

import pytest
import torch

import tokred
from tokred.core.tiles import TileReduction, facility_location, soft_shares, tile_rows, tile_sizes
from tokred.diffusion.site import AttentionSite, SublayerPlace

VALUES = torch.arange(1.0, 7, dtype=torch.float64).view(1, 6, 1)


def features() -> torch.Tensor:
    turned = torch.tensor([0, 10, 25, 70, 85, 105.0], dtype=torch.float64) * math.pi / 180
    return torch.stack([turned.cos(), turned.sin()], 1).unsqueeze(0)


def site(x: torch.Tensor, grid: tuple[int, int], factor: int = 1, **more) -> AttentionSite:
    return AttentionSite(x, SublayerPlace(grid[0] * grid[1], grid, factor), **more)


def plan(tau: float) -> TileReduction:
    found = tokred.ToMA(ratio=2 / 3, tau=tau).reduce(site(features(), (1, 6)))
    assert isinstance(found, TileReduction)
    return found


def test_the_card_s_example():
    x = features()[0]
    similarity = x @ x.T
    expected = torch.tensor([3.061472, 3.622397, 4.252989, 4.334205, 3.751593, 2.586518], dtype=torch.float64)
    torch.testing.assert_close(similarity.sum(0), expected, rtol=0, atol=1e-6)
    assert facility_location(similarity, 2).tolist() == [3, 1]
    soft = plan(0.1)
    assert soft.representative.tolist() == [[3, 1]]
    row = torch.tensor([0.001613, 0.006693, 0.069902, 0.993307, 0.999151, 0.999884], dtype=torch.float64)
    torch.testing.assert_close(soft.tiles[0].share[0, 0].double(), torch.stack([row, 1 - row]), rtol=0, atol=2e-6)
    merged = soft.merge(VALUES)
    torch.testing.assert_close(merged.flatten(), torch.tensor([4.947970, 1.982285]).double(), rtol=0, atol=5e-6)
    restored = torch.tensor([1.987070, 2.002134, 2.189594, 4.928122, 4.945454, 4.947627], dtype=torch.float64)
    torch.testing.assert_close(soft.unmerge(merged).flatten(), restored, rtol=0, atol=5e-6)


@pytest.mark.parametrize("seed", range(6))
def test_choices_among_tokens_that_point_apart(seed: int):
    """By hand, with similarities below zero, which count as they are: the nearest choice may still be far."""
    turned = torch.rand(9, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 2 * math.pi
    x = torch.stack([turned.cos(), turned.sin()], 1)
    similarity = x @ x.T
    covered, expected = torch.full((9,), -1.0, dtype=torch.float64), []
    for _ in range(4):
        gains = [-math.inf if j in expected else float(torch.maximum(similarity[:, j], covered).sum() - covered.sum())
                 for j in range(9)]  # fmt: skip
        expected.append(gains.index(max(gains)))
        covered = torch.maximum(covered, similarity[:, expected[-1]])
    assert facility_location(similarity, 4).tolist() == expected
    shares = soft_shares(similarity, torch.tensor(expected), 0.5)
    torch.testing.assert_close(shares, (similarity[expected] / 0.5).softmax(0))
    found = tokred.ToMA(ratio=5 / 9, tile=9).reduce(site(x.unsqueeze(0), (1, 9)))
    assert found.representative[0].tolist() == expected


def test_one_token_that_is_unlike_the_others_is_not_the_first():
    """Were what is below zero cut off, token 0 would cover as much as token 1, and come first."""
    x = torch.tensor([[1.0, 0], [-0.5, 0.8660254], [-0.5, -0.8660254], [-0.6, 0.8]]).unsqueeze(0)
    found = tokred.ToMA(ratio=0.75, tile=4).reduce(site(x, (1, 4)))
    assert found.representative.tolist() == [[int((x[0] @ x[0].T).sum(0).argmax())]]


@pytest.mark.parametrize("tau", [0.001, 0])
def test_a_low_temperature_is_hard_assignment(tau: float):
    hard = plan(tau)
    merged = hard.merge(VALUES)
    torch.testing.assert_close(merged.flatten(), torch.tensor([5.0, 2]).double(), rtol=0, atol=1e-4)
    expected = torch.tensor([2.0, 2, 2, 5, 5, 5]).double()
    torch.testing.assert_close(hard.unmerge(merged).flatten(), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("grid", [(8, 8), (9, 17), (5, 3), (16, 12)])
@pytest.mark.parametrize("tau", [0.1, 0])
def test_invariants(grid: tuple[int, int], tau: float):
    n = grid[0] * grid[1]
    x = torch.randn(3, n, 5, generator=torch.Generator().manual_seed(n))
    method = tokred.ToMA(ratio=0.4, tau=tau)
    found = method.reduce(site(x, grid))
    assert isinstance(found, TileReduction)
    assert found.slots == method.left(SublayerPlace(n, grid, 1))
    assert sorted(torch.cat([r.flatten() for r in tile_rows(grid, 8)]).tolist()) == list(range(n))
    assert sum(w * size for w, size in tile_sizes(grid, 8)) == n
    for tile in found.tiles:
        torch.testing.assert_close(tile.share.sum(2), torch.ones_like(tile.share.sum(2)))
        torch.testing.assert_close(tile.weight.sum(3), torch.ones_like(tile.weight.sum(3)))
    constant = torch.full((3, n, 2), 0.7)
    torch.testing.assert_close(found.unmerge(found.merge(constant)), constant)
    # Every token is one slot's own or a source, and its slot is in its own tile.
    everything = torch.cat([found.representative, found.source], 1).sort(1).values
    assert torch.equal(everything, torch.arange(n).expand(3, -1))
    tile_of = torch.empty(n, dtype=torch.int64)
    for number, rows in enumerate(r for group in tile_rows(grid, 8) for r in group):
        tile_of[rows] = number
    slots = tile_of[found.representative]
    assert torch.equal(slots.gather(1, found.target), tile_of[found.source])
    alone = method.reduce(site(x[1:2], grid))
    assert torch.equal(alone.representative[0], found.representative[1])


def test_tiles_do_not_touch():
    x = torch.randn(1, 256, 4)
    other = x.clone()
    rows = tile_rows((16, 16), 8)[0]
    other[:, rows[3]] += 1
    a, b = (tokred.ToMA().reduce(site(t, (16, 16))) for t in (x, other))
    assert isinstance(a, TileReduction)
    assert isinstance(b, TileReduction)
    assert torch.equal(a.tiles[0].share[:, :3], b.tiles[0].share[:, :3])
    assert not torch.equal(a.tiles[0].share[:, 3], b.tiles[0].share[:, 3])


def test_equal_tokens_leave_no_empty_slot():
    x = torch.ones(1, 16, 3)
    for tau in (0, 0.1):
        found = tokred.ToMA(tau=tau, tile=4).reduce(site(x, (4, 4)))
        assert found.merge(x).isfinite().all()
        torch.testing.assert_close(found.unmerge(found.merge(x)), x)
        assert found.representative.tolist() == [list(range(8))]


def test_destinations_outlast_shares():
    method = tokred.ToMA(steps_destination=4, steps_plan=1, tile=4)
    memory: dict = {}
    generator = torch.Generator().manual_seed(3)
    rows = []
    for count in range(6):
        x = torch.randn(1, 16, 6, generator=generator)
        rows.append(method.reduce(site(x, (4, 4), count=count, memory=memory)).representative.tolist())
    assert rows[0] == rows[1] == rows[2] == rows[3]
    assert rows[4] == rows[5] != rows[0]
    assert method.refresh == 1


def test_frames_of_a_clip():
    x = torch.randn(4, 40, 3)
    apart = tokred.ToMA(tile=4).reduce(site(x, (8, 5)))
    assert isinstance(apart, TileReduction)
    joined = apart.join(2)
    y = joined.merge(x.view(2, 80, 3))
    assert y.shape[1] == joined.slots == 2 * apart.slots
    torch.testing.assert_close(joined.unmerge(y).view(4, 40, 3), apart.unmerge(apart.merge(x)))
    assert torch.equal(joined.gather(torch.arange(80.0).view(1, 80, 1).expand(2, -1, -1)).squeeze(-1),
                       joined.representative.float())  # fmt: skip
    groups = {frozenset(g) for g in joined.groups()[0]}
    expected = {frozenset(i + 40 * f for i in g) for f in range(2) for g in apart.groups()[f]}
    assert groups == expected


def test_nothing_to_do_and_coarse_grids():
    x = torch.randn(1, 64, 4)
    assert tokred.ToMA(ratio=0).reduce(site(x, (8, 8))).trivial
    assert tokred.ToMA(tile=1).idle
    assert tokred.ToMA(max_downsample=2).reduce(site(x, (8, 8), factor=4)).trivial


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"ratio": 1.0}, r"ratio must lie in \[0, 1\)"),
        ({"tile": 0}, "tile must be an integer of at least 1"),
        ({"tile": 33}, "tile must be at most 32"),
        ({"tau": -1}, "tau must be a number of at least 0"),
        ({"cover": "all"}, "cover is 'all'"),
        ({"steps_plan": 0}, "steps_plan must be an integer of at least 1"),
        ({"first_full": -1}, "first_full must be an integer of at least 0"),
    ],
)
def test_wrong_parameters(parameters: dict, message: str):
    with pytest.raises((ValueError, TypeError), match=message):
        tokred.ToMA(**parameters)
