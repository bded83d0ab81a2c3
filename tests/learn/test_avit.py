"""A-ViT: halting, the sum over blocks that comes out, its losses, and that tokens may really leave."""

from __future__ import annotations

import copy

import pytest
import torch

pytest.importorskip("timm")

import tokred
from tests.encoder.tiny_timm import build, images
from tokred.learn import Learned
from tokred.methods.encoder.avit import Halt, Halting, bell, divergence

SETTING = {"gamma": 4.0, "beta": 0.0}


def test_the_cards_example():
    scores = torch.tensor([[[0.3, 0.9, 0.6]], [[0.4, 0.05, 0.5]], [[0.6, 0.1, 0.1]]])
    done, left = torch.zeros(1, 3), torch.ones(1, 3)
    alive = torch.ones(1, 3, dtype=torch.bool)
    output, blocks, seen = torch.zeros(1, 3), torch.zeros(1, 3), []
    for layer, score in enumerate(scores, 1):
        step = Halt.of(score * alive, done, left, alive, 0.99)
        done, left, alive = step.done, step.left, step.alive
        output, blocks = output + layer * step.weight, blocks + step.blocks
        seen.append(alive[0].tolist())
    assert seen[1] == [True, True, False]
    torch.testing.assert_close(output, torch.tensor([[2.0, 1.15, 1.4]]))
    torch.testing.assert_close(blocks, torch.tensor([[3.3, 3.05, 2.4]]))
    first = torch.sigmoid(10 * torch.tensor([2.8, 3.0, 3.1]) - 30)
    torch.testing.assert_close(first, torch.tensor([0.1192, 0.5, 0.7311]), rtol=0, atol=5e-5)


def test_weights_add_up_and_halting_earlier_never_takes_more_blocks():
    torch.manual_seed(0)

    def run(scores):
        done, left = torch.zeros(1, 50), torch.ones(1, 50)
        alive = torch.ones(1, 50, dtype=torch.bool)
        weight, blocks = torch.zeros(1, 50), torch.zeros(1, 50)
        for layer, score in enumerate(scores):
            score = torch.ones_like(score) if layer == len(scores) - 1 else score
            step = Halt.of(score * alive, done, left, alive, 0.99)
            done, left, alive = step.done, step.left, step.alive
            weight, blocks = weight + step.weight, blocks + step.blocks
        return weight, blocks

    scores = torch.rand(6, 1, 50) ** 3
    weight, blocks = run(scores)
    torch.testing.assert_close(weight, torch.ones(1, 50))
    assert blocks.min() >= 1
    assert blocks.max() <= 7
    assert (run((scores * 1.5).clamp(max=1))[1] <= blocks + 1e-5).all()


def masked(model, x, *, gamma: float, beta: float, eps: float = 0.01):
    """The algorithm of the card on all tokens of a timm model: halted ones are masked, none leaves."""
    tokens = model._pos_embed(model.patch_embed(x))
    b, n, _ = tokens.shape
    done, left, alive = torch.zeros(b, n), torch.ones(b, n), torch.ones(b, n)
    output, blocks, scores = torch.zeros_like(tokens), torch.zeros(b, n), []
    for layer, block in enumerate(model.blocks):
        tokens = tokens * alive[..., None]
        attn, (q, k, v) = block.attn, heads(block, tokens)
        logits = q @ k.mT * attn.scale + torch.where(alive > 0, 0.0, -1000.0)[:, None, None]
        mixed = (logits.softmax(-1) @ v).transpose(1, 2).flatten(2)
        tokens = tokens + attn.proj(mixed)
        tokens = tokens + block.mlp(block.norm2(tokens))
        score = torch.sigmoid(gamma * tokens[..., 0] - beta)
        scores.append((score * alive)[:, 1:].mean())
        score = torch.ones_like(score) if layer == len(model.blocks) - 1 else score
        done, blocks = done + score * alive, blocks + alive
        reached = (done >= 1 - eps) & (alive > 0)
        on = (done < 1 - eps) & (alive > 0)
        output = output + tokens * torch.where(reached, left, 0)[..., None] + tokens * (score * on)[..., None]
        blocks = blocks + torch.where(reached, left, 0)
        left = torch.where(on, left - score, left)
        alive = on.float()
    return model.forward_head(model.norm(output)), blocks, torch.stack(scores)


def heads(block, tokens):
    b, n, _ = tokens.shape
    qkv = block.attn.qkv(block.norm1(tokens)).view(b, n, 3, block.attn.num_heads, -1)
    return qkv.permute(2, 0, 3, 1, 4)


