"""BAViT: the card's worked examples, what stays, and that classifier and model teach each other nothing."""

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
from tokred.learn import Facts, Learned
from tokred.methods.encoder.bavit import Foreground, boxed, coverage

LOGITS = torch.tensor([[2.0, 0.0], [0.0, 1.0], [1.0, 1.0], [0.0, 3.0]])
MAP = torch.tensor([[[0, 0, 1, 1], [0, 0, 0, 1], [0, 0, 0, 0], [1, 0, 0, 0]]])


class Told(Foreground):
    """Says what it is told."""

    def __init__(self, logits: torch.Tensor) -> None:
        super().__init__(4, 1, 3, 1)
        self.told = logits

    def forward(self, pixels, grid):
        return self.told + 0 * self.head.weight.sum()


def site(logits: torch.Tensor, grid: tuple[int, int], prefix: int = 0, **more) -> tokred.Site:
    """Patches about which the classifier says this, ``(B, N, 2)``."""
    b, n = logits.shape[:2]
    return tokred.Site(
        x=torch.zeros(b, n + prefix, 8), pixels=torch.zeros(b, n, 4), grid=grid, prefix=prefix,
        learned=Learned(Told(logits).eval()), **more,
    )  # fmt: skip


def test_labels_of_maps():
    cover, known = coverage(MAP, (2, 2))
    assert cover.flatten().tolist() == [0, 0.75, 0.25, 0]
    assert (cover > 0).flatten().tolist() == [False, True, True, False]
    assert (cover > 0.49).flatten().tolist() == [False, True, False, False]
    assert known.all()
    half = MAP.masked_fill(MAP == 1, 255)
    half[0, :2, :2] = 255
    cover, known = coverage(half, (2, 2), ignore=255)
    assert not cover.any()
    assert known.flatten().tolist() == [False, True, True, True]


def test_labels_of_boxes():
    found = boxed([torch.tensor([[5, 3, 11, 9]]), torch.empty(0, 4)], (16, 16), 4)
    assert found[0].nonzero().tolist() == [[r, c] for r in range(3) for c in (1, 2)]
    assert not found[1].any()
    several = torch.tensor([[1.0, 2, 6, 7], [20, 9, 24, 24]])
    mirrored = several[:, [2, 1, 0, 3]].sub(24).abs().where(torch.tensor([1.0, 0, 1, 0]) > 0, several)
    assert torch.equal(boxed([mirrored], (24, 24), 8), boxed([several], (24, 24), 8).flip(2))
    with pytest.raises(ValueError, match=r"boxes must be \(M, 4\) each: left, top, right, bottom, got \[\[5"):
        boxed([torch.tensor([[5, 3, 1, 9]])], (16, 16), 4)


def test_the_loss():
    each = torch.nn.functional.cross_entropy(LOGITS, torch.tensor([0, 1, 0, 1]), reduction="none")
    torch.testing.assert_close(each, torch.tensor([0.1269, 0.3133, 0.6931, 0.0486]), rtol=0, atol=5e-5)
    labels, guess = torch.tensor([[[0, 1], [0, 1]]]), LOGITS.view(1, 2, 2, 2)
    assert tokred.BAViT(weight=2.0).compare([guess], labels)["foreground"] == pytest.approx(2 * 0.2955, abs=1e-4)
    # Of one foreground patch and three others each class weighs as much as the other.
    one = torch.tensor([[[0, 1], [0, 0]]])
    each = torch.nn.functional.cross_entropy(LOGITS, one.flatten(), reduction="none")
    expected = (each[[0, 2, 3]].mean() + each[1]) / 2
    torch.testing.assert_close(tokred.BAViT(balance=True).compare([guess], one)["foreground"], expected)
    big = MAP.clone()
    big[0, 2:, 2:] = -100  # a patch of which nothing is known
    found = tokred.BAViT(tau=0.5).compare([guess], big)["foreground"]
    known = torch.nn.functional.cross_entropy(LOGITS[:3], torch.tensor([0, 1, 0]))
    torch.testing.assert_close(found, known)
    assert tokred.BAViT().compare([guess], big * 0 - 100)["foreground"] == 0


def test_what_stays():
    torch.testing.assert_close(LOGITS.softmax(1)[:, 1], torch.tensor([0.1192, 0.7311, 0.5, 0.9526]), rtol=0, atol=5e-5)
    told = LOGITS[None]
    for parameters, rows in (
        ({"dilate": 0}, [1, 2, 3]),
        ({"theta": 0.99, "dilate": 0}, [3]),
        ({"theta": 0.99, "dilate": 0, "min_keep": 2}, [1, 3]),
        ({"mode": "ratio", "rho": 0.5}, [1, 3]),
        ({"mode": "ratio", "rho": 0.51}, [1, 2, 3]),
        ({"mode": "partial", "theta": 0.6, "beta": 0.5}, [1, 2, 3]),
        ({"mode": "partial", "theta": 0.6, "beta": 0.49}, [1, 3]),
    ):
        found = tokred.BAViT(**parameters).reduce(site(told, (2, 2), prefix=1))
        assert found.representative.tolist() == [[0, *(r + 1 for r in rows)]], parameters
    assert tokred.BAViT().reduce(site(told, (2, 2))).trivial, "all patches are neighbours"


