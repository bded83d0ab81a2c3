"""Attention with soft decisions, drawn decisions and losses: the worked examples and laws."""

from __future__ import annotations

import pytest
import torch

from tokred.learn import distill_logits, distill_tokens, gated_attention, gumbel_keep, ratio_loss

S = torch.tensor([[1.0, 2, 0], [0, 1, 1], [2, 0, 1]])


def weights(logits: torch.Tensor, gate: list[float], **more) -> torch.Tensor:
    """What :func:`gated_attention` weighs by, for logits ``(N, N)``."""
    n = len(logits)
    eye = torch.eye(n).view(1, 1, n, n)
    return gated_attention(eye, logits.mT.view(1, 1, n, n), eye, torch.tensor([gate]), scale=1.0, **more)[0, 0]


def test_worked_example():
    found = weights(S, [1.0, 0, 1])
    expected = torch.tensor([[0.7311, 0, 0.2689], [0.1554, 0.4223, 0.4223], [0.7311, 0, 0.2689]])
    torch.testing.assert_close(found, expected, rtol=0, atol=5e-5)
    pair = S[[0, 2]][:, [0, 2]].softmax(-1)
    torch.testing.assert_close(found[[0, 2]][:, [0, 2]], pair, rtol=0, atol=1e-5)


def test_open_gates_are_softmax_and_closed_keys_get_what_eps_leaves():
    torch.testing.assert_close(weights(S, [1.0, 1, 1]), S.softmax(-1), rtol=0, atol=2e-6)
    high, eps = torch.tensor([1.0, 1, 2]), 1e-6  # of the keys that are seen
    total = (S - high[:, None]).exp()[:, [0, 2]].sum(-1) + eps
    found = weights(S, [1.0, 0, 1])
    for row in (0, 2):
        assert float(found[row, 1]) == pytest.approx(eps / 3 / float(total[row]), rel=1e-3)
    assert torch.allclose(weights(S, [0.0, 0, 0]), torch.eye(3), atol=1e-5), "each sees itself"


def test_a_closed_key_of_a_high_logit_leaves_the_others_their_shares():
    logits = torch.tensor([[1.0, 40, 0], [0, 1, 1], [2, 0, 1]])
    found = weights(logits, [1.0, 0, 1])
    torch.testing.assert_close(found[0], torch.tensor([0.7311, 0, 0.2689]), rtol=0, atol=5e-5)
    gate = torch.tensor([[1.0, 0, 1]], requires_grad=True)
    eye = torch.eye(3).view(1, 1, 3, 3)
    gated_attention(eye, logits.mT.view(1, 1, 3, 3), eye, gate, scale=1.0).square().sum().backward()
    assert gate.grad.isfinite().all()
    assert gate.grad[0, 1] != 0, "a closed gate learns, too"


@pytest.mark.parametrize("boolean", [True, False])
def test_masks_hide_altogether(boolean):
    seen = torch.tensor([[True, True, False]]).expand(3, 3)
    mask = seen if boolean else torch.zeros(3, 3).masked_fill(~seen, -torch.inf)
    found = weights(S, [1.0, 1, 1], mask=mask)
    assert (found[:, 2] == 0).all()
    torch.testing.assert_close(found, S.masked_fill(~seen, -torch.inf).softmax(-1), rtol=0, atol=2e-6)
    none = weights(S, [1.0, 1, 1], mask=torch.zeros(3, 3, dtype=torch.bool))
    assert (none == 0).all(), "a row that sees nothing is defined"


