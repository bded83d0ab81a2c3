"""The oracle: one forward of the unpatched model, rolled out, against matrices by hand; the model stays as it was."""

from __future__ import annotations

import pytest
import torch

import tokred
from tests.encoder.test_tokentm import FAMILIES, linear_parts
from tokred.analysis.contributions import contributions
from tokred.encoder.importance import tokentm_rollout, tokentm_weights


@pytest.fixture
def tiny():
    pytest.importorskip("timm")
    from tests.encoder import tiny_timm

    return tiny_timm


def by_hand(model, x, per_head=False, use_mlp=False, target=None, direction_only=False):
    """The whole roll-out of a plain VisionTransformer with matrices, in float64, by its parameters."""
    model = model.double()
    attentions, z = [], model._pos_embed(model.patch_embed(x.double()))
    c = torch.diag_embed(z.norm(dim=-1)).detach()
    layers = []
    for block in model.blocks:
        e = block.norm1(z)
        b, n, _ = e.shape
        q, k, v = block.attn.qkv(e).reshape(b, n, 3, 3, 16).permute(2, 0, 3, 1, 4)
        a = (block.attn.q_norm(q) @ block.attn.k_norm(k).mT / 4).softmax(-1)
        attentions.append(a)
        z = z + block.ls1(block.attn.proj((a @ v).transpose(1, 2).flatten(2)))
        m = block.norm2(z)
        out = block.mlp(m)
        z = z + block.ls2(out)
        layers.append((e.detach(), m.detach(), out.detach(), linear_parts(block.attn)))
    votes = [a.detach() for a in attentions]
    if target is not None:
        logits = model.forward_head(model.norm(z))
        gradients = torch.autograd.grad(logits.gather(1, target[:, None]).sum(), attentions)
        votes = [(a * g).clamp_min(0) for a, g in zip(votes, gradients, strict=True)]
    with torch.no_grad():
        for a, (e, m, out, parts) in zip(votes, layers, strict=True):
            if per_head:
                w = torch.stack([tokentm_weights(e, e @ p.mT, direction_only=direction_only) for p in parts], 1)
            else:
                w = tokentm_weights(e, e @ parts.sum(0).mT, direction_only=direction_only).unsqueeze(1)
            c = c + (a @ (w.unsqueeze(-1) * c.unsqueeze(1))).mean(1)
            if use_mlp:
                c = c + tokentm_weights(m, out, direction_only=direction_only).unsqueeze(-1) * c
        return c[:, 0, 1:].float()


@pytest.mark.parametrize("family", ["vit", "vit-qknorm", "vit-layerscale (DeiT-3)", "vit-no-bias"])
@pytest.mark.parametrize(
    "options",
    [{}, {"form": "per_head"}, {"use_mlp": True}, {"direction_only": True}, {"target": torch.tensor([2, 0])},
     {"target": torch.tensor([1, 6]), "form": "per_head", "use_mlp": True}],
)  # fmt: skip
def test_contributions_equal_the_roll_out_by_hand(tiny, family, options):
    model, x = tiny.build(family), tiny.images(2)
    found = contributions(model, x, **options)
    assert found.shape == (2, 25)
    assert not found.requires_grad
    given = {k: v for k, v in options.items() if k != "form"}
    expected = by_hand(tiny.build(family), x, per_head=options.get("form") == "per_head", **given)
    torch.testing.assert_close(found, expected, rtol=2e-4, atol=1e-5)
    alone = {**options, "target": options["target"][1:]} if "target" in options else options
    torch.testing.assert_close(contributions(model, x[1:], **alone), found[1:], rtol=2e-4, atol=1e-5)


def test_one_class_for_all_images(tiny):
    model, x = tiny.build("vit"), tiny.images(2)
    both = contributions(model, x, target=3)
    assert torch.equal(both, contributions(model, x, target=torch.tensor([3, 3])))
    assert not torch.allclose(both, contributions(model, x, target=4))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_is_left_as_it_was(tiny, family):
    from tests.encoder.laws import assert_same, snapshot

    model, x = tiny.build(family), tiny.images(2)
    scores = contributions(model, x)
    assert scores.isfinite().all()
    assert (scores >= 0).all()
    before = snapshot(model)
    contributions(model, x, use_mlp=True, target=1)
    assert_same(before, snapshot(model))
    assert all(p.grad is None for p in model.parameters())
    with torch.no_grad():
        tokred.apply(model, "tome", r=4)
        y = model(x)
        report = str(tokred.report(model))
        before = snapshot(model)
        assert torch.equal(contributions(model, x), scores), "the patch is lifted for the oracle"
        assert_same(before, snapshot(model))
        assert str(tokred.report(model)) == report
        assert torch.equal(model(x), y)
    model.train()
    model.blocks[1].eval()
    assert torch.equal(contributions(model, x), scores), "in evaluation mode"
    assert [b.training for b in model.blocks] == [True, False, True]
    tokred.remove(model)


def test_an_error_leaves_the_model_as_it_was_too(tiny):
    from tests.encoder.laws import assert_same, snapshot

    model = tiny.build("vit")
    tokred.apply(model, "tome", r=4)
    before = snapshot(model)
    with pytest.raises(AssertionError, match="height"):
        contributions(model, torch.randn(2, 3, 24, 24))
    assert_same(before, snapshot(model))


def test_pooling_models_are_scored_by_the_mean_of_their_patches(tiny):
    model, x = tiny.build("vit-mean"), tiny.images(2)
    found = contributions(model, x)
    assert found.shape == (2, 25)
    with_class = contributions(tiny.build("vit-mean-with-class (MAE)"), x)
    assert with_class.shape == (2, 25)
    from tokred.adapters.encoder.unpatched_run import record

    run = record(model, x)
    weights = [tokentm_weights(*b.transform()) for b in run.blocks]
    full = tokentm_rollout([b.site for b in run.blocks], weights, run.blocks[0].x.norm(dim=-1))
    torch.testing.assert_close(found, full.mean(1), rtol=1e-4, atol=1e-5)


def test_a_model_inside_another(tiny):
    inner, x = tiny.build("vit"), tiny.images(2)
    outer = torch.nn.Sequential(inner, torch.nn.Linear(7, 3))
    torch.testing.assert_close(contributions(outer, x), contributions(inner, x))
    assert contributions(outer, x, target=2).shape == (2, 25)


def test_what_cannot_be_recorded_is_refused(tiny):
    x = tiny.images(2)
    with pytest.raises(tokred.MissingInputError, match="transform"):
        contributions(tiny.build("vit-parallel-scaling"), x)
    with pytest.raises(tokred.MissingInputError, match="attention"):
        contributions(tiny.build("relpos"), x)
    with pytest.raises(ValueError, match="form is 'heads'"):
        contributions(tiny.build("vit"), x, form="heads")
    model = tiny.build("vit")
    model.blocks[1].attn.fused_attn = False
    with pytest.raises(tokred.UnsupportedModelError, match="fused"):
        contributions(model, x)
