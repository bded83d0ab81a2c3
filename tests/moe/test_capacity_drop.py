"""Capacity-aware token drop: the card's example, and laws on scores of routers."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import tokred
from tokred.core.experts import ExpertSite

# First expert, second expert; every token goes to the better one.
CARD = torch.tensor([[0.9, 0.1], [0.8, 0.2], [0.6, 0.4], [0.7, 0.3], [0.2, 0.8], [0.55, 0.45]])


def site_of(scores: Tensor, k: int, **more: Any) -> ExpertSite:
    return ExpertSite(scores.log(), scores.topk(k).indices, **more)


def drawn(tokens: int, experts: int, k: int, seed: int = 0, **more: Any) -> ExpertSite:
    """Scores of which some experts get more than others."""
    made = torch.Generator().manual_seed(seed)
    logits = torch.randn(tokens, experts, generator=made) + torch.linspace(1.5, 0, experts)
    return ExpertSite(logits, logits.topk(k).indices, **more)


def loads(routing: Any, experts: int) -> Tensor:
    return routing.ids[routing.kept].bincount(minlength=experts)


def sent(routing: Any, experts: int) -> Tensor:
    """``(T, E)`` bool: which experts each token goes to."""
    return (torch.nn.functional.one_hot(routing.ids, experts) * routing.kept.unsqueeze(2)).sum(1) > 0


# ---------------------------------------------------------------- the card


def test_the_cards_example() -> None:
    routing = tokred.CapacityDrop(gamma=1.0).route(site_of(CARD, 1))
    assert routing.ids.flatten().tolist() == [0, 0, 0, 0, 1, 0]
    assert routing.kept.flatten().tolist() == [True, True, False, True, True, False]
    routing = tokred.CapacityDrop(gamma=1.0, rounds=2).route(site_of(CARD, 1))
    assert routing.ids.flatten().tolist() == [0, 0, 1, 0, 1, 1]
    assert routing.kept.all()
    assert tokred.CapacityDrop(gamma=1.5).route(site_of(CARD, 1)).kept.all()


def test_the_cards_example_as_a_reduction() -> None:
    found = tokred.CapacityDrop(gamma=1.0).reduce(site_of(CARD, 1))
    assert [found.representative[e][found.mask[e]].tolist() for e in (0, 1)] == [[0, 1, 3], [4]]
    with pytest.raises(TypeError, match=r"'capacity_drop' needs a tokred\.core\.experts\.ExpertSite, got Site"):
        tokred.CapacityDrop().reduce(tokred.Site(x=torch.zeros(1, 2, 3)))


@pytest.mark.parametrize(("strategy", "kept"), [("first", [0, 1, 2]), ("last", [2, 3, 5]), ("score", [0, 1, 3])])
def test_which_tokens_an_expert_keeps(strategy: Any, kept: list[int]) -> None:
    routing = tokred.CapacityDrop(gamma=1.0, strategy=strategy).route(site_of(CARD, 1))
    assert sent(routing, 2)[:, 0].nonzero().flatten().tolist() == kept


def test_without_an_expert_left_the_best_one_is_the_fallback() -> None:
    routing = tokred.CapacityDrop(gamma=1.0, empty="fallback").route(site_of(CARD, 1))
    assert routing.kept.all(), "each token has one expert, which it keeps"
    routing = tokred.CapacityDrop(gamma=0.5, empty="fallback").route(drawn(40, 8, 2))
    scores = drawn(40, 8, 2).scores
    plain = tokred.CapacityDrop(gamma=0.5).route(drawn(40, 8, 2))
    none = ~plain.kept.any(1)
    assert none.any()
    assert routing.kept.sum(1)[none].tolist() == [1] * int(none.sum())
    assert torch.equal(routing.ids[none][routing.kept[none]], scores.argmax(1)[none])
    assert torch.equal(routing.kept[~none], plain.kept[~none])


@pytest.mark.parametrize("strategy", ["score", "first", "last", "random"])
@pytest.mark.parametrize("rounds", [1.0, 1.5, 3.0])
@pytest.mark.parametrize("gamma", [0.5, 1.0, 1.5])
def test_no_expert_gets_more_than_its_capacity(gamma: float, rounds: float, strategy: Any) -> None:
    for seed in range(3):
        site = drawn(37, 8, 2, seed)
        routing = tokred.CapacityDrop(gamma=gamma, rounds=rounds, strategy=strategy).route(site)
        assert loads(routing, 8).max() <= math.ceil(gamma * 2 * 37 / 8)
        assert routing.kept.sum() <= 2 * 37
        assert (sent(routing, 8).sum(1) == routing.kept.sum(1)).all(), "no expert twice"
        if rounds == 1:
            assert torch.equal(routing.ids, site.ids)
            assert (loads(routing, 8) <= site.ids.flatten().bincount(minlength=8)).all()


def test_devices_share_a_capacity() -> None:
    site = drawn(24, 8, 2)
    routing = tokred.CapacityDrop(gamma=1.0, devices=2).route(site)
    found = loads(routing, 8).view(2, 4).sum(1)
    assert found.tolist() == [24, min(24, int((site.ids >= 4).sum()))]
    # of the pairs of a device those with the largest scores stay
    scores = site.scores.gather(1, site.ids)
    first = site.ids < 4
    assert scores[first & routing.kept].min() >= scores[first & ~routing.kept].max()
    one = tokred.CapacityDrop(gamma=1.0, devices=8).route(site)
    assert torch.equal(one.kept, tokred.CapacityDrop(gamma=1.0).route(site).kept)
    with pytest.raises(ValueError, match="devices must divide the 8 experts, got devices=3"):
        tokred.CapacityDrop(devices=3).route(site)


@pytest.mark.parametrize("rounds", [1.0, 2.0])
def test_the_order_of_tokens_does_not_matter(rounds: float) -> None:
    site, method = drawn(31, 8, 2), tokred.CapacityDrop(gamma=1.0, rounds=rounds)
    order = torch.randperm(31, generator=torch.Generator().manual_seed(1))
    moved = ExpertSite(site.logits[order], site.ids[order])
    assert torch.equal(sent(method.route(moved), 8), sent(method.route(site), 8)[order])


def test_among_equal_scores_the_lower_index_stays() -> None:
    routing = tokred.CapacityDrop(gamma=1.0).route(ExpertSite(torch.zeros(6, 2), torch.zeros(6, 1, dtype=torch.int64)))
    assert routing.kept.flatten().tolist() == [True] * 3 + [False] * 3


@pytest.mark.parametrize(("gamma", "more"), [(4.0, {}), (2.0, {"devices": 2}), (0.5, {"one": True})])
def test_nothing_is_dropped_where_all_have_room_or_a_token_is_alone(gamma: float, more: dict[str, Any]) -> None:
    alone = more.pop("one", False)
    method, site = tokred.CapacityDrop(gamma=gamma, **more), drawn(1 if alone else 20, 8, 2)
    assert method.spares(2, 8) != alone
    routing = method.route(site)
    assert routing.kept.all()
    assert torch.equal(routing.ids, site.ids)


def test_samples_have_a_capacity_each_where_that_is_asked_for() -> None:
    site = drawn(40, 8, 2, samples=2)
    each = tokred.CapacityDrop(gamma=1.0, over="sample").route(site)
    for i, rows in enumerate((slice(0, 20), slice(20, 40))):
        alone = tokred.CapacityDrop(gamma=1.0).route(ExpertSite(site.logits[rows], site.ids[rows]))
        assert torch.equal(each.kept[rows], alone.kept), i
    together = tokred.CapacityDrop(gamma=1.0).route(site)
    assert not torch.equal(together.kept, each.kept), "the batch shares a capacity by default"


def test_padding_takes_no_room() -> None:
    site = drawn(20, 8, 2)
    real = torch.arange(20) >= 6
    for over in ("batch", "sample"):
        method = tokred.CapacityDrop(gamma=1.0, over=over)
        padded = method.route(ExpertSite(site.logits, site.ids, real=real))
        alone = method.route(ExpertSite(site.logits[6:], site.ids[6:]))
        assert torch.equal(padded.kept[6:], alone.kept)
        assert loads(padded, 8).max() <= math.ceil(2 * 14 / 8)


def test_scores_keep_more_of_what_the_router_wants_than_chance_does() -> None:
    """The card's ranking by accuracy has no oracle without weights; the mass of scores that is kept has one."""
    mass = {}
    for strategy in ("score", "random", "first", "last"):
        mass[strategy] = 0.0
        for seed in range(5):
            site = drawn(64, 8, 2, seed)
            routing = tokred.CapacityDrop(gamma=1.0, strategy=strategy, seed=seed).route(site)
            mass[strategy] += float((site.scores.gather(1, routing.ids) * routing.kept).sum())
    assert all(mass["score"] > mass[other] for other in ("random", "first", "last"))


