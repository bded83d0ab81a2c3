"""LTP with learned thresholds: soft factors in training, the hard rule otherwise."""

from __future__ import annotations

import pytest
import torch

import tokred
from tests.encoder.attention_matrices import matrix_site
from tests.encoder.test_ltp import ONE, PADDED, TWO
from tokred.learn import Facts, Learned

FACTS = Facts("", 2, 8, 2)


def soft(temperature: float = 0.01, *, theta: float = 0.17, penalty: float = 0.5, **more):
    """The reduction of the worked example in training, its module and its losses."""
    method = tokred.LTP(thresholds=[0.0, theta], learn=True, temperature=temperature, penalty=penalty)
    site = matrix_site(ONE, TWO, layer=1, depth=2, **more)
    site.learned = Learned(method.module(FACTS).train())
    return method.reduce(site), site.learned.module, site.learned.losses


def test_worked_example():
    found, module, losses = soft()
    assert found.trivial
    assert found.gated == "rows"
    assert found.gate[0].tolist() == pytest.approx([1.0, 0.9998, 0.7549, 0.2018], abs=5e-5)
    assert float(losses["mask"].detach()) == pytest.approx(0.5 * 0.7391, abs=5e-5)
    (losses["mask"] / 0.5).backward()
    assert module.delta.grad.tolist() == pytest.approx([0, -8.6571], abs=5e-4)
    rows = torch.tensor([[1.0, 2], [3, 4], [5, 6], [7, 8]]) * found.gate[0, :, None]
    expected = [1.0, 2.0, 2.9995, 3.9993, 3.7746, 4.5295, 1.4127, 1.6145]
    assert rows.flatten().tolist() == pytest.approx(expected, abs=1e-4)


def test_padding_does_not_count():
    found, _, losses = soft(mask=PADDED)
    score = torch.tensor([0.5370, 0.2963, 0.1667])
    expected = torch.sigmoid((score - 0.17) / 0.01)
    assert found.gate[0, :3].tolist() == pytest.approx(expected.tolist(), abs=5e-3)
    assert float(losses["mask"].detach()) == pytest.approx(0.5 * float(found.gate[0, :3].mean().detach()))


def test_soft_factors_tend_to_the_hard_rule_as_the_temperature_falls():
    hard = torch.tensor([1.0, 1, 1, 0])
    gaps = [float((soft(t)[0].gate[0].detach() - hard).abs().max()) for t in (1e-2, 1e-3, 1e-4)]
    assert gaps[0] > gaps[1] > gaps[2]
    assert gaps[2] < 1e-6


def test_factors_rise_with_the_score_and_lie_between_none_and_all():
    gate = soft(0.1)[0].gate[0].detach()
    assert ((gate > 0) & (gate < 1)).all()
    assert gate.tolist() == sorted(gate.tolist(), reverse=True)


def test_a_threshold_too_cold_gets_no_gradient():
    _, module, losses = soft(1e-5)
    losses["mask"].backward()
    assert module.delta.grad.abs().max() < 1e-6


def test_evaluation_is_the_method_with_these_thresholds():
    method = tokred.LTP(thresholds=[0.0, 0.10], learn=True)
    module = method.module(FACTS).eval()
    with torch.no_grad():
        module.delta[1] = 0.07
    site = matrix_site(ONE, TWO, layer=1, depth=2)
    site.learned = Learned(module)
    found = method.reduce(site)
    plain = tokred.LTP(thresholds=module.values()).reduce(matrix_site(ONE, TWO, layer=1, depth=2))
    assert found.gate is None
    assert found.representative.tolist() == plain.representative.tolist() == [[0, 1, 2]]
    assert site.learned.losses == {}


def test_protected_tokens_are_never_dimmed():
    gate = soft(prefix=1, suffix=1)[0].gate[0]
    assert gate[0] == gate[3] == 1
    assert gate[2] < 1


def model_and_images():
    pytest.importorskip("timm")
    from tests.encoder.tiny_timm import build, images

    return build("vit"), images(3)


def test_a_soft_forward_multiplies_the_blocks_outputs():
    model, x = model_and_images()
    tokred.apply(model, "ltp", thresholds=[0.0, 0.04, 0.0], learn=True, temperature=0.01)
    tokens = []
    hooks = [block.register_forward_hook(lambda m, i, y: tokens.append(y)) for block in model.train().blocks]
    with torch.no_grad():
        model(x)
        gate = tokred.trace(model).gate
        tokred.remove(model)
        for hook in hooks:
            hook.remove()
        torch.testing.assert_close(tokens[1], model.blocks[1](tokens[0]) * gate[..., None])
    assert ((gate > 0) & (gate <= 1)).all()
    assert (gate[:, 0] == 1).all()


def test_gradients_reach_the_thresholds_and_the_backbone():
    model, x = model_and_images()
    tokred.apply(model.train(), "ltp", theta_final=0.06, learn=True, temperature=0.01)
    loss = model(x).square().sum() + sum(tokred.losses(model).values())
    loss.backward()
    delta = tokred.modules(model)["ltp"].delta
    assert delta.grad[0] == 0, "the first block prunes nothing"
    assert (delta.grad[1:] != 0).all()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_cold_soft_forwards_tend_to_one_with_the_hard_mask():
    model, x = model_and_images()
    outputs = []
    for temperature in (1e-3, 1e-5, 1e-7):
        tokred.apply(model, "ltp", theta_final=0.06, learn=True, temperature=temperature)
        model.train()
        with torch.no_grad():
            outputs.append(model(x))
            gate = tokred.trace(model).gate
    assert ((gate < 1e-3) | (gate > 1 - 1e-3)).all()
    a, b, c = outputs
    assert (b - c).abs().max() < (a - c).abs().max() / 10


def test_without_learning_there_is_no_module():
    model, x = model_and_images()
    tokred.apply(model, "ltp", theta_final=0.06)
    assert tokred.modules(model) == {}
    with torch.no_grad():
        y = model(x)
        tokred.apply(model, "ltp", theta_final=0.06, learn=True)
        assert torch.equal(model(x), y), "before anything is learned it is the same"


def test_a_text_encoder_learns_on_padded_batches():
    pytest.importorskip("transformers")
    from tests.encoder.test_bert import build

    with torch.no_grad():
        model = build()
    tokred.apply(model, "ltp", theta_final=0.1, learn=True, temperature=0.02)
    model.train()
    ids = torch.randint(5, 40, (2, 12))
    mask = torch.ones(2, 12, dtype=torch.int64)
    mask[1, 7:] = 0
    loss = model(input_ids=ids, attention_mask=mask).logits.square().sum() + tokred.losses(model)["ltp.mask"]
    loss.backward()
    assert tokred.modules(model)["ltp"].delta.grad[1:].abs().min() > 0


def test_refusals():
    for wrong, text in (
        ({"learn": 1}, "learn must be True or False, got 1"),
        ({"temperature": 0}, "temperature must be a number above 0, got 0"),
        ({"penalty": -1}, "penalty must be a number of at least 0, got -1"),
    ):
        with pytest.raises(ValueError, match=text):
            tokred.LTP(**wrong)
    with pytest.raises(tokred.MissingInputError, match="does not supply 'module', which ltp with learn=True"):
        tokred.LTP(thresholds=[0.1], learn=True).reduce(matrix_site(ONE))
