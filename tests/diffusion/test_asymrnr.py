"""AsymRnR: the card's worked examples and counts, and reduced attention inside of denoisers."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import tokred
from tests.diffusion.tiny import MODELS, inputs, run
from tests.kinds import DENOISERS, each
from tokred.adapters.diffusion.inside import Halves, Inside
from tokred.diffusion.grid import clip_destinations
from tokred.diffusion.site import AttentionSite, SublayerPlace

Q = torch.tensor([[1, 0], [0.9, 0.1], [0, 1], [0.1, 0.8]]).view(1, 1, 4, 2)
K = torch.tensor([[1, 0], [0, 1], [0.8, 0.2], [0.1, 0.9]]).view(1, 1, 4, 2)
V = torch.tensor([1.0, 2, 3, 4]).view(1, 1, 4, 1)


def pairs(rows: list[int], source: list[int], target: list[int]) -> tokred.Reduction:
    parts = (torch.tensor([[values]]) for values in (rows, source, target))
    return tokred.Reduction(*parts, 4, by_size=False)


def attended(halves: Halves, q: torch.Tensor = Q, k: torch.Tensor = K) -> torch.Tensor:
    with Inside(lambda *_: halves, 4) as mode:
        out = F.scaled_dot_product_attention(q, k, V)
    assert mode.seen == 1
    return out.flatten()


def test_the_card_s_attention():
    near = {"rtol": 0, "atol": 2e-6}
    full = torch.tensor([2.320551, 2.357633, 2.647682, 2.608119])
    torch.testing.assert_close(attended(Halves()), full, **near)
    queries = pairs([0, 2], [1, 3], [0, 1])
    expected = torch.tensor([2.339120, 2.339120, 2.628459, 2.628459])
    torch.testing.assert_close(attended(Halves(queries=queries)), expected, **near)
    keys = pairs([0, 1, 2], [3], [1])
    expected = torch.tensor([2.159288, 2.192667, 2.513331, 2.460104])
    torch.testing.assert_close(attended(Halves(keys=keys)), expected, **near)
    expected = torch.tensor([2.307899, 2.346738, 2.670361, 2.622981])
    torch.testing.assert_close(attended(Halves(keys=keys, proportional=True)), expected, **near)


def test_equal_pairs_need_no_bias():
    k, v = K[:, :, [0, 0, 1, 1]], V[:, :, [0, 0, 1, 1]]
    keys = pairs([0, 2], [1, 3], [0, 1])
    out = []
    for proportional in (False, True):
        with Inside(lambda *_, p=proportional: Halves(keys=keys, proportional=p), 4):
            out.append(F.scaled_dot_product_attention(Q, k, v))
    torch.testing.assert_close(*out)
    torch.testing.assert_close(out[0], F.scaled_dot_product_attention(Q, k, v))


@pytest.mark.parametrize(
    ("frames", "grid", "cell", "ratio", "cells", "left"),
    [
        (13, (30, 45), (2, 2, 2), 0.4, 1980, 10530),
        (13, (30, 45), (2, 2, 2), 0.3, 1980, 12285),
        (13, (30, 45), (2, 2, 2), 0.8, 1980, 3510),
        (33, (34, 60), (6, 2, 2), 0.3, 2550, 47124),
        (3, (5, 7), (2, 2, 2), 0.5, 6, 52),
        (3, (5, 7), (2, 2, 2), 0.99, 6, 6),
    ],
)
def test_counts(frames: int, grid: tuple[int, int], cell: Any, ratio: float, cells: int, left: int):
    place = SublayerPlace(frames * math.prod(grid), grid, 1, frames)
    method = tokred.AsymRnR(q=ratio, kv=0, cell=cell)
    assert len(clip_destinations((frames, *grid), cell, None)[1]) == cells
    assert method.side("queries", place) == left == method.left(place)
    assert method.side("keys", place) == place.length


def test_offsets_count_frames_then_rows_then_columns():
    """By hand: which token of each cell is its destination, in a clip that cells do not divide."""
    frames, high, wide, cell = 5, 5, 7, (2, 2, 3)
    offsets = torch.arange(8) * 5 % 12
    expected = []
    for number, offset in enumerate(offsets.tolist()):
        t, y, x = number // 4, number // 2 % 2, number % 2
        dt, dy, dx = offset // 6, offset // 3 % 2, offset % 3
        expected.append(((2 * t + dt) * high + 2 * y + dy) * wide + 3 * x + dx)
    sources, destinations = clip_destinations((frames, high, wide), cell, offsets)
    assert destinations.tolist() == sorted(expected)
    assert sorted([*sources.tolist(), *expected]) == list(range(frames * high * wide))


def heads(frames: int = 3, grid: tuple[int, int] = (5, 7), b: int = 2, seed: int = 0) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    return {name: torch.randn(b, 3, frames * math.prod(grid), 4, generator=g) for name in "qkv"}


def site(given: dict[str, torch.Tensor], side: Any = "queries", frames: int = 3, grid: Any = (5, 7), **more: Any):
    return AttentionSite(None, SublayerPlace(frames * math.prod(grid), grid, 1, frames), side=side, **given, **more)


@pytest.mark.parametrize("metric", ["distance", "cosine", "dot"])
def test_matching_by_hand(metric: str):
    given = heads()
    method = tokred.AsymRnR(q=0.5, kv=0.3, metric=metric)
    for side, name in (("queries", "q"), ("keys", "v")):
        plan = method.reduce(site(given, side, step=5))
        assert plan.slots == method.side(side, SublayerPlace(105, (5, 7), 1, 3))
        dest = plan.representative[..., -6:]
        assert (dest == dest[0, 0]).all(), "one split for all heads and samples"
        kept = dest[0, 0].tolist()
        sources = [i for i in range(105) if i not in kept]
        for b in range(2):
            for h in range(3):
                x = given[name][b, h].double()
                a, c = x[sources], x[kept]
                if metric == "cosine":
                    a, c = F.normalize(a, dim=1), F.normalize(c, dim=1)
                score = -torch.cdist(a, c) if metric == "distance" else a @ c.T
                best, where = score.max(1)
                merged = best.argsort(descending=True, stable=True)[: len(sources) - (plan.slots - 6)]
                expected = {(sources[i], kept[int(where[i])]) for i in merged.tolist()}
                slots = plan.representative[b, h]
                found = {(int(s), int(slots[t])) for s, t in zip(plan.source[b, h], plan.target[b, h], strict=True)}
                assert found == expected
    assert plan.mode == "keep"


def test_draws_are_those_of_a_step():
    given = heads()
    method = tokred.AsymRnR(q=0.5)

    def index(**more: Any) -> torch.Tensor:
        return method.reduce(site(given, **more)).index

    state = torch.get_rng_state()
    assert torch.equal(index(step=3), index(step=3, layer=9)), "the same in all blocks"
    assert not torch.equal(index(step=3), index(step=4))
    assert torch.equal(state, torch.get_rng_state())
    alone = method.reduce(site({k: v[1:] for k, v in given.items()}, step=3))
    assert torch.equal(alone.index[0], index(step=3)[1])


def test_images_have_cells_of_one_frame():
    given = heads(1, (8, 6))
    plan = tokred.AsymRnR(q=0.99).reduce(site(given, frames=1, grid=(8, 6)))
    assert plan.slots == 12
    assert tokred.AsymRnR(cell=(1, 9, 2)).left(SublayerPlace(48, (8, 6), 1)) == 48


@pytest.mark.parametrize("kind", each(list(MODELS), DENOISERS))
def test_queries_alone_and_keys_alone(kind: str):
    model, given = MODELS[kind](), inputs(kind)
    before = run(model, given)
    found = []
    for parameters in ({"q": 0.5, "kv": 0}, {"q": 0, "kv": 0.5}, {"q": 0.5, "kv": 0.5, "combine": "mean",
                       "size_bias": True}):  # fmt: skip
        with tokred.applied(model, "asymrnr", **parameters, first_full=0):
            out = run(model, given)
            assert torch.equal(run(model, given), out)
            report = tokred.report(model)
        assert report.reduced > 0
        assert out.isfinite().all()
        assert F.cosine_similarity(out.flatten(), before.flatten(), 0) > 0.8
        found.append(out)
    assert not torch.equal(found[0], found[1])
    with tokred.applied(model, "asymrnr", q=0, kv=0):
        assert torch.equal(run(model, given), before)


def test_text_rows_change_through_the_keys_alone():
    """Joint attention: with all keys kept, the text's part of the output is what it was."""
    q, k, v = (torch.randn(1, 2, 30, 4, generator=torch.Generator().manual_seed(i)) for i in range(3))
    full = F.scaled_dot_product_attention(q, k, v)
    plan = tokred.AsymRnR(q=0.5).reduce(
        site({"q": q[:, :, :24], "k": k[:, :, :24], "v": v[:, :, :24]}, frames=1, grid=(4, 6))
    )
    with Inside(lambda *_: Halves(queries=plan), 24, 6):
        last = F.scaled_dot_product_attention(q, k, v)
    torch.testing.assert_close(last[:, :, 24:], full[:, :, 24:], rtol=0, atol=1e-6)
    assert not torch.equal(last[:, :, :24], full[:, :, :24])
    turned = [torch.cat([t[:, :, 24:], t[:, :, :24]], 2) for t in (q, k, v)]
    with Inside(lambda *_: Halves(queries=plan, keys=plan), 24, 6, first=True):
        first = F.scaled_dot_product_attention(*turned)
    with Inside(lambda *_: Halves(queries=plan, keys=plan), 24, 6):
        last = F.scaled_dot_product_attention(q, k, v)
    torch.testing.assert_close(first[:, :, 6:], last[:, :, :24])


