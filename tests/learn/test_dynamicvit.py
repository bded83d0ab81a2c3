"""DynamicViT: its counts, soft decisions in training, and that masked and packed forwards agree."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("timm")

import tokred
from tests.encoder import tiny_timm
from tests.encoder.tiny_timm import build, images
from tokred.adapters import find
from tokred.adapters.encoder.host import shared_of
from tokred.learn import Facts, Learned
from tokred.methods.encoder.dynamicvit import Predictor, Predictors


def learned(width: int = 8, stages: int = 3, *, training: bool, gate=None) -> Learned:
    torch.manual_seed(0)
    return Learned(Predictors(width, stages).train(training), gate)


def test_counts_of_the_paper():
    method, n, found = tokred.DynamicViT(), 197, []
    for layer in range(12):
        place = tokred.Place(layer, 12, prefix=1)
        acts = method.acts(n, place)
        n = method.tokens(n, place)
        if acts:
            found.append((layer + 1, n - 1))
    assert found == [(3, 137), (6, 96), (9, 67)]
    assert [method.kept(196, stage) for stage in range(3)] == [137, 96, 67]
    assert method.places(3) == (1, 2)
    assert tokred.DynamicViT(at=[1]).places(12) == (1,)


def test_the_highest_scores_stay_sorted_by_score_behind_the_class_token():
    x = torch.randn(2, 12, 8, generator=torch.Generator().manual_seed(3))
    given = learned(training=False)
    site = tokred.Site(x=x, prefix=1, suffix=1, layer=2, depth=12, learned=given)
    found = tokred.DynamicViT(rho=0.5).reduce(site)
    score = given.module(0, x[:, 1:-1], torch.ones(2, 10))[..., 0]
    expected = score.argsort(1, descending=True)[:, :5] + 1
    assert found.gate is None
    assert found.representative.tolist() == [[0, *row, 11] for row in expected.tolist()]


def test_soft_decisions_multiply_and_are_held_to_the_share():
    x = torch.randn(2, 9, 8, generator=torch.Generator().manual_seed(3))
    gate = torch.ones(2, 9)
    gate[:, 3:6] = 0
    given = learned(training=True, gate=gate)
    site = tokred.Site(x=x, prefix=1, layer=5, depth=12, learned=given)
    torch.manual_seed(5)
    found = tokred.DynamicViT(rho=0.5, ratio_weight=3.0).reduce(site)
    assert found.slots == 9
    assert found.gated == "keys"
    assert (found.gate[:, 0] == 1).all()
    share = (found.gate * gate)[:, 1:].mean(1)
    expected = 3.0 * (share - 0.25).square().mean() / 3
    torch.testing.assert_close(given.losses["ratio"], expected)


def test_the_predictor_sees_only_those_that_are_left():
    torch.manual_seed(0)
    predictor, x = Predictor(8), torch.randn(1, 6, 8)
    left = torch.tensor([[1.0, 1, 0, 1, 0, 1]])
    other = x.clone()
    other[0, 2] = 100
    rows = [0, 1, 3, 5]
    torch.testing.assert_close(predictor(x, left)[:, rows], predictor(other, left)[:, rows])
    packed = predictor(x[:, rows], torch.ones(1, 4))
    torch.testing.assert_close(predictor(x, left)[:, rows], packed)
    assert predictor(x, left * 0).isfinite().all()
    assert predictor.half()(x.half(), left).dtype == torch.float32


def forced(model, gates: list[torch.Tensor]) -> None:
    """Let the stages of a model in training decide as they are told."""
    stages = tokred.modules(model)["dynamicvit"].stages
    for stage, gate in zip(stages, gates, strict=True):
        # So sure that no draw changes it.
        logp = torch.stack([(gate - 1) * 1e4, -gate * 1e4], -1)
        stage.forward = lambda x, previous, logp=logp: logp + 0 * x.sum()


def kept_by(model, layer: int) -> torch.Tensor:
    """``(B, N)`` ones where a token of the last forward has come out of a block."""
    state = shared_of(model)[0][2].records[layer].state
    return torch.zeros(len(state.representative), state.length).scatter_(1, state.representative, 1)


@pytest.fixture(params=tiny_timm.FAMILIES)
def family(request) -> str:
    """Those whose heads read the class token."""
    if find(build(request.param)).pooled:
        with pytest.raises(tokred.MissingInputError, match=r"dynamicvit.*reads gates, module, which"):
            tokred.apply(build(request.param), "dynamicvit")
        pytest.skip("its head pools over all tokens, where soft decisions do not reach")
    return request.param


def soft_and_packed(model, x, **more):
    """A packed forward, then one in training whose decisions are those of the packed one."""
    tokred.apply(model, "dynamicvit", rho=0.6, at=[1, 2], **more)
    with torch.no_grad():
        packed = model(x)
        gates = [kept_by(model, layer) for layer in (0, 1)]
        prefix = shared_of(model)[0][2].prefix
        forced(model, [gate[:, prefix:] for gate in gates])
    return packed, model.train(), gates


def test_the_masked_forward_is_the_packed_one(family):
    """Tokens that stay come out of the soft forward as from one on them alone."""
    x = images(2)
    packed, model, gates = soft_and_packed(build(family), x)
    assert gates[0].sum() > gates[1].sum()
    soft = model(x)
    torch.testing.assert_close(soft, packed, rtol=1e-4, atol=5e-5)
    assert torch.equal(tokred.trace(model).gate, gates[1])
    assert {layer.tokens_out for layer in tokred.report(model).layers} == {gates[1].shape[1]}, "all stay"


def test_gradients_reach_the_predictors_and_the_backbone():
    model, x = build("vit").train(), images(3)
    tokred.apply(model, "dynamicvit", rho=0.6)
    losses = {}
    model(x).square().sum().backward()
    own = dict(tokred.modules(model)["dynamicvit"].named_parameters())
    assert all(p.grad is not None and p.grad.isfinite().all() for p in own.values())
    assert all(own[f"stages.{i}.embed.weight"].grad.abs().sum() > 0 for i in range(2)), "through the masked attention"
    assert all(p.grad is not None for p in model.parameters())
    losses = tokred.losses(model)
    assert list(losses) == ["dynamicvit.ratio"]
    assert losses["dynamicvit.ratio"].requires_grad


def test_a_closed_gate_hides_a_token_from_all_others():
    """Its features reach no other row, so no gradient comes back to them from where the others end."""
    _, model, gates = soft_and_packed(build("vit"), images(1))
    seen = []
    hooked = model.blocks[1].register_forward_pre_hook(lambda m, args: seen.append(args[0]) or args[0].retain_grad())
    model(images(1)).square().sum().backward()
    hooked.remove()
    reached = seen[0].grad.abs().sum(-1)
    assert (reached[gates[0] == 0] < 1e-4 * reached.max()).all(), "but for eps"
    assert (reached[gates[1] == 1] > 1e-4 * reached.max()).all()


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing(reentrant):
    import timm.models

    from tests.encoder.test_training import _reentrant

    def run(model):
        torch.manual_seed(1)
        loss = model(x).square().sum() + sum(tokred.losses(model).values())
        loss.backward()
        every = [*model.named_parameters(), *tokred.modules(model)["dynamicvit"].named_parameters()]
        found = {name: p.grad.clone() for name, p in every}
        for _, p in every:
            p.grad = None
        return found, {k: float(v.detach()) for k, v in tokred.losses(model).items()}

    model, x = build("vit").train(), images(3)
    tokred.apply(model, "dynamicvit", rho=0.6)
    expected, terms = run(model)
    model.set_grad_checkpointing(True)
    with _reentrant(timm, reentrant):
        if reentrant:
            with pytest.raises(tokred.UnsupportedModelError, match="reentrant checkpointing cuts off"):
                run(model)
            return
        found, again = run(model)
    assert again == pytest.approx(terms), "a recomputation adds no terms"
    for name, grad in expected.items():
        torch.testing.assert_close(found[name], grad, rtol=1e-4, atol=1e-5, msg=name)


def test_in_half_precision_and_under_autocast():
    model, x = build("vit"), images(2)
    tokred.apply(model.to(torch.bfloat16), "dynamicvit", rho=0.6)
    own = tokred.modules(model)["dynamicvit"]
    assert {p.dtype for p in own.parameters()} == {torch.bfloat16}
    assert model(x.bfloat16()).isfinite().all()
    model.float().train()
    assert {p.dtype for p in own.parameters()} == {torch.float32}
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(x).float().square().sum() + sum(tokred.losses(model).values())
    loss.backward()
    assert all(p.grad.isfinite().all() for p in own.parameters())


def test_refusals():
    for wrong, text in (
        ({"rho": 0}, "rho must be a number above 0 and at most 1, got 0"),
        ({"rho": 1.5}, "rho must be a number above 0"),
        ({"at": [0]}, r"at must be rising numbers of blocks, the first at least 1, got \[0\]"),
        ({"at": [2, 1]}, "at must be rising"),
        ({"tau": 0}, "tau must be"),
        ({"over": "all"}, "over is 'all'"),
    ):
        with pytest.raises(ValueError, match=text):
            tokred.DynamicViT(**wrong)
    with pytest.raises(ValueError, match=r"at is \[12\], but the model has 12 blocks"):
        tokred.DynamicViT(at=[12]).check(12)
    with pytest.raises(ValueError, match="width must be even and at least 4, got 7"):
        tokred.DynamicViT().module(Facts("", 12, 7, 1))
    with pytest.raises(tokred.MissingInputError, match="does not supply 'module', by which dynamicvit decides"):
        tokred.DynamicViT().reduce(tokred.Site(x=torch.randn(1, 5, 8), layer=2, depth=12))


def test_the_head_sees_each_token_beside_the_mean_of_those_that_are_left():
    torch.manual_seed(0)
    own, x = Predictor(8), torch.randn(2, 5, 8)
    left = torch.tensor([[1.0, 0.0, 1.0, 0.5, 1.0], [1.0] * 5])
    local, whole = torch.nn.functional.gelu(own.embed(own.norm(x))).chunk(2, -1)
    mean = (whole * left[..., None]).sum(1, keepdim=True) / left.sum(1)[:, None, None]
    expected = own.head(torch.cat([local, mean.expand_as(local)], -1)).log_softmax(-1)
    torch.testing.assert_close(own(x, left), expected)
