"""Methods in the blocks of a model that is written down (torch.jit.trace, torch.export) or runs on many samples at once
(torch.func.vmap); and batches of nothing."""

from __future__ import annotations

import warnings

import pytest
import torch

import tokred
from tests.encoder.blocks import SETTINGS, method, site, tensors
from tests.encoder.test_timm import METHODS
from tests.encoder.tiny_timm import build, images


def others(n: int = 3) -> torch.Tensor:
    """Images that no trace has seen, some of them flat, so that counts that follow the image are others."""
    x = images(n).flip(-1) * torch.linspace(0.1, 3, n).view(-1, 1, 1, 1)
    return x.roll(1, 0)


@pytest.mark.parametrize("case", ["tome", "evit", "ltp", "ats", "vtm", "avit", "dovit", "dynamicvit", "pixelprune"])
def test_gradients_of_each_sample_at_once_are_those_of_one_after_the_other(case):
    model = tokred.apply(build("vit"), case.partition("-")[0], **METHODS[case])
    weights, x = {k: v.detach() for k, v in model.named_parameters()}, others()

    def loss(weights, one):
        return torch.func.functional_call(model, weights, (one[None],)).square().sum()

    found = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(weights, x)
    with pytest.raises(tokred.NothingRecordedError, match="vmapped"):
        tokred.report(model)  # what it saw means nothing outside
    model(x)
    before = tokred.report(model).layers
    torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(weights, x)
    assert tokred.report(model).layers == before
    for i, one in enumerate(x):
        alone = torch.func.grad(loss)(weights, one)
        for name, value in alone.items():
            torch.testing.assert_close(found[name][i], value, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("case", METHODS)
def test_a_trace_runs_and_trains_on_other_images(case):
    model = tokred.apply(build("vit"), case.partition("-")[0], **METHODS[case])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own, that lengths become numbers
        learned = list(tokred.parameters(model))
        if learned:
            with pytest.raises(tokred.UnsupportedModelError, match=r"torch\.export, or freeze them"):
                torch.jit.trace(model, images())
        for p in learned:
            p.requires_grad_(False)
        # The gradients are on here, and off in the trace's own check of itself.
        traced = torch.jit.trace(model, images())
    for x in (images(), others()):
        y = model(x)
        torch.testing.assert_close(traced(x), y, rtol=1e-4, atol=1e-5)
    found, expected = (torch.autograd.grad(f(x).square().sum(), list(model.parameters())) for f in (traced, model))
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("case", ["tome", "downsample", "ats", "saint", "ltp", "vtm-centre", "spatten-heads"])
def test_an_export_runs_on_other_images(case):
    model = tokred.apply(build("vit"), case.partition("-")[0], **METHODS[case])
    with torch.no_grad():
        exported = torch.export.export(model, (images(),)).module()
        for x in (images(), others()):
            torch.testing.assert_close(exported(x), model(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "given"),
    [
        ("tome", {"r": 8}),
        ("evit", {"kappa": 0.7}),
        *(
            pytest.param(name, given, marks=pytest.mark.hosts)
            for name, given in {
                "pitome": {"ratio": 0.9}, "ats": {}, "saint": {}, "ltp": {"theta_final": 0.01}, "pixelprune": {},
            }.items()
        ),
    ],
)  # fmt: skip
def test_an_export_leaves_the_batch_open(name, given):
    """Of images so large that the path of operators would follow the batch."""
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    model = tokred.apply(timm.create_model("test_vit", num_classes=10).eval(), name, **given)
    batch = torch.export.Dim("batch", min=2, max=64)
    with torch.no_grad():
        exported = torch.export.export(model, (torch.randn(2, 3, 160, 160),), dynamic_shapes=({0: batch},)).module()
        for b in (2, 5, 60):
            x = torch.randn(b, 3, 160, 160)
            torch.testing.assert_close(exported(x), model(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("case", METHODS)
def test_an_empty_batch_runs(case):
    model = tokred.apply(build("vit"), case.partition("-")[0], **METHODS[case])
    with torch.no_grad():
        assert model(images()[:0]).shape == (0, *model(images()).shape[1:])


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("label", SETTINGS)
def test_an_empty_batch_is_reduced(label, masked):
    given = tensors(0, batch=0)
    mask = torch.ones(0, 18, dtype=torch.bool) if masked else None
    step = method(label).reduce(site(label, given, mask=mask))
    assert step.merge(given["x"]).shape == (0, step.slots, given["x"].shape[2])
    assert step.unmerge(step.merge(given["x"])).shape == given["x"].shape
