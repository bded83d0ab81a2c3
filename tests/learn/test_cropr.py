"""Cropr: the card's worked examples, what its heads may teach, folding, and tokens that come back."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch

pytest.importorskip("timm")

import tokred
from tests.encoder import tiny_timm
from tests.encoder.tiny_timm import build, images
from tests.kinds import each
from tests.learn.checkpointing import check_gradients
from tests.learn.laws import applied, check_found_again, descended
from tokred.adapters.encoder.host import shared_of
from tokred.learn import Facts, Learned
from tokred.methods.encoder.cropr import Croppers, Folded

X = torch.tensor([[[1.0, 0], [0.5, 1], [2, -1], [0, 0.5], [1, 1]]])
Q = torch.tensor([[1.0, 0], [0.5, -1]])


def croppers(queries: torch.Tensor, classes: int = 3) -> Croppers:
    """With these queries ``(blocks, M, C)``."""
    torch.manual_seed(0)
    made = Croppers(queries.shape[-1], *queries.shape[:2], classes)
    made.queries.data.copy_(queries)
    return made


def test_worked_example():
    module = croppers(torch.stack([Q, torch.tensor([[0.0, 1], [0, 0]])]))
    torch.testing.assert_close(module.scores(0, X)[0], torch.tensor([1.5, -0.25, 4, -0.5, 0.5]))
    assert module.folded().direction.tolist() == [[1.5, -1.0], [0.0, 1.0]]
    expected = torch.tensor([[1.2267, -0.0152], [1.4139, -0.3282]])
    torch.testing.assert_close(module.gathered(0, X)[0], expected, rtol=0, atol=5e-5)
    method = tokred.Cropr(r=[1, 1])  # two after the first block, since the class token is protected
    first = method.reduce(tokred.Site(x=X, prefix=1, layer=0, depth=3, learned=Learned(module.eval())))
    assert first.representative.tolist() == [[0, 2, 4]]
    second = method.reduce(tokred.Site(x=first.merge(X), prefix=1, layer=1, depth=3, learned=Learned(module)))
    assert second.representative.tolist() == [[0, 2]]
    assert first.then(second).representative.tolist() == [[0, 4]]


@pytest.mark.parametrize(
    ("n", "r", "fuse", "first", "last", "modules"),
    [(197, 8, True, 188, 20, 22), (197, 8, False, 188, 12, 23), (1025, 40, True, 984, 144, 22)],
)
def test_schedules(n, r, fuse, first, last, modules):
    method, found = tokred.Cropr(r=r, fuse=fuse), []
    for layer in range(24):
        place = tokred.Place(layer, 24, prefix=1)
        if method.acts(n, place):
            n = method.tokens(n, place)
            found.append(n)
    assert (found[0], found[-1], len(found)) == (first, last, modules)


def test_counts_are_rounded_and_one_token_stays():
    place = tokred.Place(0, 12, prefix=1)
    assert tokred.Cropr(r=10, round_to=8).tokens(197, place) == 184
    assert tokred.Cropr(r=400, round_to=8).tokens(197, place) == 2, "no multiple of 8 is left"
    assert tokred.Cropr(r=0).tokens(197, place) == 197, "nor does the class token count where nothing is to go"
    assert tokred.Cropr(r=8).tokens(2, place) == 2


def test_many_queries_score_like_their_sum():
    module, x = croppers(torch.randn(2, 7, 8)), torch.randn(3, 20, 8)
    every = (module.queries[1] @ x.mT).sum(1)
    torch.testing.assert_close(module.scores(1, x), every, rtol=0, atol=1e-5)
    assert torch.equal(module.scores(1, x), module.folded().scores(1, x))


# ---------------------------------------------------------------- gradients


def test_no_gradient_of_the_heads_reaches_the_model():
    model, x = build("vit").train(), images(3)
    tokred.apply(model, "cropr", r=4, classes=5)
    own = dict(tokred.modules(model)["cropr"].named_parameters())
    out = model(x)
    terms = tokred.losses(model, targets=torch.tensor([0, 3, 4]))
    assert list(terms) == ["cropr.heads"]
    terms["cropr.heads"].backward(retain_graph=True)
    assert all(p.grad is None for p in model.parameters()), "exactly none"
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in own.values())
    for p in own.values():
        p.grad = None
    out.square().sum().backward()
    assert all(p.grad is None for p in own.values()), "nor does the task's own loss reach the queries"
    assert all(p.grad is not None for p in model.parameters())


def test_tokens_leave_while_it_learns():
    model, x = build("vit"), images(2)
    tokred.apply(model, "cropr", r=4, classes=5)
    with torch.no_grad():
        y = model(x)
        counts = [layer.tokens_out for layer in tokred.report(model).layers]
        model.train()
        torch.testing.assert_close(model(x), y, rtol=0, atol=1e-6)
    assert [layer.tokens_out for layer in tokred.report(model).layers] == counts == [21, 17, 17]


def test_checkpointing_gives_the_same_gradients():
    model, x, y = build("vit").train(), images(3), torch.tensor([0, 1, 1])
    tokred.apply(model, "cropr", r=4, fuse=True, classes=2)
    check_gradients(model, lambda: model(x).square().sum() + tokred.losses(model, targets=y)["cropr.heads"])


def test_the_queries_learn_where_the_task_is():
    """One patch of sixteen says which class it is: it is found by the head's loss alone, the model being frozen."""
    torch.manual_seed(0)
    module = Croppers(8, 1, 1, 2)
    method, optimiser = tokred.Cropr(r=11, classes=2), torch.optim.AdamW(module.parameters(), lr=0.02)
    signal, kept = torch.zeros(2, 8), 0

    def batch():
        y, where = torch.randint(0, 2, (64,)), torch.randint(0, 16, (64,))
        x = torch.randn(64, 16, 8)
        x[:, :, :3] *= 0.3
        x[torch.arange(64), where] = signal[y]
        return x, y, where

    signal[:, 0], signal[:, 1] = 3, torch.tensor([-3.0, 3.0])

    def loss():
        x, y, _ = batch()
        learned = Learned(module.train())
        method.reduce(tokred.Site(x=x, depth=2, learned=learned))
        return method.compare(learned.guesses, y)["heads"]

    descended(optimiser, loss, 60)
    x, _, where = batch()
    found = method.reduce(tokred.Site(x=x, depth=2, learned=Learned(module.eval())))
    kept = (found.representative == where[:, None]).any(1).float().mean()
    assert found.slots == 5
    assert kept > 5 / 16 + 0.3, "by chance it is five of sixteen"


