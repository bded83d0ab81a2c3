"""ToDo: the card's worked examples, without a denoiser."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import tokred
from tests.diffusion.tiny import inputs, run, sd15
from tokred.diffusion.grid import kept_lines
from tokred.diffusion.site import AttentionSite, Step, SublayerPlace
from tokred.methods.diffusion.todo import SimilarKeys


def kept(grid: tuple[int, int], values: torch.Tensor | None = None, **parameters) -> list[float]:
    n = grid[0] * grid[1]
    values = torch.arange(1.0, n + 1) if values is None else values
    x = values.view(1, n, 1)
    plan = tokred.ToDo(**parameters).reduce(AttentionSite(x, SublayerPlace(n, grid, 1), step=3))
    return plan.merge(x).flatten().tolist()


@pytest.mark.parametrize(
    ("n", "factor", "nearest", "exact"),
    [
        (4, 2, [0, 2], [1, 3]),
        (6, 3, [0, 3], [1, 4]),
        (8, 4, [0, 4], [2, 6]),
        (9, 2, [0, 2, 4, 6], [1, 3, 5, 7]),
        (10, 3, [0, 3, 6], [1, 5, 8]),
        (13, 2, [0, 2, 4, 6, 8, 10], [1, 3, 5, 7, 9, 11]),
    ],
)
def test_kept_rows(n: int, factor: int, nearest: list[int], exact: list[int]):
    assert kept_lines(n, factor) == nearest
    assert kept_lines(n, factor, exact=True) == exact
    line = torch.arange(float(n)).view(1, 1, n)
    size = n // factor
    assert F.interpolate(line, size=size, mode="nearest").flatten().tolist() == nearest
    assert F.interpolate(line, size=size, mode="nearest-exact").flatten().tolist() == exact


def test_modes_on_a_grid():
    assert kept((4, 4)) == [1, 3, 9, 11]
    assert kept((4, 4), mode="nearest-exact") == [6, 8, 14, 16]
    assert kept((4, 4), mode="average") == [3.5, 5.5, 11.5, 13.5]
    assert kept((4, 4), mode="max") == [6, 8, 14, 16]
    assert kept((4, 4), phase=3) == [6, 8, 14, 16]
    assert kept((5, 7), mode="average") == [5, 7, 9, 19, 21, 23]


def test_a_phase_counts_row_by_row():
    """1 is the column to the right, 2 at factor 2 the row below, on grids of two shapes."""
    assert kept((4, 6), phase=1) == [2, 4, 6, 14, 16, 18]
    assert kept((4, 6), phase=2) == [7, 9, 11, 19, 21, 23]
    assert kept((6, 3), factors=3, phase=5) == [6, 15]
    assert kept((6, 3), factors=3, phase=7) == [8, 17]


@pytest.mark.parametrize("grid", [(8, 12), (12, 8)])
def test_cycling_moves_rows_and_columns_by_one_draw(grid: tuple[int, int]):
    n, found = grid[0] * grid[1], set()
    method = tokred.ToDo(factors=4, phase="cycle")
    for step in range(200):
        site = AttentionSite(torch.zeros(1, n, 1), SublayerPlace(n, grid, 1), step=step)
        rows = method.reduce(site).representative[0]
        y, x = int(rows[0]) // grid[1], int(rows[0]) % grid[1]
        expected = [(a + y) * grid[1] + b + x for a in range(0, grid[0], 4) for b in range(0, grid[1], 4)]
        assert rows.tolist() == expected
        found.add((y, x))
    assert found == {(y, x) for y in range(4) for x in range(4)}


def test_attention_of_the_card():
    k = torch.full((1, 8, 2), 5.0)
    k[0, 0], k[0, 2] = torch.tensor([1.0, 0]), torch.tensor([0, 1.0])
    v = torch.zeros(1, 8, 1)
    v[0, 0], v[0, 2] = 10, 20
    q = torch.tensor([[0, 0], [1, 0], [0, 1], [1, 1], [2, 0], [0, 2], [-1, 0], [0, -1.0]]).unsqueeze(0)
    plan = tokred.ToDo(factors=2).reduce(AttentionSite(k, SublayerPlace(8, (2, 4), 1)))
    out = F.scaled_dot_product_attention(q, plan.merge(k), plan.merge(v)).flatten()
    expected = [15, 13.302385, 16.697615, 15, 11.955703, 18.044297, 16.697615, 13.302385]
    torch.testing.assert_close(out, torch.tensor(expected))


def test_constant_cells_change_nothing():
    cells = torch.tensor([[1.0, 2], [3, 4]]).repeat_interleave(2, 0).repeat_interleave(2, 1).view(1, 16, 1)
    x = cells * torch.tensor([0.3, -1.0, 0.7])
    q = torch.randn(1, 16, 3)
    for mode in ("nearest", "nearest-exact", "average", "max"):
        plan = tokred.ToDo(factors=2, mode=mode).reduce(AttentionSite(x, SublayerPlace(16, (4, 4), 1)))
        y = F.scaled_dot_product_attention(q, plan.merge(x), plan.merge(x))
        torch.testing.assert_close(y, F.scaled_dot_product_attention(q, x, x))


def test_cost_of_the_card():
    method = tokred.ToDo(factors=2)
    place = SublayerPlace(16384, (128, 128), 1)
    assert method.left(place) == 4096
    assert place.length * method.left(place) == pytest.approx(6.71e7, rel=1e-3)


def test_factors_go_by_depth():
    method = tokred.ToDo(factors=(3, 2))
    assert [method.factor(SublayerPlace(64, (8, 8), d)) for d in (1, 2, 3, 4, 8)] == [3, 2, 1, 1, 1]
    assert tokred.ToDo(factors=(1, 1)).idle


def test_cycling_moves_with_the_step_alone():
    method = tokred.ToDo(factors=2, phase="cycle")
    x = torch.zeros(1, 81, 1)

    def rows(step: int, layer: int = 0) -> list[int]:
        site = AttentionSite(x, SublayerPlace(81, (9, 9), 1), step=step, layer=layer)
        return method.reduce(site).representative[0].tolist()

    assert len({tuple(rows(step)) for step in range(40)}) == 4
    assert rows(3) == rows(3, layer=5)
    assert max(map(max, map(rows, range(40)))) < 81


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"factors": 0}, "factors must be an integer of at least 1"),
        ({"factors": (2, 1.5)}, "factors must be an integer"),
        ({"factors": ()}, "at least one factor"),
        ({"mode": "pool"}, "mode is 'pool'"),
        ({"phase": 4}, r"phase must lie in \[0, 4\)"),
        ({"phase": 1, "mode": "average"}, "phase is for mode 'nearest'"),
        ({"switch": 1.5}, r"switch must lie in \[0, 1\]"),
        ({"stop": -0.1}, "stop must lie in"),
        ({"secondary": "none"}, "secondary is 'none'"),
        ({"phase": "spin"}, "phase must be an integer or 'cycle'"),
    ],
)
def test_wrong_parameters(parameters: dict, message: str):
    with pytest.raises((ValueError, TypeError), match=message):
        tokred.ToDo(**parameters)


def test_a_factor_larger_than_the_grid():
    assert kept((4, 8), factors=5) == list(range(1, 33))
    with pytest.raises(ValueError, match="a factor of 5 is larger than the 4 rows"):
        kept_lines(4, 5)


def test_the_late_switch():
    method = tokred.ToDo(factors=2, switch=0.2, stop=0.1)
    assert method.at(Step(0.9, 0)) is method
    late = method.at(Step(0.2, 5))
    assert late == SimilarKeys((2,))
    assert method.at(Step(0.1, 7)) is None
    assert tokred.ToDo(factors=2, switch=0.2, secondary=None).at(Step(0.1, 7)) is None
    assert tokred.ToDo(factors=2).at(Step(0.0, 9)) == tokred.ToDo(factors=2), "the last timestep may be 0"
    assert not tokred.ToDo().stepwise


@pytest.mark.parametrize("grid", [(4, 4), (5, 7), (9, 6)])
def test_keys_by_similarity(grid: tuple[int, int]):
    n = grid[0] * grid[1]
    x = torch.randn(2, n, 5, generator=torch.Generator().manual_seed(0))
    late = SimilarKeys((2,))
    plan = late.reduce(AttentionSite(x, SublayerPlace(n, grid, 1), step=3))
    assert plan.slots == late.left(SublayerPlace(n, grid, 1)) == (grid[0] // 2) * (grid[1] // 2)
    near = F.normalize(x, dim=-1)
    scores = near @ near.mT
    for b in range(2):
        slots = plan.representative[b]
        for source, target in zip(plan.source[b].tolist(), plan.target[b].tolist(), strict=True):
            assert scores[b, source, slots[target]] == scores[b, source, slots].max()


def test_a_denoiser_switches():
    model, given = sd15(), inputs("sd15")
    before = run(model, {**given, "timestep": 50})
    tokred.apply(model, "todo", factors=(2, 2), switch=0.5, stop=0.1)

    def image() -> list[torch.Tensor]:
        return [run(model, {**given, "timestep": t}) for t in (900, 500, 50)]

    first, second = image(), image()
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert torch.equal(first[2], before)
    tokred.apply(model, "todo", factors=(2, 2))
    plain = image()
    assert torch.equal(first[0], plain[0])
    assert not torch.equal(first[1], plain[1])


def test_compiled_forwards_do_not_know_the_step(monkeypatch: pytest.MonkeyPatch):
    model, given = sd15(), inputs("sd15")
    tokred.apply(model, "todo", factors=(2, 2), switch=0.5)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    with pytest.raises(tokred.UnsupportedModelError, match="which a compiled forward does not know"):
        run(model, {**given, "timestep": torch.tensor(900)})