def test_rows_that_stay_are_those_of_the_gathered_attention():
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 6, 9, 4, generator=g) for _ in range(3))
    k, v = k[:, :3], v[:, :3]
    gate = (torch.rand(2, 9, generator=g) > 0.4).float()
    gate[:, 0] = 1
    found = gated_attention(q, k, v, gate)
    for i in range(2):
        rows = gate[i].nonzero().flatten()
        some = (t[i : i + 1].repeat_interleave(6 // t.shape[1], 1)[:, :, rows] for t in (q, k, v))
        expected = torch.nn.functional.scaled_dot_product_attention(*some)
        torch.testing.assert_close(found[i : i + 1, :, rows], expected, rtol=1e-5, atol=1e-5)


def test_gradients_are_those_of_the_definition():
    g = torch.Generator().manual_seed(1)
    q, k, v = (torch.randn(1, 2, 4, 3, generator=g, dtype=torch.float64, requires_grad=True) for _ in range(3))
    gate = torch.rand(1, 4, generator=g, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(gated_attention, (q, k, v, gate))


def test_half_precision_and_refusals():
    g = torch.Generator().manual_seed(2)
    q, k, v = (torch.randn(1, 2, 5, 4, generator=g) for _ in range(3))
    gate = torch.tensor([[1.0, 0, 1, 1, 0.5]])
    low = gated_attention(q.half(), k.half(), v.half(), gate)
    assert low.dtype == torch.float16
    torch.testing.assert_close(low.float(), gated_attention(q, k, v, gate), rtol=1e-2, atol=1e-2)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(gated_attention(q, k, v, gate), gated_attention(q, k, v, gate).float())
    with pytest.raises(ValueError, match=r"gate must be \(1, 5\), one entry a key, got \(1, 4\)"):
        gated_attention(q, k, v, gate[:, :4])


def test_drawn_decisions_are_hard_with_a_soft_gradient():
    torch.manual_seed(0)
    logp = torch.randn(4, 50, 2).log_softmax(-1).requires_grad_()
    drawn = gumbel_keep(logp)
    assert set(drawn.unique().tolist()) <= {0.0, 1.0}
    drawn.sum().backward()
    assert logp.grad.abs().sum() > 0
    sure = torch.tensor([[0.0, -1e4], [-1e4, 0.0]])
    assert gumbel_keep(sure).tolist() == [1.0, 0.0]
    torch.manual_seed(0)
    soft = gumbel_keep(torch.randn(2000, 2), tau=0.01, hard=False)
    assert float(((soft < 0.01) | (soft > 0.99)).float().mean()) > 0.97, "cold draws are all but hard"


def test_ratio_loss():
    decision = torch.tensor([[1.0, 1, 0, 1], [1, 0, 0, 0]])
    assert float(ratio_loss(decision, 0.5)) == pytest.approx(0.0625)
    assert float(ratio_loss(decision, 0.5, over="batch")) == pytest.approx(0)
    mask = torch.tensor([[True, True, True, True], [True, True, False, False]])
    assert float(ratio_loss(decision, 0.5, mask=mask)) == pytest.approx(0.0625 / 2)
    with pytest.raises(ValueError, match="over is 'all'; allowed are 'image', 'batch'"):
        ratio_loss(decision, 0.5, over="all")


def test_distillation():
    g = torch.Generator().manual_seed(0)
    own = torch.randn(3, 5, 4, generator=g, requires_grad=True)
    teacher = torch.randn(3, 5, 4, generator=g, requires_grad=True)
    gate = torch.ones(3, 5).requires_grad_()
    for kind in ("mse", "kl"):
        assert float(distill_tokens(own, own, gate, kind=kind).detach()) == pytest.approx(0, abs=1e-6)
        assert float(distill_tokens(own, teacher, gate * 0, kind=kind).detach()) == 0, "no token stays: no NaN"
        distill_tokens(own, teacher, gate, kind=kind).backward()
    assert own.grad.abs().sum() > 0
    assert teacher.grad is None
    assert gate.grad is None
    some = torch.zeros(3, 5)
    some[1, 2] = 1
    expected = (own[1, 2] - teacher[1, 2]).square().mean()
    torch.testing.assert_close(distill_tokens(own, teacher, some), expected)
    p, q = own[:, 0].log_softmax(-1), teacher[:, 0].log_softmax(-1)
    torch.testing.assert_close(distill_logits(own[:, 0], teacher[:, 0]), (q.exp() * (q - p)).sum(-1).mean())
    with pytest.raises(ValueError, match="kind is 'l1'"):
        distill_tokens(own, teacher, gate, kind="l1")
    with pytest.raises(ValueError, match=r"gate \(B, N\), got \(3, 4\)"):
        distill_tokens(own, teacher, some[:, :4])
