"""SDTM: the card's curve, the windows of the first stage, the ages of the second."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import tokred
from tests.diffusion.tiny import inputs, run, sd15
from tokred.diffusion.site import AttentionSite, Step, SublayerPlace
from tokred.kernels.similarity_rows import unit
from tokred.methods.diffusion.sdtm import SDTMStage


def site(x: torch.Tensor, grid: tuple[int, int], **more: Any) -> AttentionSite:
    return AttentionSite(x, SublayerPlace(grid[0] * grid[1], grid, 1), **more)


def test_the_card_s_curve():
    method = tokred.SDTM()
    found = [method.curve(p) for p in (0, 0.25, 0.5, 0.75, 1)]
    assert found == pytest.approx([0.7, 0.669552, 0.582843, 0.453073, 0.3], abs=1e-6)
    stage = method.at(Step(0.5, 3))
    assert stage == SDTMStage(method.curve(0.5), False)
    assert stage.sublayers == ("self", "mlp")
    late = method.at(Step(0.5, 20))
    assert isinstance(late, SDTMStage)
    assert late.detail
    assert late.sublayers == ("mlp",)


@pytest.mark.parametrize("grid", [(8, 8), (9, 7)])
def test_windows(grid: tuple[int, int]):
    n = grid[0] * grid[1]
    x = torch.randn(2, n, 5, generator=torch.Generator().manual_seed(1))
    stage = SDTMStage(0.4, False, age=0.0)
    plan = stage.reduce(site(x, grid, step=3))
    assert plan.slots == stage.left(SublayerPlace(n, grid, 1))
    for b in range(2):
        windows = {}
        for y in range(grid[0] // 2):
            for c in range(grid[1] // 2):
                first = 2 * y * grid[1] + 2 * c
                rows = [first, first + 1, first + grid[1], first + grid[1] + 1]
                u = unit(x[b, rows])
                windows[tuple(rows)] = float((u @ u.T).mean())
        count = (n - plan.slots) // 3
        best = sorted(windows, key=lambda rows: -windows[rows])[:count]
        groups = {tuple(g) for g in plan.groups()[b] if len(g) > 1}
        assert groups == set(best)
        slots = plan.representative[b].tolist()
        assert len({rows.index(t) for rows in best for t in rows if t in slots}) > 1, "any member stands for a window"
    alone = stage.reduce(site(x[1:], grid, step=3))
    assert torch.equal(alone.index[0], plan.index[1])


def test_ages():
    memory: dict[str, Any] = {}
    x = torch.randn(1, 64, 4, generator=torch.Generator().manual_seed(0))
    for _ in range(3):
        plan = SDTMStage(0.3, False).reduce(site(x, (8, 8), memory=memory))
    alone = {g[0] for g in plan.groups()[0] if len(g) == 1}
    since = memory["since"][0]
    assert all((since[t] == 0) == (t in alone) for t in range(64))
    assert since.max() == 3
    late = SDTMStage(0.5, True).reduce(site(x, (8, 8), memory=memory))
    oldest = set(since.argsort(descending=True, stable=True)[:16].tolist())
    assert set(late.representative[0, -16:].tolist()) == oldest
    assert late.slots == 32


def test_windows_weigh_age_by_its_mean():
    """By hand: similarity of the window's tokens plus the age of its four tokens over the mean age."""
    g = torch.Generator().manual_seed(3)
    x, since = torch.randn(2, 64, 4, generator=g), torch.randint(0, 9, (2, 64), generator=g).float()
    corners = [8 * y + c for y in range(0, 8, 2) for c in range(0, 8, 2)]
    windows = [(t, t + 1, t + 8, t + 9) for t in corners]
    found = []
    for age in (0.0, 0.3, 50.0):
        plan = SDTMStage(0.3, False, age=age).reduce(site(x, (8, 8), memory={"since": since.clone()}))
        found.append([{tuple(g) for g in groups if len(g) > 1} for groups in plan.groups()])
        for b in range(2):
            scores = []
            for rows in windows:
                u = unit(x[b, list(rows)])
                scores.append(float((u @ u.T).mean()) + age * float((since[b] / since[b].mean())[list(rows)].mean()))
            best = sorted(range(16), key=lambda i: -scores[i])[: (64 - plan.slots) // 3]
            assert found[-1][b] == {windows[i] for i in best}
    assert found[0] != found[1] != found[2]


def test_ages_count_steps_since_a_token_stood_alone():
    memory: dict[str, Any] = {}
    g, expected = torch.Generator().manual_seed(5), torch.zeros(2, 64)
    for step in range(4):
        x = torch.randn(2, 64, 4, generator=g)
        plan = SDTMStage(0.4, step > 1, age=0.2).reduce(site(x, (8, 8), memory=memory, step=step))
        for b, groups in enumerate(plan.groups()):
            for members in groups:
                for token in members:
                    expected[b, token] = 0 if len(members) == 1 else expected[b, token] + 1
        assert torch.equal(memory["since"], expected)


def test_stages_in_a_denoiser():
    model, given = sd15(), inputs("sd15")
    tokred.apply(model, "sdtm", switch=2)

    def image() -> list[Any]:
        out = []
        for t in (999, 700, 400, 100):
            y = run(model, {**given, "timestep": t})
            rows = tokred.report(model).sublayers
            out.append((y, {row.role for row in rows if row.left < row.tokens}, min(row.left for row in rows)))
        return out

    first, again = image(), image()
    assert [roles for _, roles, _ in first] == [{"self", "mlp"}] * 2 + [{"mlp"}] * 2
    lefts = [left for _, _, left in first]
    assert lefts == sorted(lefts)
    assert lefts[0] < lefts[-1]
    assert all(torch.equal(a[0], b[0]) for a, b in zip(first, again, strict=True))


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"ratio": 0.9}, "their curve must lie in"),
        ({"ratio": 0.1}, "their curve must lie in"),
        ({"spread": -1}, "spread must lie in"),
        ({"switch": -1}, "switch must be an integer of at least 0"),
        ({"age": -1}, "age must be a number of at least 0"),
        ({"share": "all"}, "share is 'all'"),
    ],
)
def test_wrong_parameters(parameters: dict, message: str):
    with pytest.raises((ValueError, TypeError), match=message):
        tokred.SDTM(**parameters)
