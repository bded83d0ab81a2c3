"""Blocks on maps (SAM, ViTDet): the two laws, the composition, positions, and what a window may not do to another."""

from __future__ import annotations

import copy
import pickle
from dataclasses import replace

import pytest
import torch

pytest.importorskip("timm")
pytest.importorskip("transformers")

import tokred
from tests.encoder.tiny_windows import FAMILIES, SIDE, SIZE, WINDOW, build, images, layers, read
from tests.kinds import WINDOWED, each
from tokred.adapters.encoder.windows import Grid, decomposed_bias
from tokred.core.reduction import Reduction

CHOICES = ("auto", "global", "windowed", "all")


class Whole(tokred.BlockMethod):
    """Decides to keep every token, yet says that it did something: the reduced path runs with all tokens."""

    name = "whole"

    def tokens(self, n, place):
        return n

    def acts(self, n, place):
        return True

    def reduce(self, site):
        b, n = site.shape
        return replace(Reduction.identity((b,), n, site.device), trivial=False)


class Pairs(tokred.BlockMethod):
    """Merges tokens 0 and 1, 2 and 3, ... of a window."""

    name = "pairs"

    def __init__(self, pairs, proportional=True):
        self.pairs, self.on = pairs, proportional

    @property
    def proportional(self):
        return self.on

    def tokens(self, n, place):
        return n - self.pairs

    def reduce(self, site):
        b, n = site.shape
        index = torch.cat([torch.arange(self.pairs).repeat_interleave(2), torch.arange(self.pairs, n - self.pairs)])
        return Reduction.from_index(index.expand(b, -1).to(site.device), n - self.pairs)


def snapshot(model):
    return [(type(m), sorted(m.__dict__), len(m._forward_hooks)) for m in model.modules()]


def equal(a, b):
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("windows", CHOICES)
@pytest.mark.parametrize("family", each(FAMILIES, WINDOWED))
def test_nothing_to_remove_is_bit_equal_and_removal_restores_everything(family, windows):
    model, x = build(family), images()
    with torch.no_grad():
        y = read(model, x)
        before, text, keys = snapshot(model), repr(model), list(model.state_dict())
        tokred.apply(model, "tome", r=0, windows=windows)
        assert equal(read(model, x), y)
        assert (repr(model), list(model.state_dict())) == (text, keys)
        tokred.apply(model, "tome", r=5, windows=windows)
        z = read(model, x)
        assert [t.shape for t in z] == [t.shape for t in y]
        assert not equal(z, y)
        assert all(torch.isfinite(t).all() for t in z)
        tokred.remove(model)
        assert snapshot(model) == before
        assert equal(read(model, x), y)


@pytest.mark.parametrize("family", each(FAMILIES, WINDOWED))
def test_the_composition_is_the_hosts(family):
    """All tokens, through the path of the reduced ones: the host's block, up to rounding."""
    model, x = build(family), images()
    with torch.no_grad():
        y = read(model, x)
        tokred.apply(model, Whole(), windows="all")
        for a, b in zip(read(model, x), y, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["timm SAM", "SAM vision", "ViTDet"])
@pytest.mark.parametrize("windows", CHOICES)
def test_counts_are_those_announced_and_samples_are_alone(family, windows):
    model, x = build(family), images(3)
    tokred.apply(model, "tome", r=6, windows=windows)
    with torch.no_grad():
        y = read(model, x)
        report = tokred.report(model)
        alone = read(model, x[1:2])
    expected = {"global": [30, 30], "windowed": [40, 40], "all": [40, 30, 40, 30]}
    expected["auto"] = expected["global"]
    assert [row.tokens_out for row in report.layers] == expected[windows]
    plan = tokred.flops(model, "tome", (3, SIZE, SIZE), r=6, windows=windows)
    assert plan.tokens == expected[windows]
    assert [row.macs for row in plan.layers] == [row.macs for row in report.layers]
    assert report.macs < report.macs_unpatched
    assert len({tokred.flops(model, None, (3, SIZE, SIZE), windows=w).macs for w in CHOICES}) == 1
    assert "reduced inside each block" in str(report)
    for a, b in zip(alone, y, strict=True):
        torch.testing.assert_close(a, b[1:2], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "method", [("pitome", {"ratio": 0.7}), ("random", {"r": 5}), ("random_prune", {"r": 5}), ("kth", {"k": 2})]
)
@pytest.mark.parametrize("family", ["timm SAM", "SAM", "ViTDet backbone"])
def test_other_methods_run(family, method):
    name, parameters = method
    model, x = build(family), images()
    with torch.no_grad():
        y = read(model, x)
        tokred.apply(model, name, windows="all", **parameters)
        z = read(model, x)
    assert [t.shape for t in z] == [t.shape for t in y]
    assert all(torch.isfinite(t).all() for t in z)
    assert tokred.report(model).layers[0].tokens_out < tokred.report(model).layers[0].tokens_in


