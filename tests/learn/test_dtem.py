"""DTEM: the card's worked example, what becomes of sizes, the limit of a low temperature, and gradients."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("timm")

import tokred
from tests.encoder.tiny_timm import build, images
from tests.learn.laws import check_found_again
from tokred.core.matching import sides_of
from tokred.core.relaxed import Relaxed, relaxed_top
from tokred.learn import Learned

W = torch.tensor([[[0.6, 0.995], [0.8, 0.0995], [0.96, 0.8557]]])


def test_worked_example():
    part = relaxed_top(W, 2, 0.1)
    expected = torch.tensor([[[0.0230, 0.8583], [0.1643, 0.0002], [0.6766, 0.2777]]])
    torch.testing.assert_close(part, expected, rtol=0, atol=2e-4)
    assert float(part.sum()) == pytest.approx(2)
    x, size = torch.tensor([[[1.0], [4], [2], [3], [5]]]), torch.tensor([[1.0, 2, 1, 1, 1]])
    step = Relaxed.make(torch.arange(3), torch.arange(3, 5), part, 5)
    y, m = step.step(x, size)
    torch.testing.assert_close(y[0, 3:, 0], torch.tensor([2.8056, 3.0028]), rtol=0, atol=1e-3)
    assert torch.equal(y[0, :3], x[0, :3])
    torch.testing.assert_close(m[0], torch.tensor([0.1187, 1.6712, 0.0457, 2.0281, 2.1363]), rtol=0, atol=1e-3)
    assert float(m.sum()) == pytest.approx(6)


def test_a_low_temperature_is_a_hard_choice():
    part = relaxed_top(W, 2, 1e-4)
    assert part[0].tolist() == [[0, 1], [0, 0], [1, 0]]
    assert relaxed_top(W.expand(2, -1, -1), 6, 1e-4).eq(1).all(), "all of them, each once"


def test_what_gives_nothing_stays_as_it_is():
    x = torch.randn(2, 5, 4)
    step = Relaxed.make(torch.arange(3), torch.arange(3, 5), torch.zeros(2, 3, 2), 5)
    y, m = step.step(x)
    assert torch.equal(y, x)
    assert (m == 1).all()
    with pytest.raises(ValueError, match=r"part must be \(B, 3, 2\), got \(2, 2, 3\)"):
        Relaxed.make(torch.arange(3), torch.arange(3, 5), torch.zeros(2, 2, 3), 5)
    with pytest.raises(ValueError, match="a relaxed merge allows 'mean'"):
        step.merge(x, mode="max")


def _drawn(seed: int, r: int, tau: float) -> tuple[torch.nn.Module, torch.nn.Module]:
    """A model that merges ``r`` pairs in its first block, and its embeddings, whose weights are drawn."""
    model = build("vit")
    tokred.apply(model, "dtem", r=[r], tau=tau)
    own = tokred.modules(model)["dtem"]
    torch.manual_seed(seed)
    for p in own.parameters():
        torch.nn.init.normal_(p)
    return model, own


def _apart(x: torch.Tensor, seed: int, r: int) -> bool:
    """True if the ``r`` best pairs are of as many givers, each better than the next one by 20 low temperatures.

    The limit is a hard merge only there: a giver that stands in two of the pairs is shared out between both takers, and
    of two pairs that are as good as alike (to 14 temperatures, the log of a million) one is chosen more than once.
    Another token stays whole for it.
    """
    model, own = _drawn(seed, r, 1e-4)
    heard: list[torch.Tensor] = []
    own.register_forward_hook(lambda module, inputs, output: heard.append(output))
    with torch.no_grad():
        model(x)
    unit = torch.nn.functional.normalize(heard[0], dim=-1)
    giving, taking = sides_of(unit.shape[1], 1, 0)
    score = unit[:, giving] @ unit[:, taking].mT
    best = score.flatten(1).topk(r + 1)
    givers = best.indices[:, :r] // score.shape[2]
    clear = best.values.diff(dim=1) < -2e-3
    return bool(clear.all()) and all(len(set(row)) == r for row in givers.tolist())


def test_softly_merged_tokens_vanish_as_the_temperature_falls():
    """In training, at a low temperature, what the class token answers is what it answers after a hard merge."""
    x = images(2)
    outs = {}
    seed = next(seed for seed in range(100) if _apart(x, seed, 4))
    for tau in (1e-4, 1.0):
        model, own = _drawn(seed, 4, tau)
        with torch.no_grad():
            hard = model(x)
            assert tokred.report(model).layers[0].tokens_out == 22
            own.train()
            outs[tau] = (model(x) - hard).abs().max()
            assert tokred.report(model).layers[0].tokens_out == 26
    assert outs[1e-4] < 1e-3 * outs[1.0]


def test_gradients_of_the_task_reach_the_embeddings_alone_where_it_is_detached():
    model, x = build("vit").train(), images(2)
    plain = build("vit").train()
    tokred.apply(model, "dtem", r=4)
    assert list(tokred.losses(model).keys() if model(x) is not None else ()) == []
    own = dict(tokred.modules(model)["dtem"].named_parameters())
    model(x).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in own.values())
    assert all(own[f"layers.{i}.weight"].grad.abs().sum() > 0 for i in range(2))
    del plain
    site = tokred.Site(x=torch.randn(1, 9, 48, requires_grad=True), prefix=1, depth=3)
    site.learned = Learned(tokred.modules(model)["dtem"])
    for detach in (True, False):
        part = tokred.DTEM(r=2, detach=detach).reduce(site).part
        (grad,) = torch.autograd.grad(part.square().sum(), site.x, allow_unused=True)
        assert (grad is None) == detach


def test_an_embedding_of_nothing_makes_no_nan():
    site = tokred.Site(x=torch.randn(1, 9, 8), prefix=1, depth=2)
    module = tokred.DTEM().module(tokred.learn.Facts("", 2, 8, 1))
    for p in module.layers.parameters():
        torch.nn.init.zeros_(p)
    site.learned = Learned(module.train())
    part = tokred.DTEM(r=2).reduce(site).part
    torch.testing.assert_close(part, torch.full_like(part, 2 / 16))
    part.square().sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in module.parameters())


def test_in_evaluation_it_is_tome_by_the_embedding():
    model, x = build("vit"), images(2)
    tokred.apply(model, "dtem", r=4)
    with torch.no_grad():
        model(x)
    assert [layer.tokens_out for layer in tokred.report(model).layers] == [22, 18, 14]
    module = tokred.modules(model)["dtem"]
    tokens = torch.randn(2, 17, 48)
    found = tokred.DTEM(r=3).reduce(tokred.Site(x=tokens, prefix=1, depth=3, learned=Learned(module)))
    metric = module(0, tokens)[:, None]
    expected = tokred.ToMe(r=3).reduce(tokred.Site(x=tokens, k=metric, prefix=1, depth=3))
    assert torch.equal(found.index, expected.index)


def test_drawn_amounts():
    module = tokred.DTEM().module(tokred.learn.Facts("", 2, 8, 1)).train()
    torch.manual_seed(0)
    totals = set()
    for _ in range(20):
        step = tokred.DTEM(r=2, vary=True).reduce(
            tokred.Site(x=torch.randn(1, 9, 8), prefix=1, depth=2, learned=Learned(module))
        )
        totals.add(0 if step.trivial else round(float(step.part.detach().sum())))
    assert totals == {0, 1, 2}


def test_saved_and_refused(tmp_path):
    model, x = build("vit"), images(2)
    tokred.apply(model, "dtem", r=4, dim=16)
    check_found_again(model, x, tmp_path)
    for wrong, text in (({"dim": 0}, "dim must be"), ({"tau": 0}, "tau must be"), ({"r": -1}, "r")):
        with pytest.raises(ValueError, match=text):
            tokred.DTEM(**wrong)
    with pytest.raises(tokred.MissingInputError, match="by which dtem compares tokens"):
        tokred.DTEM(r=1).reduce(tokred.Site(x=torch.randn(1, 5, 8)))
    with pytest.raises(tokred.MissingInputError, match=r"dtem.*reads module"):
        tokred.apply(build("vit-mean"), "dtem", r=2)
