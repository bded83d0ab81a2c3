"""VidCom2 and V-CAST: the card's examples, and the published definitions written as loops."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import tokred
from tests.vlm.visual import kept
from tokred.methods.vlm.vcast import turns
from tokred.vlm import VisualSite

COMMANDER = torch.tensor(
    [
        [[1, 0, 5, 0], [1, 0.1, -5, 1], [1, 0.3, 4, 9], [0.9, 0.2, -4, 3]],
        [[1, 0.05, 5, 0], [1, 0.15, -5, 2], [0.8, 0.1, 3, 8], [1, -0.1, -3, 4]],
        [[0, 1, 5, 0], [0.2, 1, -5, 1], [1, 0, 4, 7], [0.1, 0.8, -4, 2]],
    ]
)
CAST = torch.tensor(
    [
        [[1, 0], [2, 0], [1, 0.2]], [[1, 0.3], [1.5, 0.2], [1, 0.4]], [[0, 1], [0.2, 2], [0.1, 1]],
        [[1, 0.1], [1, 0], [3, 0.2]],
    ]
)  # fmt: skip


def site(x: Tensor) -> VisualSite:
    return VisualSite(x=x.flatten(0, 1)[None], frames=x.shape[0], grid=(1, x.shape[1]))


def test_the_commanders_worked_example():
    clip, both = tokred.VidCom2().redundancy(COMMANDER[None].float())
    near = [4.0217, 4.3301, 4.7298, 4.6175, 4.1818, 4.4623, 4.3985, 3.6843, 1.8391, 2.2308, 4.0217, 2.0741]
    assert clip.flatten().tolist() == pytest.approx(near, abs=1e-3)
    sums = [8.8482, 9.3084, 9.5848, 9.5837, 9.1813, 9.3964, 9.3625, 8.5036, 5.7539, 6.7093, 5.9271, 6.3681]
    assert both.flatten().tolist() == pytest.approx(sums, abs=1e-3)
    assert tokred.VidCom2(ratio=0.5).budgets(clip).tolist() == [[1, 1, 3]]
    assert tokred.VidCom2(ratio=0.75).budgets(clip).tolist() == [[1, 1, 2]]


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"ratio": 0.5, "exact": False}, [0, 7, 8, 10, 11]),
        ({"ratio": 0.5}, [0, 7, 8, 9, 10, 11]),
        ({"ratio": 0.75, "floor": False}, [7, 8, 10]),
        ({"ratio": 0.75}, [0, 7, 8]),
        ({"ratio": 0.95}, [0, 7, 8]),
    ],
)
def test_the_commanders_choices(settings, expected):
    assert kept(tokred.VidCom2(**settings).reduce(site(COMMANDER))) == expected


def test_counts_are_those_that_engines_size_prompts_by():
    assert tokred.VidCom2(ratio=0.9).kept(10, 10) == 10
    assert tokred.VidCom2(ratio=0.9).kept(5, 20) == 9
    assert tokred.VidCom2(ratio=0.75).kept(32, 196) == 1568


def commander(x: Tensor, ratio: float, *, floor: bool) -> list[int]:
    """The definition, token by token, in float64."""
    frames, cells, c = x.shape
    flat = x.double().flatten(0, 1)
    quiet = flat.var(0, correction=0).argsort(stable=True)[: max(1, int(c * 0.5))]
    u = torch.nn.functional.normalize(flat[:, quiet], dim=-1).view(frames, cells, -1)

    def near(a: Tensor, b: Tensor) -> float:
        return sum(math.exp(-float((a - b).square().sum()) / (2 * w)) for w in (1 / 8, 1 / 4, 1 / 2, 1, 2))

    v = [[near(u[t, j], u.mean((0, 1))) for j in range(cells)] for t in range(frames)]
    z = [v[t][j] + near(u[t, j], u[t].mean(0)) for t in range(frames) for j in range(cells)]
    y = torch.tensor([-sum(row) / cells for row in v], dtype=torch.float64) / 0.01
    p = (y - y.max()).softmax(0).tolist()
    r = 1.0 - ratio
    stays: set[int] = set()
    for t in range(frames):
        k = min(max(round(min(1, r * (1 + p[t] - 1 / frames)) * cells), 1), cells)
        stays |= set(sorted(range(t * cells, (t + 1) * cells), key=lambda i: (z[i], i))[:k])
    count = max(frames, min(int(frames * cells * (1.0 - ratio)), frames * cells))
    while len(stays) > count:
        free = [i for i in stays if not floor or sum(s // cells == i // cells for s in stays) > 1]
        stays.remove(max(free, key=lambda i: (z[i], i)))
    others = sorted(set(range(frames * cells)) - stays, key=lambda i: (z[i], i))
    return sorted(stays | set(others[: count - len(stays)]))


@settings(max_examples=30, deadline=None)
@given(
    st.integers(1, 5), st.integers(1, 6), st.sampled_from([0.2, 0.5, 0.75, 0.9]), st.booleans(), st.integers(0, 10**6)
)
def test_the_commander_equals_its_definition(frames, cells, ratio, floor, seed):
    x = torch.randn(frames, cells, 8, generator=torch.Generator().manual_seed(seed))
    found = kept(tokred.VidCom2(ratio=ratio, floor=floor).reduce(site(x)))
    assert found == commander(x, ratio, floor=floor)
    if floor:
        assert len({i // cells for i in found}) == frames, "every frame keeps a token"
    assert kept(tokred.VidCom2(ratio=ratio, floor=floor).reduce(site(4 * x))) == found


def test_alike_frames_have_alike_budgets():
    x = torch.randn(1, 6, 8, generator=torch.Generator().manual_seed(0)).repeat(4, 1, 1)
    method = tokred.VidCom2(ratio=0.5)
    assert method.budgets(method.redundancy(x[None])[0]).tolist() == [[3] * 4]
    loud = x.clone()
    loud[..., 3] *= 50
    assert kept(method.reduce(site(loud))) == kept(method.reduce(site(loud + torch.eye(8)[3] * 7)))


def test_vcasts_worked_example():
    mean = torch.nn.functional.normalize(CAST.mean(1), dim=-1)[None]
    assert turns(mean)[0].tolist() == pytest.approx([1, 0.2502, 1.9954, 1], abs=1e-3)
    weight = (turns(mean) / 0.7).softmax(1)
    assert weight[0].tolist() == pytest.approx([0.1541, 0.0528, 0.6389, 0.1541], abs=1e-3)
    method = tokred.VCAST(budget=0.5)
    assert method.kept(4, 3) == 6
    assert method.budgets(weight, 6, 3).tolist() == [[2, 1, 2, 1]]
    assert kept(method.reduce(site(CAST))) == [1, 2, 4, 7, 8, 11]


def test_leftovers_of_vcasts_budget():
    weight = torch.tensor([[0.26, 0.25, 0.25, 0.24], [0.25, 0.25, 0.25, 0.25]])
    assert tokred.VCAST().budgets(weight, 11, 6).tolist() == [[3, 3, 3, 2], [3, 3, 3, 2]]
    assert tokred.VCAST(leftover="one").budgets(weight, 11, 6)[0].tolist() == [5, 2, 2, 2]


@settings(max_examples=30, deadline=None)
@given(st.integers(2, 6), st.integers(1, 5), st.integers(0, 10**6), st.sampled_from(["each", "one"]))
def test_vcasts_budgets_add_up(frames, cells, seed, leftover):
    g = torch.Generator().manual_seed(seed)
    weight = (3 * torch.randn(2, frames, generator=g)).softmax(1)
    for total in range(frames, frames * cells + 1):
        found = tokred.VCAST(leftover=leftover).budgets(weight, total, cells)
        assert found.sum(1).tolist() == [total] * 2
        assert int(found.min()) >= 1
        assert int(found.max()) <= cells


def test_a_straight_path_and_one_that_turns_back():
    line = torch.tensor([[[0.0, 1], [1, 1], [3, 1], [2, 1]]])
    assert turns(line)[0].tolist() == pytest.approx([1, 0, 2, 1], abs=1e-6)
    assert turns(line[:, :2]).tolist() == [[1, 1]]


@pytest.mark.parametrize(
    ("name", "wrong", "match"),
    [
        ("vidcom2", {"ratio": 1.0}, "ratio"),
        ("vidcom2", {"channels": 0.0}, "channels"),
        ("vcast", {"temperature": 0.0}, "temperature must be above 0"),
        ("vcast", {"leftover": "two"}, "leftover"),
        ("vcast", {"budget": 0.0}, "budget"),
    ],
)
def test_bad_parameters(name, wrong, match):
    with pytest.raises(ValueError, match=match):
        tokred.make(name, **wrong)
