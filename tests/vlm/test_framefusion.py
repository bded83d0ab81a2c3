"""FrameFusion: the card's examples, rounds by hand, and both stages on tiny models."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch
from torch import Tensor

import tokred
from tests.vlm import hosts, layered, oracle
from tests.vlm.visual import kept
from tokred.core.attention import Attention
from tokred.methods.vlm.framefusion import DONE, KEEP, MERGE, excess, fuse
from tokred.vlm import LayerSite, VisualSite, clips

# Two places, four frames, as the card has them.
CLIP = torch.tensor([[[1, 0], [0, 1]], [[0.9, 0.1], [1, 0]], [[0.8, 0.3], [0.9, 0.1]], [[-1, 0], [0.8, 0.2]]])
MOMENT = torch.tensor([[t, j] for t in range(4) for j in range(2)])


@pytest.mark.parametrize(("shares", "expected"), [([], 0.7), ([0.4], 0.5185), ([0.4, 0.2], 0.4135)])
def test_the_share_that_has_to_leave(shares, expected):
    left, used = 1.0, 0.0
    for share in shares:
        left *= 1 - share
        used += left
    assert excess(0.3, 28, len(shares), used, left) == pytest.approx(expected, abs=1e-4)


def test_a_round_of_the_worked_example():
    found = fuse(CLIP.flatten(0, 1), MOMENT, 0.7, 0.6, 0.1)
    assert found.root.tolist() == [0, 1, 0, 3, 0, 3, 6, 3]
    assert found.state == MERGE
    site = VisualSite(x=CLIP.flatten(0, 1)[None], frames=4, grid=(1, 2))
    step = tokred.FrameFusion().reduce(site)
    assert kept(step) == [0, 1, 3, 6]
    torch.testing.assert_close(
        step.merge(site.x)[0], torch.tensor([[0.9, 0.4 / 3], [0, 1], [0.9, 0.1], [-1, 0]]), rtol=1e-5, atol=1e-6
    )
    assert excess(0.3, 28, 1, 0.5, 0.5) == pytest.approx(0.4148, abs=1e-4)


def test_where_too_many_are_alike_the_most_similar_merge_and_that_is_all():
    x = CLIP.flatten(0, 1)
    found = fuse(x, MOMENT, 0.25, 0.6, 0.1)
    assert found.state == DONE
    assert [i for i, r in enumerate(found.root.tolist()) if r != i] == [2, 5], "of .9939, .9694, .9939 and .991"
    assert fuse(x, MOMENT, 0.7, 0.6, 0.6).state == KEEP, "half of them is less than was asked for to go on"
    assert fuse(x, MOMENT, 0.0, 0.6, 0.1).root.tolist() == list(range(8))


def test_tokens_merge_with_the_one_before_that_is_left():
    """The first frame's token has left, and the third is compared with what the first two became."""
    x, moment = torch.tensor([[1.0, 0], [0, 1], [1, 0.1]]), torch.tensor([[0, 0], [1, 1], [3, 0]])
    assert fuse(x, moment, 0.9, 0.6, 0.1).root.tolist() == [0, 1, 0]
    shuffled = fuse(x[[2, 0, 1]], moment[[2, 0, 1]], 0.9, 0.6, 0.1)
    assert shuffled.root.tolist() == [1, 1, 2], "whatever the order that they come in"


def site(x: Tensor, scores: Tensor, layer: int, rows: dict[str, Tensor] | None = None, depth: int = 6) -> LayerSite:
    """One clip between a word and another, with attention of the last word to its tokens in proportion to scores."""
    b, n, c = x.shape
    whole = torch.cat([torch.ones(b, 1, c), x, torch.ones(b, 1, c)], 1)
    k = torch.cat([torch.zeros(b, 1), scores.log(), torch.zeros(b, 1)], 1)[:, None, :, None]
    moment = torch.cat([torch.zeros(1, 2), MOMENT, torch.zeros(1, 2)]).long()[: n + 2].expand(b, -1, -1)
    visual = torch.tensor([[False] + [True] * n + [False]]).expand(b, -1)
    before = Attention(torch.ones(b, 1, n + 2, 1), k, scale=1.0, causal=True)
    return LayerSite(x=whole, visual=visual, moment=moment, before=before, layer=layer, depth=depth, rows=rows)


def test_keeping_follows_merging_and_meets_the_cost():
    x, scores = CLIP.flatten(0, 1)[None], torch.tensor([[0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8]])
    method = tokred.FrameFusionLayer(cost=0.5, threshold=2.0)
    first = site(x, scores, 1)
    assert method.reduce(first).trivial, "nothing is alike"
    second = site(x, scores, 2, first.rows)
    step = method.reduce(second)
    # 3 layers' worth, of which two have run on all: a quarter for each of the other four.
    assert kept(step) == [0, 7, 8, 9]
    rows = {name: state.gather(1, step.representative) for name, state in second.rows.items()}
    third = site(x[:, [6, 7]], scores[:, [6, 7]], 3, rows)
    assert method.reduce(third).trivial, "it is done"
    assert not method.tokens(8, tokred.Place(1, 6)) < 8
    assert method.tokens(8, tokred.Place(2, 6)) == 2