def _duplicates(model):
    """Maps whose tokens 0 and 1, 2 and 3, ... of each row are equal, and no position anywhere."""
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "rel_pos" in name:
                p.zero_()
    return torch.randn(2, SIDE, SIDE // 2, 48, generator=torch.Generator().manual_seed(3)).repeat_interleave(2, 2)


@pytest.mark.parametrize("family", ["timm SAM", "timm SAM, no positions in attention", "SAM vision", "ViTDet"])
@pytest.mark.parametrize("place", [0, 1], ids=["windowed", "global"])
def test_merging_duplicates_changes_nothing(family, place):
    model = build(family)
    maps = _duplicates(model)
    block = layers(model)[place]
    first = family.startswith("ViTDet")
    x = maps.permute(0, 3, 1, 2) if first else maps

    def run():
        out = block(x)
        return out[0] if first else out

    with torch.no_grad():
        y = run()
        # A window of 4 x 4 holds 8 pairs, of which the first two rows are inside every window of the map.
        pairs = 4 if place == 0 else SIDE * SIDE // 2
        tokred.apply(model, Pairs(pairs), windows="all")
        torch.testing.assert_close(run(), y, rtol=1e-5, atol=1e-5)
        tokred.apply(model, Pairs(pairs - 1, proportional=False), windows="all")
        assert (run() - y).abs().max() > 1e-4, "the sizes make no difference here"


def test_the_bias_is_that_of_the_places_left():
    """Merged queries put back on the grid, the host's bias of all pairs, rows and columns gathered."""
    from timm.models.vision_transformer_sam import get_decomposed_rel_pos_bias

    attention = build("timm SAM").blocks[1].attn
    generator = torch.Generator().manual_seed(0)
    rows = torch.stack([torch.randperm(SIDE * SIDE, generator=generator)[:20] for _ in range(2)])
    q = torch.randn(2, 3, 20, 16, generator=generator)
    full = torch.zeros(2, 3, SIDE * SIDE, 16).scatter(2, rows[:, None, :, None].expand(-1, 3, -1, 16), q)
    grid = (SIDE, SIDE)
    with torch.no_grad():
        bias = get_decomposed_rel_pos_bias(full.flatten(0, 1), attention.rel_pos_h, attention.rel_pos_w, grid, grid)
        bias = bias.view(2, 3, SIDE * SIDE, SIDE * SIDE)
        at = rows[:, None, :, None].expand(-1, 3, -1, SIDE * SIDE)
        expected = bias.gather(2, at).gather(3, rows[:, None, None].expand(-1, 3, 20, -1))
        torch.testing.assert_close(decomposed_bias(q, rows, grid, attention), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("family", ["timm SAM, rope", "timm SAM", "SAM vision"])
def test_permuted_tokens_take_their_places_along(family):
    """Tokens in another order, each with its place: the same output, for the bias and for rotary embedding."""

    class Shuffle(Whole):
        def reduce(self, site):
            b, n = site.shape
            order = torch.randperm(n, generator=torch.Generator().manual_seed(1)).expand(b, -1)
            return replace(Reduction.keep(order, n), mode="mean")

    model, x = build(family), images()
    with torch.no_grad():
        y = read(model, x)
        tokred.apply(model, Shuffle(), windows="all")
        for a, b in zip(read(model, x), y, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["timm SAM", "SAM vision", "ViTDet"])
def test_a_window_changes_nothing_in_another(family):
    model = build(family)
    tokred.apply(model, "tome", r=6, windows="windowed")
    block, first = layers(model)[0], family.startswith("ViTDet")
    x = torch.randn(1, SIDE, SIDE, 48, generator=torch.Generator().manual_seed(5))
    other = x.clone()
    other[:, :WINDOW, :WINDOW] += torch.randn(1, WINDOW, WINDOW, 48, generator=torch.Generator().manual_seed(6))

    def run(maps):
        out = block(maps.permute(0, 3, 1, 2) if first else maps)
        return out[0].permute(0, 2, 3, 1) if first else out

    with torch.no_grad():
        a, b = run(x), run(other)
    assert torch.equal(a[:, WINDOW:], b[:, WINDOW:])
    assert torch.equal(a[:, :, WINDOW:], b[:, :, WINDOW:])
    assert not torch.equal(a[:, :WINDOW, :WINDOW], b[:, :WINDOW, :WINDOW])


def test_members_of_a_group_are_given_the_same_and_dropped_tokens_nothing():
    model = build("timm SAM")
    block, x = model.blocks[1], torch.randn(2, SIDE, SIDE, 48)
    with torch.no_grad():
        tokred.apply(model, "tome", r=8, where=lambda name, _: name == "blocks.1")
        added = (block(x) - x).flatten(1, 2)
        index = next(iter(_states(model))).steps[0].index
        for b in range(2):
            for slot in index[b].unique():
                rows = added[b][index[b] == slot]
                torch.testing.assert_close(rows, rows[:1].expand_as(rows), rtol=1e-4, atol=1e-5)
        tokred.apply(model, "random_prune", r=8, where=lambda name, _: name == "blocks.1")
        y = block(x).flatten(1, 2)
        dropped = next(iter(_states(model))).steps[0].index[0] < 0
    assert int(dropped.sum()) == 8
    assert torch.equal(y[:, dropped], x.flatten(1, 2)[:, dropped])
    assert not torch.equal(y[:, ~dropped], x.flatten(1, 2)[:, ~dropped])


def _states(model):
    from tokred.adapters.encoder.host import shared_of

    return [record.state for record in shared_of(model)[0][2].records.values()]


@pytest.mark.parametrize(("height", "width", "side"), [(6, 6, 4), (6, 6, 0), (8, 8, 4), (5, 7, 3), (1, 9, 2)])
def test_windows_are_those_of_the_host(height, width, side):
    from timm.models.vision_transformer_sam import window_partition

    grid, maps = Grid(height, width, side), torch.randn(2, height, width, 3)
    cut = grid.split(maps)
    assert cut.shape == (2 * grid.number, grid.area, 3)
    if side:
        assert torch.equal(cut, window_partition(maps, side)[0].flatten(1, 2))
    assert torch.equal(grid.join(cut), maps)
    weights = grid.weights(maps)
    assert (weights is None) == (not grid.padded)
    if weights is not None:
        assert round(float(weights.sum())) == 2 * height * width


def test_padding_weighs_nothing_in_the_mlp():
    """Of a window that reaches over the map, a real token that shares a group with padding is not averaged with it."""
    grid = Grid(6, 6, 4)
    maps = torch.randn(1, 6, 6, 3)
    rows, weights = grid.split(maps), grid.weights(maps)
    real = weights[1] > 0.5
    inside, outside = int(real.nonzero()[0]), int((~real).nonzero()[0])
    index = torch.arange(16)
    index[outside] = index[inside]
    step = Reduction.from_index(index.unique(return_inverse=True)[1].expand(4, -1), 15)
    merged = step.unmerge(step.merge(rows, weights))
    torch.testing.assert_close(merged[1, inside], rows[1, inside])


def test_trace_is_that_of_the_last_block():
    model, x = build("timm SAM"), images()
    tokred.apply(model, "tome", r=6)
    with torch.no_grad():
        model(x)
    trace = tokred.trace(model)
    assert (trace.length, trace.slots) == (SIDE * SIDE, SIDE * SIDE - 6)


@pytest.mark.parametrize("family", ["timm SAM, rope", "SAM", "ViTDet"])
def test_copies_carry_the_patch_and_no_tensors(family):
    model, x = build(family), images()
    plain = len(pickle.dumps(model))
    tokred.apply(model, "tome", r=5, windows="all")
    with torch.no_grad():
        y = read(model, x)
        for clone in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert equal(read(clone, x), y)
            tokred.remove(clone)
            assert not equal(read(clone, x), y)
    assert len(pickle.dumps(model)) < plain + 6000, "the state of the last batch travels along"


@pytest.mark.parametrize("family", ["timm SAM", "SAM vision"])
def test_gradients_and_compilation(family):
    model, x = build(family), images()
    tokred.apply(model, "tome", r=5, windows="all")
    read(model, x)[0].square().sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)
    for name, p in model.named_parameters():
        if "rel_pos" in name:
            assert p.grad.abs().sum() > 0, name
    block = layers(model)[1]
    maps = torch.randn(2, SIDE, SIDE, 48)
    with torch.no_grad():
        compiled = torch.compile(block, backend="eager", fullgraph=True)
        torch.testing.assert_close(compiled(maps), block(maps), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", ["timm SAM", "timm SAM, rope", "ViTDet"])
def test_half_precision(family, dtype):
    model, x = build(family).to(dtype), images().to(dtype)
    tokred.apply(model, "tome", r=5, windows="all")
    with torch.no_grad():
        y = read(model, x)
    assert all(t.dtype == dtype and torch.isfinite(t).all() for t in y)


def test_what_cannot_be_is_refused():
    model = build("timm SAM")
    before = snapshot(model)
    with pytest.raises(ValueError, match="windows is 'some'; allowed are"):
        tokred.apply(model, "tome", r=5, windows="some")
    with pytest.raises(tokred.MissingInputError, match="class_attention"):
        tokred.apply(model, "evit")
    with pytest.raises(ValueError, match="expose must be 'all'"):
        tokred.apply(model, "tome", r=5, expose="none")
    assert snapshot(model) == before
    import timm

    with pytest.raises(ValueError, match="does not run in windows"):
        tokred.apply(timm.create_model("test_vit"), "tome", r=5, windows="global")
    vitdet = build("ViTDet")
    tokred.apply(vitdet, "tome", r=5)
    with pytest.raises(tokred.UnsupportedModelError, match="attention weights"), torch.no_grad():
        vitdet(images(), output_attentions=True)


def test_only_windows_or_only_global_attention():
    from timm.models.vision_transformer_sam import VisionTransformerSAM

    from tests.encoder.tiny_windows import TIMM

    only = VisionTransformerSAM(**{**TIMM, "use_rel_pos": True, "global_attn_indexes": ()}).eval()
    tokred.apply(only, "tome", r=5)
    with torch.no_grad():
        only(images())
    assert [row.tokens_in for row in tokred.report(only).layers] == [64] * 4
    with pytest.raises(ValueError, match="no block of this timm VisionTransformerSAM is global"):
        tokred.apply(only, "tome", r=5, windows="global")


def test_a_changed_block_is_refused():
    from timm.models.vision_transformer_sam import Block

    class Gated(Block):
        def forward(self, x):
            return super().forward(x) * self.gate

    model = build("timm SAM")
    model.blocks[0].__class__ = Gated
    with pytest.raises(tokred.UnsupportedModelError, match="also uses forward, gate"):
        tokred.apply(model, "tome", r=5)


def test_tokens_that_come_back_some_blocks_later_are_refused():
    """Every block gives its whole map back, so that they would go around nothing."""
    model = build(next(iter(FAMILIES)))
    with pytest.raises(tokred.MissingInputError, match="'skipvit' reads fewer tokens from block to block"):
        tokred.apply(model, "skipvit", score="random")
    row = next(r for r in tokred.supports(model) if r.method == "skipvit")
    assert not row.works
