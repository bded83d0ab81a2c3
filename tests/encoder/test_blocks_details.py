"""Details of methods in the blocks that no whole run shows: rounds by depth, votes, thresholds, sizes, places."""

from __future__ import annotations

import sys

import pytest
import torch

import tokred
from tests.encoder.blocks import site, tensors
from tests.encoder.tiny_timm import build
from tokred.adapters.encoder.state import TokenState
from tokred.encoder.importance import class_value
from tokred.kernels.similarity_rows import unit
from tokred.methods.encoder.saint import degree_sums


def test_places_are_composed_over_two_steps():
    x = torch.randn(2, 6, 3, generator=torch.Generator().manual_seed(0))
    first = tokred.Reduction.keep(torch.tensor([[0, 2, 3, 5], [0, 1, 4, 5]]), 6)
    second = tokred.Reduction.keep(torch.tensor([[0, 2, 3], [0, 1, 2]]), 4)
    state, y = TokenState(6).advance(first, x, False)
    state, y = state.advance(second, y, False)
    assert state.representative.tolist() == [[0, 3, 5], [0, 1, 4]]
    assert torch.equal(state.shorten(x), y)
    assert state.composed().representative.tolist() == state.representative.tolist()


@pytest.mark.parametrize("depth", [3, 12, 13, 24])
def test_page_rank_runs_longer_in_earlier_thirds(depth, monkeypatch):
    rounds: list[int] = []
    found = tokred.ZeroTPrune.importances

    def noted(self, part, count):
        rounds.append(count)
        return found(self, part, count)

    monkeypatch.setattr(tokred.ZeroTPrune, "importances", noted)
    given = tensors(0)
    for layer in range(depth):
        method = tokred.ZeroTPrune(blocks=(layer,), rho=0.5, r_s=0, T=(7, 5, 3))
        rounds.clear()
        method.reduce(tokred.Site(x=given["x"], q=given["q"], k=given["k"], prefix=1, layer=layer, depth=depth))
        assert rounds == [7 if layer < depth / 3 else 5 if layer < 2 * depth / 3 else 3]


@pytest.mark.parametrize("vote", ["weighted", "count"])
def test_padding_neither_votes_nor_is_voted_for(vote):
    method = tokred.VoMix(vote=vote)
    for seed in range(20):
        k = unit(torch.randn(1, 9, 4, generator=torch.Generator().manual_seed(seed)))
        k[:, 6:] = k[:, seed % 6].unsqueeze(1)  # padding that would all vote for one token
        real = torch.arange(9).unsqueeze(0) < 6
        found = method.votes(k, real)
        assert torch.equal(found[:, :6], method.votes(k[:, :6]))
        assert (found[:, 6:] == -torch.inf).all()


@pytest.mark.parametrize("relative", [False, True])
def test_ppt_prunes_at_the_threshold_itself(relative):
    scores = torch.tensor([[0.5, 0.25, 0.125, 0.125]])
    spread = scores.var(dim=1).item() * (16 if relative else 1)
    assert tokred.PPT(threshold=spread, relative=relative).prunes(scores).item()
    assert not tokred.PPT(threshold=spread * 1.001, relative=relative).prunes(scores).item()


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("form", ["plain", "bsm", "tome-plain", "halves"])
def test_pitome_weighs_by_sizes(form, masked):
    given = tensors(1)
    mask = torch.ones(2, 18, dtype=torch.bool) if masked else None
    if mask is not None:
        mask[1, 12:17] = False
    sizes = torch.randint(1, 9, (2, 18), generator=torch.Generator().manual_seed(0)).float()
    sizes = sizes if mask is None else sizes * mask
    for weighted in (True, False):
        step = tokred.PiToMe(ratio=0.6, form=form, size_weighted=weighted).reduce(
            site("pitome-plain-k", given, mask=mask)
        )
        y, total = step.merge(given["x"], sizes), step.sizes(sizes)
        merged = 0
        for i, groups in enumerate(step.groups()):
            for slot, members in enumerate(groups):
                if len(members) > 1:
                    rows, weight = given["x"][i, members], sizes[i, members] if weighted else torch.ones(len(members))
                    torch.testing.assert_close(y[i, slot], (rows * weight.unsqueeze(1)).sum(0) / weight.sum())
                    assert total[i, slot] == sizes[i, members].sum()
                    merged += 1
        assert merged > 2
    assert tokred.PiToMe().size_weighted, "as the card has it"


