"""Detectors, segmentation heads, videos, encoders of language models: positions go along, full length comes back."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

pytest.importorskip("timm")
pytest.importorskip("transformers")

import tokred
from tests.encoder.tiny_timm import needs
from tests.encoder.tiny_transformers import FAMILIES, build, read
from tests.kinds import TRANSFORMERS, each
from tokred import adapters
from tokred.core.reduction import Reduction

ENCODERS = {
    "DeepSeek": ("deepseek_vit_412m", 84, {"img_size": 84, "embed_dim": 48, "depth": 3, "num_heads": 3}),
    "Qwen 3": ("qwen3_vit_88m", 96, {"embed_dim": 48, "depth": 3, "num_heads": 3, "pos_embed_grid_size": 6}),
    "Gemma 4": (
        "gemma4_vit_167m",
        96,
        {"embed_dim": 48, "depth": 3, "num_heads": 3, "head_dim": 16, "intermediate_size": 64,
         "position_embedding_size": 32},
    ),
}  # fmt: skip


class Shuffle(tokred.BlockMethod):
    """Puts the unprotected tokens of the first block into another order, and removes none."""

    name = "shuffle"

    def __init__(self, layer=0):
        self.layer = layer

    def tokens(self, n, place):
        return n

    def acts(self, n, place):
        return place.layer == self.layer

    def reduce(self, site):
        b, n = site.shape
        free = n - site.prefix - site.suffix
        order = torch.randperm(free, generator=torch.Generator().manual_seed(1)) + site.prefix
        rows = torch.cat([torch.arange(site.prefix), order, torch.arange(n - site.suffix, n)])
        return replace(Reduction.keep(rows.expand(b, -1), n), mode="mean")


class Look(tokred.BlockMethod):
    """Notes what a site has."""

    name = "look"
    reads = frozenset({"x", "grid", "frames"})

    def __init__(self):
        self.seen = []

    def tokens(self, n, place):
        return n

    def acts(self, n, place):
        return True

    def reduce(self, site):
        try:
            grid = site.grid
        except tokred.MissingInputError:
            grid = None
        self.seen.append((site.frames, grid))
        return Reduction.identity((site.shape[0],), site.shape[1], site.device)


def timm_model(label, suffix=""):
    import timm

    name, size, options = ENCODERS[label]
    needs(name + suffix)
    torch.manual_seed(0)
    model = timm.create_model(name + suffix, **options, **({} if suffix else {"num_classes": 5})).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn_like(p) * (0.15 if p.ndim > 1 else 0.3))
            if p.ndim == 1:
                p.add_(1)
    return model, torch.rand(2, 3, size, size, generator=torch.Generator().manual_seed(1))


POSITIONED = [
    "BEiT segmentation", "UperNet on BEiT", "Data2Vec vision (own bias)", "Data2Vec vision (shared bias)",
    "TimeSformer", "CLIPSeg", "OWL-ViT", "OWLv2", "DETR", "Conditional DETR",
]  # fmt: skip


@pytest.mark.parametrize("family", each(POSITIONED, TRANSFORMERS))
def test_tokens_take_their_positions_along(family):
    """In another order, each with its position data, tokens give the same output; dense outputs in the old order."""
    model, inputs = build(family), FAMILIES[family].inputs(2)
    with torch.no_grad():
        y = read(family, model(**inputs))
        tokred.apply(model, Shuffle())
        for a, b in zip(read(family, model(**inputs)), y, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4 * max(1.0, float(b.abs().max())))


@pytest.mark.parametrize("family", ["DETR", "Conditional DETR"])
def test_detectors_would_notice_embeddings_in_the_wrong_order(family):
    model, inputs = build(family), FAMILIES[family].inputs(2)
    with torch.no_grad():
        y = model(**inputs).encoder_last_hidden_state
        tokred.apply(model, Shuffle())
        model.model.encoder.layers[1].__dict__["_tokred"].recipe.positions = {}
        assert (model(**inputs).encoder_last_hidden_state - y).abs().max() > 1e-2


@pytest.mark.parametrize("label", ENCODERS)
@pytest.mark.parametrize("suffix", ["", "_enc"], ids=["classifier", "encoder"])
def test_encoders_of_language_models(label, suffix):
    model, x = timm_model(label, suffix)
    before = [(type(m), sorted(m.__dict__), len(m._forward_hooks)) for m in model.modules()]
    with torch.no_grad():
        y = model(x)
        maps = model.forward_intermediates(x, intermediates_only=True)
        tokred.apply(model, "tome", r=0)
        assert torch.equal(model(x), y)
        tokred.apply(model, Shuffle())
        torch.testing.assert_close(model(x), y, rtol=1e-3, atol=1e-4 * max(1.0, float(y.abs().max())))
        tokred.apply(model, "tome", r=4)
        z = model(x)
        assert z.shape == y.shape
        assert not torch.equal(z, y)
        assert [layer.tokens_out for layer in tokred.report(model).layers] == [32, 28, 24]
        assert tokred.flops(model, "tome", tuple(x.shape[1:]), r=4).tokens == [32, 28, 24]
        assert [m.shape for m in model.forward_intermediates(x, intermediates_only=True)] == [m.shape for m in maps]
        with pytest.raises(ValueError, match="reads tokens by their position"):
            tokred.apply(model, "tome", r=4, expose="none")
        tokred.remove(model)
        assert [(type(m), sorted(m.__dict__), len(m._forward_hooks)) for m in model.modules()] == before
        assert torch.equal(model(x), y)


def test_gemma_compares_keys_after_their_norm_and_before_rotation():
    """Two equal patches, without their embedded positions, are equal keys wherever they are."""
    model, x = timm_model("Gemma 4", "_enc")
    x = x.clone()
    x[:, :, :16, :16] = x[:, :, 32:48, 48:64]  # patches 0 and 15
    with torch.no_grad():
        model.patch_embed.position_embedding_table.zero_()
        tokred.apply(model, "tome", r=[1])
        model(x)
    assert [0, 15] in tokred.trace(model).groups()[0]


def test_gemma_refuses_padding_when_it_comes():
    model, _ = timm_model("Gemma 4", "_enc")
    patches = torch.rand(2, 36, 16 * 16 * 3)
    where = torch.stack(torch.meshgrid(torch.arange(6), torch.arange(6), indexing="ij"), -1).reshape(1, 36, 2)
    valid = torch.ones(2, 36, dtype=torch.bool)
    valid[1, 27:] = False
    tokred.apply(model, "tome", r=4)
    with torch.no_grad(), pytest.raises(tokred.UnsupportedModelError, match="padded tokens"):
        model(patches, where.expand(2, -1, -1), valid)


@pytest.mark.parametrize(("family", "expected"), [("VideoMAE", (2, (4, 4))), ("ViViT", (2, (4, 4))), ("ViT", None)])
def test_sites_of_videos_know_frames_and_rows(family, expected):
    model, look = build(family), Look()
    if expected is None:
        with pytest.raises(tokred.MissingInputError, match="frames"):
            tokred.apply(model, look)
        return
    tokred.apply(model, look)
    with torch.no_grad():
        model(**FAMILIES[family].inputs(2))
    assert look.seen == [expected] * 3


def test_a_masked_video_has_no_frames_any_more():
    with pytest.raises(tokred.MissingInputError, match="frames, grid"):
        tokred.apply(build("VideoMAE masked"), Look())


def test_methods_of_images_are_not_run_on_the_rows_of_a_video():
    """Rows and columns alone would place a video's tokens wrong."""

    class Rows(Look):
        reads = frozenset({"x", "grid"})

    with pytest.raises(tokred.MissingInputError, match="grid"):
        tokred.apply(build("ViViT"), Rows())
    tokred.apply(build("ViT"), Rows())
    tokred.apply(build("TimeSformer"), Rows())
    model = build("ViViT")
    tokred.apply(model, "vtm", variant="centre", R=0.5, blocks=(0,))  # which takes them frame after frame
    with torch.no_grad():
        model(**FAMILIES["ViViT"].inputs(2))
    assert tokred.report(model).layers[-1].tokens_out < 33


