"""What timm asks of its own models, asked of patched ones: shapes, sizes, heads, features, gradients, tracing."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("timm")

import timm

import tokred
from tests.encoder.tiny_timm import needs
from tests.kinds import TIMM_MODELS, each

SMALL: dict[str, Any] = {"depth": 3, "embed_dim": 48, "num_heads": 3, "num_classes": 7}
# Name, options beside SMALL, side of an image, another size that it takes when it is built or set for it.
MODELS: dict[str, tuple[dict[str, Any], int, tuple[int, int]]] = {
    "vit_tiny_patch16_224": ({"img_size": 80}, 80, (32, 128)),
    "vit_medium_patch16_gap_256": ({"img_size": 80}, 80, (48, 96)),
    "vit_medium_patch16_reg4_gap_256": ({"img_size": 80}, 80, (96, 48)),
    "vit_base_patch16_siglip_224": ({"img_size": 80}, 80, (32, 128)),
    "vit_base_patch16_clip_224": ({"img_size": 80}, 80, (32, 128)),
    "vit_small_patch14_reg4_dinov2": ({"img_size": 70}, 70, (28, 112)),
    "vit_dlittle_patch16_reg1_gap_256": ({"img_size": 80}, 80, (32, 128)),
    "vit_dpwee_patch16_reg1_gap_256": ({"img_size": 80}, 80, (32, 128)),
    "deit_tiny_distilled_patch16_224": ({"img_size": 80}, 80, (32, 128)),
    "deit3_small_patch16_224": ({"img_size": 80}, 80, (32, 128)),
    "eva_giant_patch14_224": ({"img_size": 70}, 70, (28, 112)),
    "eva02_tiny_patch14_224": ({"img_size": 70}, 70, (28, 112)),
    "vit_small_patch16_dinov3": ({"img_size": 80}, 80, (32, 128)),
    "vit_pe_core_tiny_patch16_384": ({"img_size": 80}, 80, (32, 128)),
    "vit_small_patch16_rope_mixed_224": ({"img_size": 80}, 80, (32, 128)),
    "beit_base_patch16_224": ({"img_size": 80}, 80, (32, 128)),
    "vit_relpos_small_patch16_224": ({"img_size": 80}, 80, (32, 128)),
    "samvit_base_patch16": ({"img_size": 64, "global_attn_indexes": (1,)}, 64, (64, 128)),
}
FLAT = [name for name in MODELS if "sam" not in name]
DYNAMIC = [n for n in FLAT if n.startswith(("vit_tiny", "vit_medium", "eva02", "vit_small_patch16_d"))]
AMOUNTS = (0, 2)


def create(name: str, seed: int = 0, **options: Any) -> nn.Module:
    """A tiny model of the name, in which no branch is zero."""
    needs(name)
    torch.manual_seed(seed)
    model = timm.create_model(name, **{**SMALL, **MODELS[name][0], **options}).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.05)
    return model


def images(name: str, size: tuple[int, int] | None = None) -> Tensor:
    """Two images."""
    return torch.randn(2, 3, *(size or (MODELS[name][1],) * 2), generator=torch.Generator().manual_seed(1))


def short(model: nn.Module) -> bool:
    """Whether the last forward ended with fewer tokens than it began with."""
    layers = tokred.report(model).layers
    return layers[-1].tokens_out < layers[0].tokens_in


@pytest.mark.parametrize("r", AMOUNTS)
@pytest.mark.parametrize("name", each(MODELS, TIMM_MODELS))
def test_forward_of_other_sizes(name, r):
    """Sizes that are built for, set later, and taken as they come."""
    size = MODELS[name][2]
    shapes = []
    models = [create(name, img_size=size)]
    try:
        create(name).set_input_size(img_size=size)
    except AttributeError:
        pass  # this timm cannot, for this model
    else:
        models.append(tokred.apply(create(name), "tome", r=r))
        models[1].set_input_size(img_size=size)
    for model in models:
        if model is models[0]:
            tokred.apply(model, "tome", r=r)
        with torch.no_grad():
            y = model(images(name, size))
        assert torch.isfinite(y).all()
        shapes.append(tuple(y.shape))
        assert short(model) == bool(r)
    assert set(shapes) == {(2, 7)}


@pytest.mark.parametrize("r", AMOUNTS)
@pytest.mark.parametrize(
    "name", [n for n in FLAT if n.startswith(("vit_tiny", "vit_medium", "eva02", "vit_small_patch16_d"))]
)
def test_forward_of_dynamic_sizes(name, r):
    model = tokred.apply(create(name, dynamic_img_size=True), "tome", r=r)
    with torch.no_grad():
        for size in (MODELS[name][2], tuple(reversed(MODELS[name][2])), (MODELS[name][1],) * 2):
            assert model(images(name, size)).shape == (2, 7)


@pytest.mark.parametrize("r", AMOUNTS)
@pytest.mark.parametrize("name", each(MODELS, TIMM_MODELS))
def test_backward_reaches_what_it_reaches_without_a_patch(name, r):
    model = create(name).train()
    model(images(name)).sum().backward()
    expected = {n for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    tokred.apply(model, "tome", r=r)
    model(images(name)).sum().backward()
    found = {n for n, p in model.named_parameters() if p.grad is not None}
    assert found == expected
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize("r", AMOUNTS)
@pytest.mark.parametrize("name", each(MODELS, TIMM_MODELS))
def test_features_and_head_make_the_forward(name, r):
    model, x = create(name), images(name)
    with torch.no_grad():
        plain = model.forward_features(x)
        tokred.apply(model, "tome", r=r)
        features = model.forward_features(x)
        y = model(x)
        head = model.forward_head(features)
        assert torch.equal(head, y)
        if r == 0:
            assert torch.equal(features, plain)
        before = model.forward_head(features, pre_logits=True)
        assert before.shape == model.forward_head(plain, pre_logits=True).shape


@pytest.mark.parametrize("expose", ["auto", "none", "last", "all"])
@pytest.mark.parametrize("r", AMOUNTS)
@pytest.mark.parametrize("name", each(FLAT, TIMM_MODELS))
def test_one_length_of_final_features(name, r, expose):
    """``forward_features``, ``forward_intermediates`` and the forward itself end with the same tokens."""
    model, x = create(name), images(name)
    tokred.apply(model, "tome", r=r, expose=expose)
    with torch.no_grad():
        features = model.forward_features(x)
        pooled = getattr(model, "attn_pool", None) is not None or model.global_pool != "token"
        full = expose in ("last", "all") or (expose == "auto" and pooled)
        whole = 25 + model.num_prefix_tokens
        assert features.shape[1] == (whole if full or not r else whole - 3 * r)
        final, maps = model.forward_intermediates(x)
        assert torch.equal(final, features)
        assert [tuple(m.shape) for m in maps] == [(2, 48, 5, 5)] * 3
        rows = model.forward_intermediates(x, output_fmt="NLC", intermediates_only=True)
        assert [tuple(m.shape) for m in rows] == [(2, 25, 48)] * 3
        early, _ = model.forward_intermediates(x, indices=[0], stop_early=True)
        assert early.shape[1] == (whole if full or not r else whole - r)
        again = model.forward_features(x)
        assert torch.equal(again, features), "asking for maps leaves nothing behind"


@pytest.mark.parametrize("name", each(FLAT, TIMM_MODELS))
def test_a_dictionary_of_features(name):
    model, x = create(name), images(name)
    tokred.apply(model, "tome", r=2)
    with torch.no_grad():
        try:
            out = model.forward_intermediates(x, output_dict=True)
        except TypeError:
            pytest.skip("this timm makes no dictionaries")
        assert torch.equal(out["image_features"], model.forward_features(x))
        assert [tuple(m.shape) for m in out["image_intermediates"]] == [(2, 48, 5, 5)] * 3


@pytest.mark.parametrize("r", AMOUNTS)
@pytest.mark.parametrize("name", each(MODELS, TIMM_MODELS))
def test_features_only(name, r):
    model = create(name, features_only=True)
    with torch.no_grad():
        plain = [f.shape for f in model(images(name))]
        tokred.apply(model, "tome", r=r)
        found = model(images(name))
    assert [f.shape for f in found] == plain
    assert all(torch.isfinite(f).all() for f in found)


@pytest.mark.parametrize("r", AMOUNTS)
@pytest.mark.parametrize("name", each(MODELS, TIMM_MODELS))
def test_without_a_classifier(name, r):
    model, x = create(name, num_classes=0), images(name)
    with torch.no_grad():
        shape = model(x).shape
        tokred.apply(model, "tome", r=r)
        assert model(x).shape == shape
    other = create(name)
    tokred.apply(other, "tome", r=r)
    other.reset_classifier(0)
    with torch.no_grad():
        assert other(x).shape == shape
        other.reset_classifier(5)
        assert other(x).shape == (2, 5)


# ---------------------------------------------------------------- heads that pool


@pytest.mark.parametrize("pool", ["token", "avg", "avgmax", "max", ""])
@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "eva02_tiny_patch14_224", "beit_base_patch16_224"])
def test_pooling_that_is_built(name, pool):
    try:
        model = create(name, global_pool=pool)
    except (AssertionError, RuntimeError, ValueError) as error:
        pytest.skip(f"timm does not build it: {error}")
    x = images(name)
    with torch.no_grad():
        y = model(x)
        tokred.apply(model, "tome", r=0)
        assert torch.equal(model(x), y)
        tokred.apply(model, "tome", r=2)
        assert model(x).shape == y.shape


@pytest.mark.parametrize("pool", ["avg", "max", "map"])
def test_a_head_that_begins_to_pool(pool):
    """A mean of merged tokens would count each once: right, or an error that says what to do. Here, an error."""
    model, x = create("vit_tiny_patch16_224"), images("vit_tiny_patch16_224")
    if pool == "map":
        from timm.layers import AttentionPoolLatent

        options = {"num_heads": 3, "mlp_ratio": 2.0}
    tokred.apply(model, "tome", r=2)
    clone = copy.deepcopy(model)
    for changed in (model, clone):
        with torch.no_grad():
            changed(x)
            if pool == "map":
                changed.attn_pool, changed.global_pool = AttentionPoolLatent(48, **options), "map"
            else:
                changed.reset_classifier(7, global_pool=pool)
            for call in (changed, changed.forward_features, changed.forward_intermediates):
                with pytest.raises(tokred.UnsupportedModelError, match=r"head pools over all tokens now.*again"):
                    call(x)
            tokred.apply(changed, "tome", r=2)
            assert changed.forward_features(x).shape[1] == 26
            assert changed(x).shape == (2, 7)
            tokred.remove(changed)
            changed(x)


def test_a_head_that_stops_pooling_and_methods_that_drop():
    name = "vit_tiny_patch16_224"
    model, x = create(name, global_pool="avg"), images(name)
    tokred.apply(model, "tome", r=2)
    model.reset_classifier(7, global_pool="token")
    with torch.no_grad():
        y = model(x)
        assert torch.equal(tokred.apply(model, "tome", r=2)(x), y), "the class token is the same at any length"
    model = create(name)
    tokred.apply(model, "random_prune", r=2)
    model.reset_classifier(7, global_pool="avg")
    with torch.no_grad():
        y = model(x)
        assert torch.equal(tokred.apply(model, "random_prune", r=2)(x), y), "over those that are left"


@pytest.mark.parametrize("name", each(FLAT, TIMM_MODELS))
def test_blocks_that_are_taken_out(name):
    model, x = create(name), images(name)
    tokred.apply(model, "tome", r=2)
    model.prune_intermediate_layers([0, 1], prune_norm=False, prune_head=False)
    with torch.no_grad():
        for call in (model, model.forward_features, model.forward_intermediates):
            with pytest.raises(tokred.UnsupportedModelError, match=r"2 blocks instead of 3.*again"):
                call(x)
        tokred.apply(model, "tome", r=2)
        assert model(x).shape == (2, 7)
        assert len(tokred.report(model).layers) == 2


def test_attention_that_is_switched():
    """To a form that no size can reach: an error in the forward, whichever block it is."""
    name = "vit_tiny_patch16_224"
    for i in range(1, 3):
        model = tokred.apply(create(name), "tome", r=2)
        model.blocks[i].attn.fused_attn = False
        with torch.no_grad(), pytest.raises(tokred.UnsupportedModelError, match=rf"blocks\.{i} did not run"):
            model(images(name))


# ---------------------------------------------------------------- tracing


@pytest.mark.parametrize("r", AMOUNTS)
@pytest.mark.parametrize("name", each(FLAT, TIMM_MODELS))
def test_fx_takes_blocks_as_leaves(name, r):
    from timm.models import create_feature_extractor, get_graph_node_names

    pytest.importorskip("torchvision")
    model, x = create(name), images(name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        get_graph_node_names(model)  # timm itself can
        tokred.apply(model, "tome", r=r)
        names = get_graph_node_names(model)[1]
        assert [n for n in names if n.startswith("blocks")] == ["blocks.0", "blocks.1", "blocks.2"]
        graph = create_feature_extractor(model, ["blocks.0", "blocks.2", names[-1]]).eval()
    with torch.no_grad():
        found = graph(x)
        assert torch.equal(found[names[-1]], model(x))
        assert found["blocks.0"].shape[1] == 25 + model.num_prefix_tokens - r
        assert found["blocks.2"].shape[1] == model.forward_features(x).shape[1]
        assert torch.equal(copy.deepcopy(graph).eval()(x)[names[-1]], model(x))
    tokred.remove(model)


def test_other_tracers_are_told():
    from torchvision.models.feature_extraction import get_graph_node_names

    from tokred.adapters.encoder.block import Leaf

    model = tokred.apply(create("vit_tiny_patch16_224"), "tome", r=2)
    with pytest.raises(tokred.UnsupportedModelError, match="leaf_modules"):
        get_graph_node_names(model)
    found = get_graph_node_names(model, tracer_kwargs={"leaf_modules": [Leaf]})[1]
    assert "blocks.2" in found
    assert not isinstance(tokred.remove(model).blocks[0], Leaf)


@pytest.mark.parametrize("r", AMOUNTS)
@pytest.mark.parametrize("name", each(MODELS, TIMM_MODELS))
def test_script_is_refused_and_names_what_works(name, r):
    model = tokred.apply(create(name), "tome", r=r)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(tokred.UnsupportedModelError, match=r"torch\.export"):
            torch.jit.script(model)
        with pytest.raises(tokred.UnsupportedModelError, match=r"torch\.export"):
            torch.jit.script(nn.Sequential(model))