def test_a_random_choice_depends_on_seed_and_layer_alone() -> None:
    site = drawn(32, 8, 2)
    kept = [tokred.CapacityDrop(gamma=0.5, strategy="random", seed=s).route(site).kept for s in (0, 0, 1)]
    assert torch.equal(kept[0], kept[1])
    assert not torch.equal(kept[0], kept[2])
    other = ExpertSite(site.logits, site.ids, layer=1, depth=2)
    assert not torch.equal(tokred.CapacityDrop(gamma=0.5, strategy="random").route(other).kept, kept[0])


@pytest.mark.parametrize(
    ("parameters", "text"),
    [
        ({"gamma": 0.4}, "gamma must be at least 0.5, got 0.4"),
        ({"gamma": "much"}, "gamma must be a finite number, got 'much'"),
        ({"rounds": 0.5}, "rounds must be at least 1, got 0.5"),
        ({"strategy": "best"}, "strategy is 'best'; allowed are 'score', 'first', 'last', 'random'"),
        ({"empty": "zero"}, "empty is 'zero'; allowed are 'residual', 'fallback'"),
        ({"over": "token"}, "over is 'token'; allowed are 'batch', 'sample'"),
        ({"devices": 0}, "devices must be an integer of at least 1, got 0"),
    ],
)
def test_wrong_parameters(parameters: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        tokred.CapacityDrop(**parameters)


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ((torch.zeros(4, 2), torch.zeros(3, 1, dtype=torch.int64), {}), r"ids \(T, k\), got \(4, 2\) and \(3, 1\)"),
        ((torch.zeros(4, 2), torch.zeros(4, 1, dtype=torch.int64), {"samples": 3}), "samples must divide the 4 tokens"),
        ((torch.zeros(4, 2), torch.zeros(4, 1, dtype=torch.int64), {"real": torch.ones(3)}), r"real must be \(4,\)"),
    ],
)
def test_sites_of_shapes_that_do_not_fit(given: Any, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        ExpertSite(given[0], given[1], **given[2])