def test_what_merged_before_the_language_model_counts():
    clip = VisualSite(x=CLIP.flatten(0, 1)[None], frames=4, grid=(1, 2))
    step = tokred.FrameFusion(stop=0.6).reduce(clip)
    rows = {
        name: torch.nn.functional.pad(s.gather(1, step.representative), (1, 1), value=-1)
        for name, s in clip.rows.items()
    }
    x = step.merge(clip.x)
    here = site(x, torch.tensor([[0.4, 0.1, 0.2, 0.3]]), 1, rows)
    # Half are left for 1 of 6 layers; 2.4 layers' worth are allowed: 1.9 for the other five, on .38 of 8.
    found = tokred.FrameFusionLayer(cost=0.4).reduce(here)
    assert kept(found) == [0, 1, 3, 4, 5]


def test_pictures_are_judged_apart():
    """Each of two samples alone gives what both together give; an image beside a clip has its own state."""
    g = torch.Generator().manual_seed(0)
    x, scores = torch.randn(2, 8, 4, generator=g), torch.rand(2, 8, generator=g)
    method = tokred.FrameFusionLayer(cost=0.5, threshold=0.0)
    both, whole = method.reduce(site(x, scores, 1)), site(x, scores, 1).x
    for i in range(2):
        alone = method.reduce(site(x[i : i + 1], scores[i : i + 1], 1))
        assert kept(alone) == kept(both, i)
        mask = slice(None) if both.mask is None else both.mask[i]
        torch.testing.assert_close(alone.merge(whole[i : i + 1])[0], both.merge(whole)[i, mask])


def test_laws_inside_the_language_model():
    method = tokred.FrameFusionLayer(layer=3, cost=0.5)
    assert tokred.FrameFusionLayer(cost=1.0).reduce(layered.layer_site(layer=3)).trivial
    assert method.reduce(layered.layer_site(layer=2)).trivial


# A host that takes videos as what they are and one that takes frames as images; the others are for the matrix.
HOSTS = [
    "onevision_video",
    *(pytest.param(h, marks=pytest.mark.hosts) for h in ("qwen2_5_vl_video", "internvl", "llava")),
]


def stages(cost: float, threshold: float) -> list[Any]:
    terms = {"cost": cost, "threshold": threshold}
    return [tokred.make("framefusion", **terms), tokred.make("framefusion_layer", **terms)]


@torch.no_grad()
@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize("threshold", [0.0, 2.0])
def test_both_stages(host, threshold):
    model: Any = hosts.build(host)
    frames = host in ("internvl", "llava")
    rows: hosts.Rows = [[3, *["image"] * (3 if frames else 1), 5], [2, *["image"] * (3 if frames else 1), 4]]
    batch, runs = hosts.prompts(host, rows), [[3], [3]]
    y = model(**batch).logits
    with tokred.applied(model, stages(0.6, threshold)), clips(runs) if frames else contextlib.nullcontext():
        model(**batch)
        left = [row.visual[0] for row in tokred.report(model).layers]
        n = int((batch["input_ids"][0] == batch["input_ids"][0].mode().values).sum())
        out = oracle.generate(model, batch, max_new_tokens=3)
    assert left == sorted(left, reverse=True)
    assert left[-1] < n
    assert all(step.isfinite().all() for step in out.logits)
    if threshold > 1:
        # Nothing merges: one layer on all, then the rest of 2.4 layers' worth for three.
        assert left[0] > left[1] == left[2] == left[3]
    assert torch.equal(model(**batch).logits, y)


@pytest.mark.parametrize("host", HOSTS)
def test_dropping_equals_masking_where_nothing_merges(host):
    model: Any = hosts.build(host)
    frames = host in ("internvl", "llava")
    batch = hosts.prompts(host, [[3, *["image"] * (2 if frames else 1), 5], [2, *["image"] * (2 if frames else 1), 7]])
    with clips([[2], [2]]) if frames else contextlib.nullcontext():
        oracle.agree(model, hosts.layers(host, model), stages(0.6, 2.0), batch, max_new_tokens=3)


@pytest.mark.parametrize(
    ("wrong", "match"),
    [({"cost": 0.0}, "cost"), ({"threshold": "much"}, "threshold"), ({"stop": 2.0}, "stop"), ({"layer": 0}, "layer")],
)
def test_bad_parameters(wrong, match):
    with pytest.raises(ValueError, match=match):
        tokred.make("framefusion_layer", **wrong)


def test_costs_that_cannot_be_met():
    with pytest.raises(ValueError, match=r"2 layers on all tokens use up.*more than 0\.5"):
        tokred.make("framefusion_layer", cost=0.5).check(4)
    with pytest.raises(ValueError, match="the model has 2 layers"):
        tokred.make("framefusion_layer").check(2)
    tokred.make("framefusion_layer").check(28)
