"""VTM's learned targets: the saliency of the card, its auxiliary attention, and what teaches it."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("timm")

import tokred
from tests.encoder import tiny_timm
from tests.encoder.tiny_timm import build, images
from tests.kinds import each
from tests.learn.checkpointing import check_gradients
from tests.learn.laws import applied, check_found_again, descended
from tokred.adapters import find
from tokred.encoder.padding import reduce_each
from tokred.learn import Facts, Learned
from tokred.methods.encoder.vtm import Saliency, auxiliary, largest

LEARNED = {"variant": "learned", "gamma": 3, "blocks": (1,)}


def test_worked_example_of_the_draws():
    s = torch.tensor([[0.9, -0.5, 0.1, 0.7]])
    p = s.softmax(1)
    torch.testing.assert_close(p, torch.tensor([[0.397669, 0.098064, 0.178684, 0.325584]]), rtol=0, atol=1e-6)
    assert largest(s, 2).tolist() == largest(s + 3, 2).tolist() == [[True, False, False, True]]
    # Keys and a vector of which these are the saliencies.
    module = Saliency(1, 1)
    torch.nn.init.ones_(module.vectors)
    k = s.atanh().view(1, 1, 4, 1)
    torch.testing.assert_close(module(0, k[:, 0]), s)
    x = torch.arange(4.0).view(1, 4, 1)
    site = tokred.Site(x=x, k=k, q=k, v=k, learned=Learned(module.eval()))
    found = tokred.VTM("learned", gamma=2, R=None, blocks=(0,)).reduce(site)
    assert found.representative.tolist() == [[0, 3]]
    assert type(found) is tokred.Reduction


def test_worked_example_of_the_auxiliary_attention():
    eye, s = torch.eye(2).view(1, 1, 2, 2), torch.tensor([[0.5, -0.5]])
    # Values that are the identity say how each row looks at each key.
    found = auxiliary(eye, eye, eye, s)[0]
    torch.testing.assert_close(found, torch.tensor([[0.804430, 0.195570], [0.5, 0.5]]), rtol=0, atol=1e-6)
    q, k, v = torch.randn(3, 2, 4, 6, 8).unbind(0)
    plain = torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
    torch.testing.assert_close(auxiliary(q, k, v, torch.zeros(2, 6)), plain, rtol=1e-4, atol=1e-5)
    mask = torch.arange(6).expand(2, -1) < 4
    short = auxiliary(q[:, :, :4], k[:, :2, :4], v[:, :2, :4], torch.ones(2, 4))
    torch.testing.assert_close(auxiliary(q, k[:, :2], v[:, :2], torch.ones(2, 6), mask=mask)[:, :4], short)


def trained(helps: str):
    model, x = build("vit").train(), images(2)
    torch.manual_seed(3)
    tokred.apply(model, "vtm", **LEARNED, helps=helps)
    return model, x


def test_the_saliency_learns_by_the_loss_of_the_task_alone():
    grads = {}
    for helps in ("gradient", "added"):
        model, x = trained(helps)
        torch.manual_seed(5)
        y = model(x)
        y.square().sum().backward()
        assert tokred.losses(model) == {}
        (vectors,) = tokred.parameters(model)
        assert vectors.grad.abs().sum() > 0
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
        grads[helps] = y.detach()
    assert not torch.equal(grads["gradient"], grads["added"])


def test_the_gradient_does_not_change_what_comes_out():
    """With the draws that evaluation takes, training gives what evaluation gives, bit for bit; the paper's does not."""
    same = {}
    for helps in ("gradient", "added"):
        model, x = trained(helps)
        own = tokred.modules(model)["vtm"]
        # So sure that no draw changes it.
        own.forward = lambda block, keys, own=own: 1e6 * (keys @ own.vectors[block])
        with torch.no_grad():
            soft, kept = model(x), tokred.trace(model).representative
            hard = model.eval()(x)
        assert torch.equal(kept, tokred.trace(model).representative)
        same[helps] = torch.allclose(soft, hard, rtol=1e-4, atol=1e-5)
    assert same == {"gradient": True, "added": False}


def test_training_draws_and_evaluation_does_not():
    model, x = trained("gradient")
    with torch.no_grad():
        torch.manual_seed(0)
        model(x)
        first = tokred.trace(model).representative
        model(x)
        assert not torch.equal(first, tokred.trace(model).representative)
        torch.manual_seed(0)
        model(x)
        assert torch.equal(first, tokred.trace(model).representative)
        y = model.eval()(x)
        assert torch.equal(model(x), y)
        torch.testing.assert_close(torch.cat([model(one[None]) for one in x]), y, rtol=1e-4, atol=1e-5)
        tokred.change(model, sampling=True, seed=1)
        drawn = model(x)
        assert not torch.equal(drawn, y)
        assert torch.equal(model(x), drawn)