def test_rings_around_the_foreground():
    logits = torch.zeros(1, 25, 2)
    logits[0, :, 0] = 5
    logits[0, 6, 1] = 9
    rows = tokred.BAViT().reduce(site(logits, (5, 5))).representative[0].tolist()
    assert rows == [0, 1, 2, 5, 6, 7, 10, 11, 12]
    # Some background more than that, the first of equals.
    more = tokred.BAViT("partial", beta=0.2, dilate=1).reduce(site(logits, (5, 5))).representative[0].tolist()
    assert more == [0, 1, 2, 3, 4, 5, 6, 7, 8, 10, 11, 12]


def test_counts():
    method = tokred.BAViT("ratio", rho=0.7, min_keep=3)
    assert [method.tokens(n, tokred.Place(0, 12, 1, 2)) for n in (199, 7, 5)] == [3 + 138, 6, 5]
    assert method.tokens(199, tokred.Place(1, 12, 1, 2)) == 199
    for idle in ({"theta": 0.0}, {"mode": "ratio", "rho": 1.0}, {"mode": "partial", "beta": 1.0}):
        assert not tokred.BAViT(**idle).removes(12)


def test_nothing_in_the_picture_and_everything():
    model, x = build("vit"), images(2)
    with torch.no_grad():
        y = model(x)
        tokred.apply(model, "bavit", theta=1.0, dim=12)
        assert model(x).isfinite().all()
        assert tokred.report(model).layers[0].tokens_out == 2, "the class token and one more"
        tokred.apply(model, "bavit", theta=1e-30, dim=12)
        assert torch.equal(model(x), y)


def test_a_sample_does_not_depend_on_its_batch():
    model, x = build("vit"), images(4)
    tokred.apply(model, "bavit", dilate=0, dim=12)
    with torch.no_grad():
        y = model(x)
        mask = tokred.trace(model).mask
        assert mask is not None
        assert len(set(mask.sum(1).tolist())) > 1
        alone = torch.cat([model(one[None]) for one in x])
    torch.testing.assert_close(alone, y, rtol=1e-4, atol=1e-5)


def test_no_gradient_passes_between_classifier_and_model():
    model, x = build("vit").train(), images(3)
    tokred.apply(model, "bavit", dim=12)
    own = list(tokred.parameters(model))
    y = model(x)
    terms = tokred.losses(model, targets=torch.randint(0, 2, (3, 5, 5)))
    assert list(terms) == ["bavit.foreground"]
    terms["bavit.foreground"].backward(retain_graph=True)
    assert all(p.grad is None for p in model.parameters()), "exactly none"
    assert all(p.grad is not None for p in own)
    for p in own:
        p.grad = None
    y.square().sum().backward()
    assert all(p.grad is None for p in own)
    assert all(p.grad is not None for p in model.parameters())


def test_fine_tuning_with_a_classifier_that_stays_as_it_is():
    model, x = build("vit").train(), images(2)
    tokred.apply(model, "bavit", mode="ratio", rho=0.5, dim=12)
    for p in tokred.parameters(model):
        p.requires_grad_(False)
    model(x).square().sum().backward()
    assert tokred.losses(model) == {}, "no labels of patches are asked for"
    assert tokred.report(model).layers[0].tokens_out < 26
    assert all(p.grad is not None for p in model.parameters())


def test_the_loss_falls_and_the_object_stays():
    """A bright square on noise is found after a few steps, with the model as it was."""
    torch.manual_seed(0)
    module = Foreground(48, 1, 24, 2)
    method = tokred.BAViT("ratio", rho=0.25, dilate=0)

    def batch():
        corner = torch.randint(0, 7, (32, 2))
        label = torch.zeros(32, 8, 8, dtype=torch.long)
        for one, (r, c) in zip(label, corner.tolist(), strict=True):
            one[r : r + 2, c : c + 2] = 1
        return torch.randn(32, 64, 48) + label.flatten(1)[..., None], label

    def asked(x):
        given = Learned(module)
        found = method.reduce(tokred.Site(x=torch.zeros(32, 64, 4), pixels=x, grid=(8, 8), learned=given))
        return found, given.guesses

    def loss():
        x, label = batch()
        return method.compare(asked(x)[1], label)["foreground"]

    losses = descended(torch.optim.AdamW(module.parameters(), lr=5e-3), loss, 25)
    module.eval()
    x, label = batch()
    kept = asked(x)[0].representative
    assert losses[-1] < 0.5 * losses[0]
    assert label.flatten(1).gather(1, kept).sum() > 0.9 * label.sum()