# ---------------------------------------------------------------- targets


def test_targets_of_every_kind():
    guesses = [torch.randn(2, 1, 3), torch.randn(2, 1, 3)]
    classes = torch.tensor([2, 0])
    expected = sum(torch.nn.functional.cross_entropy(g[:, 0], classes) for g in guesses)
    method = tokred.Cropr(classes=3, weight=2.0)
    torch.testing.assert_close(method.compare(guesses, classes)["heads"], 2 * expected)
    shares = torch.nn.functional.one_hot(classes, 3).float()
    torch.testing.assert_close(method.compare(guesses, shares)["heads"], 2 * expected)
    several = tokred.Cropr(classes=3, targets="labels")
    expected = sum(torch.nn.functional.binary_cross_entropy_with_logits(g[:, 0], shares) for g in guesses)
    torch.testing.assert_close(several.compare(guesses, shares.long())["heads"], expected)


def test_maps_are_sampled_at_the_queries_and_ignored_pixels_do_not_count():
    method = tokred.Cropr(classes=2, targets="map", grid=(2, 2), ignore=255)
    guess = torch.zeros(1, 4, 2)
    guess[0, :, 1] = torch.tensor([0.0, 2, 0, 5])
    pixels = torch.tensor([[[0, 7, 1, 7], [7, 7, 7, 7], [255, 7, 255, 7], [7, 7, 7, 7]]])
    expected = (torch.tensor(2.0).log() + (1 + torch.tensor(-2.0).exp()).log()) / 2
    torch.testing.assert_close(method.compare([guess], pixels)["heads"], expected)
    assert method.compare([guess], torch.full((1, 4, 4), 255))["heads"] == 0
    assert method.queries == 4


