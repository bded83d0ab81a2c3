"""Modules that stand at several places, and models whose tensors hold no numbers."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import tokred
from tests.encoder.tiny_timm import build
from tests.registered import examples
from tokred.adapters.tiny import diffusion, kv
from tokred.kernels.dispatch import without_autocast

TWICE = r"is patched already: it stands at several places of this model.*copy\.deepcopy"


def test_a_block_at_several_places_is_refused():
    model, images = build("vit"), torch.randn(2, 3, 40, 40)
    model.blocks = nn.Sequential(*[model.blocks[0]] * 3)
    expected = model(images)
    with pytest.raises(tokred.UnsupportedModelError, match=TWICE):
        tokred.apply(model, "tome", r=2)
    assert tokred.patched(model) == []
    assert torch.equal(model(images), expected)
    model.blocks = nn.Sequential(*(copy.deepcopy(block) for block in model.blocks))
    assert tokred.apply(model, "tome", r=2)(images).shape == expected.shape


@pytest.mark.parametrize("name", ["tome", "evit", "pitome", "dynamicvit", "dtem", "diffrate", "random"])
def test_encoders_without_numbers(name):
    """On ``meta``, of which torch knows no autocast, only what looks at values cannot run."""
    model, images = build("vit"), torch.randn(2, 3, 40, 40)
    expected = tokred.apply(model, name, **examples("block")[name])(images)
    assert model.to("meta")(images.to("meta")).shape == expected.shape


def test_caches_and_denoisers_without_numbers():
    model, ids = kv.build("llama"), kv.prompt(40)
    tokred.apply(model, "h2o", budget=16)
    assert model.to("meta")(ids.to("meta")).logits.shape[:2] == ids.shape
    unet, given = diffusion.build("sd15"), diffusion.inputs("sd15")
    tokred.apply(unet, "tomesd", ratio=0.5)
    made = unet.to("meta")(**{k: v.to("meta") if isinstance(v, torch.Tensor) else v for k, v in given.items()})
    assert made.sample.is_meta


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_autocast_is_off_where_there_is_one(device):
    x = torch.ones(2, 2, device=device)
    with torch.autocast("cpu", torch.bfloat16), without_autocast(x), without_autocast(x.device):
        assert (x @ x).dtype == torch.float32 if device == "cpu" else (x @ x).is_meta