@pytest.mark.parametrize(
    ("name", "parameters", "text"),
    [
        ("kth", {"blocks": (3,)}, r"blocks names \[3\], but the model has 3 blocks"),
        ("pitome", {"ratio": 0.9, "start": 3}, "start is 3, but the model has 3 blocks"),
        ("algm", {"local_block": 2}, "local_block is 2, but of 3 blocks 2 is the global one"),
        ("evit", {"blocks": (3,)}, r"blocks names \[3\]"),
        ("ppt", {"r": [1] * 4}, "the schedule has 4 entries, but the model has 3 blocks"),
        ("ltp", {"thresholds": [0.1]}, "thresholds has 1 entries"),
        ("downsample", {"keep": 0.5, "block": 3}, "block is 3, but the model has 3 blocks"),
    ],
)
def test_what_fits_no_block_is_refused_when_applied(name, parameters, text):
    model = build("vit")
    with pytest.raises(ValueError, match=text):
        tokred.apply(model, name, **parameters)
    assert not tokred.patched(model)


def test_parameters_that_exclude_each_other():
    with pytest.raises(ValueError, match="start must lie before stop, got start=5 and stop=5"):
        tokred.PiToMe(start=5, stop=5)
    with pytest.raises(ValueError, match="blocks must be non-negative"):
        tokred.KthMerge(blocks=(-1,))


def test_pitome_removes_half_at_most():
    assert tokred.PiToMe(ratio=0.1).tokens(18, tokred.Place(layer=0, depth=2, prefix=1, suffix=1)) == 10
    assert tokred.PiToMe(ratio=0.1).reduce(site("pitome-plain-k", tensors(0))).slots == 10


def test_saint_drops_the_divisors_part_at_a_time():
    """Of 16 alike but for one pair: an eighth at a time leaves 14, 13, ...; the sums are taken anew each time."""
    seen: list[int] = []
    given = tensors(2)

    def noted(a, b, real=None):
        seen.append(int(real.sum(1)[0]))
        return degree_sums(a, b, real)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys.modules["tokred.methods.encoder.saint"], "degree_sums", noted)
        tokred.SAINT(form="full", M=10, q=8, blocks=(0,)).reduce(site("saint-full", given))
    assert seen == [16, 14, 13, 12, 11, 10, 9]


def test_windows_and_pairs_at_the_threshold_itself_merge():
    x = torch.zeros(1, 4, 8)
    x[..., 0] = 1  # their cosines are exactly one
    place = {"x": x, "grid": (2, 2), "depth": 2}
    assert tokred.ALGM(T=1.0, theta=2).reduce(tokred.Site(**place)).slots == 1
    assert tokred.ALGM(T=2, theta=1.0).reduce(tokred.Site(**place, layer=1)).slots == 2


def test_ltp_keeps_what_reaches_the_threshold_itself_and_knows_no_smaller_one_than_its_floor():
    x = torch.zeros(1, 4, 2)
    even = {"x": x, "q": torch.zeros(1, 1, 4, 2), "k": torch.zeros(1, 1, 4, 2), "prefix": 1}  # a quarter each
    assert tokred.LTP(thresholds=[0.25]).reduce(tokred.Site(**even)).slots == 4
    assert tokred.LTP(thresholds=[0.2501]).reduce(tokred.Site(**even)).slots == 2, "the class token and one more"
    # The last token receives some 1e-6: less than any threshold that takes effect.
    bias = torch.tensor([[0.0, 0.0, 0.0, -13.0]])
    assert tokred.LTP(thresholds=[1e-9]).reduce(tokred.Site(**even, bias=bias)).slots == 3


@pytest.mark.parametrize("method", [tokred.RandomMerge(r=4), tokred.RandomPrune(r=4), tokred.RandomMerge(r=4, seed=1)])
def test_random_choices_differ_by_block_and_step(method):
    given = tensors(0)
    found = set()
    for layer, step in ((0, 0), (1, 0), (0, 1), (1, 1)):
        place = tokred.Site(x=given["x"], k=given["k"], prefix=1, layer=layer, depth=2, step=step)
        made = method.reduce(place)
        gone = sorted(set(range(18)) - set(made.representative[0].tolist()))
        found.add(tuple(gone))
        assert torch.equal(made.representative, method.reduce(place).representative)
    assert len(found) == 4


def test_a_coarser_grid_is_rounded_to_the_nearest():
    assert tokred.Downsample(keep=0.5).coarse((4, 7)) == (3, 5)  # 2.83 and 4.95
    assert tokred.Downsample(keep=0.4).coarse((4, 7)) == (3, 4)  # 2.53 and 4.43
    assert tokred.Downsample(keep=0.01).coarse((4, 7)) == (1, 1)


def test_padding_scores_nothing_whatever_the_host_says_it_receives():
    v, mask = torch.ones(1, 1, 5, 2), torch.tensor([[True, True, True, False, False]])
    given = torch.tensor([[0.0, 0.2, 0.2, 0.3, 0.3]])
    found = class_value(tokred.Site(class_attention=given, v=v, prefix=1, mask=mask))
    assert found.tolist() == [[0.5, 0.5, 0, 0]]
