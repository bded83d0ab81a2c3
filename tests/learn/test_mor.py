"""Mixture-of-Recursions: the card's numbers, its oracles, and generation with caches of different lengths."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.learn.models import drawn_text, greedy
from tokred.learn.models import Cache, MoR, MoRConfig
from tokred.learn.models.blocks import begin
from tokred.learn.models.choice import (
    balance_loss,
    capacities,
    moved,
    selection_loss,
    some_of,
    top,
    warmed,
    z_loss,
)

WORDS = 31
SMALL: dict[str, Any] = {"vocabulary": WORDS, "width": 32, "inner": 48, "layers": 8, "deviation": 0.2}


def made(seed: int = 0, **more: Any) -> MoR:
    torch.manual_seed(seed)
    return MoR(MoRConfig(**{**SMALL, **more})).eval()


def text(n: int = 14, b: int = 2) -> Tensor:
    return drawn_text(WORDS, n, b)


# ---------------------------------------------------------------- the card


def test_capacities() -> None:
    assert capacities(3) == (1, 2 / 3, 1 / 3)
    real = torch.ones(1, 9, dtype=torch.bool)
    counts = [top(torch.randn(1, 9), real, torch.tensor([9]), share).at.shape[1] for share in capacities(3)]
    assert counts == [9, 6, 3]
    assert top(torch.randn(1, 2), real[:, :2], torch.tensor([2]), 0.3).at.shape[1] == 1, "never none"


def test_the_cards_example_by_experts() -> None:
    x = torch.arange(1.0, 7).view(1, 6, 1)
    logits = torch.tensor([[0.2, -1, 0.6, 0.1, -0.3, 0.9]])
    real = torch.ones(1, 6, dtype=torch.bool)
    chosen = top(logits, real, torch.tensor([6]), 2 / 3)
    assert chosen.at.tolist() == [[0, 2, 3, 5]]
    gates = 0.1 * logits.sigmoid()
    torch.testing.assert_close(
        gates, torch.tensor([[0.0550, 0.0269, 0.0646, 0.0525, 0.0426, 0.0711]]), atol=6e-5, rtol=0
    )
    y = moved(x, chosen.at, chosen.real, gates.gather(1, chosen.at), lambda h: 10 * h, add=True)
    torch.testing.assert_close(y.flatten(), torch.tensor([1.5498, 2, 4.9370, 6.0999, 5, 10.2657]), atol=6e-5, rtol=0)
    assert float(selection_loss(logits, chosen.mask, real)) == pytest.approx(0.4815, abs=6e-5)
    # the next router, of the four
    second = top(torch.tensor([[0.5, 0.2, -0.4, 0.3]]), chosen.real, torch.tensor([6]), 1 / 3)
    assert chosen.at.gather(1, second.at).tolist() == [[0, 5]]


def test_the_cards_example_by_tokens() -> None:
    logits = torch.tensor([[[2.0, 0, 0], [0, 1, 0], [0, 0, 3], [1, 1.5, 0]]])
    shares, real = logits.softmax(-1), torch.ones(1, 4, dtype=torch.bool)
    depths = shares.argmax(-1)
    assert depths.tolist() == [[0, 1, 2, 1]]
    torch.testing.assert_close(shares.mean(1)[0], torch.tensor([0.3439, 0.3186, 0.3375]), atol=6e-5, rtol=0)
    assert float(balance_loss(shares, depths, real)) == pytest.approx(0.9890, abs=6e-5)
    assert float(z_loss(logits, real)) == pytest.approx(5.3571, abs=6e-5)


def test_a_warm_up_goes_from_all_tokens_to_the_shares() -> None:
    assert warmed((1, 0.5), 0, 10) == (1, 1)
    assert warmed((1, 0.5), 5, 10) == pytest.approx((1, 0.75))
    assert warmed((1, 0.5), 10, 10) == warmed((1, 0.5), 99, 10) == (1, 0.5)


@pytest.mark.parametrize(
    ("sharing", "weights", "ends"),
    [
        ("cycle", (0, 1, 0, 1, 0, 1), 0),
        ("sequence", (0, 0, 0, 1, 1, 1), 0),
        ("middle_cycle", (0, 1, 0, 1, 0, 1), 2),
        ("middle_sequence", (0, 0, 0, 1, 1, 1), 2),
    ],
)
def test_which_layers_share_weights(sharing: Any, weights: tuple[int, ...], ends: int) -> None:
    model = made(sharing=sharing, layers=6 + ends)
    assert model.config.weights_of == weights
    assert (len(model.blocks), len(model.ends)) == (2, ends)


# ---------------------------------------------------------------- its oracles


def stacked(model: MoR, ids: Tensor) -> Tensor:
    """The logits of a plain recursive transformer with these weights."""
    tokens, x = begin(ids, None, None), model.embedding(ids)
    order = [model.blocks[i] for i in model.config.weights_of]
    if model.config.own_ends:
        order = [model.ends[0], *order, model.ends[1]]
    for block in order:
        x, _ = block(x, tokens)
    return F.linear(model.norm(x), model.embedding.weight)


@pytest.mark.parametrize("recursions", [1, 2, 3])
@pytest.mark.parametrize("sharing", ["middle_cycle", "sequence"])
def test_all_tokens_in_all_recursions_without_a_gate_is_a_plain_recursive_transformer(
    recursions: int, sharing: Any
) -> None:
    layers = 8 if sharing == "middle_cycle" else 6
    model = made(recursions=recursions, sharing=sharing, layers=layers, gate="none", update="replace",
                 capacity=(1.0,) * recursions)  # fmt: skip
    torch.testing.assert_close(model(text()).logits, stacked(model, text()))
    added = made(recursions=recursions, sharing=sharing, layers=layers, gate="none", capacity=(1.0,) * recursions)
    assert not torch.allclose(added(text()).logits, stacked(added, text()), atol=1e-2), "x + f(x) is another model"


def sets_of(model: MoR, ids: Tensor, **more: Any) -> Tensor:
    return model(ids, **more).depths


def test_sets_are_nested_and_have_the_sizes_of_their_capacities() -> None:
    depths = sets_of(made(), text(9), select="top_k")
    assert [int((depths[0] > r).sum()) for r in range(3)] == [9, 6, 3]


def test_top_k_looks_ahead_and_a_threshold_does_not() -> None:
    model, ids = made(3), text(12)
    other = ids.clone()
    other[:, 8] = (other[:, 8] + 1) % WORDS
    for select, same in (("threshold", True), ("top_k", False)):
        a, b = model(ids, select=select), model(other, select=select)
        assert torch.equal(a.depths[:, :8], b.depths[:, :8]) or not same
        assert torch.allclose(a.logits[:, :8], b.logits[:, :8], atol=1e-5) == same, select


KINDS: dict[str, dict[str, Any]] = {
    "experts": {},
    "experts, shared keys": {"kv": "share"},
    "a second router": {"sampling": "aux_router", "router": "mlp"},
    "tokens": {"route": "token"},
    "tokens, shared keys": {"route": "token", "kv": "share", "gate": "sigmoid", "sharing": "cycle", "layers": 6},
}


def varied(kind: str, ids: Tensor) -> MoR:
    """A model whose tokens take every depth."""
    models = (made(seed, **KINDS[kind]) for seed in range(40))
    with torch.no_grad():
        return next(model for model in models if len(model(ids).depths.unique()) == 3)


@pytest.mark.parametrize("kind", KINDS)
def test_a_cache_gives_what_one_forward_gives(kind: str) -> None:
    ids = text(13)
    model = varied(kind, ids)
    with torch.no_grad():
        whole = model(ids)
        cache, parts = Cache(), []
        for piece in (ids[:, :6], ids[:, 6:7], ids[:, 7:10], ids[:, 10:]):
            parts.append(model(piece, cache=cache))
    assert torch.equal(torch.cat([p.depths for p in parts], 1), whole.depths)
    torch.testing.assert_close(torch.cat([p.logits for p in parts], 1), whole.logits, atol=1e-4, rtol=1e-4)
    # by recursions each holds the rows of the tokens that it ran on, shared ones those of all
    last, depth = len(model.config.weights_of), len(model.config.weights_of) // 3
    if model.config.kv == "share":
        assert cache.held(1) == 26
        assert not any(cache.held(at) for at in range(1 + depth, 1 + last))
    else:
        assert [cache.held(1 + r * depth) for r in range(3)] == [int((whole.depths > r).sum()) for r in range(3)]


@pytest.mark.parametrize("kind", ["experts", "tokens, shared keys"])
def test_generation_is_that_of_forwards_without_a_cache(kind: str) -> None:
    model, ids = made(4, **KINDS[kind]), text(7)
    assert torch.equal(model.generate(ids, 5), greedy(model, ids, 5))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("select", ["top_k", "threshold"])
def test_a_sample_does_not_depend_on_its_batch_nor_on_padding(kind: str, select: Any) -> None:
    model, ids = made(4, **KINDS[kind]), text(11)
    mask = torch.ones_like(ids, dtype=torch.bool)
    mask[1, :4] = False
    with torch.no_grad():
        both, first, second = (
            model(ids, mask, select=select),
            model(ids[:1], select=select),
            model(ids[1:, 4:], select=select),
        )
    torch.testing.assert_close(both.logits[:1], first.logits, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(both.logits[1:, 4:], second.logits, atol=1e-4, rtol=1e-4)
    assert torch.equal(both.depths[1:, 4:], second.depths)
    assert not both.depths[1, :4].any()


def test_a_cache_after_padding() -> None:
    model, ids = made(4), text(9)
    mask = torch.ones_like(ids, dtype=torch.bool)
    mask[1, :3] = False
    both = model.generate(ids, 4, mask)
    assert torch.equal(both[1, 3:], model.generate(ids[1:, 3:], 4)[0])


def test_a_recursion_that_no_token_is_left_in_does_not_run() -> None:
    model = made(capacity=(1.0, 0.5, 0.5))
    with torch.no_grad():
        model.routers[1].layers[0].weight.zero_()  # logits of zero are below the threshold
    calls = []
    model.blocks[0].register_forward_hook(lambda *a: calls.append(1))
    answer = model(text())
    assert len(calls) == 1
    assert (answer.depths == 1).all()


def test_kv_entries_are_as_many_as_the_card_says() -> None:
    for recursions, share in ((2, 0.75), (3, 0.667), (4, 0.625)):
        assert sum(capacities(recursions)) / recursions == pytest.approx(share, abs=1e-3)


# ---------------------------------------------------------------- training


def test_routers_learn_from_the_task_by_what_they_chose_and_else_by_their_loss() -> None:
    model = made(coefficient=1.0).train()
    seen: list[Tensor] = []

    def note(module: Any, args: Any, out: Tensor) -> None:
        out.retain_grad()
        seen.append(out)

    model.routers[1].register_forward_hook(note)
    answer = model(text(9))
    chosen = (answer.depths > 1)[answer.depths > 0].view(2, 9)
    answer.logits.square().mean().backward(retain_graph=True)
    task = seen[0].grad.squeeze(2).clone()
    assert (task[chosen] != 0).all()
    assert (task[~chosen] == 0).all(), "exactly"
    seen[0].grad = None
    answer.losses["router"].backward()
    assert (seen[0].grad.squeeze(2)[~chosen] > 0).all(), "down for those that were not taken"
    assert (seen[0].grad.squeeze(2)[chosen] < 0).all()


def test_the_wide_router_is_the_mlp_by_another_name() -> None:
    one, other = (made(router=router).routers[0].layers for router in ("mlp", "wide_mlp"))
    assert [tuple(p.shape) for p in other.parameters()] == [(2 * SMALL["width"], SMALL["width"]), (2 * SMALL["width"],),
                                                            (1, 2 * SMALL["width"]), (1,)]  # fmt: skip
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


def test_a_second_router_leaves_the_states_alone() -> None:
    model = made(sampling="aux_router", coefficient=1.0).train()
    model(text()).losses["router"].backward()
    assert model.deciders[1].layers[0].weight.grad.abs().sum() > 0
    assert all(p.grad is None or not p.grad.any() for n, p in model.named_parameters() if not n.startswith("deciders"))


def test_a_bias_without_a_loss_evens_out_the_depths() -> None:
    model = made(route="token", balancing="loss_free", step=0.1).train()
    model.bias.copy_(torch.tensor([1.0, 0, 0]))  # most take the first depth
    before = model(text(40)).depths.flatten().bincount(minlength=4)[1:]
    assert model(text(40)).losses == {}
    for _ in range(14):
        model(text(40))
    after = model(text(40)).depths.flatten().bincount(minlength=4)[1:]
    assert after.float().std() < before.float().std() / 2
    assert model.bias.abs().sum() > 0
    assert "bias" in model.state_dict(), "a training that goes on has it again"
    kept = model.bias.clone()
    model.eval()(text(40))
    assert torch.equal(model.bias, kept)


def test_it_learns_and_its_threshold_comes_to_stand_for_its_shares() -> None:
    """Texts that repeat: a few steps of the loop that the page shows."""
    model = made(deviation=0.05, coefficient=0.1).train()
    ids = torch.arange(5).repeat(4, 4)
    optimiser = torch.optim.AdamW(model.parameters(), lr=5e-3)
    losses = []
    for _ in range(40):
        answer = model(ids)
        loss = F.cross_entropy(answer.logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        losses.append(float(loss.detach()))
        optimiser.zero_grad()
        (loss + sum(answer.losses.values())).backward()
        optimiser.step()
    assert losses[-1] < losses[0] / 4
    model.eval()
    assert torch.equal(model.generate(ids[:, :6], 4), ids[:, :10])
    share = float((model(ids).depths > 1).float().mean())
    assert 0.4 < share < 0.9, "two thirds were taken in training"


@pytest.mark.parametrize("how", ["average", "stepwise", "lower", "upper"])
def test_weights_of_a_trained_stack(how: Any) -> None:
    stack = made(1, recursions=1, sharing="cycle", layers=8)
    model = made(2)
    model.tie(stack.blocks, how)
    assert torch.equal(model.ends[0].norm.weight, stack.blocks[0].norm.weight)
    given = [stack.blocks[i].mlp.up.weight for i in range(1, 7)]
    expected = {
        "average": torch.stack([given[0], given[2], given[4]]).mean(0), "stepwise": given[0], "lower": given[0],
        "upper": given[4],
    }[how]  # fmt: skip
    torch.testing.assert_close(model.blocks[0].mlp.up.weight, expected)
    with pytest.raises(ValueError, match="stack must have 8 blocks, got 3"):
        model.tie(stack.blocks[:3])


def test_copies_and_states() -> None:
    model = made(4)
    other = made(5)
    other.load_state_dict(copy.deepcopy(model.state_dict()))
    assert torch.equal(other(text()).logits, model(text()).logits)


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("given", "text_of"),
    [
        ({"recursions": 4}, r"recursions must divide the 6 shared layers \(layers=8, sharing='middle_cycle'\), got"),
        ({"heads": 5}, "heads must divide the width into even parts"),
        ({"capacity": (1.0, 0.5)}, r"capacity must have 3 shares, one a recursion, got \(1\.0, 0\.5\)"),
        ({"capacity": (0.5, 0.6, 0.1)}, "capacity must not increase"),
        ({"capacity": (0.5, 0.5, 0.1), "kv": "share"}, "recursion 0 makes the keys of all tokens"),
        ({"gate": "softmax"}, "gate with route='expert' is 'softmax'; allowed are"),
        ({"gate": "tanh", "route": "token"}, "gate with route='token' is 'tanh'; allowed are"),
        ({"temperature": 0}, "temperature must be above 0, got 0"),
        ({"router": "wide"}, "router is 'wide'; allowed are 'linear', 'mlp'"),
        ({"layers": 0}, "layers must be an integer of at least 1, got 0"),
    ],
)
def test_configurations_that_cannot_be(given: dict[str, Any], text_of: str) -> None:
    with pytest.raises(ValueError, match=text_of):
        MoRConfig(**{**SMALL, **given})


def test_forwards_that_cannot_be() -> None:
    model = made()
    with pytest.raises(ValueError, match="select='top_k' chooses among all tokens of a text"):
        model(text(), cache=Cache(), select="top_k")
    with pytest.raises(ValueError, match="a model with sampling='none' learns no threshold: give select='top_k'"):
        made(sampling="none")(text())
    with pytest.raises(ValueError, match=r"mask must be \(2, 14\) like ids, got \(2, 3\)"):
        model(text(), torch.ones(2, 3))
    with pytest.raises(ValueError, match=r"ids must be \(B, N\), got \(14,\)"):
        model(text()[0])
    cache = Cache()
    model(text(), cache=cache)
    with pytest.raises(ValueError, match="the cache is of 2 samples, and ids has 1"):
        model(text(1, 1), cache=cache)
    assert some_of(torch.zeros(2, 3, dtype=torch.bool)).at.shape == (2, 0)
