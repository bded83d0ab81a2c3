"""HiRED: the card's examples, budgets over tiles, and its laws."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import tokred
from tests.vlm.visual import check_laws, kept, visual
from tokred.methods.vlm.hired import HiRED, shared
from tokred.vlm import Tile, VisualSite
from tokred.vlm.tools.tiles import Tiles

EARLY = torch.tensor([1.0, 1, 1, 1, 1, 1, 1, 9, 2, 2, 8, 8, 2, 3, 8, 8])
FOUR = Tiles(2, 2, (4, 4))


def tiled(tiles: Tiles, seed: int = 0) -> list[VisualSite]:
    """A site for each tile, with its real tokens alone."""
    whole, real, found = visual(tiles.total, tiles.grid, seed=seed), tiles.real(), []
    for i in range(tiles.total):
        rows = real[i].nonzero().flatten()
        some = torch.cat([torch.zeros(1, dtype=torch.long), rows + 1])

        def heads(layer: int, i: int = i, some: torch.Tensor = some) -> tuple[torch.Tensor, torch.Tensor]:
            q, k = whole.layer_heads(layer)
            return q[i : i + 1, :, some], k[i : i + 1, :, some]

        found.append(
            VisualSite(
                x=whole.x[i : i + 1, rows], q=heads(2)[0], k=heads(2)[1], prefix=1, layer_heads=heads,
                tile=Tile(i, tiles.total, i == 0), tiles=tiles,
                whole=lambda layer: whole.layer_class_attention(layer)[:1],
            )
        )  # fmt: skip
    return found


def test_worked_example():
    method = HiRED(budget=0.25)
    cell = FOUR.cell()
    assert cell.tolist() == [0, 0, 1, 1, 0, 0, 1, 1, 2, 2, 3, 3, 2, 2, 3, 3]
    assert method.contents(EARLY, cell, 4) == [0, 1, 3, 4]
    assert method.budgets(EARLY, FOUR) == [10, 0, 1, 4, 5]
    assert HiRED(budget=0.25, rounding="floor").budgets(EARLY, FOUR) == [10, 0, 1, 3, 5]
    assert HiRED(content="sum").contents(EARLY, cell, 4) == [4, 12, 9, 32]
    assert HiRED(budget=0.25, content="sum", rounding="floor").budgets(EARLY, FOUR) == [10, 0, 2, 1, 5]
    # The released code cuts the map of marks into runs of rows instead of cells.
    assert method.contents(EARLY, torch.arange(16) // 4, 4) == [0, 1, 4, 3]
    assert shared([0, 1, 4, 3], 10, [16] * 4, True) == [0, 1, 5, 4]
    assert shared([0, 1, 4, 3], 10, [16] * 4, False) == [0, 1, 5, 3]


def test_shares():
    assert shared([0, 0, 0], 7, [9, 9, 9], True) == [3, 2, 2], "nothing to see: even shares"
    assert shared([8, 1, 1], 20, [10, 10, 10], True) == [10, 8, 2], "overflow goes to the next by content"
    assert shared([1, 1, 8], 20, [10, 10, 10], False) == [2, 2, 10]
    assert HiRED(alpha=1.0, budget=20).budgets(EARLY, FOUR) == [16, 1, 1, 1, 1]
    assert HiRED(alpha=1.0, budget=12).budgets(EARLY, FOUR) == [12, 0, 0, 0, 0]
    assert HiRED(alpha=0.0, budget=12).budgets(EARLY, FOUR)[0] == 0


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 3), st.integers(1, 3), st.integers(1, 5), st.floats(0.02, 1), st.floats(0, 1), st.integers(0, 2),
    st.booleans(), st.sampled_from(["count", "sum"]), st.integers(0, 99),
)  # fmt: skip
def test_the_budget_is_met(rows, columns, side, budget, alpha, cut, ignore, content, seed):
    tiles = Tiles(rows, columns, (side, side), (min(cut, (rows * side - 1) // 2), 0))
    early = torch.rand(side * side, generator=torch.Generator().manual_seed(seed))
    method = HiRED(budget=budget, alpha=alpha, ignore_padding=ignore, content=content)
    room = tiles.real().sum(1).tolist() if ignore else [side * side] * tiles.total
    total = max(1, int(round(sum(room) * budget, 9)))
    found = method.budgets(early, tiles)
    whole = min(int(round(total * alpha, 9)), side * side)
    assert found[0] == whole
    assert sum(found) == whole + min(total - whole, sum(room[1:]))
    assert all(f <= r for f, r in zip(found, room, strict=True))
    floor = HiRED(budget=budget, alpha=alpha, ignore_padding=ignore, content=content, rounding="floor")
    assert sum(floor.budgets(early, tiles)) <= total


def test_places():
    assert Tiles(2, 1, (3, 1)).cell().tolist() == [0, 1, 1], "floor boundaries where the grid does not divide"
    wide = Tiles(1, 2, (1, 4), (0, 2))
    assert wide.real().tolist() == [[True] * 4, [False, False, True, True], [True, True, False, False]]
    # Only the two inner columns of each part are the image, so each shows one half of it.
    assert wide.cell().tolist() == [0, 0, 1, 1]
    assert Tiles(1, 2, (1, 4)).cell().tolist() == [0, 0, 1, 1]


@pytest.mark.parametrize("tiles", [FOUR, Tiles(2, 2, (4, 4), (0, 3)), Tiles(1, 3, (3, 3), (1, 0))])
def test_tiles_keep_what_the_class_token_sees(tiles):
    sites, method = tiled(tiles), HiRED(budget=0.25)
    total = int(tiles.real().sum()) // 4
    budgets = method.budgets(sites[0].whole_attention(0)[0].sum(0), tiles)
    assert sum(budgets) == total
    for site, budget in zip(sites, budgets, strict=True):
        scores = site.class_attention_heads.sum(1)[0]
        assert kept(method.reduce(site)) == sorted(scores.argsort(descending=True, stable=True)[:budget].tolist())
        assert HiRED(budget=1.0).reduce(site).trivial
        assert HiRED(budget=80).reduce(site).trivial
    assert sum(len(kept(HiRED(budget=total + 3).reduce(site))) for site in sites) == total + 3


def test_padding_gets_budget_only_where_asked_for():
    tiles = Tiles(2, 2, (4, 4), (0, 3))
    early = torch.rand(16, generator=torch.Generator().manual_seed(0))
    assert sum(HiRED(budget=0.5).budgets(early, tiles)) == int(tiles.real().sum()) // 2
    assert sum(HiRED(budget=0.5, ignore_padding=False).budgets(early, tiles)) == 40


def test_a_single_tile_keeps_its_highest_scores():
    site = visual(2, (4, 4))
    found = HiRED(budget=0.3).reduce(site)
    top = site.class_attention.argsort(dim=1, descending=True, stable=True)[:, :4].sort().values
    assert found.representative.tolist() == top.tolist()
    assert found.mask is None
    assert torch.equal(HiRED(budget=0.05).reduce(site).representative, HiRED(budget=1).reduce(site).representative)


def test_laws():
    check_laws(HiRED(budget=0.2), HiRED(budget=1.0))


@pytest.mark.parametrize(
    ("parameters", "match"),
    [
        ({"budget": 0.0}, "budget must be"),
        ({"alpha": 1.2}, r"alpha must lie in \[0, 1\]"),
        ({"l_early": "first"}, "l_early must be an integer"),
        ({"content": "mean"}, "content is 'mean'"),
        ({"rounding": "up"}, "rounding is 'up'"),
    ],
)
def test_bad_parameters(parameters, match):
    with pytest.raises(ValueError, match=match):
        tokred.make("hired", **parameters)
