"""SparseVLM: raters, budgets, recycling."""

from __future__ import annotations

import pytest
import torch

import tokred
from tests.vlm.layered import LAYOUT, check_laws, columns_kept, layer_site
from tokred.methods.vlm.sparsevlm import SparseVLM, raters, recycled
from tokred.vlm.in_llm import LayerSite, Prompt
from tokred.vlm.tools.cluster import density_peaks

ALL = LAYOUT[:1]


def prompt(visual: list[list[float]], text: list[list[float]], before: int = 0) -> Prompt:
    """Text tokens before and after the visual ones."""
    rows = torch.tensor([*text[:before], *visual, *text[before:]])[None]
    seen = torch.zeros(1, rows.shape[1], dtype=torch.bool)
    seen[:, before : before + len(visual)] = True
    return Prompt(rows, seen, ~seen, torch.arange(rows.shape[1])[None])


def test_raters_worked_example():
    v, t = [[1.0, 0], [0, 1]], [[2.0, 2], [0, 0], [0, 1]]
    share = (torch.tensor(v) @ torch.tensor(t).T).softmax(-1).mean(0)
    assert share.tolist() == pytest.approx([0.7261, 0.0983, 0.1756], abs=1e-4)
    assert raters(prompt(v, t)).tolist() == [[False, False, True, False, False]]
    # Text before the image does not vote, whatever it says.
    assert raters(prompt(v, [[9.0, 9], *t], before=1)).tolist() == [[False, False, False, True, False, False]]
    assert raters(prompt(v, t, before=3)).tolist() == [[True, False, False, False, False]], "the image stands last"
    assert raters(prompt(v, [[1.0, 1]] * 3)).tolist() == [[False, False, True, True, True]], "all alike: all are raters"


@pytest.mark.parametrize(("d", "m", "c"), [(276, 83, 9), (109, 33, 4), (94, 29, 3)])
def test_recycle_counts(d, m, c):
    n = d + 20
    g = torch.Generator().manual_seed(0)
    visual = torch.ones(1, n, dtype=torch.bool)
    site = LayerSite(x=torch.randn(1, n, 4, generator=g), visual=visual)
    scores = torch.rand(1, n, generator=g)
    stays = site.best_visual(scores, 20)
    found = recycled(site, stays, scores, 0.3, 10)
    assert found.slots == 20 + c
    assert sum(len(group) for group in found.groups()[0]) == 20 + m
    best = scores.masked_fill(stays, -1).argsort(descending=True)[0, :m].tolist()
    assert {j for group in found.groups()[0] for j in group} - set(stays[0].nonzero().flatten().tolist()) == set(best)


@pytest.mark.parametrize(
    ("average", "kept", "mean"),
    [
        (192, [309, 204, 113], 206.5),
        (128, [312, 117, 39], 145.4),
        (96, [249, 55, 27], 114.1),
        (64, [82, 32, 18], 82.25),
    ],
)
def test_tables(average, kept, mean):
    method = SparseVLM(average=average)
    n, found = 576, []
    for layer in (2, 6, 15):
        site = LayerSite(
            x=torch.zeros(1, n, 2), visual=torch.ones(1, n, dtype=torch.bool), initial=(576,), layer=layer + 1
        )
        stays = method.kept(site, site.visual)[0]
        lost = n - stays
        members = int(0.3 * lost) + 1
        n = stays + members // 10 + 1
        found.append(n)
    assert found == kept
    layers = [576] * 3 + [kept[0]] * 4 + [kept[1]] * 9 + [kept[2]] * 16
    assert sum(layers) / 32 == pytest.approx(mean, abs=0.05)


def test_rank_budgets():
    ones = LayerSite(x=torch.zeros(1, 576, 2), visual=torch.ones(1, 576, dtype=torch.bool), layer=3)

    class Ranked(SparseVLM):
        def ranks(self, site, rows):
            return [14]

    assert Ranked(budget="scale").kept(ones, ones.visual) == (189,)
    assert Ranked(budget="scale", average=128).kept(ones, ones.visual) == (132,)
    assert Ranked(budget="scale", average=64).kept(ones, ones.visual) == (11,)
    assert Ranked(budget="rank", strength=0.5).kept(ones, ones.visual) == (576 - 281,)
    assert Ranked(budget=(0.25, 7, 3)).kept(ones, ones.visual) == (144,)


def test_the_default_is_the_table_where_images_are_those_of_llava_1_5():
    class Ranked(SparseVLM):
        def ranks(self, site, rows):
            return [14] * len(site.counts)

    def kept(n, first=None, **parameters):
        site = LayerSite(
            x=torch.zeros(len(n), max(n), 2), visual=torch.arange(max(n)) < torch.tensor(n).unsqueeze(1), initial=first,
            mask=torch.arange(max(n)) < torch.tensor(n).unsqueeze(1), layer=3,
        )  # fmt: skip
        return Ranked(**parameters).kept(site, site.visual)

    assert kept([576]) == (300,)
    assert kept([309], (576,)) == (300,), "what there was first says which"
    assert kept([1152]) == (600,), "two images"
    assert kept([100, 576, 0]) == (100 - 43, 300, 0)
    assert kept([100], budget="table") == (52,)
    assert kept([576], budget="rank") == (576 - 281,)
    assert kept([576], layers=(2, 6)) == (576 - 281,), "the table has three layers"
    assert SparseVLM().budget == "auto"


