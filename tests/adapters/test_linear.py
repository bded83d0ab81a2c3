"""Matrices that are no plain weights: quantised, offloaded, with adapters. Counted and called, never read."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("timm")

import tokred
from tests.encoder import tiny_timm, tiny_transformers
from tokred import adapters
from tokred.adapters.linear import constant, features, linear, macs, matrices, value_transform


class Packed(nn.Module):
    """A matrix in a form of its own: two rows to a byte, as quantisers keep it, and features under other names."""

    def __init__(self, plain: nn.Linear) -> None:
        super().__init__()
        self.infeatures, self.outfeatures = plain.in_features, plain.out_features
        self.register_buffer("qweight", torch.zeros(plain.out_features // 2, plain.in_features, dtype=torch.uint8))
        self.held = (plain.weight.detach(), None if plain.bias is None else plain.bias.detach())

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, *self.held)


def quantised(model: nn.Module) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.ao.quantization.quantize_dynamic(copy.deepcopy(model), {nn.Linear}, torch.qint8)


def packed(model: nn.Module) -> nn.Module:
    model = copy.deepcopy(model)
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.Linear:
                setattr(parent, name, Packed(child))
    return model


def adapted(model: nn.Module) -> nn.Module:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=r".*(attn\.qkv|attn\.proj|fc1)", r=4, lora_alpha=8)
    model = peft.get_peft_model(copy.deepcopy(model), config)
    torch.manual_seed(7)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.normal_(std=0.2)
    return model.eval()


def offloaded(model: nn.Module) -> nn.Module:
    accelerate = pytest.importorskip("accelerate")
    return accelerate.cpu_offload(copy.deepcopy(model), execution_device="cpu")


KINDS = {"quantised": quantised, "packed": packed, "adapted": adapted, "offloaded": offloaded}
FAMILIES = ["vit", "vit-no-bias", "vit-layerscale (DeiT-3)"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_report_counts_all_of_them(kind):
    plain, x = tiny_timm.build("vit"), tiny_timm.images(2)
    tokred.apply(plain, "tome", r=4)
    model = tokred.apply(KINDS[kind](tokred.remove(copy.deepcopy(plain))), "tome", r=4)
    with torch.no_grad():
        plain(x)
        model(x)
    expected, found = tokred.report(plain), tokred.report(model)
    if kind == "adapted":  # a row of 4 beside qkv, proj and fc1
        more = [4 * (a + b) for a, b in ((48, 144), (48, 48), (48, 192))]
        rows = [(row.tokens_in, row.tokens_out) for row in expected.layers]
        own = [n * (more[0] + more[1]) + m * more[2] for n, m in rows]
        assert [row.macs for row in found.layers] == [row.macs + e for row, e in zip(expected.layers, own, strict=True)]
    else:
        assert [row.macs for row in found.layers] == [row.macs for row in expected.layers]
        assert found.macs_unpatched == expected.macs_unpatched
    if kind != "offloaded":  # whose patch embedding has no weight between forwards
        shape = (1, 3, 40, 40)
        assert tokred.flops(model, None, shape).macs >= tokred.flops(plain, None, shape).macs


def test_quantised_after_the_method_was_applied():
    plain, x = tiny_timm.build("vit"), tiny_timm.images(2)
    tokred.apply(plain, "tome", r=4)
    model = quantised(plain)
    with torch.no_grad():
        model(x)
        plain(x)
    assert tokred.report(model).macs == tokred.report(plain).macs


@pytest.mark.parametrize("family", ["ViT classifier", "BERT classifier", "CLIP projection"])
def test_heads_and_poolers_of_transformers(family):
    pytest.importorskip("transformers")
    model, row = tiny_transformers.build(family), tiny_transformers.FAMILIES[family]
    whole = tokred.flops(model, None, row.shape)
    assert tokred.flops(packed(model), None, row.shape) == whole
    assert whole.outside > 0


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", KINDS)
def test_each_tokens_own_projections(kind, family):
    """As the attention of a model in which every token sees itself alone."""
    plain = tiny_timm.build(family)
    model = KINDS[kind](plain)
    host = adapters.find(model)
    attn: Any = host.blocks[0][1].attn
    seen: list[Tensor] = []

    @torch.no_grad()
    def alone() -> tuple[Tensor, Tensor]:
        x = torch.randn(2, 1, 48, generator=torch.Generator().manual_seed(2))
        v = attn.qkv(x).view(2, 1, 3, 3, 16)[:, :, 2].transpose(1, 2)
        seen.append(attn(x))
        nothing = attn(torch.zeros_like(x))
        whole = value_transform(attn, x, v, 3)
        parts = value_transform(attn, x, v, 3, per_head=True)
        rtol = 0.1 if kind == "quantised" else 1e-4
        torch.testing.assert_close(parts.sum(1), whole, rtol=rtol, atol=rtol)
        return seen[0] - nothing, whole

    expected, found = alone()
    rtol = 0.1 if kind == "quantised" else 1e-4
    torch.testing.assert_close(found, expected, rtol=rtol, atol=rtol)


@pytest.mark.parametrize("kind", KINDS)
def test_a_method_that_reads_them(kind):
    plain, x = tiny_timm.build("vit"), tiny_timm.images(2)
    model = KINDS[kind](plain)
    parameters = {"keep": 0.6, "blocks": (1,)}
    with torch.no_grad():
        tokred.apply(model, "tokentm", **parameters)
        y = model(x)
        assert tokred.report(model).layers[-1].tokens_out == 16
        assert torch.isfinite(y).all()
        if kind in ("packed", "offloaded"):
            torch.testing.assert_close(y, tokred.apply(plain, "tokentm", **parameters)(x), rtol=1e-4, atol=1e-5)
        if kind == "adapted":
            merged = tokred.remove(model).merge_and_unload()
            torch.testing.assert_close(tokred.apply(merged, "tokentm", **parameters)(x), y, rtol=1e-4, atol=1e-5)


def test_what_is_linear():
    class Conv1D(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(8, 24))

    assert features(nn.Linear(3, 5)) == (3, 5)
    assert features(Packed(nn.Linear(4, 6))) == (4, 6)
    assert features(nn.Conv2d(3, 4, 1)) is None
    assert features(nn.Bilinear(2, 3, 4)) is None
    assert macs(Conv1D()) == 8 * 24
    assert macs(nn.MultiheadAttention(8, 2)) == 4 * 8 * 8
    assert macs(nn.Embedding(5, 6)) == 0
    shared = nn.Linear(4, 4)
    assert macs(nn.Sequential(shared, shared, nn.Linear(4, 2))) == 16 + 8
    assert [name for name, *_ in matrices(nn.Sequential(shared))] == ["0"]


def test_merged_adapters_cost_nothing():
    model = adapted(tiny_timm.build("vit"))
    attn: Any = adapters.find(model).blocks[0][1].attn
    before = macs(attn)
    model.merge_adapter()
    assert macs(attn) == macs(tiny_timm.build("vit").blocks[0].attn) == before - 4 * (48 + 144) - 4 * (48 + 48)


def test_the_constant_of_a_module():
    layer, x = nn.Linear(4, 6), torch.randn(2, 5, 4)
    assert torch.equal(constant(layer, x), layer.bias)
    assert torch.equal(constant(nn.Linear(4, 6, bias=False), x), torch.zeros(6))
    torch.testing.assert_close(linear(Packed(layer), x), x @ layer.weight.T, rtol=1e-5, atol=1e-6)
    called = []
    layer.register_forward_hook(lambda m, i, o: called.append(1))
    torch.testing.assert_close(linear(layer, x), x @ layer.weight.T, rtol=1e-5, atol=1e-6)
    assert called, "a module with hooks is called: one may bring its weight"


def test_a_bias_that_is_not_at_hand():
    attn: Any = offloaded(tiny_timm.build("beit (own bias)")).blocks[0].attn
    with torch.no_grad(), pytest.raises(tokred.UnsupportedModelError, match="v_bias is offloaded"):
        value_transform(attn, torch.randn(2, 5, 48), torch.randn(2, 3, 5, 16), 3)
