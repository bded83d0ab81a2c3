"""StreamingTOM and STC: the card's examples, and the laws of methods that see frames one by one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import tokred
from tests.vlm.visual import kept
from tokred.core.registry import methods as registered
from tokred.methods.vlm.stc import STC
from tokred.methods.vlm.streamingtom import StreamingTOM
from tokred.vlm import VisualSite
from tokred.vlm.causal import in_a_row, is_causal

NAMES = sorted(n for n, cls in registered.of("projector").items() if is_causal(cls))

BEFORE = torch.tensor([[1.0, 0], [1, 0], [0, 1], [0, 1], [1, 1], [1, 1]])
NOW = torch.tensor([[1, 0.05], [1, 0.1], [1, 0.2], [0, 1], [1, 1.1], [-1, 1]])
SALIENCY = torch.tensor([0.1, 0.2, 0.3, 0.15, 0.2, 0.05])


def frame(x: Tensor, score: Tensor | None = None) -> VisualSite:
    received = None if score is None else score[None, None]
    return VisualSite(x=x[None], received=received, grid=(1, len(x)), frames=1)


def test_streamingtom_worked_example():
    method = StreamingTOM(budget=3)
    first, step = method.step((), frame(BEFORE, SALIENCY))
    assert kept(step) == [1, 2, 4], "all of a first frame is dynamic"
    state, step = method.step(first, frame(NOW, SALIENCY))
    assert step.groups()[0] == [[0, 1], [2], [3, 4]]
    torch.testing.assert_close(step.merge(NOW[None])[0], torch.tensor([[1, 0.075], [1, 0.2], [0.5, 1.05]]))
    assert step.sizes()[0].tolist() == [2, 1, 2]
    assert torch.equal(state[0][0], NOW), "the next frame is compared with this one before its reduction"


def test_streamingtom_still_and_cut():
    method, x, score = StreamingTOM(budget=3), torch.randn(6, 8, generator=torch.Generator().manual_seed(0)), SALIENCY
    state, _ = method.step((), frame(x, score))
    _, still = method.step(state, frame(x, score))
    assert still.slots == 3
    assert sum(map(len, still.groups()[0])) == 6, "every token of a still frame lives on"
    _, cut = method.step(state, frame(-x, score))
    assert kept(cut) == [1, 2, 4], "the salient ones alone"
    drift, gone = x, 0
    for _ in range(20):  # below the threshold from frame to frame, and far in the end
        state, _ = method.step((), frame(drift, score))
        drift = torch.nn.functional.normalize(drift + 0.1 * torch.roll(x, 1, 0), dim=-1)
        gone += int(method.step(state, frame(drift, score))[1].source.shape[-1] == 0)
    assert gone == 0


def test_streamingtom_without_the_towers_attention():
    x = torch.tensor([[3.0, 0], [0, 1], [2, 2], [0, 0.5]])
    found = StreamingTOM(budget=2, saliency="norm").step((), frame(x))[1]
    assert kept(found) == [0, 2]
    assert next(StreamingTOM().variants())[1] == StreamingTOM(saliency="norm")


def test_stc_worked_example():
    z = torch.tensor([[1, 0], [1, 0.1], [0, 1], [0.9, 0.2]])
    history = torch.tensor([[[1, 0], [1, 0.2]]])
    found = STC(budget=2).novelty(z[None], history)[0]
    torch.testing.assert_close(found, torch.tensor([0.0462, 0.0257, 0.7457, 0.0138]), atol=5e-5, rtol=0)
    alone = STC(budget=2).novelty(z[None], None)[0]
    torch.testing.assert_close(alone, torch.tensor([0.0875, 0.0513, 0.5909, 0.0205]), atol=5e-5, rtol=0)
    state, step = STC(budget=2).step((history,), frame(z))
    assert kept(step) == [0, 2]
    torch.testing.assert_close(state[0], torch.cat([history, z.mean(0)[None, None]], 1))
    assert kept(STC(budget=2).step((), frame(z))[1]) == [0, 2]


def test_stc_remembers_so_many_frames():
    method, state = STC(budget=1, window=3), ()
    for t in range(5):
        state, _ = method.step(state, frame(torch.full((2, 3), float(t + 1))))
    assert state[0][0, :, 0].tolist() == [3, 4, 5]


def clip(frames: int = 5, b: int = 2, cells: int = 8, seed: int = 0) -> VisualSite:
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(b, 1, cells, 6, generator=g) + 0.3 * torch.randn(b, frames, cells, 6, generator=g)
    scores = torch.rand(b, 2, frames * cells, generator=g)
    return VisualSite(x=x.flatten(1, 2), received=scores, grid=(2, 4), frames=frames)


def part(site: VisualSite, first: int, last: int, cells: int = 8) -> VisualSite:
    some = slice(first * cells, last * cells)
    received = site._values["received"][..., some]
    return VisualSite(x=site.x[:, some], received=received, grid=(2, 4), frames=last - first)


def equal(a: Any, b: Any, x: Tensor) -> None:
    assert torch.equal(a.index, b.index)
    assert torch.equal(a.merge(x), b.merge(x))


@pytest.mark.parametrize("name", NAMES)
def test_frame_by_frame_is_the_clip(name):
    """However the frames are handed over; and no later frame, and no other stream, changes what came out before."""
    method, site = tokred.make(name, budget=3), clip()
    whole = method.reduce(site)
    state, found = (), []
    for t in range(5):
        before = tuple(x.clone() for x in state)
        after, step = method.step(state, part(site, t, t + 1))
        assert all(torch.equal(a, b) for a, b in zip(before, state, strict=True)), "a state is never written into"
        again, twice = method.step(state, part(site, t, t + 1))
        equal(step, twice, part(site, t, t + 1).x)
        assert all(torch.equal(a, b) for a, b in zip(after, again, strict=True))
        assert step.slots == 3
        state, found = after, [*found, step]
    equal(in_a_row(found), whole, site.x)
    early = method.reduce(part(site, 0, 3))
    assert torch.equal(early.index, whole.index[:, :24])
    for i in range(2):
        one = VisualSite(x=site.x[i : i + 1], received=site._values["received"][i : i + 1], grid=(2, 4), frames=5)
        assert torch.equal(method.reduce(one).index[0], whole.index[i])
        assert kept(method.reduce(one)) == kept(whole, i)


@pytest.mark.parametrize("name", NAMES)
def test_frames_of_no_more_tokens_stay_whole(name):
    assert tokred.make(name, budget=8).reduce(clip()).trivial
    assert tokred.make(name, budget=99).kept(4, 8) == 32


@pytest.mark.parametrize(
    ("name", "given", "match"),
    [
        ("streamingtom", {"budget": 0}, "budget must be a number of tokens"),
        ("streamingtom", {"tau": "high"}, "tau must be a finite number"),
        ("streamingtom", {"saliency": "colour"}, "saliency"),
        ("stc", {"alpha": 1.5}, "alpha must lie in"),
        ("stc", {"window": 0}, "window must be"),
    ],
)
def test_bad_parameters(name, given, match):
    with pytest.raises(ValueError, match=match):
        tokred.make(name, **given)