def test_rank_of_the_attention():
    site = layer_site()
    rows = raters(site.prompt)
    heads = site.attention_of("before")
    found = SparseVLM(budget="rank").ranks(site, rows)
    q, k = heads.q, heads.k.repeat_interleave(2, 1)
    for i in range(3):
        seen = torch.ones(17, 17).tril().bool() & site.mask[i]
        a = (q[i] @ k[i].mT / 2).masked_fill(~seen, -torch.inf).softmax(-1).mean(0)
        p = a[rows[i]][:, site.visual[i]]
        assert found[i] == int(torch.linalg.matrix_rank(p))
        expected = p.mean(0)
        torch.testing.assert_close(site.row_scores(rows, of="before")[i, site.visual[i]], expected)


def test_without_recycling_the_best_stay():
    site = layer_site()
    method = SparseVLM(recycle=0.0, budget=(4, 3, 2))
    found = method.reduce(site)
    scores = site.row_scores(raters(site.prompt), of="before")
    for i, row in enumerate(LAYOUT):
        visual = [j for j, c in enumerate(row) if c == "v"]
        best = sorted(sorted(visual, key=lambda j: -float(scores[i, j]))[:4])
        assert [j + 17 for j in columns_kept(found, i) if row[j] == "v"] == best
    assert found.mode == "keep"
    priority = SparseVLM(recycle=0.0, budget=(4, 3, 2), heads="priority").scores(site, raters(site.prompt))
    assert priority.shape == scores.shape
    assert not torch.equal(priority, scores)


def test_recycled_tokens_are_means_at_their_centre():
    site = layer_site(ALL)
    found = SparseVLM(budget=(4, 3, 2), recycle=1.0, cluster=4).reduce(site)
    made = found.merge(site.x)
    merged = 0
    for slot, members in enumerate(found.groups()[0]):
        torch.testing.assert_close(made[0, slot], site.x[0, members].mean(0))
        merged += len(members) > 1
    assert merged
    assert found.slots == 5 + 4 + 3, "text, kept, clusters of eight tokens"


@pytest.mark.parametrize(
    "method",
    [SparseVLM(), SparseVLM(recycle=0.0), SparseVLM(budget="rank"), SparseVLM(budget="scale", average=64),
     SparseVLM(budget=(0.5, 0.3, 0.1), heads="priority")],
)  # fmt: skip
def test_laws(method):
    check_laws(method, SparseVLM(layers=(4, 6, 15)), 3)


def test_density_peaks():
    x = torch.tensor([[0.0], [0.1], [0.2], [5.0], [5.1], [9.0]])[None]
    found = density_peaks(x, 2, 2)
    assert found.centre.tolist() == [[0, 3]], "a point of low density is no centre, however far"
    assert found.group.tolist() == [[0, 0, 0, 1, 1, 1]]
    same = density_peaks(torch.ones(1, 4, 2), 2, 2)
    assert same.centre.tolist() == [[0, 1]]
    assert same.group.tolist() == [[0, 1, 0, 0]]
    g = torch.Generator().manual_seed(0)
    x = torch.randn(3, 20, 4, generator=g)
    both = density_peaks(x, 5, 5)
    for i in range(3):
        alone = density_peaks(x[i : i + 1], 5, 5)
        assert torch.equal(alone.centre, both.centre[i : i + 1])
        assert torch.equal(alone.group, both.group[i : i + 1])
        assert both.group[i, both.centre[i]].tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(
    ("parameters", "match"),
    [
        ({"layers": ()}, "layers must be increasing"),
        ({"layers": (6, 2)}, "layers must be increasing"),
        ({"layers": (2, 6), "budget": "table"}, "the table has numbers for three layers"),
        ({"average": 100}, "average is 100; allowed are 192, 128, 96, 64"),
        ({"budget": "scale", "average": 96}, "average is 96"),
        ({"budget": "half"}, "budget is 'half'"),
        ({"budget": (5, 4)}, "budget must name a number or share for each of 3"),
        ({"budget": (5, 4, 0)}, r"budget\[2\] must be a number of tokens"),
        ({"strength": 0}, "strength must lie"),
        ({"recycle": 2}, "recycle must lie"),
        ({"cluster": 0}, "cluster must be"),
        ({"heads": "max"}, "heads is 'max'"),
    ],
)
def test_bad_parameters(parameters, match):
    with pytest.raises(ValueError, match=match):
        tokred.make("sparsevlm", **parameters)


def test_depth_is_checked():
    with pytest.raises(ValueError, match="is 16, but the model has 16"):
        SparseVLM().check(16)
    SparseVLM().check(17)