def test_padding_is_not_looked_at():
    module, x = croppers(torch.randn(1, 1, 8)), torch.randn(1, 6, 8)
    mask = torch.tensor([[True, True, True, True, False, False]])
    torch.testing.assert_close(module(0, x, mask), module(0, x[:, :4]))


# ---------------------------------------------------------------- folded, saved, brought back


def test_folded_it_is_the_same_model(tmp_path):
    model, x = build("vit"), images(3)
    tokred.apply(model, "cropr", r=4, classes=5)
    own = tokred.modules(model)["cropr"]
    with torch.no_grad():
        y = model(x)
        kept = tokred.trace(model).representative
        tokred.apply(model, "cropr", r=4, module=own.folded())
        assert torch.equal(model(x), y)
        assert torch.equal(tokred.trace(model).representative, kept)
        assert not list(tokred.parameters(model))
        folder = tokred.save(model, tmp_path)
        assert (folder / "weights.safetensors").stat().st_size < 1000
        other = tokred.apply(build("vit"), tokred.load(folder))
        assert torch.equal(other(x), y)
    assert tokred.losses(model.train() and model(x) is not None and model) == {}, "nothing is foretold"


def test_saved_with_its_heads_and_found_again(tmp_path):
    model, x = build("vit"), images(2)
    tokred.apply(model, "cropr", r=4, classes=5)
    check_found_again(model, x, tmp_path)
    small = build("vit")
    small.blocks = small.blocks[:2]
    with pytest.raises(ValueError, match=r"learned on .* of 3 layers, 48 wide.* of 2 layers"):
        tokred.apply(small, tokred.load(tmp_path))


def test_all_tokens_come_back_before_the_last_block():
    """The last block sees those that are left as they are, and those that went as they went."""
    model, x = build("vit"), images(2)
    tokred.apply(model, "cropr", r=4, fuse=True)
    seen = {}
    for i in (0, 1, 2):
        model.blocks[i].register_forward_hook(lambda m, args, out, i=i: seen.update({i: (args[0], out)}))
    with torch.no_grad():
        model(x)
    state = shared_of(model)[0][2].records[1].state
    kept = state.representative
    assert [layer.tokens_out for layer in tokred.report(model).layers] == [21, 21, 26]
    assert [row.tokens_out for row in tokred.flops(model, tokred.Cropr(r=4, fuse=True), x.shape).layers] == [21, 21, 26]
    tokred.remove(model)
    with torch.no_grad():
        dense = {}
        model.blocks[0].register_forward_hook(lambda m, args, out: dense.update({0: out}))
        model(x)
        whole = dense[0].scatter(1, kept[..., None].expand(-1, -1, 48), seen[1][1])
        torch.testing.assert_close(model.blocks[2](whole), seen[2][1])


def test_where_nothing_goes_coming_back_changes_nothing():
    model, x = build("vit"), images(2)
    with torch.no_grad():
        y = model(x)
        tokred.apply(model, "cropr", r=0, fuse=True, classes=2)
        assert torch.equal(model(x), y)


def test_a_sample_does_not_depend_on_its_batch():
    model, x = build("vit"), images(3)
    tokred.apply(model, "cropr", r=4, fuse=True)
    with torch.no_grad():
        model(x)
        state = shared_of(model)[0][2].records[1].state
        model(x[1:2])
        assert torch.equal(shared_of(model)[0][2].records[1].state.representative[0], state.representative[1])


@pytest.mark.parametrize("family", each(tiny_timm.FAMILIES, {"vit": "a class token"}))
def test_hosts_learn_and_bring_tokens_back(family):
    model, x = build(family), images(2)
    if not applied(model, "cropr", "module", r=4, classes=3, fuse=True):
        return
    model.train()
    out = model(x)
    terms = tokred.losses(model, targets=torch.tensor([0, 2]))
    (out.square().sum() + terms["cropr.heads"]).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in tokred.parameters(model))
    layers = tokred.report(model).layers
    assert layers[0].tokens_out < layers[0].tokens_in
    assert layers[-1].tokens_in == layers[0].tokens_in


