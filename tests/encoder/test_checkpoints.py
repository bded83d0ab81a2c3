"""Reentrant checkpointing: the gradients of no checkpointing, or a refusal at the first forward. Never others."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

pytest.importorskip("timm")

import tokred
from tests.encoder import tiny_timm, tiny_transformers
from tests.encoder.test_timm import METHODS
from tests.encoder.test_training import assert_gradients, gradients

REFUSED = "use_reentrant=False"


def grown(model: nn.Module, run: Callable[[], Tensor]) -> dict[str, Tensor]:
    """Gradients of a step; methods that draw while they learn draw the same each time."""
    torch.manual_seed(0)
    model.zero_grad()
    run().square().sum().backward()
    return gradients(model)


def timm_run(model: Any, x: Tensor, reentrant: bool, segment: int = 1) -> Tensor:
    """A forward whose blocks are checkpointed one by one, or several together."""
    x = model.patch_embed(x)
    if hasattr(model, "_pos_embed"):
        x = model.norm_pre(model._pos_embed(x))
    else:
        x = torch.cat([model.cls_token.expand(len(x), -1, -1), x], 1)
        x = x if model.pos_embed is None else x + model.pos_embed
    for i in range(0, len(model.blocks), segment):
        x = checkpoint(nn.Sequential(*model.blocks[i : i + segment]), x, use_reentrant=reentrant)
    return model.forward_head(model.norm(x))


@pytest.mark.parametrize("family", ["vit", "vit-mean-with-class (MAE)", "vit-mean", "beit (own bias)"])
@pytest.mark.parametrize("case", METHODS)
def test_equal_or_refused(family, case):
    model, x = tiny_timm.build(family).train(), tiny_timm.images()
    name, parameters = case.partition("-")[0], METHODS[case]
    method = tokred.make(name, **parameters)
    try:
        tokred.apply(model, method)
    except tokred.MissingInputError:
        pytest.skip("does not run on this family")
    expected = grown(model, lambda: model(x))
    assert_gradients(grown(model, lambda: timm_run(model, x, False)), expected)
    # Those with losses, and those of which tokens come back by the side of the blocks.
    learns = (
        any(True for _ in tokred.parameters(model)) or name == "avit" or method.joins(len(model.blocks)) is not None
    )
    if learns or (method.drops and method.uneven and family != "vit"):
        with pytest.raises(tokred.UnsupportedModelError, match=rf"(?s){name!r}.*{REFUSED}"):
            timm_run(model, x, True)
    else:
        assert_gradients(grown(model, lambda: timm_run(model, x, True)), expected)


def test_refused_in_the_forward_and_only_where_gradients_are_lost():
    model, x = tiny_timm.build("vit-mean").train(), tiny_timm.images()
    tokred.apply(model, "saint", tau=0.35, K=3)
    with pytest.raises(tokred.UnsupportedModelError, match=REFUSED):
        timm_run(model, x, True)  # no backward
    expected = grown(model, lambda: model(x))
    assert_gradients(grown(model, lambda: timm_run(model, x, True, segment=3)), expected)
    inputs = x.clone().requires_grad_()
    assert_gradients(grown(model, lambda: checkpoint(model, inputs, use_reentrant=True)), expected)
    with torch.no_grad():
        model(x)
    with torch.inference_mode():
        model(x)


def test_restoring_in_every_block_is_refused_too():
    model, x = tiny_timm.build("vit").train(), tiny_timm.images()
    tokred.apply(model, "random_prune", r=3, expose="all")
    with pytest.raises(tokred.UnsupportedModelError, match=REFUSED):
        timm_run(model, x, True)


@pytest.mark.parametrize(
    ("family", "name", "parameters", "refused"),
    [
        ("BEiT (own bias)", "ats", {}, True),
        ("BEiT masked", "random_prune", {"r": 3}, True),
        ("BERT", "tome", {"r": 4}, False),
        ("BERT padded", "tome", {"r": 4}, True),
        ("ViT classifier", "tome", {"r": 4}, False),
        ("TimeSformer", "random_prune", {"r": 2}, False),
    ],
)
def test_transformers(family, name, parameters, refused):
    pytest.importorskip("transformers")
    family, padded, _ = family.partition(" padded")
    model, x = tiny_transformers.build(family).train(), tiny_transformers.FAMILIES[family].inputs(3)
    if padded:
        x["attention_mask"] = torch.arange(26).expand(3, -1) < torch.tensor([[26], [20], [14]])
    for m in model.modules():
        if isinstance(m, nn.Dropout):
            m.p = 0.0
        for rate in ("dropout_prob", "drop_prob"):
            if hasattr(m, rate):
                setattr(m, rate, 0.0)

    def run() -> Tensor:
        return tiny_transformers.read(family, model(**x))[0]

    tokred.apply(model, name, **parameters)
    expected = grown(model, run)
    if not model.supports_gradient_checkpointing:
        pytest.skip("has no checkpoints")
    model.gradient_checkpointing_enable({"use_reentrant": False})
    assert_gradients(grown(model, run), expected)
    model.gradient_checkpointing_enable({"use_reentrant": True})
    if refused:
        with pytest.raises(tokred.UnsupportedModelError, match=REFUSED):
            run()
    else:
        assert_gradients(grown(model, run), expected)
