"""PruneVid: the card's examples; the question's stage by hand and on tiny models."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import tokred
from tests.vlm import hosts, layered, oracle
from tests.vlm.visual import kept
from tokred.adapters.contract import cache_name
from tokred.core.attention import Attention
from tokred.methods.vlm.prunevid import refined, steady
from tokred.vlm import LayerSite, VisualSite


def site(x: torch.Tensor) -> VisualSite:
    return VisualSite(x=x.flatten(0, 1)[None], frames=x.shape[0], grid=(1, x.shape[1]))


def test_labels_become_runs():
    assert refined([0, 0, 1, 0, 2, 2, 1, 1, 0, 1]) == [0, 0, 0, 0, 2, 2, 1, 1, 1, 1]
    assert refined([0, 1, 2, 3]) == [0, 0, 0, 0]
    assert refined([1, 1, 2, 0, 0, 0]) == [1, 1, 0, 0, 0, 0], "the longer side"
    assert refined([3]) == [0]


def test_static_places_of_the_worked_example():
    x = torch.tensor([[[1, 0], [1, 0]], [[1, 0.2], [0, 1]], [[1, -0.2], [1, 1]]])
    assert steady(x).tolist() == pytest.approx([0.9614, 0.4714], abs=1e-4)
    found = tokred.PruneVid().reduce(site(x))
    assert found.groups()[0] == [[0, 2, 4], [1], [3], [5]]
    assert found.merge(site(x).x)[0, 0].tolist() == pytest.approx([1, 0])


def test_frames_that_are_alike_are_one_and_then_half():
    x = torch.randn(1, 20, 8, generator=torch.Generator().manual_seed(0)).repeat(4, 1, 1)
    found = tokred.PruneVid().reduce(site(x))
    assert found.slots == 10
    assert all(i < 20 for i in kept(found))
    assert sorted(len(group) % 4 for group in found.groups()[0]) == [0] * 10
    whole = tokred.PruneVid(clusters=1.0).reduce(site(x))
    assert kept(whole) == list(range(20))
    torch.testing.assert_close(whole.merge(site(x).x)[0], x[0])


def test_small_sets_are_not_clustered():
    x = torch.randn(2, 14, 32, generator=torch.Generator().manual_seed(0))
    assert tokred.PruneVid().reduce(site(x)).slots == 28
    assert tokred.PruneVid(least=13).reduce(site(x)).slots == 14


def test_cuts_are_found():
    g = torch.Generator().manual_seed(0)
    one, two = torch.randn(2, 1, 6, 8, generator=g)
    x = torch.cat([one.repeat(5, 1, 1), two.repeat(3, 1, 1)]) + 0.01 * torch.randn(8, 6, 8, generator=g)
    assert tokred.PruneVid(segments=0.25).runs(x) == [(0, 4), (5, 7)]


@pytest.mark.parametrize("wrong", [{"segments": 0.0}, {"clusters": 2.0}, {"least": 0}, {"neighbours": 0}])
def test_bad_parameters(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        tokred.make("prunevid", **wrong)


def test_sets_are_written_down():
    x = torch.tensor([[[1, 0], [1, 0]], [[1, 0.2], [0, 1]], [[1, -0.2], [1, 1]]])
    here = site(x)
    tokred.PruneVid().reduce(here)
    assert here.rows["prunevid"].tolist() == [[0, 1, 0, 3, 0, 5]], "a static place, and one set for each frame"


def question(rows: torch.Tensor, sets: list[int] | None, images: list[int] | None = None) -> LayerSite:
    """A word, ten visual tokens, and two words of a question whose first head attends to them like ``rows`` ``(2,
    10)``, which add up to less than 1; the second head and the first word attend to something else."""
    logits = torch.zeros(2, 13, 13)
    logits[:, :, 1:] = -30.0  # to the first word
    for i, row in enumerate(rows):
        logits[0, 11 + i, 1:11] = (row / (1 - row.sum())).log()
    q = torch.eye(13).expand(1, 2, -1, -1)
    return LayerSite(
        x=torch.zeros(1, 13, 4),
        visual=torch.tensor([[False] + [True] * 10 + [False] * 2]),
        image=torch.tensor([[0, *(images or [0] * 10), 0, 0]]),
        before=Attention(q, logits.mT[None].contiguous(), scale=1.0, causal=True),
        rows=None if sets is None else {"prunevid": torch.tensor([[-1, *sets, -1, -1]])},
        layer=11,
        depth=28,
    )


ASKED = torch.tensor(
    [
        [0.01, 0.02, 0.03, 0.04, 0.05, 0.06, 0.07, 0.08, 0.09, 0.10],
        [0.20, 0.001, 0.001, 0.001, 0.001, 0.001, 0.001, 0.001, 0.001, 0.001],
    ]
)


def test_a_share_of_each_set_stays():
    here = question(ASKED, [0, 0, 0, 0, 0, 1, 1, 1, 3, 3])
    # Two of the five static ones, one of the three of the first frame, none of the two of the second.
    assert kept(tokred.PruneVidLayer().reduce(here)) == [0, 1, 5, 8, 11, 12]
    assert kept(tokred.PruneVidLayer(alpha=0.5).reduce(here)) == [0, 1, 5, 8, 10, 11, 12]
    assert tokred.PruneVidLayer(alpha=1.0).reduce(here).trivial
    assert kept(tokred.PruneVidLayer().reduce(question(ASKED, None))) == [0, 1, 8, 9, 10, 11, 12], "one set"


def test_a_picture_keeps_a_token():
    here = question(ASKED, list(range(10)), [0] * 4 + [1] * 6)
    assert kept(tokred.PruneVidLayer(alpha=0.9).reduce(here)) == [0, 1, 10, 11, 12]


def test_laws_inside_the_language_model():
    layered.check_laws(tokred.PruneVidLayer(layer=3), tokred.PruneVidLayer(layer=3, alpha=1.0), 3)


OTHERS = ("qwen2_5_vl_video", "llava_next_video")


@torch.no_grad()
@pytest.mark.parametrize("host", ["onevision_video", *(pytest.param(h, marks=pytest.mark.hosts) for h in OTHERS)])
def test_all_layers_hold_what_is_left(host):
    """The prompt runs as if nothing were freed; then every layer sees what the last ones saw."""
    model: Any = hosts.build(host)
    batch = hosts.prompts(host, [[3, "image", 5], [2, "image", 6]])
    length = batch["input_ids"].shape[1]
    stages = [tokred.make("prunevid", least=2), tokred.make("prunevid_layer", layer=2)]
    with tokred.applied(model, stages):
        out = oracle.generate(model, batch, max_new_tokens=4)
        left = [row.columns for row in tokred.report(model).layers]
    cache = out.past_key_values
    assert left[1] > left[2]
    assert {layer.keys.shape[2] for layer in cache.layers} == {left[-1] + 3}
    assert cache.get_seq_length() == length + 3
    with tokred.applied(model, [stages[0], tokred.make("prunevid_layer", layer=2, evict=False)]):
        whole = oracle.generate(model, batch, max_new_tokens=4)
    assert {layer.keys.shape[2] for layer in whole.past_key_values.layers[:2]} == {left[0] + 3}
    assert torch.equal(out.logits[0], whole.logits[0]), "nothing is freed before the prompt has run"
    assert not torch.equal(out.logits[1], whole.logits[1])


@torch.no_grad()
def test_decoding_sees_what_is_left():
    model: Any = hosts.build("onevision_video")
    batch = hosts.prompts("onevision_video", [[3, "image", 5], [2, "image", 6]])
    length, layers = batch["input_ids"].shape[1], hosts.layers("onevision_video", model)
    with tokred.applied(model, tokred.make("prunevid_layer", layer=2)):
        out = oracle.generate(model, batch, max_new_tokens=4)
        cache = cache_name(type(model).forward)
        turn = model(input_ids=out.sequences[:, -1:], **{cache: out.past_key_values}).logits
    (keep,) = oracle.kept(out.past_key_values, length).values()
    with oracle.masked(layers, {2: keep}, None):
        step = model(**batch, use_cache=True)
    with oracle.masked(layers, {0: keep}, None):
        for i in range(4):
            torch.testing.assert_close(step.logits[:, -1], out.logits[i], rtol=1e-4, atol=1e-4)
            token = out.sequences[:, length + i : length + i + 1]
            step = model(input_ids=token, **{cache: step.past_key_values})
    torch.testing.assert_close(turn, step.logits, rtol=1e-4, atol=1e-4)


def test_layers_that_slide_are_refused():
    model = hosts.build("gemma3")
    with pytest.raises(ValueError, match="take evict=False"):
        tokred.apply(model, "prunevid_layer", layer=2)
    tokred.apply(model, "prunevid_layer", layer=2, evict=False)


@pytest.mark.parametrize("wrong", [{"alpha": 0.0}, {"layer": 0}, {"evict": "yes"}])
def test_bad_parameters_of_the_second_stage(wrong):
    with pytest.raises((TypeError, ValueError), match=next(iter(wrong))):
        tokred.make("prunevid_layer", **wrong)
