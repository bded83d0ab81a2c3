"""Subclasses of hosts: those that change what they run are refused, others are what they derive from."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import tokred
from tests.diffusion.tiny import MODELS, inputs, run, sd15
from tests.kinds import DENOISERS, each
from tokred import adapters


def derived(module: nn.Module, **body: Any) -> type[nn.Module]:
    return type(f"My{type(module).__name__}", (type(module),), {"__module__": "elsewhere", **body})


def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
    return super(type(self), self).forward(*args, **kwargs)


def refused(model: nn.Module, words: str) -> None:
    for call in (lambda: tokred.apply(model, "tomesd"), lambda: tokred.explain(model, "tomesd", 16)):
        with pytest.raises(tokred.UnsupportedModelError, match=words):
            call()


def test_dreamlite():
    """A U-Net that has blocks of its own, with self-attention in some of them."""
    diffusers = pytest.importorskip("diffusers")
    if not hasattr(diffusers, "DreamLiteUNetModel"):
        pytest.skip("this diffusers has no DreamLite")
    with torch.device("meta"):
        model = diffusers.DreamLiteUNetModel(block_out_channels=(16, 32, 32), norm_num_groups=4, attention_head_dim=8,
                                             cross_attention_dim=12, sample_size=16)  # fmt: skip
    refused(model, r"transformer_blocks\.0 is a BasicTransformerBlockDreamLite, which is none of the blocks")
    assert not any(row.works for row in tokred.supports(model))


@pytest.mark.parametrize("kind", each(list(MODELS), DENOISERS))
def test_forwards_that_were_changed(kind: str):
    model = MODELS[kind]()
    model.__class__ = derived(model, forward=forward)
    refused(model, r"the model is a My\w+, which changes the forward of diffusers' ")
    for part in adapters.find(MODELS[kind](), "attention").parts:
        model = MODELS[kind]()
        block = model.get_submodule(part.name)
        block.__class__ = derived(block, forward=forward)
        refused(model, f"{part.name} is a My.*, which changes the forward")
        model = MODELS[kind]()
        name, module, what = part.sublayers[0]
        module = model.get_submodule(name)
        module.__class__ = derived(module, forward=forward)
        if what != "parallel":
            refused(model, f"{name} is a My.*, which changes the forward")


@pytest.mark.parametrize("kind", each(list(MODELS), DENOISERS))
def test_another_block(kind: str):
    """One whose class is not known would be passed by."""
    for part in adapters.find(MODELS[kind](), "attention").parts:
        model = MODELS[kind]()
        block = model.get_submodule(part.name)
        if part.alone:
            continue
        other = type("Own", (nn.Module,), {})()
        other.__dict__.update(block.__dict__)
        parent, _, name = part.name.rpartition(".")
        model.get_submodule(parent)[int(name)] = other
        refused(model, f"{part.name} is a Own, which is none of the blocks")


@pytest.mark.parametrize("kind", ["unet", "sd15", "flux", "wan"])
def test_subclasses_that_change_nothing(kind: str):
    given, model = inputs(kind), MODELS[kind]()
    settings = {"max_downsample": 8, "merge_mlp": True, "merge_crossattn": True}
    expected = run(tokred.apply(model, "tomesd", **settings), given)
    told = tokred.explain(model, "tomesd", (3, 16, 16) if kind == "wan" else 16, **settings)
    model = MODELS[kind]()
    for module in model.modules():
        if type(module).__module__.startswith("diffusers"):
            module.__class__ = derived(module)
    assert torch.equal(run(tokred.apply(model, "tomesd", **settings), given), expected)
    assert tokred.explain(model, "tomesd", (3, 16, 16) if kind == "wan" else 16, **settings).macs == told.macs
    span = model.__dict__["_tokred"].steps.span
    assert span == (1.0 if kind == "flux" else 1000.0)


def test_wrappers_of_blocks_are_looked_through():
    model, given = sd15(), inputs("sd15")
    expected = run(tokred.apply(model, "tomesd", max_downsample=8), given)
    model = sd15()

    class Wrapper(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return self.inner(*args, **kwargs)

    blocks = model.mid_block.attentions[0].transformer_blocks
    blocks[0] = Wrapper(blocks[0])
    assert torch.equal(run(tokred.apply(model, "tomesd", max_downsample=8), given), expected)


def test_dropped_layers_stay_dropped():
    """A layer that someone has replaced by nothing holds no attention that could be passed by."""

    class Nothing(nn.Module):
        def forward(self, hidden_states: torch.Tensor, **_: Any) -> torch.Tensor:
            return hidden_states

    model = sd15()
    model.mid_block.attentions[0].transformer_blocks[0] = Nothing()
    assert run(tokred.apply(model, "tomesd", max_downsample=8), inputs("sd15")).isfinite().all()
