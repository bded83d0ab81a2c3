"""DoViT: the card's worked examples, what stops and comes back, and what its heads may teach."""

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
from tokred import learn
from tokred.adapters.encoder.host import shared_of
from tokred.learn import Facts, Learned
from tokred.methods.encoder.dovit import Heads

SURE = [0.99, 0.50, 0.97, 0.90, 0.96, 0.30]
ROWS = torch.tensor([[[1.0, 0], [0, 2], [4, 0], [2, 2], [0, 0], [6, 2], [1, 1]]])


class Told(Heads):
    """Sure of the patches as it is told, ``(B, N)``: two logits whose softmax has this as the larger one."""

    def __init__(self, *sure: torch.Tensor) -> None:
        super().__init__(2, len(sure), 2, 2)
        self.told = sure

    def forward(self, stage, x):
        p = self.told[stage]
        return torch.stack([p.log(), (1 - p).log()], -1)[:, : x.shape[1]]


def site(sure: torch.Tensor, x: torch.Tensor = ROWS, *, training: bool = False, **more) -> tokred.Site:
    return tokred.Site(
        x=x, prefix=1, grid=(2, 3), depth=3, learned=Learned(Told(sure.double()).train(training)), **more
    )


def test_worked_example():
    sure = torch.tensor([SURE])
    ramp = learn.Ramp(1.0, 0.96)
    stopped = []
    for step in (0, 50, 100):
        limit = ramp.at(step, 101)
        found = tokred.DoViT(classes=2, confidence=limit, at=[1]).reduce(site(sure))
        stopped.append(sorted({*range(7)} - set(found.representative[0].tolist())))
    assert [ramp.at(step, 101) for step in (0, 50, 100)] == pytest.approx([1, 0.98, 0.96])
    assert stopped == [[], [1], [1, 3]]
    # The token of .96 is not above the limit; the class token takes in (0, 2) and (2, 2), two of seven rows.
    assert found.representative.tolist() == [[0, 2, 4, 5, 6]]
    assert found.merge(ROWS)[0].tolist() == [[1, 1], [4, 0], [0, 0], [6, 2], [1, 1]]
    plain = tokred.DoViT(classes=2, at=[1], agg_rate=2 / 7 + 0.01).reduce(site(sure))
    assert plain.merge(ROWS)[0, 0].tolist() == [1, 0], "2 of 7 are no larger share than that"
    again = found.unmerge(found.merge(ROWS), fill=ROWS)
    assert torch.equal(again[:, 1:], ROWS[:, 1:])


def test_batches_of_uneven_counts():
    sure = torch.full((2, 6), 0.5)
    sure[0, [0, 2, 3]] = torch.tensor([0.99, 0.98, 0.97])
    sure[1, 4] = 0.99
    x = torch.cat([ROWS, ROWS + 10])
    found = {
        batch: tokred.DoViT(classes=2, at=[1], batching=batch, agg_rate=1.0).reduce(site(sure, x))
        for batch in ("pad", "max", "mean")
    }
    assert {k: v.slots for k, v in found.items()} == {"pad": 6, "max": 6, "mean": 5}
    assert found["pad"].mask.sum(1).tolist() == [4, 6]
    # What it is least sure of fills the first one up.
    assert found["max"].representative.tolist() == [[0, 2, 3, 4, 5, 6], [0, 1, 2, 3, 4, 6]]
    assert found["mean"].representative.tolist() == [[0, 1, 2, 5, 6], [0, 1, 2, 3, 4]], "the second one loses one"
    tied = site(sure[:1], ROWS)
    tokred.DoViT(classes=2, at=[1], batching="max").reduce(tied)
    assert tied.rows["dovit.alive"].tolist() == [[True, False, True, False, False, True, True]]


