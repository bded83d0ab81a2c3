"""SkipViT: who goes around, that they come back as they were, and that nothing else changes."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("timm")

import tokred
from tests.encoder.tiny_timm import build, images
from tokred.adapters.encoder.host import shared_of
from tokred.adapters.tiny import timm as tiny
from tokred.adapters.tiny.weights import scattered


def deep(family: str = "vit"):
    """Six blocks: 0 decides, 1 to 3 are gone around, 4 and 5 see all."""
    torch.manual_seed(0)
    return scattered(tiny.made(tiny.FAMILIES[family], depth=6)).eval()


def inputs_of(model, x):
    """What each block runs on: its first norm sees it."""
    seen = []
    hooks = [b.norm1.register_forward_pre_hook(lambda m, args: seen.append(args[0])) for b in model.blocks]
    y = model(x)
    for hook in hooks:
        hook.remove()
    return seen, y


def test_the_cards_score_and_counts():
    rows = torch.tensor([[[0.40, 0.10, 0.05, 0.25, 0.20], [0.20, 0.30, 0.10, 0.05, 0.35]]])
    site = tokred.Site(x=torch.zeros(1, 5, 2), class_attention=rows, prefix=1, layer=0, depth=6)
    torch.testing.assert_close(site.class_attention[0, 1:], torch.tensor([0.200, 0.075, 0.150, 0.275]))
    found = tokred.SkipViT(rho=0.5).reduce(site)
    assert found.representative.tolist() == [[0, 1, 4]], "patches 0 and 3"
    method, n, entered = tokred.SkipViT(), 197, []
    for layer in range(12):
        if layer == method.joins(12):
            n = 197
        entered.append(n)
        n = method.tokens(n, tokred.Place(layer, 12, prefix=1))
    assert method.skipped(196) == 107
    assert entered == [197] * 3 + [90] * 7 + [197] * 2


def test_the_cards_rejoin():
    from dataclasses import replace

    from tokred.adapters.encoder.state import Shared, TokenState
    from tokred.core.reduction import Reduction

    shared = Shared(tokred.SkipViT(), 6, 1, 0, "none", True)
    x = torch.stack([torch.arange(5.0), torch.arange(5.0) * 10], -1)[None]
    state = TokenState(5)
    assert shared.keeps_dropped(state)
    state, short = state.advance(Reduction.keep(torch.tensor([[0, 1, 4]]), 5), x, True)
    carried = shared.attach(3, short + 100, replace(state))
    _, y = shared.enter(4, carried)
    assert y[0].tolist() == [[100, 100], [101, 110], [2, 20], [3, 30], [104, 140]]


@pytest.mark.parametrize("family", ["vit", "vit-mean-with-class (MAE)"])
def test_those_that_skip_come_back_as_they_were(family):
    model, x = deep(family), images(3)
    tokred.apply(model, "skipvit", rho=0.4)
    with torch.no_grad():
        whole = {}
        hook = model.blocks[0].mlp.register_forward_hook(lambda m, i, y: whole.update(y=y))
        seen, y = inputs_of(model, x)
        hook.remove()
        kept = shared_of(model)[0][2].records[3].state.representative
        behind = shared_of(model)[0][2].records[3].state.dropped[0]
        assert [t.shape[1] for t in seen] == [26, 16, 16, 16, 26, 26]
        assert whole["y"].shape[1] == 26, "the block that decides runs on all"
        skipped = torch.ones(3, 26, dtype=torch.bool).scatter(1, kept, False)
        assert torch.equal(seen[4][skipped], behind[skipped])
        assert not torch.equal(seen[4][~skipped], behind[~skipped])
        assert [layer.tokens_in for layer in tokred.report(model).layers] == [26, 16, 16, 16, 26, 26]
        assert [row.tokens_in for row in tokred.flops(model, tokred.SkipViT(rho=0.4), x.shape).layers] == [
            26,
            16,
            16,
            16,
            26,
            26,
        ]
        torch.testing.assert_close(torch.cat([model(one[None]) for one in x]), y, rtol=1e-4, atol=1e-5)
        assert torch.equal(model.train()(x), y), "it does in training what it does in evaluation"


def test_behind_the_last_block_it_is_pruning_for_the_class_token():
    model, x = deep(), images(2)
    with torch.no_grad():
        y = tokred.apply(model, "skipvit", rho=0.4, split=1, join=6)(x)
        assert model.forward_features(x).shape[1] == 26
        pruned = tokred.apply(model, "evit", kappa=0.6, blocks=[1], fuse=False)(x)
    # EViT prunes between attention and MLP, whose output the class token alone reads in no block.
    torch.testing.assert_close(y, pruned, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="expose must be 'last', got 'none'"):
        tokred.apply(model, "skipvit", rho=0.4, split=1, join=6, expose="none")


def test_everything_may_skip_and_nothing():
    model, x = deep(), images(2)
    with torch.no_grad():
        y = model(x)
        assert tokred.apply(model, "skipvit", rho=1.0)(x).isfinite().all()
        assert [layer.tokens_in for layer in tokred.report(model).layers] == [26, 1, 1, 1, 26, 26]
        assert torch.equal(tokred.apply(model, "skipvit", rho=0.0)(x), y)


def test_gradients_reach_those_that_skip():
    model, x = deep().train(), images(2)
    tokred.apply(model, "skipvit", rho=0.4)
    seen = []
    model.blocks[0].register_forward_pre_hook(lambda m, args: seen.append(args[0]) or args[0].retain_grad())
    model(x).square().sum().backward()
    assert (seen[0].grad.abs().sum(-1) > 0).all()


@pytest.mark.parametrize("score", ["columns", "random"])
def test_other_scores(score):
    model, x = deep("vit-mean"), images(2)
    with torch.no_grad():
        assert tokred.apply(model, "skipvit", rho=0.4, score=score)(x).isfinite().all()
    site = tokred.Site(x=torch.zeros(2, 9, 4), layer=0, depth=6)
    one, other = (tokred.SkipViT(score="random", seed=s).reduce(site).representative for s in (0, 1))
    assert not torch.equal(one, other)
    assert torch.equal(one[0], one[1])


def test_a_share_that_rises_while_it_trains():
    model, x = deep(), images(1)
    tokred.apply(model, "skipvit", rho=0.0)
    tokred.change(model, rho=0.4)
    with torch.no_grad():
        model(x)
    assert tokred.report(model).layers[1].tokens_in == 16
    with pytest.raises(ValueError, match="runs in another way"):
        tokred.change(model, join=5)


def test_refusals():
    for wrong, text in (
        ({"rho": 1.5}, "rho"),
        ({"score": "value"}, "score is 'value'"),
        ({"split": -1}, "split"),
        ({"join": 1}, "join"),
    ):
        with pytest.raises(ValueError, match=text):
            tokred.SkipViT(**wrong)
    with pytest.raises(ValueError, match=r"have to come back at least two further on .* got join=2"):
        tokred.SkipViT(split=1, join=2).check(6)
    with pytest.raises(ValueError, match="at most behind the last of 6 blocks, got join=7"):
        tokred.SkipViT(join=7).check(6)
    with pytest.raises(tokred.MissingInputError):
        tokred.apply(build("vit-mean"), "skipvit")
