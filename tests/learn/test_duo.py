"""Duo-LLM: the card's numbers and oracles, routing, and generation with a cache."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.learn.models import drawn_text, greedy
from tokred.learn.models import Cache, Duo, DuoConfig
from tokred.learn.models.blocks import begin
from tokred.learn.models.duo import BIG, SKIP, SMALL, Path, budget_loss, oracle, paths

WORDS = 29
LITTLE: dict[str, Any] = {"vocabulary": WORDS, "width": 32, "big": 64, "small": 8, "layers": 4, "deviation": 0.2}


def made(seed: int = 0, **more: Any) -> Duo:
    torch.manual_seed(seed)
    return Duo(DuoConfig(**{**LITTLE, **more})).eval()


def text(n: int = 12, b: int = 2) -> Tensor:
    return drawn_text(WORDS, n, b)


def test_the_cards_budget() -> None:
    big = torch.tensor([0.9, 0.2, 0.4, 0.1]).view(4, 1, 1)
    assert float(budget_loss(big, 0.25)) == pytest.approx(0.0225)
    assert float(budget_loss(big.expand(4, 1, 2), 0.25, torch.tensor([[True, False]]))) == pytest.approx(0.0225)


def test_the_cards_numbers_of_paths() -> None:
    assert len(paths(12)) == 4096
    assert len(paths(12, big=6)) == math.comb(12, 6) == 924
    assert len(paths(3, choices=3)) == 27
    with pytest.raises(ValueError, match="at most 12 layers are counted through, got 13"):
        paths(13)


def test_all_big_is_the_model_of_the_big_mlps_alone() -> None:
    model, ids = made(), text()
    chosen = torch.full((4, 2, 12), BIG)
    found = model(ids, choices=chosen)
    x, tokens = model.embedding(ids), begin(ids, None, None)
    for layer in model.layers:
        x, _ = layer.seen(x, tokens)
        x = x + layer.big(layer.norm_mlp(x))
    torch.testing.assert_close(found.logits, F.linear(model.norm(x), model.embedding.weight))
    assert (found.depths == 4).all()


def test_hard_choices_are_the_limit_of_soft_ones() -> None:
    model, ids = made(3, skip=True), text()
    hard = model(ids, route="hard")
    assert len(hard.depths.unique()) > 1
    gaps = [
        float((model(ids, route="soft", temperature=t).logits.detach() - hard.logits.detach()).abs().max())
        for t in (1, 100, 1e6)
    ]
    assert gaps[0] > gaps[1] > gaps[2]
    assert gaps[2] < 1e-3


def test_a_token_that_skips_keeps_what_attention_gave_it() -> None:
    model, ids = made(skip=True), text()
    layer, h = model.layers[0], torch.randn(2, 12, 32)
    choice = torch.full((2, 12), SKIP)
    choice[0, 3], choice[1, 5] = SMALL, BIG
    out = layer.routed(h, choice)
    torch.testing.assert_close(out[0, 3], layer.small(h[0, 3]))
    torch.testing.assert_close(out[1, 5], layer.big(h[1, 5]))
    assert int(out.any(-1).sum()) == 2
    assert not layer.routed(h, torch.full((2, 12), SKIP)).any()
    assert ids.shape == (2, 12)


def test_a_tokens_choice_depends_on_no_later_token_and_on_no_other_sample() -> None:
    model, ids = made(3), text()
    other = ids.clone()
    other[:, 7] = (other[:, 7] + 1) % WORDS
    with torch.no_grad():
        a, b, alone = model(ids), model(other), model(ids[:1])
    assert torch.equal(a.depths[:, :7], b.depths[:, :7])
    torch.testing.assert_close(a.logits[:, :7], b.logits[:, :7])
    torch.testing.assert_close(a.logits[:1], alone.logits)


def test_a_cache_gives_what_one_forward_gives() -> None:
    model, ids = made(3, skip=True), text()
    with torch.no_grad():
        whole, cache = model(ids), Cache()
        parts = [model(piece, cache=cache) for piece in (ids[:, :5], ids[:, 5:6], ids[:, 6:])]
    assert torch.equal(torch.cat([p.depths for p in parts], 1), whole.depths)
    torch.testing.assert_close(torch.cat([p.logits for p in parts], 1), whole.logits, atol=1e-4, rtol=1e-4)
    mask = torch.ones(2, 6, dtype=torch.bool)
    mask[1, :2] = False
    found = model.generate(ids[:, :6], 4, mask)
    assert torch.equal(found[1, 2:], model.generate(ids[1:, 2:6], 4)[0])
    assert torch.equal(found[:1], greedy(model, ids[:1, :6], 4))


def test_the_first_stage_takes_every_choice_as_often() -> None:
    model, made_by = made(layers=8), torch.Generator().manual_seed(0)
    found = model.train()(text(100, 4), route="random", generator=made_by)
    assert found.losses == {}
    assert float(found.depths.float().mean()) / 8 == pytest.approx(0.5, abs=0.05)


@pytest.mark.parametrize("target", [0.2, 0.8])
def test_the_second_stage_comes_to_its_budget(target: float) -> None:
    model, ids = made(2, target=target, budget=20.0, layers=2).train(), text(24)
    routers = [layer.router.weight for layer in model.layers]
    optimiser = torch.optim.Adam(routers, lr=0.02)
    for step in range(50):
        answer = model(ids, route="soft", temperature=1 + step / 10)
        loss = F.cross_entropy(answer.logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        optimiser.zero_grad()
        (loss + answer.losses["budget"]).backward()
        optimiser.step()
    share = float(model.eval()(ids).depths.float().mean()) / 2
    assert share == pytest.approx(target, abs=0.15)


def test_the_oracle_is_never_worse_than_a_fixed_pattern() -> None:
    model, ids, word = made(3), text(9, 1)[0], 5
    every: list[Path] = []
    best = oracle(model, ids, word, batch=5, each=every.append)
    assert len(every) == 16
    assert best.loss == min(one.loss for one in every)
    for big in range(5):
        among = [one for one in every if one.choices.count(BIG) == big]
        found = oracle(model, ids, word, big=big)
        assert found.choices.count(BIG) == big
        assert found.loss == pytest.approx(min(one.loss for one in among), abs=1e-5)
    # a path that is the router's own gives the router's loss
    model_loss = float(F.cross_entropy(model(ids.unsqueeze(0)).logits[:, -1].detach(), torch.tensor([word])))
    assert any(one.loss == pytest.approx(model_loss, abs=1e-5) for one in every)
    with pytest.raises(ValueError, match="no path of 4 layers has big=5 big ones"):
        oracle(model, ids, word, big=5)


@pytest.mark.parametrize(
    ("given", "text_of"),
    [
        ({"small": 64}, "small must be below big, got small=64 and big=64"),
        ({"target": 1.5}, r"target must lie in \[0, 1\], got 1\.5"),
        ({"heads": 3}, "heads must divide the width into even parts"),
        ({"budget": -1.0}, "budget must be at least 0"),
    ],
)
def test_configurations_that_cannot_be(given: dict[str, Any], text_of: str) -> None:
    with pytest.raises(ValueError, match=text_of):
        DuoConfig(**{**LITTLE, **given})


def test_forwards_that_cannot_be() -> None:
    model, ids = made(), text()
    with pytest.raises(ValueError, match="route is 'both'; allowed are"):
        model(ids, route="both")
    with pytest.raises(ValueError, match="temperature must be above 0"):
        model(ids, temperature=0)
    with pytest.raises(ValueError, match=r"choices must be \(4, 2, 12\) int64, got \(4, 12\)"):
        model(ids, choices=torch.zeros(4, 12, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"choices must lie in \[0, 2\)"):
        model(ids, choices=torch.full((4, 2, 12), SKIP))
