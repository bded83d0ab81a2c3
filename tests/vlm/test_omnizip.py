"""OmniZip: the card's examples, sites by hand, and Qwen2.5-Omni's thinker."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

import tokred
from tests.vlm.visual import kept
from tokred.vlm import VisualSite
from tokred.vlm.sound import SoundSite, windows_of
from tokred.vlm.tools.cluster import density_peaks


@pytest.mark.parametrize(
    ("rho_v", "shares", "tokens", "expected"),
    [
        (0.6, [0.9, 0.5, 0.7, 0.1], 8, [4, 3, 4, 2]),
        (0.85, [1.0, 0.0, 0.0, 0.0], 10, [3, 1, 1, 1]),
        (0.95, [0.0, 1.0, 0.5], 4, [1, 1, 1]),
        (0.0, [0.3, 0.9], 5, [5, 5]),
        (0.5, [None, 0.2, 0.8], 4, [2, 2, 2]),
    ],
)
def test_budgets_of_the_worked_examples(rho_v, shares, tokens, expected):
    assert tokred.OmniZip(rho_v=rho_v).budgets(shares, [tokens] * len(shares)) == expected


def test_shares_before_they_are_whole():
    found = tokred.OmniZip(rho_v=0.6)._scaled([0.39, 0.55, 0.47, 0.71], [8] * 4)
    assert found == pytest.approx([0.4415, 0.6226, 0.5321, 0.8038], abs=1e-4)


def test_windows_of_the_order_in_the_prompt():
    sound = torch.tensor([c == "a" for c in "vvvaavvvaa"])
    assert windows_of(sound).tolist() == [0] * 5 + [1] * 5


def site(x: Tensor, kinds: str, heard: list[float] | None = None, cells: int = 4) -> SoundSite:
    """A clip whose tokens are seen ("v") or heard ("a")."""
    sound = torch.tensor([c == "a" for c in kinds])
    place = (~sound).long().cumsum(0) - 1
    scores = torch.zeros(1, len(kinds))
    if heard is not None:
        scores[:, sound] = torch.tensor(heard)
    return SoundSite(
        x=x[None], sound=sound, window=windows_of(sound), frames=int((~sound).sum()) // cells,
        moment=torch.stack([place // cells, place % cells], 1), heard=scores,
    )  # fmt: skip


FRAMES = torch.tensor([[1, 0], [0, 1], [1, 1], [5, 5], [1, 0.1], [1, 0], [1, 1.2], [5, 4]])


def test_two_frames_of_the_worked_example():
    method = tokred.OmniZip(rho_v=0.5, neighbours=2)
    with pytest.warns(tokred.NothingRemovedWarning, match="without sound"):
        found = method.reduce(site(FRAMES, "v" * 8))
    assert kept(found) == [0, 1, 5, 7]
    # Tokens 0 and 2 of the second frame go into the first; its third place leaves with what went into it.
    assert found.groups()[0] == [[0, 4], [1], [5], [7]]
    assert found.merge(FRAMES[None])[0, 0].tolist() == pytest.approx([1, 0.05])
    merged = torch.tensor([[1, 0.05], [0, 1], [1, 1.1], [5, 5]])
    assert density_peaks(merged[None], 2, 2).centre.tolist() == [[0, 1]]
    with pytest.warns(tokred.NothingRemovedWarning):
        dropped = tokred.OmniZip(rho_v=0.5, neighbours=2, temporal="drop").reduce(site(FRAMES, "v" * 8))
    assert all(len(group) == 1 for group in dropped.groups()[0])


def test_sound():
    """Ten tokens of sound in two windows: six stay, two of them anchors that take one neighbour each."""
    kinds = "v" * 4 + "a" * 5 + "v" * 4 + "a" * 5
    x = torch.zeros(18, 3)
    x[:, 0] = 1.0  # what is seen
    x[4:9], x[13:18] = torch.tensor([0.0, 1, 0]), torch.tensor([0.0, 1, 0])
    x[6], x[14] = torch.tensor([1.0, 1, 0]), torch.tensor([0.5, 1, 0])
    heard = [0.9, 0.1, 0.1, 0.1, 0.1, 0.8, 0.1, 0.1, 0.7, 0.6]
    here = site(x, kinds, heard)
    method = tokred.OmniZip(0.4, 0.5, rho_min=0.1, rho_max=0.9, anchors=0.2, merges=1, neighbours=2)
    found = method.reduce(here)
    sound = [i for i in kept(found) if here.sound[i]]
    # Salient: 4 | 13, 16, 17. Others: 5 to 8, of which the middle one (2 of 4) stays; 14 and 15, of which 15 does.
    assert sound == [4, 7, 13, 15, 16, 17]
    assert [6, 7] in found.groups()[0], "the one that is most like what is seen"
    assert [14, 15] in found.groups()[0]
    video = [sum(1 for i in kept(found) if not here.sound[i] and here.window[i] == w) for w in range(2)]
    assert video == [1, 3], "more of the second window's sound is salient"


def test_counts_and_order():
    g = torch.Generator().manual_seed(0)
    kinds = ("v" * 8 + "a" * 6) * 3
    x, heard = torch.randn(42, 8, generator=g), torch.rand(18, generator=g).tolist()
    here = site(x, kinds, heard)
    found = tokred.OmniZip(rho_a=0.5, rho_v=0.7, neighbours=2).reduce(here)
    rows = kept(found)
    assert rows == sorted(rows)
    assert sum(bool(here.sound[i]) for i in rows) == 9
    assert sum(not here.sound[i] for i in rows) == round(0.3 * 24)
    assert {int(here.window[i]) for i in rows if not here.sound[i]} == {0, 1, 2}
    assert len(rows) <= tokred.OmniZip(rho_a=0.5, rho_v=0.7).count(42)
    # What the other windows show changes nothing here, as long as what is heard is alike.
    other = x.clone()
    other[:8] = torch.randn(8, 8, generator=g)
    again = tokred.OmniZip(rho_a=0.5, rho_v=0.7, neighbours=2).reduce(site(other, kinds, heard))
    assert [i for i in kept(again) if i >= 14] == [i for i in rows if i >= 14]
    assert tokred.OmniZip(rho_a=0.0, rho_v=0.0).reduce(here).trivial
    for dtype in (torch.float16, torch.bfloat16):
        assert found.merge(x[None].to(dtype)).isfinite().all()


def test_images_stay_whole_and_silent_clips_are_refused():
    x = torch.randn(1, 8, 4)
    assert tokred.OmniZip().reduce(VisualSite(x=x, grid=(2, 4))).trivial
    with pytest.raises(tokred.MissingInputError, match="a clip without its sound"):
        tokred.OmniZip().reduce(VisualSite(x=x, grid=(2, 2), frames=2))


@pytest.mark.parametrize(
    ("wrong", "match"),
    [({"rho_a": 1.0}, "rho_a"), ({"rho_min": 0.9}, "rho_min must be at most rho_max"), ({"merges": -1}, "merges"),
     ({"temporal": "mean"}, "temporal"), ({"neighbours": 0}, "neighbours")],
)  # fmt: skip
def test_bad_parameters(wrong, match):
    with pytest.raises(ValueError, match=match):
        tokred.make("omnizip", **wrong)


# ---------------------------------------------------------------- Qwen2.5-Omni's thinker


@pytest.fixture(scope="module")
def model() -> Any:
    omni = pytest.importorskip("tokred.adapters.tiny.omni")
    if not omni.known():
        pytest.skip("in this version of transformers the thinker has no model of its own inside its head")
    return omni.build()


ROWS: list[list[int | str]] = [[3, "clip", 5], [2, "clip", 1, "clip", 4]]


@torch.no_grad()
def test_laws_on_a_thinker(model):
    from tokred.adapters.tiny import omni

    batch = omni.prompts(ROWS)
    y = model(**batch).logits
    with tokred.applied(model, "omnizip", rho_a=0.0, rho_v=0.0):
        assert torch.equal(model(**batch).logits, y)
    with tokred.applied(model, "omnizip", rho_a=0.5, rho_v=0.5, neighbours=2):
        short = model(**batch).logits
        report = tokred.report(model)
        assert [row.visual for row in report.layers] == [(8, 16)] * len(report.layers)
        # Of 16 tokens of video and 8 of sound in each clip half stay.
        had = batch["attention_mask"].sum(1) - torch.tensor([12, 24])
        assert list(report.layers[0].tokens) == had.tolist()
        n = int(batch["attention_mask"][0].sum())
        alone = {name: batch[name][:1, -n:] for name in ("input_ids", "attention_mask")}
        # One clip of three.
        clips = ("pixel_values_videos", "video_grid_thw", "video_second_per_grid", "input_features")
        alone |= {name: batch[name][: len(batch[name]) // 3] for name in (*clips, "feature_attention_mask")}
        alone["use_audio_in_video"] = True
        torch.testing.assert_close(model(**alone).logits[0, -5:], short[0, -5:], rtol=1e-4, atol=1e-4)
    assert torch.equal(model(**batch).logits, y)


@torch.no_grad()
def test_dropping_equals_masking_on_a_thinker(model):
    from tests.vlm import oracle
    from tokred.adapters.tiny import omni

    method = tokred.OmniZip(0.5, 0.5, merges=0, temporal="drop", neighbours=2)
    oracle.agree(model, model.model.language_model.layers, method, omni.prompts(ROWS), max_new_tokens=3)


@torch.no_grad()
def test_what_the_encoder_listens_to(model, monkeypatch):
    from tokred.adapters.tiny import omni

    seen: list[SoundSite] = []
    stock = tokred.OmniZip.choose
    monkeypatch.setattr(tokred.OmniZip, "choose", lambda self, here: seen.append(here) or stock(self, here))
    attention, noted = model.model.audio_tower.layers[-1].self_attn, []
    hook = attention.register_forward_pre_hook(lambda m, a, k: noted.append((*a, k)), with_kwargs=True)
    with tokred.applied(model, "omnizip", neighbours=2):
        model(**omni.prompts(ROWS[:1]))
    hook.remove()
    given = noted[0][-1]
    x = noted[0][0] if len(noted[0]) > 1 else given["hidden_states"]
    heads = attention.num_heads
    q, k = (p(x).view(len(x), heads, -1).transpose(0, 1) for p in (attention.q_proj, attention.k_proj))
    ends, received = given["cu_seqlens"].tolist(), []
    assert len(ends) > 2
    for a, b in pairwise(ends):
        received.append((q[:, a:b] @ k[:, a:b].mT * attention.scaling).softmax(-1).mean((0, 1)))
    expected = torch.cat(received).view(-1, 2).mean(1)
    here = seen[0]
    torch.testing.assert_close(here.heard[0, here.sound], expected, rtol=1e-4, atol=1e-6)
    assert here.window.tolist() == [0] * 12 + [1] * 12
    assert here.moment[~here.sound][:, 0].tolist() == [t for t in range(4) for _ in range(4)]


@torch.no_grad()
def test_methods_of_clips_run_on_a_thinker(model):
    from tokred.adapters.tiny import omni

    batch = omni.prompts(ROWS)
    for name, settings in (("evs", {"ratio": 0.5}), ("fastv", {"layer": 1}), ("divprune", {"budget": 4})):
        with tokred.applied(model, name, **settings):
            assert model(**batch).logits.isfinite().all()
            assert tokred.report(model).layers[-1].visual[0] < 16


def test_models_that_do_not_hear_are_refused():
    from tests.vlm import hosts

    with pytest.raises(tokred.MissingInputError, match=r"sound.*here work .*vidcom2"):
        tokred.apply(hosts.build("onevision_video"), "omnizip")
