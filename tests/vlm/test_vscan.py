"""VScan: the card's examples, windows of every grid, merging."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import tokred
from tests.vlm.visual import check_laws, kept, visual
from tokred.methods.vlm.vscan import VScan, window_of
from tokred.vlm import VisualSite

S5 = torch.tensor([[1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 16, 13, 14, 15, 12]]) / 136
SD = torch.tensor([[9, 1, 1, 1, 1, 8, 1, 1, 1, 1, 7, 1, 6, 1, 1, 5]]) / 45


def grid_site(rows: int, columns: int, frames: int = 1) -> VisualSite:
    return VisualSite(x=torch.zeros(1, rows * columns * frames, 2), grid=(rows, columns))


def test_worked_example():
    windows = window_of(grid_site(4, 4), 2)
    assert windows.tolist() == [0, 0, 1, 1, 0, 0, 1, 1, 2, 2, 3, 3, 2, 2, 3, 3]
    method = VScan(budget=8, window=2)
    assert method.select(S5, torch.zeros(1, 16), 4, windows).shape == (1, 4)
    assert method.select(S5, SD, 8, windows).tolist() == [[0, 5, 7, 10, 11, 12, 13, 15]]


def test_merge_is_the_plain_mean():
    x = torch.tensor([[1, 0], [0, 1], [0.9, 0.1], [0.2, 0.8], [0.8, -0.2]])[None]
    heads = torch.full((1, 1, 6, 2), 1.0)
    keys = torch.cat([torch.zeros(1, 1, 1, 2), torch.tensor([[3.0, 3], [3, 3], [0, 0], [0, 0], [0, 0]])[None, None]], 2)
    site = VisualSite(x=x, q=heads, k=keys, prefix=1, grid=(1, 5), layer_heads=lambda _: (heads, keys))
    found = VScan(budget=2, window=5).reduce(site)
    assert kept(found) == [0, 1]
    merged = found.merge(x)
    torch.testing.assert_close(merged, torch.tensor([[[0.9, -0.1 / 3], [0.1, 0.9]]]), atol=1e-4, rtol=0)
    sized = found.merge(x, torch.tensor([[5.0, 1, 1, 1, 1]]))
    torch.testing.assert_close(sized, merged), "sizes play no part"
    mass = (found.sizes().unsqueeze(-1) * merged).sum(1)
    torch.testing.assert_close(mass, x.sum(1))


def test_budget_is_met_or_lost():
    scores = torch.rand(2, 576, generator=torch.Generator().manual_seed(0))
    windows = window_of(grid_site(24, 24), 6)
    counts = {
        (t, exact): VScan(budget=t, exact_budget=exact).select(scores, scores.flip(1), t, windows).shape[1]
        for t in (60, 64, 96)
        for exact in (True, False)
    }
    assert counts == {(60, True): 60, (60, False): 46, (64, True): 64, (64, False): 64, (96, True): 96, (96, False): 96}


@settings(max_examples=25, deadline=None)
@given(
    st.integers(1, 9), st.integers(1, 9), st.integers(1, 4), st.integers(1, 2), st.integers(1, 60), st.integers(0, 99)
)
def test_windows_of_any_grid(rows, columns, side, frames, total, seed):
    site = grid_site(rows, columns, frames)
    windows = window_of(site, side)
    n = rows * columns * frames
    total = min(total, n)
    g = torch.Generator().manual_seed(seed)
    a, b = torch.rand(1, n, generator=g), torch.rand(1, n, generator=g)
    found = VScan(budget=total, window=side).select(a, b, total, windows)[0].tolist()
    assert len(set(found)) == total == len(found)
    place = [(i // (rows * columns), i // columns % rows // side, i % columns // side) for i in range(n)]
    assert len(set(place)) == int(windows.max()) + 1
    assert all((place[i] == place[j]) == bool(windows[i] == windows[j]) for i in range(n) for j in range(i))
    each = int(total * 0.5) // len(set(place))
    for one in set(place):
        members = sorted((i for i in range(n) if place[i] == one), key=lambda i: -float(a[0, i]))
        assert set(members[:each]) <= set(found)


def test_reads_the_two_layers():
    site = visual(1)
    found = VScan(budget=8, window=3, shallow=0).reduce(site)
    assert found.slots == 8
    shallow, deep = site.layer_class_attention(0).mean(1), site.class_attention
    assert kept(found) == VScan(budget=8).select(shallow, deep, 8, window_of(site, 3))[0].tolist()
    assert sum(len(g) for g in found.groups()[0]) == 36


def test_laws():
    check_laws(VScan(budget=10, window=3, shallow=1), VScan(budget=36))


@pytest.mark.parametrize(
    ("parameters", "match"),
    [
        ({"local_ratio": -0.1}, "local_ratio must lie"),
        ({"window": 0}, "window must be an integer of at least 1"),
        ({"shallow": 1.5}, "shallow must be an integer"),
        ({"budget": 2.0}, "budget must be"),
    ],
)
def test_bad_parameters(parameters, match):
    with pytest.raises(ValueError, match=match):
        tokred.make("vscan", **parameters)
