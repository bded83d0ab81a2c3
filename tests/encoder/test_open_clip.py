"""Every open_clip family: the two laws, batch independence, and sizes that reach a hidden attention."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("open_clip")

import tokred
from tests.encoder.laws import assert_equal, assert_same, snapshot
from tests.encoder.tiny_open_clip import CUSTOM, FAMILIES, PATCH, SIZE, build, inputs, outputs
from tests.kinds import OPEN_CLIP, each

OWN = [f for f in FAMILIES if f != "timm trunk"]


def run(family, model, b=3):
    with torch.no_grad():
        return outputs(model, *inputs(family, b))


@pytest.mark.parametrize("family", each(FAMILIES, OPEN_CLIP))
def test_nothing_to_remove_is_bit_equal_and_removal_restores_everything(family):
    model = build(family)
    before = snapshot(model)
    y = run(family, model)
    for name, parameters in {"tome": {"r": 0}, "pitome": {"ratio": 1.0}, "evit": {"kappa": 1.0}}.items():
        tokred.apply(model, name, **parameters)
        assert_equal(run(family, model), y)
        assert list(model.state_dict()) == list(before["state"])
        assert repr(model) == before["repr"]
    tokred.apply(model, "tome", r=4)
    assert not torch.equal(run(family, model)[0], y[0])
    tokred.remove(model)
    assert_same(before, snapshot(model))
    assert_equal(run(family, model), y)


@pytest.mark.parametrize("family", each(FAMILIES, OPEN_CLIP))
@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("tome", {"r": 4}),
        ("pitome", {"ratio": 0.8}),
        ("evit", {"kappa": 0.6, "blocks": (1,)}),
        ("random_prune", {"r": 2}),
    ],
)
def test_runs_with_the_announced_tokens_and_without_batch_mates(family, name, parameters):
    model = build(family)
    tokred.apply(model, name, **parameters)
    y = run(family, model)
    assert all(torch.isfinite(t).all() for t in y)
    layers = tokred.report(model).layers
    shape = inputs(family, 1)[0].shape
    assert tokred.flops(model, name, shape, **parameters).tokens == [row.tokens_out for row in layers]
    assert layers[-1].tokens_out < layers[0].tokens_in
    alone = run(family, model, 1)
    for a, b in zip(alone, y, strict=True):
        torch.testing.assert_close(a[:1] if a.ndim else a, b[:1] if b.ndim else b, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("family", each([f for f in OWN if "sine" not in f], OPEN_CLIP))
@pytest.mark.parametrize("training", [False, True])
def test_merging_duplicates_changes_nothing(family, training):
    """In eval mode torch would take its fused encoder path, which knows no sizes; in training it never does."""
    model = build(family).visual.train(training)
    with torch.no_grad():
        model.positional_embedding.zero_()
    patches = torch.randn(2, 12, 3, PATCH, PATCH, generator=torch.Generator().manual_seed(3)).repeat_interleave(2, 1)
    patches = torch.cat([patches, torch.randn(2, 1, 3, PATCH, PATCH)], 1)
    side = SIZE // PATCH
    image = patches.view(2, side, side, 3, PATCH, PATCH).permute(0, 3, 1, 4, 2, 5).reshape(2, 3, SIZE, SIZE)

    def features():
        out = model(image)
        return out[0] if isinstance(out, tuple) else out

    with torch.no_grad():
        y = features()
        tokred.apply(model, "tome", r=[12])
        merged = features()
        assert sorted(len(g) for g in tokred.trace(model).groups()[0])[-12:] == [2] * 12
        torch.testing.assert_close(merged, y, rtol=1e-4, atol=1e-4)
        tokred.apply(model, "tome", r=[12], prop_attn=False)
        assert not torch.allclose(features(), y, rtol=1e-4, atol=1e-4)


def test_what_is_captured_is_what_the_attention_uses():
    from tokred.adapters.encoder.capture import MhaCapture

    block = build("CLIP").visual.transformer.resblocks[0]
    x, bias = torch.randn(2, 9, 48), torch.rand(2, 1, 1, 9)
    with torch.no_grad():
        plain = block(x)
        with MhaCapture(None, 9, None) as capture:
            torch.testing.assert_close(block(x), plain)
        assert capture.calls == 1
        assert capture.q.shape == capture.k.shape == (2, 3, 9, 16)
        mixed = F.scaled_dot_product_attention(capture.q, capture.k, capture.v)
        attended = block.attn.out_proj(mixed.transpose(1, 2).reshape(2, 9, 48))
        torch.testing.assert_close(attended, block.attention(block.ln_1(x)))
        with MhaCapture(bias, 9, None) as capture:
            biased = block.attention(block.ln_1(x))
        mixed = F.scaled_dot_product_attention(capture.q, capture.k, capture.v, attn_mask=bias)
        torch.testing.assert_close(biased, block.attn.out_proj(mixed.transpose(1, 2).reshape(2, 9, 48)))
        torch.testing.assert_close(capture.key_bias(), bias[:, 0].expand(-1, 3, -1))


@pytest.mark.parametrize("family", each(OWN, OPEN_CLIP))
def test_the_text_tower_is_not_touched(family):
    model = build(family)
    text = [m for n, m in model.named_modules() if n and not n.startswith("visual")]
    before = [(type(m), sorted(m.__dict__), len(m._forward_hooks)) for m in text]
    tokens = inputs(family, 2)[1]
    with torch.no_grad():
        y = model.encode_text(tokens)
        tokred.apply(model, "tome", r=4)
        assert torch.equal(model.encode_text(tokens), y)
    assert [(type(m), sorted(m.__dict__), len(m._forward_hooks)) for m in text] == before


@pytest.mark.parametrize("family", ["CLIP", "custom blocks", "timm trunk"])
def test_intermediate_maps_are_restored_not_scrambled(family):
    model = build(family)
    image = inputs(family, 2)[0]
    with torch.no_grad():
        shapes = [
            f.shape for f in model.visual.forward_intermediates(image, intermediates_only=True)["image_intermediates"]
        ]
        tokred.apply(model, "tome", r=4)
        maps = model.visual.forward_intermediates(image, intermediates_only=True)["image_intermediates"]
        assert [f.shape for f in maps] == shapes
        index = tokred.trace(model).index
        last = maps[-1].flatten(2).mT
        index = index[:, index.shape[1] - last.shape[1] :]
    if family != "timm trunk":  # which norms its last map
        for b in range(2):
            for slot in index[b].unique():
                rows = last[b][index[b] == slot]
                assert torch.equal(rows, rows[:1].expand_as(rows)), "a group is not piecewise constant"


def test_copies_carry_the_patch_and_no_tensors():
    model = build("CLIP")
    plain = len(pickle.dumps(model))
    tokred.apply(model, "tome", r=4)
    y = run("CLIP", model)
    for clone in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert_equal(run("CLIP", clone), y)
        tokred.remove(clone)
        assert not torch.equal(run("CLIP", clone)[0], y[0])
    assert len(pickle.dumps(model)) < plain + 8000


def test_gradients_are_those_without_checkpointing():
    model = build("CLIP").visual.train()
    image = inputs("CLIP", 2)[0]
    tokred.apply(model, "tome", r=4)

    def gradients():
        model.zero_grad()
        model(image).square().sum().backward()
        return [p.grad.clone() for p in model.parameters()]

    plain = gradients()
    model.set_grad_checkpointing()
    for a, b in zip(plain, gradients(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_a_compiled_tower_gives_the_same():
    model = build("CLIP").visual
    image = inputs("CLIP", 2)[0]
    tokred.apply(model, "tome", r=4)
    with torch.no_grad():
        y = model(image)
        torch.testing.assert_close(
            torch.compile(model, backend="eager", fullgraph=True)(image), y, rtol=1e-5, atol=1e-6
        )


def test_towers_without_tokens_or_fused_attention_are_refused():
    from open_clip.model import CLIP

    from tests.encoder.tiny_open_clip import TEXT, VISION

    residual = CLIP(16, {"image_size": 32, "layers": [1, 1, 1, 1], "width": 16}, TEXT)
    cosine = CLIP(16, {**VISION, **CUSTOM, "qk_norm": False, "scaled_cosine_attn": True}, TEXT)
    for model, reason in ((residual, "convolutional"), (cosine, "scaled cosine")):
        before = snapshot(model)
        with pytest.raises(tokred.UnsupportedModelError, match=reason):
            tokred.apply(model, "tome", r=4)
        assert_same(before, snapshot(model))
        assert all(not row.works and reason in row.reason for row in tokred.supports(model))