@pytest.mark.parametrize("beta", [0.0, -3.0, 5.0])
def test_tokens_that_leave_are_as_good_as_masked(beta):
    """In training and in evaluation; with a class token that halts, and with samples that are done early."""
    plain, x = build("vit"), images(4)
    expected, blocks, scores = masked(plain, x, gamma=4.0, beta=beta)
    model = tokred.apply(copy.deepcopy(plain), "avit", gamma=4.0, beta=beta)
    found = model(x)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert tokred.report(model).layers[-1].tokens_in < 26 or beta == 5.0
    torch.testing.assert_close(model.train()(x), expected, rtol=1e-4, atol=1e-4)
    losses = tokred.losses(model)
    assert sorted(losses) == ["avit.ponder", "avit.prior"]
    torch.testing.assert_close(losses["avit.ponder"], 5e-4 * blocks.mean())
    goal = bell(3, None, 1.0, scores)
    torch.testing.assert_close(losses["avit.prior"], 1e-3 * divergence(scores, goal), rtol=1e-4, atol=1e-7)
    # And the gradients.
    (found_grad,) = torch.autograd.grad(model(x).square().sum() + sum(tokred.losses(model).values()),
                                        model.blocks[0].mlp.fc1.weight)  # fmt: skip
    wanted, blocks, scores = masked(plain, x, gamma=4.0, beta=beta)
    loss = wanted.square().sum() + 5e-4 * blocks.mean() + 1e-3 * divergence(scores, goal)
    (wanted_grad,) = torch.autograd.grad(loss, plain.blocks[0].mlp.fc1.weight)
    torch.testing.assert_close(found_grad, wanted_grad, rtol=1e-3, atol=1e-3)


def test_a_sample_does_not_depend_on_its_batch():
    model, x = tokred.apply(build("vit"), "avit", **SETTING), images(4)
    with torch.no_grad():
        together, alone = model(x), torch.cat([model(one[None]) for one in x])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)


def test_the_first_channel_gets_a_gradient_from_the_number_of_blocks():
    model, x = tokred.apply(build("vit").train(), "avit", gamma=1.0, beta=2.0), images(2)
    seen = []
    model.blocks[0].register_forward_hook(lambda m, i, y: seen.append(y) or y.retain_grad())
    model(x)
    tokred.losses(model)["avit.ponder"].backward()
    grad = seen[0].grad.abs().sum((0, 1))
    assert grad[0] > 0
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


def test_nothing_halts_without_a_gate():
    plain, x = build("vit"), images(2)
    with torch.no_grad():
        expected = plain(x)
        model = tokred.apply(plain, "avit", gamma=0.0, beta=50.0)
        torch.testing.assert_close(model(x), expected)
        assert {layer.tokens_out for layer in tokred.report(model).layers} == {26}


def test_checkpointing_is_right_or_refused():
    import timm

    from tests.encoder.test_training import _reentrant

    def run(model):
        loss = model(x).square().sum() + 1e4 * sum(tokred.losses(model).values())
        return torch.autograd.grad(loss, model.blocks[0].attn.qkv.weight)[0]

    model, x = tokred.apply(build("vit").train(), "avit", **SETTING), images(2)
    expected = run(model)
    model.set_grad_checkpointing(True)
    with _reentrant(timm, False):
        torch.testing.assert_close(run(model), expected, rtol=1e-4, atol=1e-4)
    with _reentrant(timm, True), pytest.raises(tokred.UnsupportedModelError, match="reentrant checkpointing cuts off"):
        run(model)


def test_saved_and_found_again(tmp_path):
    model = tokred.apply(build("vit"), "avit", **SETTING)
    tokred.save(model, tmp_path)
    assert tokred.load(tmp_path) == tokred.AViT(**SETTING)
    with torch.no_grad():
        torch.testing.assert_close(tokred.apply(build("vit"), tokred.load(tmp_path))(images(1)), model(images(1)))


def test_goal_of_the_scores():
    goal = bell(12, None, 1.0, torch.zeros(()))
    assert float(goal[:8].sum()) == pytest.approx(0.98, abs=1e-6)
    assert int(goal.argmax()) == 8
    assert float(goal.sum()) > 1, "it is not held to one"
    assert float(divergence(goal * 3, (goal / goal.sum()).clamp(0.01, 0.99))) == pytest.approx(0, abs=1e-6)


def test_refusals():
    for wrong, text in (
        ({"eps": 0}, r"eps must lie in \(0, 1\), got 0"),
        ({"ponder": -1}, "ponder and prior must be at least 0, got -1"),
        ({"spread": 0}, "spread must be above 0"),
        ({"gamma": "x"}, "gamma"),
    ):
        with pytest.raises(ValueError, match=text):
            tokred.AViT(**wrong)
    with pytest.raises(tokred.MissingInputError, match="does not supply 'module', by which avit"):
        tokred.AViT().reduce(tokred.Site(x=torch.randn(1, 5, 8), prefix=1))
    with pytest.raises(tokred.MissingInputError, match="module"):
        tokred.apply(build("vit-mean"), "avit", **SETTING)
    site = tokred.Site(x=torch.zeros(1, 3, 4), prefix=1, depth=2, learned=Learned(Halting()))
    assert tokred.AViT(gamma=1.0, beta=-9.0).reduce(site).slots == 1, "all have halted; a first token stays in place"
