"""Layers are called, their weights are not read: offloaded, packed and adapted ones choose what they mean."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

pytest.importorskip("transformers")

import tokred
from tests.kv.tiny import build, padded, prompt
from tokred import kv
from tokred.adapters.linear import weight_of

CRITICAL = tokred.make("criticalkv", budget=9, score=kv.Window(4, 3))


pytestmark = pytest.mark.usefixtures("no_grad")


def rows(model, policy=CRITICAL):
    tokred.apply(model, policy)
    ids, mask, _ = padded((31, 17))
    cache = tokred.kv_cache(model)
    position = (mask.cumsum(1) - 1).clamp(min=0)
    model(ids, attention_mask=mask, position_ids=position, past_key_values=cache)
    return [layer.positions.tolist() for layer in cache.layers]


def biased(dtype=torch.float32):
    model = build("llama", dtype, attention_bias=True)
    for layer in model.model.layers:
        nn.init.normal_(layer.self_attn.o_proj.bias, std=2.0)
    return model


class Packed(nn.Linear):
    """Four-bit codes, two a byte, and a scale for each output."""

    def __init__(self, plain: nn.Linear) -> None:
        super().__init__(plain.in_features, plain.out_features, plain.bias is not None)
        self.scale = plain.weight.abs().amax(1, keepdim=True) / 7
        codes = (plain.weight / self.scale).round().clamp(-7, 7).to(torch.uint8)
        self.weight = nn.Parameter((codes[:, ::2] & 15) | (codes[:, 1::2] << 4), requires_grad=False)
        self.bias = plain.bias

    def unpacked(self) -> torch.Tensor:
        codes = torch.stack([self.weight & 15, self.weight >> 4], 2).flatten(1).to(torch.int8)
        return torch.where(codes > 7, codes - 16, codes) * self.scale

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, self.unpacked().to(x.dtype), self.bias)


# ---------------------------------------------------------------- the matrix of a layer


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("kind", ["plain", "hooked", "packed", "dynamic", "own_forward"])
def test_the_matrix_is_what_the_layer_does(kind, bias):
    torch.manual_seed(0)
    plain = nn.Linear(24, 10, bias=bias)
    expected, layer = plain.weight.detach().clone(), plain
    if kind == "hooked":
        plain.register_forward_hook(lambda m, a, out: 2 * out)
        expected = 2 * expected
    elif kind == "packed":
        layer = Packed(plain)
        expected = layer.unpacked()
    elif kind == "dynamic":
        layer = torch.ao.quantization.quantize_dynamic(nn.Sequential(plain), {nn.Linear})[0]
        expected = layer.weight().dequantize()
    elif kind == "own_forward":
        layer.forward = lambda x: -nn.functional.linear(x, plain.weight, plain.bias)
        expected = -expected
    found = weight_of(layer, 24, torch.zeros(1))
    assert torch.allclose(found, expected, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_large_bias_takes_no_digits_of_a_half_precise_weight(dtype):
    torch.manual_seed(0)
    plain = nn.Linear(24, 10).to(dtype)
    nn.init.normal_(plain.weight, std=0.02)
    nn.init.normal_(plain.bias, std=1.0)
    expected = plain.weight.detach().float().clone()
    plain.register_forward_pre_hook(lambda m, a: None)
    found = weight_of(plain, 24, torch.zeros(1, dtype=dtype))
    assert (found - expected).abs().max() < 0.01 * expected.abs().max()


def test_dropout_of_an_adapter_is_not_called():
    layer = nn.Sequential(nn.Dropout(0.5), nn.Linear(24, 10)).train()
    found = weight_of(layer, 24, torch.zeros(1))
    assert torch.allclose(found, layer[1].weight, atol=1e-6)
    assert layer.training
    assert layer[0].training


# ---------------------------------------------------------------- models


@pytest.mark.parametrize("make", [build, biased], ids=["plain", "biased"])
@pytest.mark.parametrize("where", ["cpu", "disk"])
@pytest.mark.parametrize("order", ["before", "after"])
def test_offloaded_models_keep_the_rows_of_resident_ones(make, where, order, tmp_path):
    accelerate = pytest.importorskip("accelerate")
    model = build("llama") if make is build else biased()
    expected = rows(copy.deepcopy(model))
    policy = tokred.make("criticalkv", budget=9, score=kv.Window(4, 3))
    if order == "after":
        tokred.apply(model, policy)
    if where == "cpu":
        accelerate.cpu_offload(model, torch.device("cpu"), offload_buffers=True)
    else:
        accelerate.disk_offload(model, str(tmp_path), torch.device("cpu"))
    assert model.model.layers[0].self_attn.o_proj.weight.device.type == "meta"
    assert rows(model, policy) == expected


@pytest.mark.parametrize("name", ["snapkv", "expected_attention", "h2o", "kvzip", "squeezeattention", "zeromerge"])
def test_other_policies_on_an_offloaded_model(name):
    accelerate = pytest.importorskip("accelerate")
    parameters = {"snapkv": {"window": 4}, "kvzip": {"chunk": 9}}.get(name, {})
    policy = tokred.make(name, budget=0.4, **parameters)
    model = build("llama")
    expected = rows(copy.deepcopy(model), policy)
    accelerate.cpu_offload(model, torch.device("cpu"), offload_buffers=True)
    assert {r.method for r in tokred.supports(model) if r.works} == {
        r.method for r in tokred.supports(build("llama")) if r.works
    }
    assert rows(model, policy) == expected
    ids = prompt(20)
    assert torch.equal(
        model.generate(ids, max_new_tokens=3, do_sample=False),
        tokred.apply(build("llama"), policy).generate(ids, max_new_tokens=3, do_sample=False),
    )


def test_packed_weights():
    model = biased()
    for layer in model.model.layers:
        layer.self_attn.o_proj = Packed(layer.self_attn.o_proj)
    unpacked = copy.deepcopy(model)
    for layer in unpacked.model.layers:
        packed = layer.self_attn.o_proj
        layer.self_attn.o_proj = nn.Linear(64, 48)
        layer.self_attn.o_proj.weight.copy_(packed.unpacked())
        layer.self_attn.o_proj.bias = packed.bias
    assert rows(model) == rows(unpacked)


def test_an_adapter_beside_the_projection_counts():
    peft = pytest.importorskip("peft")
    model = build("llama", torch.float64)
    plain = rows(copy.deepcopy(model))
    config = peft.LoraConfig(target_modules=["o_proj"], r=4, lora_alpha=64, lora_dropout=0.3, init_lora_weights=False)
    torch.manual_seed(1)
    adapted = peft.get_peft_model(copy.deepcopy(model), config).eval()
    merged = copy.deepcopy(adapted).merge_and_unload()
    inner = adapted.get_base_model()
    assert next(r for r in tokred.supports(inner) if r.method == "criticalkv").works
    found = rows(inner)
    assert found == rows(merged)
    assert found != plain


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_a_quantised_model():
    model = build("llama")
    quantised = torch.ao.quantization.quantize_dynamic(model, {nn.Linear})
    tokred.apply(quantised, CRITICAL)
    cache, ids = tokred.kv_cache(quantised), prompt(31)
    quantised(ids, past_key_values=cache)
    held = sum(x.nbytes for layer in cache.layers for x in (layer.keys, layer.values, layer.positions))
    report = tokred.report(quantised)
    assert report.bytes == held == 3 * 2 * 9 * (2 * 16 * 4 + 4), "keys and values stay float32"
    assert report.dense_bytes == 3 * 2 * 31 * 2 * 16 * 4
    assert [row.rows for row in report.layers] == [9] * 3
    after = tokred.apply(build("llama"), CRITICAL)
    after = torch.ao.quantization.quantize_dynamic(after, {nn.Linear})
    other = tokred.kv_cache(after)
    after(ids, past_key_values=other)
    for a, b in zip(cache.layers, other.layers, strict=True):
        assert torch.equal(a.positions, b.positions)