def test_fill_does_not_come_to_life_again():
    sure = torch.full((2, 6), 0.5)
    sure[0, [0, 2, 3]] = torch.tensor([0.99, 0.98, 0.97])
    x = torch.cat([ROWS, ROWS])
    first = site(sure, x)
    method = tokred.DoViT(classes=2, at=[1], batching="max", agg_rate=1.0)
    assert method.reduce(first).trivial
    rest = torch.full((2, 6), 0.5)
    rest[1] = torch.tensor([0.99, 0.99, 0.5, 0.99, 0.5, 0.5])
    then = site(rest, x, rows=dict(first.rows))
    found = method.reduce(then)
    assert found.representative.tolist() == [[0, 2, 5, 6], [0, 3, 5, 6]]


def test_all_patches_may_stop():
    for prefix in (1, 0):
        given = tokred.Site(
            x=ROWS[:, : 6 + prefix], prefix=prefix, grid=(2, 3), depth=3,
            learned=Learned(Told(torch.tensor([SURE], dtype=torch.float64)).eval()),
        )  # fmt: skip
        found = tokred.DoViT(classes=2, at=[1], confidence=0.1).reduce(given)
        # Without a class token there is always one patch, of which it is least sure: the larger of .5 and .5.
        assert found.representative.tolist() == ([[0]] if prefix else [[1]])
    model, x = build("vit"), images(2)
    tokred.apply(model, "dovit", classes=2, confidence=0.1, at=[1])
    with torch.no_grad():
        assert model(x).isfinite().all()
    assert [layer.tokens_in for layer in tokred.report(model).layers] == [26, 1, 1]


def test_the_class_token_takes_in_all_that_has_stopped_so_far():
    model, x = build("vit"), images(3)
    tokred.apply(model, "dovit", classes=2, confidence=[0.55, 0.52], at=[1, 2], agg_rate=0.0)
    seen = {}
    for i in (0, 1, 2):
        model.blocks[i].register_forward_hook(lambda m, args, out, i=i: seen.update({i: (args[0], out)}))
    with torch.no_grad():
        model(x)
    records = shared_of(model)[0][2].records
    first, second = records[0].state, records[1].state
    before = second.dropped
    assert not torch.equal(before[0][:, 0], seen[1][0][:, 0]), "another class token goes on"
    for b in range(3):
        gone = [
            before[0][b, list({*range(1, 26)} - set(real_rows(first, b)))],
            before[1][b, [i for i, r in enumerate(real_rows(first, b)) if r not in real_rows(second, b)]],
        ]
        mean = torch.cat(gone).mean(0)
        torch.testing.assert_close(seen[2][0][b, 0], (mean + before[1][b, 0]) / 2, rtol=1e-4, atol=1e-5)


def real_rows(state, b: int) -> list[int]:
    rows = state.representative[b]
    return (rows if state.mask is None else rows[state.mask[b]]).tolist()


def test_what_stopped_comes_back_as_it_was():
    model, x = build("vit-mean"), images(2)
    tokred.apply(model, "dovit", classes=2, confidence=0.55, at=[1])
    seen = {}
    model.blocks[0].register_forward_hook(lambda m, args, out: seen.update({0: out}))
    model.norm.register_forward_pre_hook(lambda m, args: seen.update({1: args[0]}))
    with torch.no_grad():
        model(x)
    state = shared_of(model)[0][2].records[0].state
    whole, before = seen[1], state.dropped[0]
    assert whole.shape[1] == 25, "the norm behind the blocks sees every patch"
    for b in range(2):
        gone = [i for i in range(25) if i not in real_rows(state, b)]
        assert gone
        assert torch.equal(whole[b, gone], before[b, gone])
        assert not torch.equal(whole[b], before[b])


def test_nothing_stops_at_one():
    model, x = build("vit"), images(2)
    with torch.no_grad():
        y = model(x)
        assert torch.equal(tokred.apply(model, "dovit", classes=2, confidence=1.0)(x), y)
        assert torch.equal(tokred.apply(model, "dovit", classes=99, confidence=0.999999)(x), y)


