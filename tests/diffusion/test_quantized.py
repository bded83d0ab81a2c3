"""Denoisers whose weights are packed: layers are called, and never read."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import Tensor, nn

import tokred
from tests.diffusion.tiny import CLIPS, FRAMES, MODELS, inputs, run

METHODS = {
    "tomesd": {"max_downsample": 8, "merge_mlp": True, "merge_crossattn": True},
    "todo": {"factors": (2, 2)},
    "keymerge": {"max_downsample": 8, "cell": 2},
    "asymrnr": {"first_full": 0},
}


def packed(model: nn.Module) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)


@pytest.mark.parametrize(
    ("kind", "names"),
    [
        ("sd15", ["tomesd"]),
        ("flux", ["tomesd"]),
        pytest.param("sd15", list(METHODS), marks=pytest.mark.hosts),
        pytest.param("hunyuan", ["tomesd"], marks=pytest.mark.hosts),
    ],
)
def test_dynamic_quantisation(kind: str, names: list[str]):
    size = (FRAMES, 16, 16) if kind in CLIPS else 16
    for name in names:
        settings = METHODS[name]
        plain = tokred.apply(MODELS[kind](), name, **settings)
        run(plain, inputs(kind))
        found = []
        for model in (tokred.apply(packed(MODELS[kind]()), name, **settings),
                      packed(tokred.apply(MODELS[kind](), name, **settings))):  # fmt: skip
            found.append(run(model, inputs(kind)))
            assert tokred.report(model).sublayers == tokred.report(plain).sublayers
            assert tokred.explain(model, name, size, **settings) == tokred.explain(plain, name, size, **settings)
        assert torch.equal(*found)
        tokred.remove(model)
        assert torch.equal(run(model, inputs(kind)), run(packed(MODELS[kind]()), inputs(kind)))


class Bytes(nn.Module):
    """As four-bit layers keep their weights: one column of bytes, unpacked when called."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.weight = nn.Parameter(layer.weight.detach().view(torch.uint8).view(-1, 1), requires_grad=False)
        self.bias = layer.bias

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight.view(-1).view(torch.float32).view(self.out_features, self.in_features)
        return nn.functional.linear(x, weight, self.bias)


@pytest.mark.parametrize("kind", ["sd15", "flux", "sd3"])
@pytest.mark.parametrize("name", list(METHODS))
def test_packed_bytes(kind: str, name: str):
    settings, outs, told = METHODS[name], [], []
    for pack in (False, True):
        model = MODELS[kind]()
        for module in list(model.modules()) if pack else ():
            for child, layer in module.named_children():
                if type(layer) is nn.Linear and any(part in child for part in ("to_", "add_", "proj_mlp", "proj_out")):
                    setattr(module, child, Bytes(layer))
                elif isinstance(layer, nn.ModuleList) and child == "to_out":
                    layer[0] = Bytes(layer[0])
        tokred.apply(model, name, **settings)
        outs.append(run(model, inputs(kind)))
        told.append(tokred.explain(model, name, 16, **settings) if name == "tomesd" else None)
    assert torch.equal(*outs)
    assert told[0] == told[1]