def test_texts_of_different_lengths():
    pytest.importorskip("transformers")
    from tokred.adapters.tiny import given
    from tokred.adapters.tiny import transformers as tiny

    model, texts = tiny.build("BERT"), given.texts(2)
    texts["attention_mask"] = torch.ones_like(texts["input_ids"])
    texts["attention_mask"][1, -5:] = 0
    own = tokred.modules(tokred.apply(model, "cropr", r=2, fuse=True))["cropr"]
    with torch.no_grad():
        batch = model(**texts).last_hidden_state
        one = {name: value[1:2, :-5] for name, value in texts.items()}
        alone = model(**one).last_hidden_state
    assert type(own) is Folded
    torch.testing.assert_close(batch[1, : alone.shape[1]], alone[0], rtol=1e-4, atol=1e-5)
    tokred.apply(model, "cropr", r=2, fuse=True, classes=4)
    model.train()(**texts)
    assert tokred.losses(model, targets=torch.tensor([0, 1]))["cropr.heads"].requires_grad


def test_refusals():
    for wrong, text in (
        ({"classes": 0}, "classes must be an integer of at least 1, got 0"),
        ({"targets": "boxes"}, "targets is 'boxes'; allowed are 'class', 'labels', 'map'"),
        ({"targets": "map"}, r"targets='map' needs grid=\(rows, columns\)"),
        ({"grid": (2, 2)}, r"targets='class' has no grid, got \(2, 2\)"),
        ({"targets": "map", "grid": (0, 2)}, "grid must be two integers of at least 1"),
        ({"round_to": 0}, "round_to must be an integer of at least 1"),
        ({"weight": -1.0}, "weight must be a number of at least 0"),
        ({"ignore": 0.5}, "ignore must be an integer"),
    ):
        with pytest.raises(ValueError, match=text):
            tokred.Cropr(**wrong)
    method = tokred.Cropr(classes=3)
    for targets in (torch.zeros(2, 3, dtype=torch.long), torch.zeros(2), torch.zeros(3, dtype=torch.long)):
        with pytest.raises(ValueError, match=r"must be \(B,\) integers or \(B, K\) shares for B = 2 and K = 3, got"):
            method.compare([torch.zeros(2, 1, 3)], targets)
    with pytest.raises(ValueError, match=r"targets of cropr must be classes from 0 to 2, or -100 for what .* got 3"):
        tokred.Cropr(r=1, classes=3).compare([torch.zeros(2, 1, 3)], torch.tensor([2, 3]))
    with pytest.raises(tokred.MissingInputError, match="does not supply 'module', by which cropr decides"):
        tokred.Cropr(r=1).reduce(tokred.Site(x=torch.randn(1, 5, 8), depth=12))
    model = tokred.apply(build("vit").train(), "cropr", r=4, classes=2)
    model(images(2))
    with pytest.raises(tokred.MissingInputError, match=r"'cropr' learns by what the model is to say: .*targets=labels"):
        tokred.losses(model)
    with pytest.raises(ValueError, match="for B = 2 and K = 2"):
        tokred.losses(model, targets=torch.zeros(3, dtype=torch.long))


def test_half_precision_copies_and_other_rates():
    model, x = build("vit"), images(2)
    tokred.apply(model.to(torch.bfloat16), "cropr", r=4, classes=2)
    model.train()
    with torch.no_grad():
        assert model(x.bfloat16()).isfinite().all()
    model.float()
    with torch.autocast("cpu", torch.bfloat16):
        model(x)
        assert tokred.losses(model, targets=torch.tensor([0, 1]))["cropr.heads"].dtype == torch.float32
    other = copy.deepcopy(model).eval()
    own = tokred.modules(other)["cropr"]
    method = dataclasses.replace(tokred.patched(other)[0], r=6)
    tokred.apply(other, method, module=own)
    with torch.no_grad():
        other(x)
    assert [layer.tokens_out for layer in tokred.report(other).layers] == [19, 13, 13]
    assert method.module(Facts("", 3, 48, 3)).queries.shape == (2, 1, 48)