def test_padded_batches_are_as_single_images_and_the_mean_is_not():
    x = images(4)
    found = {}
    for batch in ("pad", "mean"):
        model = build("vit")
        torch.manual_seed(1)
        tokred.apply(model, "dovit", classes=2, confidence=0.55, at=[1, 2], batching=batch)
        with torch.no_grad():
            found[batch] = model(x), torch.cat([model(one[None]) for one in x])
    torch.testing.assert_close(*found["pad"], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(*found["mean"], rtol=1e-4, atol=1e-5)


def test_less_confidence_is_less_work():
    model, x, found = build("vit"), images(2), []
    torch.manual_seed(0)
    tokred.apply(model, "dovit", classes=2, at=[1, 2])
    with torch.no_grad():
        for confidence in (0.9, 0.6, 0.55, 0.52, 0.5):
            tokred.change(model, confidence=confidence)
            model(x)
            found.append(sum(layer.tokens_in for layer in tokred.report(model).layers))
    assert found == sorted(found, reverse=True)
    assert found[0] > found[-1]


# ---------------------------------------------------------------- heads


def test_no_gradient_reaches_the_model_where_it_is_detached():
    def run(detach: bool):
        model, x = build("vit").train(), images(3)
        tokred.apply(model, "dovit", classes=4, confidence=0.9, detach=detach)
        model(x)
        terms = tokred.losses(model, targets=torch.randint(0, 4, (3, 80, 80)))
        assert list(terms) == ["dovit.heads"]
        terms["dovit.heads"].backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in tokred.parameters(model))
        return [p.grad for p in model.blocks.parameters()]

    assert all(g is None for g in run(True)), "exactly none"
    assert any(g is not None and g.abs().sum() > 0 for g in run(False))


def test_heads_see_patches_that_have_stopped():
    """Every head foretells the whole map; of what has stopped, as it was then."""
    model, x = build("vit").train(), images(2)
    tokred.apply(model, "dovit", classes=2, confidence=0.55, at=[1, 2])
    seen = {}
    for i, stage in enumerate(tokred.modules(model)["dovit"].stages):
        stage.register_forward_pre_hook(lambda m, args, i=i: seen.update({i: args[0].detach()}))
    model(x)
    state = shared_of(model)[0][2].records[0].state
    assert seen[0].shape == seen[1].shape == (2, 25, 48)
    for b in range(2):
        kept = [r - 1 for r in real_rows(state, b) if r]
        gone = [i for i in range(25) if i not in kept]
        assert gone
        assert torch.equal(seen[1][b, gone], seen[0][b, gone])
        assert not (seen[1][b, kept] == seen[0][b, kept]).all(-1).any()


def test_targets():
    guess = torch.randn(2, 3, 4, 5)
    label = torch.randint(0, 5, (2, 3, 4))
    method = tokred.DoViT(classes=5, ignore=255)
    expected = 0.4 * 2 * torch.nn.functional.cross_entropy(guess.flatten(0, 2), label.flatten())
    torch.testing.assert_close(method.compare([guess, guess], label)["heads"], expected)
    constant = guess[:, :1, :1].expand(-1, 3, 4, -1)
    big = torch.tensor([1, 3])
    torch.testing.assert_close(
        method.compare([constant], big)["heads"],
        method.compare([constant], big.view(-1, 1, 1).expand(-1, 24, 31))["heads"],
    )
    assert method.compare([guess], torch.full((2, 9, 9), 255))["heads"] == 0


def test_checkpointing_and_saving(tmp_path):
    model, x, y = build("vit").train(), images(3), torch.randint(0, 2, (3, 5, 5))
    tokred.apply(model, "dovit", classes=2, confidence=0.55, at=[1, 2])
    check_gradients(model, lambda: model(x).square().sum() + tokred.losses(model, targets=y)["dovit.heads"])
    check_found_again(model, x, tmp_path)


