"""HoliTom: the card's examples, the segments against all partitions, and counts."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import tokred
from tests.vlm import hosts, layered
from tests.vlm.visual import kept
from tokred.methods.vlm.holitom import segmented
from tokred.vlm import VisualSite, clips
from tokred.vlm.tools.cluster import density_peaks
from tokred.vlm.tools.video import shares

ROWS = torch.tensor([[0.9, 0.9, 0.2, 0.9], [0.9, 0.9, 0.9, 0.1], [0.2, 0.3, 0.9, 0.2], [0.9, 0.1, 0.9, 0.9]])


def test_segments_of_the_worked_example():
    saved, found = segmented(ROWS > 0.8, 1024)
    assert saved == 7
    assert found == [(0, 2), (3, 4)]
    assert 0.25 * 20 / (20 - saved) == pytest.approx(0.3846, abs=1e-4)


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 7), st.integers(1, 5), st.integers(0, 10**6), st.sampled_from([2, 3, 1024]))
def test_segments_are_the_best_of_all_partitions(frames, cells, seed, longest):
    static = torch.rand(frames - 1, cells, generator=torch.Generator().manual_seed(seed)) < 0.7
    best = -1
    for cuts in itertools.product((False, True), repeat=frames - 1):
        ends = [t for t in range(frames - 1) if cuts[t]] + [frames - 1]
        starts = [0] + [e + 1 for e in ends[:-1]]
        if any(e - s >= longest for s, e in zip(starts, ends, strict=True)):
            continue
        best = max(
            best, sum(int(static[s:e].all(0).sum()) * (e - s) for s, e in zip(starts, ends, strict=True) if e > s)
        )
    saved, found = segmented(static, longest)
    assert saved == best
    assert [t for s, e in found for t in range(s, e + 1)] == list(range(frames))
    assert segmented(static[:-1], longest)[0] <= saved if frames > 1 else saved == 0


def test_clusters_of_the_worked_example():
    x = torch.tensor([[0, 0], [0, 1], [1.2, 0], [10, 10], [10, 11.1], [5, 5]])[None]
    found = density_peaks(x, 2, 2)
    assert found.centre.tolist() == [[0, 3]]
    assert found.group.tolist() == [[0, 0, 0, 1, 1, 0]]
    for beta, expected in ((0.6, [[0.8267, 0.8], [10, 10.44]]), (None, [[1.55, 1.5], [10, 10.55]])):
        share = shares(found.group, found.centre, beta)[0]
        values = [(share[g, None] * x[0, g]).sum(0).tolist() for g in ([0, 1, 2, 5], [3, 4])]
        assert values == [pytest.approx(v, abs=1e-3) for v in expected]


def clip(x: torch.Tensor, scores: torch.Tensor | None = None) -> VisualSite:
    frames, cells = x.shape[:2]
    scores = torch.rand(frames, cells, generator=torch.Generator().manual_seed(0)) if scores is None else scores
    return VisualSite(x=x.flatten(0, 1)[None], received=scores.view(1, 1, -1), frames=frames, grid=(1, cells))


def test_frames_that_are_alike_are_one():
    x = torch.randn(1, 6, 4, generator=torch.Generator().manual_seed(0)).repeat(4, 1, 1)
    found = tokred.HoliTom(budget=0.25).reduce(clip(x))
    assert kept(found) == list(range(6)), "one segment, all of it static, which meets the budget"
    assert found.groups()[0] == [[j, 6 + j, 12 + j, 18 + j] for j in range(6)]
    torch.testing.assert_close(found.merge(clip(x).x)[0], x[0])
    half = tokred.HoliTom(budget=0.125).reduce(clip(x))
    assert half.slots == 3


def test_without_static_places_the_best_of_every_frame_stay():
    x = torch.randn(3, 8, 4)
    site = clip(x)
    found = kept(tokred.HoliTom(budget=0.25, tau=1.0).reduce(site))
    best = site.column_scores().view(3, 8).topk(2).indices.sort(1).values + 8 * torch.arange(3)[:, None]
    assert found == best.flatten().tolist()


@settings(max_examples=30, deadline=None)
@given(
    st.integers(1, 6),
    st.integers(1, 9),
    st.sampled_from([0.1, 0.3, 0.6]),
    st.sampled_from([0.0, 0.5]),
    st.integers(0, 10**6),
)
def test_counts(frames, cells, budget, contextual, seed):
    g = torch.Generator().manual_seed(seed)
    still = torch.rand(frames, cells, 1, generator=g) < 0.7
    x = torch.randn(1, cells, 5, generator=g) + torch.where(still, 0.02, 2.0) * torch.randn(
        frames, cells, 5, generator=g
    )
    site = clip(x)
    method = tokred.HoliTom(budget=budget, contextual=contextual)
    static = torch.nn.functional.cosine_similarity(x[1:], x[:-1], dim=-1) > 0.8
    saved, segments = segmented(static, 1024)
    n = frames * cells
    share = min(1, budget * n / (n - saved))
    expected = 0
    for s, e in segments:
        same = int(static[s:e].all(0).sum()) if e > s else 0
        expected += round(same * share) + (e - s + 1) * math.ceil(round((cells - same) * share, 9))
    if n > 1:
        found = method.reduce(site)
        assert len(kept(found)) == expected <= method.kept(frames, cells)
        assert found.merge(site.x).isfinite().all()


def test_what_is_merged_in_the_language_model():
    """(4, 0) takes (2, 0), then (0, 2)."""
    h = torch.tensor([[2.0, 0], [0, 2], [4, 0]])
    for merge, expected in (("sequential", [1.5, 1.0]), ("mean", [2.0, 2 / 3])):
        merged, own = tokred.HoliTomLayer(merge=merge).weights(torch.tensor([0, 0]), 1)
        value = merged @ h[:2] + own[0] * h[2]
        assert value.tolist() == pytest.approx(expected)
    merged, own = tokred.HoliTomLayer().weights(torch.tensor([1, 0, 1, 1]), 3)
    assert merged.tolist() == [1 / 8, 1 / 2, 1 / 4, 1 / 2]
    assert own.tolist() == [1 / 2, 1 / 8, 1]


@pytest.mark.parametrize("merge", ["sequential", "mean"])
def test_laws_inside_the_language_model(merge):
    layered.check_laws(
        tokred.HoliTomLayer(layer=3, merge=merge), tokred.HoliTomLayer(layer=3, ratio=0.0, merge=merge), 3
    )


@torch.no_grad()
@pytest.mark.parametrize("host", ["onevision_video", pytest.param("llava", marks=pytest.mark.hosts)])
def test_both_stages(host):
    model: Any = hosts.build(host)
    rows: hosts.Rows = [[3, "image", 5]] if host == "onevision_video" else [[3, *["image"] * 3, 5]]
    batch = hosts.prompts(host, rows)
    stages = [tokred.make("holitom", budget=0.5), tokred.make("holitom_layer", layer=2)]
    with tokred.applied(model, stages):
        if host == "llava":
            with clips([[3]]):
                model(**batch)
        else:
            model(**batch)
        left = [row.visual[0] for row in tokred.report(model).layers]
    assert left[0] == left[1] > left[2] == left[3] == round(left[0] / 2)


@pytest.mark.parametrize(
    ("wrong", "match"),
    [
        ({"budget": 0.0}, "budget"),
        ({"longest": 1}, "longest"),
        ({"beta": 2.0}, "beta"),
        ({"contextual": -1.0}, "contextual"),
    ],
)
def test_bad_parameters(wrong, match):
    with pytest.raises(ValueError, match=match):
        tokred.make("holitom", **wrong)
