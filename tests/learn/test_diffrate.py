"""DiffRate: counts that are learned, their gradients, and that masked and packed forwards agree."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("timm")

import tokred
from tests.encoder.tiny_timm import build, images
from tokred.core.relaxed import Absorbed
from tokred.learn import Facts, Learned
from tokred.methods.encoder.diffrate import Rates


def rates(blocks: int = 1, patches: int = 4, *, logits=None) -> Rates:
    made = Rates(blocks, patches, 1, 8)
    if logits is not None:
        made.logits.data.copy_(torch.as_tensor(logits, dtype=torch.float32))
    return made


def sharp(model: torch.nn.Module, counts: list[tuple[int, int]]) -> Rates:
    """The counts of a model as they are told, and all but surely."""
    own = tokred.modules(model)["diffrate"]
    own.logits.data.zero_()
    for block, pair in enumerate(counts):
        for which, count in enumerate(pair):
            own.logits.data[which, block, own.patches - count] = 20.0
    return own


def test_the_cards_example():
    own = rates(logits=[[[0.0, 1, 0, -1]]] * 2)
    torch.testing.assert_close(
        own.probabilities()[0, 0], torch.tensor([0.196612, 0.534447, 0.196612, 0.072329]), rtol=0, atol=1e-6
    )
    assert float((own.probabilities()[0, 0] * own.candidates).sum().detach()) == pytest.approx(2.855341, abs=1e-6)
    assert own.kept() == [(3, 3)]
    # With one protected token: that one, and four ranks of patches.
    gate = own.gate(0, 0, torch.arange(4)[None])
    assert gate.tolist() == [[1, 1, 1, 0]]
    given = torch.tensor([[1.0, 2, 3, 4]])
    (gate * given).sum().backward()
    logits = own.logits.detach()[0, 0].clone().requires_grad_()
    above = torch.stack([(logits.softmax(0) * (own.candidates > t)).sum() for t in range(4)])
    torch.testing.assert_close(above.detach(), torch.tensor([1, 0.927671, 0.731059, 0.196612]), rtol=0, atol=1e-6)
    (above * given[0]).sum().backward()
    torch.testing.assert_close(own.logits.grad[0, 0], logits.grad)


def test_soft_tends_to_hard_as_the_weights_sharpen():
    torch.manual_seed(0)
    logits = torch.randn(2, 1, 9)
    apart = []
    for factor in (1, 30, 1000):
        own = rates(patches=9, logits=logits * factor)
        p = own.probabilities()[0, 0]
        above = torch.stack([(p * (own.candidates > t)).sum() for t in range(9)])
        hard = own.gate(0, 0, torch.arange(9)[None])[0]
        apart.append(float((above - hard).abs().sum().detach()))
    assert 1 > apart[0] / 9 > 0.1 > apart[1]
    assert apart[2] < 1e-6


def test_work_is_that_of_the_counts():
    counts = [(7, 5), (9, 4), (3, 3)]
    own = rates(3, 10)
    for block, pair in enumerate(counts):
        for which, count in enumerate(pair):
            own.logits.data[which, block, 10 - count] = 30.0
    assert own.kept() == [(7, 5), (5, 4), (3, 3)], "none comes back"
    c, total, full, enters = 8, 0, 0, 11
    for leaves in (6, 5, 4):
        total += 4 * enters * c * c + 2 * enters**2 * c + 8 * leaves * c * c
        full += 12 * 11 * c * c + 2 * 11**2 * c
        enters = leaves
    share = own.work(1)
    assert float(share.detach()) == pytest.approx(total / full)
    share.backward()
    assert own.logits.grad.isfinite().all()
    assert tokred.DiffRate(**own.lists()).check(3) is None


def test_absorbed_tokens_stay_and_are_in_the_others_mean():
    x = torch.tensor([[[0.0], [1.0], [2.0], [6.0], [9.0]]])
    gate = torch.tensor([[1.0, 1, 0, 0, 0]])
    made = Absorbed.make(torch.tensor([[0, 1, 1, 1, 4]]), gate)
    y, size = made.step(x)
    assert y.flatten().tolist() == [0, 3, 2, 6, 9]
    assert size.tolist() == [[1.0] * 5]
    with pytest.raises(ValueError, match=r"into \(1, 5\) and gate \(1, 4\) must be alike"):
        Absorbed.make(torch.tensor([[0, 1, 1, 1, 4]]), gate[:, :4])


def test_last_are_pruned_next_merge():
    x = torch.tensor([[[9.0, 9], [1, 0], [0, 1], [1, 0.2], [0.1, 1], [5, 5]]])
    score = torch.tensor([[0.0, 0.4, 0.3, 0.2, 0.1, 0.05]])
    site = tokred.Site(x=x, class_attention=score, prefix=1)
    found = tokred.DiffRate(prune=[4], merge=[2]).reduce(site)
    assert found.groups() == [[[0], [1, 3], [2, 4]]], "the last patch is gone"
    y, _ = found.step(x)
    torch.testing.assert_close(y[0, 1:], torch.tensor([[1.0, 0.1], [0.05, 1.0]]))
    assert [tokred.DiffRate(prune=[4], merge=[5, 2]).left(6, layer) for layer in range(3)] == [(4, 4), (6, 2), (6, 6)]


@pytest.mark.parametrize("family", ["vit", "vit-registers (DINOv2)"])
def test_the_masked_forward_is_the_packed_one(family):
    x = images(3)
    counts = [(20, 14), (12, 12), (12, 5)]
    model = tokred.apply(build(family), "diffrate", learn=True, patches=25)
    own = sharp(model, counts)
    with torch.no_grad():
        packed = model(x)
        left = [layer.tokens_out for layer in tokred.report(model).layers]
        soft = model.train()(x)
        kept = tokred.trace(model).gate
    protected = left[-1] - 5
    assert left == [14 + protected, 12 + protected, 5 + protected]
    assert kept.sum(1).tolist() == [left[-1]] * 3
    torch.testing.assert_close(soft, packed, rtol=1e-4, atol=5e-5)
    listed = tokred.apply(build(family), "diffrate", **own.lists())
    with torch.no_grad():
        assert torch.equal(listed(x), packed), "a list needs no module"


def test_gradients_reach_the_counts_and_cost_nothing_else():
    model, x = build("vit").train(), images(2)
    tokred.apply(model, "diffrate", learn=True, patches=25, target=0.4)
    own = tokred.modules(model)["diffrate"]
    y = model(x)
    losses = tokred.losses(model)
    assert list(losses) == ["diffrate.cost"]
    torch.testing.assert_close(losses["diffrate.cost"], 10 * (own.work(1) - 0.4).square())
    losses["diffrate.cost"].backward(retain_graph=True)
    assert all(p.grad is None for p in model.parameters()), "the work is the counts' alone"
    cost = own.logits.grad.clone()
    assert cost.abs().sum() > 0
    y.square().sum().backward()
    # What is pruned or merged in the last block is seen by nobody, so only the work tells there.
    task = (own.logits.grad - cost).abs().sum(-1)
    assert (task[:, :2] > 0).all()
    assert all(p.grad is not None for p in model.parameters())


def test_training_comes_near_its_target():
    model = build("vit").train()
    tokred.apply(model, "diffrate", learn=True, patches=25, target=0.6)
    own = tokred.modules(model)["diffrate"]
    adam = torch.optim.Adam(own.parameters(), lr=0.05)
    for _ in range(120):
        adam.zero_grad()
        (own.work(1) - 0.6).square().backward()
        adam.step()
    assert float(own.work(1)) == pytest.approx(0.6, abs=0.04)


def test_refusals():
    for wrong, text in (
        ({"prune": [0]}, r"prune must be a list of numbers of patches, each at least 1, got \[0\]"),
        ({"merge": 3}, "merge must be a list"),
        ({"learn": True}, "learn=True needs patches, got None"),
        ({"patches": 9}, "learn=False has no patches, got 9"),
        ({"learn": True, "patches": 9, "merge": [3]}, r"merge is what learn=True learns: leave it out, got \[3\]"),
        ({"target": 0}, "target must lie in"),
        ({"penalty": -1}, "penalty must be a number of at least 0"),
    ):
        with pytest.raises(ValueError, match=text):
            tokred.DiffRate(**wrong)
    with pytest.raises(ValueError, match="merge has 4 entries, but the model has 3 blocks"):
        tokred.apply(build("vit"), "diffrate", merge=[9, 8, 7, 6])
    model = tokred.apply(build("vit"), "diffrate", learn=True, patches=16)
    with pytest.raises(ValueError, match="diffrate learns counts of patches=16, but this input has 25"):
        model.train()(images(1))
    with pytest.raises(tokred.MissingInputError, match="does not supply 'module', which diffrate"):
        tokred.DiffRate(learn=True, patches=4).reduce(tokred.Site(x=torch.randn(1, 5, 8), prefix=1))
    assert tokred.DiffRate().module(Facts("", 12, 8, 1)) is None
    own = Learned(rates(patches=4).train())
    site = tokred.Site(x=torch.randn(1, 5, 8), prefix=1, mask=torch.ones(1, 5, dtype=torch.bool), learned=own)
    with pytest.raises(tokred.UnsupportedModelError, match="cannot learn on batches with padding"):
        tokred.DiffRate(learn=True, patches=4).reduce(site)
