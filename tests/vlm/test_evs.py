"""EVS: the card's example and the published definition, and the baseline of fewer frames."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import tokred
from tokred.vlm import VisualSite

FRAMES = torch.tensor(
    [[[1, 0], [1, 0], [0, 1], [1, 1]], [[1, 0], [0, 1], [0, 1], [1, 1]], [[1, 0.1], [0, 1], [1, 0], [1, 1]]]
)  # fmt: skip


def kept(x: torch.Tensor, ratio: float) -> list[int]:
    site = VisualSite(x=x.flatten(0, 1)[None], frames=x.shape[0], grid=(1, x.shape[1]))
    return tokred.EVS(ratio=ratio).reduce(site).representative[0].tolist()


def test_worked_example():
    assert kept(FRAMES, 0.5) == [0, 1, 2, 3, 5, 10]
    assert kept(FRAMES, 0.6) == [0, 1, 2, 3]
    # The next to stay is the one that turned a little.
    assert kept(FRAMES, 0.4) == [0, 1, 2, 3, 5, 8, 10]


def test_counts_are_those_that_engines_size_prompts_by():
    assert tokred.EVS(ratio=0.9).kept(10, 10) == 10
    assert tokred.EVS(ratio=0.9).kept(20, 5) == 9, "int(100 * (1 - 0.9)), in floating point"
    assert tokred.EVS(ratio=0.75).kept(32, 196) == 1568
    assert tokred.EVS(ratio=0.0).kept(3, 4) == 12
    assert tokred.EVS(ratio=0.99).kept(3, 4) == 4


def test_still_frames_leave_the_first_and_then_the_earliest():
    x = torch.randn(1, 5, 8).repeat(4, 1, 1)
    assert kept(x, 0.6) == list(range(8))


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 6), st.integers(1, 6), st.sampled_from([0.1, 0.3, 0.5, 0.75, 0.9]), st.integers(0, 10**6))
def test_equals_the_published_definition(frames, cells, ratio, seed):
    x = torch.randn(frames, cells, 6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    change = torch.full((frames, cells), 255.0, dtype=torch.float64)
    change[1:] = 1 - F.cosine_similarity(x[1:], x[:-1], dim=-1)
    count = max(cells, int(frames * cells * (1 - ratio)))
    order = change.flatten().argsort(descending=True, stable=True)[:count]
    assert kept(x, ratio) == order.sort().values.tolist()
    assert kept(7 * x, ratio) == kept(x, ratio)


def test_two_videos_of_a_prompt_are_apart():
    """The first frame of the second is not compared with the last of the first."""
    x = FRAMES.flatten(0, 1)
    site = VisualSite(x=torch.stack([x, x.flip(0)]), frames=3, grid=(2, 2))
    found = tokred.EVS(ratio=0.6).reduce(site).representative
    assert found.tolist() == [[0, 1, 2, 3]] * 2


def test_fewer_frames():
    site = VisualSite(x=torch.randn(2, 24, 3), frames=8, grid=(1, 3))
    found = {n: tokred.UniformFrames(budget=n).reduce(site).representative[0] for n in (3, 6, 12)}
    stay = {n: (rows // 3).unique().tolist() for n, rows in found.items()}
    assert stay == {3: [4], 6: [2, 6], 12: [1, 3, 5, 7]}
    assert tokred.UniformFrames(budget=1).kept(8, 3) == 3, "at least a frame"
    assert tokred.UniformFrames(budget=0.25).kept(8, 3) == 6


@pytest.mark.parametrize("ratio", [1.0, -0.1])
def test_bad_parameters(ratio):
    with pytest.raises(ValueError, match=r"ratio must lie in \[0, 1\)"):
        tokred.make("evs", ratio=ratio)