def test_the_loss_falls_and_flat_images_stop_first():
    """Patches that show nothing are of one class; after a short training they stop, and those that show much do not."""
    torch.manual_seed(0)
    method = tokred.DoViT(classes=3, hidden=32, at=[1], confidence=0.9)
    module = method.module(Facts("", 3, 8, 1))

    def asked():
        x = torch.cat([torch.zeros(8, 17, 8), torch.randn(8, 17, 8)]) + 0.1 * torch.randn(16, 17, 8)
        label = torch.where(torch.arange(16) < 8, 0, torch.randint(1, 3, (16,)))
        given = Learned(module)
        found = method.reduce(tokred.Site(x=x, prefix=1, grid=(4, 4), depth=3, learned=given))
        return found, given.guesses, label

    def loss():
        _, guesses, label = asked()
        return method.compare(guesses, label)["heads"]

    losses = descended(torch.optim.AdamW(module.parameters(), lr=1e-2), loss, 40)
    module.eval()
    left = asked()[0].mask.sum(1)
    assert losses[-1] < 0.6 * losses[0]
    assert (left[:8] <= 2).all()
    assert (left[8:] >= 12).all()


@pytest.mark.parametrize("family", each(tiny_timm.FAMILIES, {"vit": "a class token"}))
def test_hosts(family):
    model, x = build(family), images(2)
    if not applied(model, "dovit", "module", "carried", "grid", classes=3, confidence=0.4, at=[1]):
        return
    out = model.train()(x)
    terms = tokred.losses(model, targets=torch.tensor([0, 2]))
    (out.square().sum() + terms["dovit.heads"]).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in tokred.parameters(model))
    with torch.no_grad():
        y = model.eval()(x)
        torch.testing.assert_close(torch.cat([model(one[None]) for one in x]), y, rtol=1e-3, atol=1e-4)


def test_refusals():
    for wrong, text in (
        ({"classes": 1}, "classes must be an integer of at least 2, got 1"),
        ({"confidence": 0.0}, r"confidence must lie in \(0, 1\]"),
        ({"confidence": []}, "confidence must be a number, or one for every decision, got none"),
        ({"confidence": [0.9, 0.8], "at": [1]}, "confidence has 2 numbers, but at has 1 blocks"),
        ({"at": [0]}, "at must be rising numbers of blocks, the first at least 1"),
        ({"at": [3, 2]}, "at must be rising"),
        ({"batching": "even"}, "batching is 'even'; allowed are 'pad', 'max', 'mean'"),
        ({"agg_rate": -0.1}, r"agg_rate must lie in \[0, 1\]"),
        ({"weight": -1}, "weight must be at least 0"),
    ):
        with pytest.raises(ValueError, match=text):
            tokred.DoViT(**wrong)
    with pytest.raises(ValueError, match=r"at is \[7\], but the model has 6 blocks"):
        tokred.DoViT(at=[7]).check(6)
    with pytest.raises(ValueError, match="confidence has 2 numbers, but it is decided before 3 blocks"):
        tokred.DoViT(confidence=[0.9, 0.8]).check(12)
    assert tokred.DoViT().places(12) == (2, 5, 8)
    for targets in (torch.zeros(2, 3).long(), torch.zeros(2), torch.zeros(3).long()):
        with pytest.raises(ValueError, match=r"targets of dovit must be \(B, H, W\) integers.* B = 2 and K = 5"):
            tokred.DoViT().compare([torch.zeros(2, 3, 4, 5)], targets)
    for label in (5, -1):
        text = f"targets of dovit must be classes from 0 to 4, or -100 for what does not count, got {label}"
        with pytest.raises(ValueError, match=text):
            tokred.DoViT().compare([torch.zeros(2, 3, 4, 5)], torch.tensor([4, label]))
    with pytest.raises(tokred.MissingInputError, match="does not supply 'module', by which dovit decides"):
        tokred.DoViT(at=[1]).reduce(tokred.Site(x=torch.randn(1, 5, 8), grid=(2, 2), prefix=1, depth=12))