# ---------------------------------------------------------------- TimeSformer


def test_the_composition_of_divided_attention_is_the_hosts():
    class Whole(Shuffle):
        def reduce(self, site):
            b, n = site.shape
            return replace(Reduction.identity((b,), n, site.device), trivial=False)

    model, inputs = build("TimeSformer"), FAMILIES["TimeSformer"].inputs(2)
    with torch.no_grad():
        y = model.timesformer(**inputs).last_hidden_state
        tokred.apply(model, Whole())
        torch.testing.assert_close(model.timesformer(**inputs).last_hidden_state, y, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("expose", ["none", "last", "all"])
def test_positions_go_in_all_frames_alike(expose):
    model, inputs = build("TimeSformer"), FAMILIES["TimeSformer"].inputs(2)
    tokred.apply(model, "tome", r=3, expose=expose)
    with torch.no_grad():
        y = model.timesformer(**inputs).last_hidden_state
        trace = tokred.trace(model)
        assert (trace.length, trace.slots) == (17, 8)
        if expose == "none":
            assert y.shape[1] == 1 + 7 * 4
            return
        assert y.shape[1] == 1 + 16 * 4
        rows = y[:, 1:].view(2, 16, 4, -1)
        for b in range(2):
            for slot in trace.index[b, 1:].unique():
                group = rows[b][trace.index[b, 1:] == slot]
                assert torch.equal(group, group[:1].expand_as(group)), "a group differs within a frame"
        assert not torch.equal(rows[:, :, 0], rows[:, :, 1]), "the frames became one"


@pytest.mark.parametrize(
    "method", [("evit", {"kappa": 0.6, "blocks": (1,)}), ("random_prune", {"r": 2}), ("pitome", {"ratio": 0.8})]
)
def test_exposing_changes_nothing_but_lengths(method):
    name, parameters = method
    model, inputs = build("TimeSformer"), FAMILIES["TimeSformer"].inputs(2)
    logits = []
    with torch.no_grad():
        for expose in ("none", "last", "all"):
            tokred.apply(model, name, expose=expose, **parameters)
            logits.append(model(**inputs).logits)
    for other in logits[1:]:
        torch.testing.assert_close(other, logits[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("expose", ["none", "all"])
def test_positions_that_went_around_blocks_come_back(expose):
    model, inputs = build("TimeSformer"), FAMILIES["TimeSformer"].inputs(2)
    # Positions as they enter the second block unpatched, and the last one patched.
    given: list[torch.Tensor] = []
    blocks = model.timesformer.encoder.layer
    blocks[1].temporal_layernorm.register_forward_pre_hook(lambda module, args: given.append(args[0]))
    with torch.no_grad():
        model(**inputs)
        blocks[2].temporal_layernorm.register_forward_pre_hook(lambda module, args: given.append(args[0]))
        tokred.apply(model, "skipvit", rho=0.5, split=0, join=2, expose=expose)
        model(**inputs)
    report = tokred.report(model)
    assert [(layer.tokens_in, layer.tokens_out) for layer in report.layers] == [(17, 9), (9, 9), (17, 17)]
    assert report.macs == sum(macs for *_, macs in adapters.find(model).plan(*tokred.patched(model), (1, 4, 3, 32, 32)))
    before, after = given[0].reshape(2, 16, -1), given[-1].reshape(2, 16, -1)
    same = torch.isclose(before, after, rtol=1e-4, atol=1e-5).all(2)
    assert same.sum(1).tolist() == [8, 8], "those that left are as they left"


def test_merging_equal_positions_of_a_video_changes_nothing():
    model = build("TimeSformer")
    with torch.no_grad():
        model.timesformer.embeddings.position_embeddings.zero_()
    patches = torch.randn(2, 4, 8, 3, 8, 8, generator=torch.Generator().manual_seed(2)).repeat_interleave(2, 2)
    clip = patches.view(2, 4, 4, 4, 3, 8, 8).permute(0, 1, 4, 2, 5, 3, 6).reshape(2, 4, 3, 32, 32)
    with torch.no_grad():
        y = model(pixel_values=clip).logits
        tokred.apply(model, "tome", r=[8])
        z = model(pixel_values=clip).logits
        assert sorted(len(g) for g in tokred.trace(model).groups()[0])[-8:] == [2] * 8
        torch.testing.assert_close(z, y, rtol=1e-4, atol=1e-5)
        tokred.apply(model, "tome", r=[6], prop_attn=False)
        assert not torch.allclose(model(pixel_values=clip).logits, y, rtol=1e-4, atol=1e-5)


def test_timesformer_of_other_attention_is_refused():
    import transformers

    config = transformers.TimesformerConfig(
        hidden_size=48, num_hidden_layers=1, num_attention_heads=3, image_size=32, patch_size=8, num_frames=4,
        attention_type="joint_space_time",
    )  # fmt: skip
    with pytest.raises(tokred.UnsupportedModelError, match="joint_space_time"):
        tokred.apply(transformers.TimesformerModel(config), "tome", r=2)


def test_timesformer_counts_and_attention_weights():
    model, inputs = build("TimeSformer"), FAMILIES["TimeSformer"].inputs(2)
    whole = tokred.flops(model, None, (4, 3, 32, 32))
    # One block of 4 frames with 16 positions, 48 channels and an MLP of 64, by hand.
    time = 64 * (5 * 48 * 48 + 2 * 4 * 48)
    space = 4 * 17 * (4 * 48 * 48 + 2 * 17 * 48)
    assert whole.layers[0].macs == time + space + 65 * 2 * 48 * 64
    tokred.apply(model, "tome", r=4)
    with torch.no_grad():
        model(**inputs)
        report = tokred.report(model)
        assert report.macs_unpatched == sum(row.macs for row in whole.layers)
        plan = tokred.flops(model, "tome", (4, 3, 32, 32), r=4)
        assert [row.macs for row in plan.layers] == [row.macs for row in report.layers]
        with pytest.raises(tokred.UnsupportedModelError, match="attention weights"):
            model(**inputs, output_attentions=True)