def test_saved_and_found_again(tmp_path):
    model, x = build("vit"), images(2)
    tokred.apply(model, "bavit", mode="ratio", rho=0.5, dim=12)
    check_found_again(model, x, tmp_path)
    # A classifier looks at pixels, and serves every model that cuts them as this one.
    third = tokred.apply(
        build("vit-registers (DINOv2)"), tokred.patched(model)[0], module=tokred.modules(model)["bavit"]
    )
    with torch.no_grad():
        third(x)
        kept = tokred.trace(third).representative[:, -5:] - tokred.trace(third).representative[:, :1]
    assert kept.shape == (2, 5)


def test_checkpointing_half_precision_and_other_grids():
    model, x = build("vit").train(), images(2)
    tokred.apply(model, "bavit", mode="ratio", rho=0.5, dim=12)
    ones = torch.ones(2, 5, 5).long()
    check_gradients(model, lambda: model(x).square().sum() + tokred.losses(model, targets=ones)["bavit.foreground"])
    assert next(tokred.parameters(model.bfloat16())).dtype == torch.float32
    module = Foreground(12, 1, 12, 3)
    assert module(torch.zeros(1, 6, 12), (2, 3)).shape == (1, 6, 2)
    assert module.cost(10) == 10 * (12 * 12 + 12 * 12 * 12 + 24) + 2 * 100 * 12


@pytest.mark.parametrize("family", each(tiny_timm.FAMILIES, {"vit": "a class token", "vit-mean": "none, a mean"}))
def test_hosts(family):
    model, x = build(family), images(2)
    if not applied(model, "bavit", "module", "pixels", "grid", dim=12, dilate=0):
        return
    model.train()(x)
    h, w = tokred.adapters.find(model).grid or (5, 5)
    assert tokred.losses(model, targets=torch.zeros(2, h, w).long())["bavit.foreground"].isfinite()


@pytest.mark.hosts
def test_detection_tokens_stay():
    pytest.importorskip("transformers")
    from tokred.adapters.tiny import transformers as tiny

    model, given = tiny.build("YOLOS"), tiny.FAMILIES["YOLOS"].inputs(2)
    tokred.apply(model, "bavit", mode="ratio", rho=0.5, dim=12)
    with torch.no_grad():
        out = model(**given)
    rows = tokred.trace(model).representative
    suffix = tokred.adapters.find(model).suffix
    assert suffix > 0
    assert (rows[:, -suffix:] == torch.arange(suffix) + tokred.trace(model).length - suffix).all()
    assert out.logits.shape[1] == suffix


def test_refusals():
    for wrong, text in (
        ({"mode": "all"}, "mode is 'all'; allowed are 'threshold', 'ratio', 'partial'"),
        ({"rho": 0.0}, r"rho must lie in \(0, 1\]"),
        ({"theta": 1.5}, r"theta must lie in \[0, 1\]"),
        ({"tau": 1.0}, r"tau must lie in \[0, 1\), got 1.0"),
        ({"dim": 100}, "dim must be a multiple of heads=3, got 100"),
        ({"mode": "ratio", "dilate": 1}, "keeps a fixed number, so dilate must be 0 or None, got 1"),
        ({"weight": -1}, "weight must be at least 0"),
        ({"min_keep": 0}, "min_keep must be an integer of at least 1"),
    ):
        with pytest.raises(ValueError, match=text):
            tokred.BAViT(**wrong)
    guess = torch.zeros(2, 5, 5, 2)
    for targets in (torch.zeros(2).long(), torch.zeros(2, 5, 5), torch.zeros(2, 7, 5).long()):
        with pytest.raises(ValueError, match=r"targets of bavit must be \(B, H, W\) integers.* B = 2 and 5 x 5 patch"):
            tokred.BAViT().compare([guess], targets)
    with pytest.raises(tokred.MissingInputError, match="does not supply 'module', by which bavit decides"):
        tokred.BAViT().reduce(tokred.Site(x=torch.zeros(1, 4, 8), pixels=torch.zeros(1, 4, 4), grid=(2, 2)))
    with pytest.raises(tokred.MissingInputError, match=r"the patches of .* do not lie side by side"):
        tokred.BAViT().module(Facts("timm.X", 3, 48, 3))
    with pytest.raises(ValueError, match="made for patches of 4 numbers, but these have 6"):
        Foreground(4, 1, 3, 1)(torch.zeros(1, 4, 6), (2, 2))