def test_plans_are_kept():
    model, given = MODELS["sd15"](), inputs("sd15")
    made: list[str] = []
    original = tokred.AsymRnR.reduce

    def counted(self: Any, at: Any) -> tokred.Reduction:
        made.append(at.side)
        return original(self, at)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokred.AsymRnR, "reduce", counted)
        tokred.apply(model, "asymrnr", q=0.5, kv=0.25, refresh=2, first_full=0)
        first = [run(model, {**given, "timestep": t}) for t in (90, 80, 70, 60)]
        assert len(made) == 2 * 2 * 7, "two plans for each of seven attentions, made twice"
        again = [run(model, {**given, "timestep": t}) for t in (90, 80, 70, 60)]
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"q": 1.0}, r"q must lie in \[0, 1\)"),
        ({"kv": "half"}, "kv must be a number"),
        ({"cell": (2, 2)}, "cell must name frames, rows and columns"),
        ({"cell": (0, 2, 2)}, "cell must be an integer of at least 1"),
        ({"metric": "l1"}, "metric is 'l1'"),
        ({"combine": "max"}, "combine is 'max'"),
        ({"size_bias": True}, "size_bias is for combine='mean'"),
        ({"refresh": 0}, "refresh must be an integer of at least 1"),
    ],
)
def test_wrong_parameters(parameters: dict, message: str):
    with pytest.raises((ValueError, TypeError), match=message):
        tokred.AsymRnR(**parameters)
