"""The grid that sites are told: that of the patches that were made, of whatever image, or none at all."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("timm")

import tokred
from tests.encoder import tiny_timm, tiny_transformers
from tests.kinds import TIMM, TRANSFORMERS, each
from tokred.adapters.tiny import open_clip as open_clip_tiny
from tokred.adapters.tiny import timm as timm_tiny
from tokred.adapters.tiny import transformers as transformers_tiny


@dataclass(frozen=True)
class Spy(tokred.BlockMethod):
    """Drops the last patch in every block, and notes what it is told of the grid."""

    seen: list[Any] = field(default_factory=list, compare=False)
    name = "spy"
    drops = True

    @property
    def reads(self) -> frozenset[str]:
        return frozenset({"x", "grid"})

    clips = True

    def tokens(self, n: int, place: tokred.Place) -> int:
        return n - 1

    def reduce(self, site: tokred.Site) -> tokred.Reduction:
        self.seen.append((site.grid, site.frames, site.length - site.prefix - site.suffix))
        b, n = site.shape
        last = n - 1 - site.suffix
        kept = torch.tensor([i for i in range(n) if i != last])
        return tokred.Reduction.keep(kept.expand(b, -1), n)


def told(model: nn.Module, run: Callable[[], Any]) -> list[Any]:
    """What sites said in one forward."""
    spy = Spy()
    tokred.apply(model, spy)
    with torch.no_grad():
        run()
    return spy.seen


PATCHES_36 = [((48, 48), (6, 6)), ((32, 72), (4, 9)), ((72, 32), (9, 4)), ((16, 144), (2, 18)), ((8, 288), (1, 36))]


def vit_of(**options: Any) -> nn.Module:
    return timm_tiny.made(timm_tiny.FAMILIES["vit"], **options)


def eva_of(**options: Any) -> nn.Module:
    return timm_tiny.made(timm_tiny.FAMILIES["eva (EVA)"], **options)


def clip_of(**options: Any) -> nn.Module:
    return open_clip_tiny.made(open_clip_tiny.FAMILIES["CLIP"], **options)


def vit(**options: Any) -> nn.Module:
    return vit_of(dynamic_img_size=True, **options).eval()


DYNAMIC = {
    "vit": vit,
    "mean": lambda: vit(class_token=False, global_pool="avg"),
    "registers": lambda: vit(reg_tokens=4),
    "eva": lambda: eva_of(dynamic_img_size=True).eval(),
    "eva02": lambda: eva_of(dynamic_img_size=True, use_rot_pos_emb=True).eval(),
    "mixed": lambda: eva_of(dynamic_img_size=True, use_rot_pos_emb=True, rope_type="mixed", attn_type="rope").eval(),
}


@pytest.mark.parametrize("family", DYNAMIC)
def test_timm_of_any_size(family):
    model = DYNAMIC[family]()
    for size, grid in PATCHES_36:
        assert told(model, lambda size=size: model(torch.randn(2, 3, *size))) == [(grid, None, 36)] * 3


def test_timm_pads_its_images():
    model = vit(dynamic_img_pad=True)
    assert told(model, lambda: model(torch.randn(2, 3, 31, 66))) == [((4, 9), None, 36)] * 3


@pytest.mark.parametrize("family", each([*tiny_timm.FAMILIES], TIMM))
def test_timm_of_a_size_that_is_set_later(family):
    model = tiny_timm.build(family)
    try:
        tiny_timm.build(family).set_input_size(img_size=(16, 64))
    except AttributeError:
        pytest.skip("this timm cannot set a size")
    spy = Spy()
    tokred.apply(model, spy)
    model.set_input_size(img_size=(16, 64))
    with torch.no_grad():
        y = model(torch.randn(2, 3, 16, 64))
    assert spy.seen == [((2, 8), None, 16)] * 3
    assert torch.isfinite(y).all()


@pytest.mark.parametrize("options", [{"img_size": (16, 64)}, {"img_size": (64, 16)}, {"img_size": (32, 32)}])
def test_timm_built_for_other_sizes(options):
    model = vit_of(**options).eval()
    grid = tuple(side // 8 for side in options["img_size"])
    assert told(model, lambda: model(torch.randn(2, 3, *options["img_size"]))) == [(grid, None, 16)] * 3


@pytest.mark.parametrize("projected", [True, False])
def test_timm_hybrid(projected):
    from functools import partial

    from timm.layers import HybridEmbed

    stem = nn.Conv2d(3, 48, 8, 8)
    model = vit(embed_layer=partial(HybridEmbed, backbone=stem, proj=projected), patch_size=1)
    assert told(model, lambda: model(torch.randn(2, 3, 32, 72))) == [((4, 9), None, 36)] * 3


def test_every_way_into_a_timm_model():
    model, x = vit(), torch.randn(2, 3, 32, 72)
    runs = {
        "features": lambda: model.forward_features(x),
        "intermediates": lambda: model.forward_intermediates(x),
        "layers": lambda: model.get_intermediate_layers(x, n=2),
    }
    for name, run in runs.items():
        assert told(model, run) == [((4, 9), None, 36)] * 3, name


def test_dropped_patches_form_no_grid():
    """25 of 36 patches are no 5 x 5 square."""
    model = vit_of(img_size=48, patch_drop_rate=11 / 36).train()
    tokred.apply(model, Spy())
    with pytest.raises(tokred.MissingInputError, match="does not know the grid"):
        model(torch.randn(2, 3, 48, 48))
    tokred.apply(model, "downsample", keep=0.5)
    with pytest.raises(tokred.MissingInputError, match="does not know the grid"):
        model(torch.randn(2, 3, 48, 48))
    model.eval()
    assert told(model, lambda: model(torch.randn(2, 3, 48, 48))) == [((6, 6), None, 36)] * 3


def test_tokens_from_elsewhere_form_no_grid():
    """Not even after a forward whose note was left."""
    model = vit()
    tokred.apply(model, Spy())
    with torch.no_grad():
        model(torch.randn(2, 3, 48, 48))
        with pytest.raises(tokred.MissingInputError, match="does not know the grid"):
            model.blocks[0](torch.randn(2, 37, 48))


def test_one_forward_inside_another():
    model, spy = vit(), Spy()
    tokred.apply(model, spy)
    outer, inner = torch.randn(2, 3, 32, 72), torch.randn(2, 3, 72, 32)

    def again(module: nn.Module, inputs: Any) -> None:
        if len(spy.seen) == 1:
            model(inner)

    handle = model.blocks[1].register_forward_pre_hook(again)
    with torch.no_grad():
        model(outer)
    handle.remove()
    assert [grid for grid, *_ in spy.seen] == [(4, 9), (9, 4), (9, 4), (9, 4), (4, 9), (4, 9)]


@pytest.mark.parametrize("reentrant", [False, True])
def test_recomputation_in_the_backward(reentrant):
    """Forwards of two sizes before the backward: each is done again with its own grid."""
    from torch.utils.checkpoint import checkpoint

    model = vit().train()
    a, b = torch.randn(2, 3, 32, 72, requires_grad=True), torch.randn(2, 3, 72, 32, requires_grad=True)

    def run(x: torch.Tensor) -> torch.Tensor:
        x = model._pos_embed(model.patch_embed(x))
        for block in model.blocks:
            x = checkpoint(block, x, use_reentrant=reentrant)
        return model.norm(x)[:, 0].square().sum()

    spy = Spy()
    tokred.apply(model, spy)
    first = run(a)
    if not reentrant:  # which loses the state of all forwards but the last
        second = run(b)
        del spy.seen[:]
        second.backward()
        assert {grid for grid, *_ in spy.seen} == {(9, 4)}
    del spy.seen[:]
    first.backward()
    assert {grid for grid, *_ in spy.seen} == {(4, 9)}
    del spy.seen[:]
    checkpoint(model, a, use_reentrant=reentrant).sum().backward()
    assert [grid for grid, *_ in spy.seen] == [(4, 9)] * 6


def test_two_threads():
    from concurrent.futures import ThreadPoolExecutor

    model, spy = vit(), Spy()
    tokred.apply(model, spy)
    sizes = [(32, 72), (72, 32)] * 8
    with ThreadPoolExecutor(2) as pool, torch.no_grad():
        list(pool.map(lambda size: model(torch.randn(2, 3, *size)), sizes))
    assert sorted(grid for grid, *_ in spy.seen) == [(4, 9)] * 24 + [(9, 4)] * 24


@pytest.mark.slow
def test_compiled():
    model = vit()
    tokred.apply(model, "vtm")
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with torch.no_grad():
        for size in ((32, 72), (72, 32), (48, 48)):
            x = torch.randn(2, 3, *size)
            torch.testing.assert_close(compiled(x), model(x))
        exported = torch.export.export(model, (x,)).module()
        torch.testing.assert_close(exported(x), model(x))


def test_a_method_of_the_grid_follows_it():
    model = vit()
    tokred.apply(model, "downsample", keep=0.25)
    with torch.no_grad():
        model(torch.randn(1, 3, 32, 64))
    groups = sorted(tokred.trace(model).groups()[0])[1:]
    cells = ([1 + r * 8 + c + k for k in (0, 1, 8, 9)] for r in (0, 2) for c in (0, 2, 4, 6))
    assert groups == sorted(cells), "4 x 8 patches in cells of 2 x 2"


# ---------------------------------------------------------------- open_clip


def test_open_clip():
    model = clip_of(image_size=(16, 64)).eval()
    x, text = torch.randn(2, 3, 16, 64), torch.arange(3, 11).repeat(2, 1)
    assert told(model, lambda: model(x, text)) == [((2, 8), None, 16)] * 3
    assert told(model, lambda: model.visual.forward_intermediates(x)) == [((2, 8), None, 16)] * 3
    dropping = clip_of(image_size=48, patch_dropout=11 / 36).train()
    tokred.apply(dropping, Spy())
    with pytest.raises(tokred.MissingInputError, match="does not know the grid"):
        dropping(torch.randn(2, 3, 48, 48), text)


# ---------------------------------------------------------------- transformers

INTERPOLATING = [
    "ViT", "ViT classifier", "DeiT", "BEiT (own bias)", "Data2Vec vision (own bias)", "ViT-MSN", "I-JEPA", "CLIP",
    "CLIP vision", "CLIP projection", "OWL-ViT", "OWLv2", "SigLIP", "SigLIP vision", "YOLOS",
]  # fmt: skip
ALWAYS = [
    "DINOv2", "DINOv2 classifier", "DINOv2 backbone", "DINOv2 with registers", "DINOv3", "DINOv3 backbone", "YOLOS",
    "Depth Anything",
]  # fmt: skip


@pytest.mark.parametrize("family", each(INTERPOLATING, TRANSFORMERS))
def test_transformers_interpolate(family):
    model, x = tiny_transformers.build(family), tiny_transformers.FAMILIES[family].inputs(2)
    if "interpolate_pos_encoding" not in inspect.signature(model.forward).parameters:
        pytest.skip("takes one size")
    for size, grid in (((32, 64), (4, 8)), ((16, 128), (2, 16))):
        given = {**x, "pixel_values": torch.randn(2, 3, *size), "interpolate_pos_encoding": True}
        seen = told(model, lambda given=given: model(**given))
        assert seen == [(grid, None, 32)] * len(seen)
        assert len(seen) >= 3


@pytest.mark.parametrize("family", each(ALWAYS, TRANSFORMERS))
def test_transformers_take_any_size(family):
    model = tiny_transformers.build(family)
    for size, grid in (((32, 72), (4, 9)), ((16, 144), (2, 18))):
        seen = told(model, lambda size=size: model(pixel_values=torch.randn(2, 3, *size)))
        assert seen == [(grid, None, 36)] * len(seen)
        assert len(seen) >= 3


def test_transformers_built_for_another_size():
    import transformers

    model = transformers.ViTModel(transformers.ViTConfig(**{**transformers_tiny.IMAGE, "image_size": (16, 64)})).eval()
    assert told(model, lambda: model(torch.randn(2, 3, 16, 64))) == [((2, 8), None, 16)] * 3


def test_clips():
    for family in ("ViViT", "VideoMAE", "TimeSformer"):
        model, x = tiny_transformers.build(family), tiny_transformers.FAMILIES[family].inputs(2)
        seen = told(model, lambda model=model, x=x: model(**x))
        expected = ((4, 4), None, 16) if family == "TimeSformer" else ((4, 4), 2, 32)
        assert seen == [expected] * 3, family


@pytest.mark.parametrize("family", ["ViT-MAE", "VideoMAE masked"])
def test_masked_autoencoders_promise_no_grid(family):
    model = tiny_transformers.build(family)
    assert not any(r.works for r in tokred.supports(model) if r.method in ("downsample", "algm"))
    with pytest.raises(tokred.MissingInputError, match="grid"):
        tokred.apply(model, "downsample", keep=0.5)


def test_a_masked_clip_has_no_grid():
    model = tiny_transformers.build("VideoMAE").videomae
    x = transformers_tiny.masked_video(2)
    tokred.apply(model, Spy())
    with pytest.raises(tokred.MissingInputError, match="does not know the grid"), torch.no_grad():
        model(**x)
