"""Every transformers family: the two laws, batch independence, and what merging must respect."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch

pytest.importorskip("transformers")

import tokred
from tests.encoder.laws import assert_equal, assert_same, snapshot
from tests.encoder.tiny_transformers import FAMILIES, PATCH, SIZE, build, read
from tests.kinds import TRANSFORMERS, each

NOTHING = {"tome": {"r": 0}, "pitome": {"ratio": 1.0}, "evit": {"kappa": 1.0}}
METHODS = {"tome": {"r": 4}, "pitome": {"ratio": 0.8}, "evit": {"kappa": 0.6, "blocks": (1,)}, "random_prune": {"r": 2}}


def run(family, model, b=3):
    """The outputs of a forward that do not depend on the number of tokens."""
    with torch.no_grad():
        return read(family, model(**FAMILIES[family].inputs(b)))


@pytest.mark.parametrize("family", each(FAMILIES, TRANSFORMERS))
def test_nothing_to_remove_is_bit_equal_and_removal_restores_everything(family):
    model = build(family)
    y = run(family, model)  # also installs whatever hooks transformers itself wants
    before = snapshot(model)
    for name, parameters in NOTHING.items():
        if name == "evit" and not FAMILIES[family].classes:
            continue
        tokred.apply(model, name, **parameters)
        assert_equal(run(family, model), y)
        assert list(model.state_dict()) == list(before["state"])
        assert repr(model) == before["repr"]
    tokred.apply(model, "tome", r=4)
    assert not all(torch.equal(a, b) for a, b in zip(run(family, model), y, strict=True))
    tokred.remove(model)
    assert_same(before, snapshot(model))
    assert_equal(run(family, model), y)


@pytest.mark.parametrize("family", each(FAMILIES, TRANSFORMERS))
def test_runs_with_the_announced_tokens_and_without_batch_mates(family):
    row = FAMILIES[family]
    model = build(family)
    for name, parameters in METHODS.items():
        if name == "evit" and not row.classes:
            with pytest.raises(tokred.MissingInputError, match="class_attention"):
                tokred.apply(model, name, **parameters)
            continue
        tokred.apply(model, name, **parameters)
        y = run(family, model)
        assert all(torch.isfinite(t).all() for t in y)
        layers = tokred.report(model).layers
        assert layers[0].tokens_in == row.tokens
        assert layers[-1].tokens_out < row.tokens
        if row.shape:
            flops = tokred.flops(model, name, row.shape, **parameters)
            assert flops.tokens == [layer.tokens_out for layer in layers]
            assert flops.outside > 0
        alone = run(family, model, 1)
        for a, b in zip(alone, y, strict=True):
            scale = max(1.0, float(b.abs().max()))  # of dense heads, whose convolutions sum in another order
            torch.testing.assert_close(a[:1], b[:1], rtol=1e-4, atol=2e-5 * scale)


@pytest.mark.parametrize("family", each([f for f, row in FAMILIES.items() if row.prefix or row.suffix], TRANSFORMERS))
def test_protected_tokens_stay_alone_and_in_place(family):
    row = FAMILIES[family]
    model = build(family)
    tokred.apply(model, "tome", r=6)
    run(family, model)
    groups = tokred.trace(model).groups()
    ends = [*range(row.prefix), *range(row.tokens - row.suffix, row.tokens)]
    for sample in groups:
        slots = [*range(row.prefix), *range(len(sample) - row.suffix, len(sample))]
        assert [sample[slot] for slot in slots] == [[token] for token in ends]


WITHOUT_POSITIONS = [
    "ViT classifier", "DeiT", "ViT-MSN", "I-JEPA", "DINOv2 classifier", "DINOv2 with registers", "CLIP classifier",
    "CLIP projection", "MetaCLIP 2", "SigLIP vision", "SigLIP classifier", "YOLOS", "Depth Anything",
]  # fmt: skip


@pytest.mark.parametrize("family", each(WITHOUT_POSITIONS, TRANSFORMERS))
def test_merging_duplicates_changes_nothing(family):
    """Patches without positions, in equal pairs: merging every pair must leave all outputs as they were."""
    model = build(family)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "position_embedding" in name:
                p.zero_()
    patches = torch.randn(2, 12, 3, PATCH, PATCH, generator=torch.Generator().manual_seed(3)).repeat_interleave(2, 1)
    patches = torch.cat([patches, torch.randn(2, 1, 3, PATCH, PATCH)], 1)
    side = SIZE // PATCH
    pixels = patches.view(2, side, side, 3, PATCH, PATCH).permute(0, 3, 1, 4, 2, 5).reshape(2, 3, SIZE, SIZE)
    with torch.no_grad():
        y = read(family, model(pixel_values=pixels))
        tokred.apply(model, "tome", r=[12])
        merged = read(family, model(pixel_values=pixels))
        assert sorted(len(g) for g in tokred.trace(model).groups()[0])[-12:] == [2] * 12
        for a, b in zip(merged, y, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
        tokred.apply(model, "tome", r=[12], prop_attn=False)
        unweighted = read(family, model(pixel_values=pixels))
    assert not torch.allclose(unweighted[0], y[0], rtol=1e-4, atol=1e-4), "the sizes make no difference here"


def test_dinov3_tables_follow_their_tokens():
    """Pruning fewer tokens than the prefix has, where the host itself would shift every position and raise nothing."""
    model = build("DINOv3")
    pixels = FAMILIES["DINOv3"].inputs(2)["pixel_values"]
    tokred.apply(model, "random_prune", r=[3])
    with torch.no_grad():
        y = model(pixels).last_hidden_state
        kept = tokred.trace(model).representative[0]
        tokred.remove(model)
        tables = model.rope_embeddings(pixels)
        rows = kept[5:] - 5
        x = model.model.layer[0](model.embeddings(pixels), position_embeddings=tables)[:, kept]
        right, wrong = x, x
        for layer in model.model.layer[1:]:
            right = layer(right, position_embeddings=tuple(t[rows] for t in tables))
            wrong = layer(wrong, position_embeddings=tables)
    torch.testing.assert_close(y, model.norm(right), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(y, model.norm(wrong), rtol=1e-2, atol=1e-2)


def test_dinov3_rows_and_tables_permute_together():
    from tokred.adapters.encoder.transformers_tables import gather_tables

    model = build("DINOv3")
    pixels = FAMILIES["DINOv3"].inputs(2)["pixel_values"]
    order = torch.stack([torch.cat([torch.arange(5), torch.randperm(25) + 5]) for _ in range(2)])
    rows = torch.arange(2).unsqueeze(1)
    with torch.no_grad():
        x, tables = model.embeddings(pixels), model.rope_embeddings(pixels)
        y, moved, lost = x, x[rows, order], x[rows, order]
        for layer in model.model.layer:
            y = layer(y, position_embeddings=tables)
            moved = layer(moved, position_embeddings=gather_tables(tables, order, 5))
            lost = layer(lost, position_embeddings=tables)
    torch.testing.assert_close(moved, y[rows, order], rtol=1e-4, atol=1e-5)
    assert (lost - y[rows, order]).abs().max() > 0.1


def test_dinov3_compares_keys_before_rotation():
    """Two equal patches are equal keys, wherever they are."""
    model = build("DINOv3")
    pixels = FAMILIES["DINOv3"].inputs(1)["pixel_values"].clone()
    pixels[:, :, :8, :8] = pixels[:, :, 24:32, 32:40]  # patches 0 and 19, tokens 5 (odd) and 24 (even)
    tokred.apply(model, "tome", r=[1])
    with torch.no_grad():
        model(pixels)
    assert [5, 24] in tokred.trace(model).groups()[0]


@pytest.mark.parametrize("interpolate", [False, True])
def test_beit_bias_follows_its_tokens(interpolate):
    model = build("BEiT (own bias)")
    pixels = FAMILIES["BEiT (own bias)"].inputs(2)["pixel_values"]
    tokred.apply(model, "random_prune", r=[6])
    with torch.no_grad():
        y = model.beit(pixels, interpolate_pos_encoding=interpolate).last_hidden_state
        kept = tokred.trace(model).representative[0]
        tokred.remove(model)
        x = model.beit.embeddings(pixels)
        x = model.beit.layers[0](x, resolution=(SIZE, SIZE))[:, kept]
        for layer in model.beit.layers[1:]:
            bias, layer.relative_position_bias = layer.relative_position_bias, None
            table = bias((5, 5))[:, :, kept][..., kept]
            x = layer(x, attention_mask=table)
    torch.testing.assert_close(y, x, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", ["ViT classifier", "DINOv3", "CLIP", "Whisper", "YOLOS", "TimeSformer", "DETR"])
def test_copies_carry_the_patch_and_no_tensors(family):
    model = build(family)
    plain = len(pickle.dumps(model))
    tokred.apply(model, "tome", r=4)
    y = run(family, model)
    for clone in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), _saved(model)):
        assert_equal(run(family, clone), y)
        tokred.remove(clone)
        assert not torch.equal(run(family, clone)[0], y[0])
    assert_equal(run(family, model), y)
    assert len(pickle.dumps(model)) < plain + 8000, "the state of the last batch travels along"


def _saved(model):
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize("family", ["ViT classifier", "CLIP", "Whisper"])
def test_save_pretrained_writes_the_plain_model(family, tmp_path):
    model = build(family)
    y = run(family, model)
    tokred.apply(model, "tome", r=4)
    model.save_pretrained(tmp_path)
    again = type(build(family)).from_pretrained(tmp_path).eval()
    assert type(again).__name__ == type(model).__name__
    assert_equal(run(family, again), y)