def test_checkpointing_and_saving(tmp_path):
    model, x = trained("gradient")

    def loss():
        torch.manual_seed(7)
        return model(x).square().sum()

    check_gradients(model, loss)
    check_found_again(model, x, tmp_path)


def test_the_loss_falls_and_targets_are_what_counts():
    """Of 16 tokens one says the class; it becomes a target, whose mean is of few, when only the saliency learns."""
    torch.manual_seed(0)
    method = tokred.VTM("learned", gamma=4, R=None, blocks=(0,), metric="x")
    module, read = method.module(Facts("", 1, 8, 1)), torch.zeros(8)
    read[1] = 1.0

    def asked(n: int = 64):
        y, where = torch.randint(0, 2, (n,)) * 2.0 - 1, torch.randint(0, 16, (n,))
        x = torch.randn(n, 16, 8) * 0.3
        x[:, :, 1] = 0
        x[torch.arange(n), where, 0] = 3
        x[torch.arange(n), where, 1] = 3 * y
        heads = x.unsqueeze(1)
        found = method.reduce(tokred.Site(x=x, q=heads * 0, k=heads, v=heads, learned=Learned(module)))
        return found, (found.merge(x).mean(1) @ read), x, y, where

    def loss():
        _, said, _, y, _ = asked()
        return torch.nn.functional.softplus(-said * y).mean()

    losses = descended(torch.optim.AdamW(module.parameters(), lr=0.05), loss, 60)
    module.eval()
    found, *_, where = asked()
    assert (found.representative == where[:, None]).any(1).float().mean() > 0.9, "by chance it is 4 of 16"
    assert sum(losses[-10:]) < sum(losses[:10])


@pytest.mark.parametrize("family", each(tiny_timm.FAMILIES, {"vit-mean": "no class token, a mean"}))
def test_hosts(family):
    model, x = build(family), images(2)
    if not applied(model, "vtm", "module", "attention", **LEARNED):
        return
    model.train()(x).square().sum().backward()
    (vectors,) = tokred.parameters(model)
    assert vectors.shape[0] == 1
    assert vectors.grad.abs().sum() > 0
    assert tokred.report(model).layers[1].tokens_out < find(model).tokens(tuple(x.shape))


def test_padded_batches_teach_it_nothing_and_are_refused():
    method = tokred.VTM("learned", gamma=2, blocks=(0,))
    module = method.module(Facts("", 1, 4, 1))
    x = torch.randn(2, 8, 4)
    mask = torch.arange(8).expand(2, -1) < torch.tensor([[8], [6]])
    site = tokred.Site(x=x, q=x[:, None], k=x[:, None], v=x[:, None], mask=mask, learned=Learned(module))
    with pytest.raises(tokred.UnsupportedModelError, match="'vtm' cannot learn on batches that are padded from the st"):
        reduce_each(method, site)
    module.eval()
    assert reduce_each(method, site).slots < 8


def test_refusals():
    site = tokred.Site(x=torch.randn(1, 8, 4), k=torch.randn(1, 1, 8, 4))
    with pytest.raises(tokred.MissingInputError, match="does not supply 'module', by which vtm with variant='learned'"):
        tokred.VTM("learned", blocks=(0,)).reduce(site)
    with pytest.raises(tokred.MissingInputError, match="keys have 4 numbers a head, not 6, the width by the heads"):
        Saliency(6, 1)(0, torch.zeros(1, 8, 4))
    assert tokred.VTM().module(Facts("", 12, 48, 3)) is None
    assert tokred.VTM("learned").module(Facts("", 12, 48, 3)).vectors.shape == (3, 16)


def test_half_precision_keys_are_judged_as_the_same_values_in_float32():
    keys = torch.randn(1, 4, 24, 8, generator=torch.Generator().manual_seed(0)).bfloat16()
    heard = []
    for k in (keys, keys.float()):
        torch.manual_seed(0)
        module = Saliency(8, 1).eval()
        module.register_forward_hook(lambda module, inputs, output: heard.append(output))
        site = tokred.Site(x=k.mean(1), k=k, q=k, v=k, learned=Learned(module))
        tokred.VTM("learned", gamma=2, blocks=(0,)).reduce(site)
    assert torch.equal(*heard)
