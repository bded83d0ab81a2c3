"""Every timm family: the two laws (nothing to remove: bit-equal; removed: as before), and what merging must respect."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

pytest.importorskip("timm")

import tokred
from tests.encoder.laws import assert_same, snapshot
from tests.encoder.tiny_timm import FAMILIES, SIZE, build, images, without_weights
from tests.kinds import TIMM, each
from tests.registered import examples, nothings
from tokred.adapters import find

ROPE = [f for f in FAMILIES if "rope" in f]
# Nothing but what is in a token tells it from others.
ALIKE = [f for f in FAMILIES if f not in ROPE and "relpos" not in f and "beit" not in f]
METHODS = {
    **examples("block"),
    # Other forms of a method, which take other ways through its code or through the hosts'.
    "tome-list": {"r": [5, 0, 2]},
    "saint-full": {"form": "full", "M": 15, "blocks": (1,)},
    "vtm-centre": {"variant": "centre", "R": 0.5, "blocks": (0, 1)},
    "spatten-heads": {"keep": 0.5, "first": 0, "heads": 2},
    "ltp-learn": {"theta_final": 0.3, "learn": True},
}
NOTHING = nothings("block")


@pytest.mark.parametrize("family", each(FAMILIES, TIMM))
def test_nothing_to_remove_is_bit_equal_and_removal_restores_everything(family):
    model, x = build(family), images()
    before = snapshot(model)
    with torch.no_grad():
        y = model(x)
        for name, parameters in NOTHING.items():
            if _lacks(model, family, name, parameters):
                continue
            tokred.apply(model, name, **parameters)
            assert torch.equal(model(x), y), name
            assert list(model.state_dict()) == list(before["state"])
            assert repr(model) == before["repr"]
        tokred.apply(model, "tome", r=4)
        assert not torch.equal(model(x), y)
        tokred.remove(model)
        assert_same(before, snapshot(model))
        assert torch.equal(model(x), y)


@pytest.mark.parametrize("family", each(FAMILIES, TIMM))
@pytest.mark.parametrize("case", METHODS)
def test_runs_with_the_announced_tokens_and_without_batch_mates(family, case):
    model, x = build(family), images()
    name, parameters = case.partition("-")[0], METHODS[case]
    if lacks := _lacks(model, family, name, parameters):
        with pytest.raises(tokred.MissingInputError, match=f"reads .*{lacks}.* does not supply"):
            tokred.apply(model, name, **parameters)
        return
    tokred.apply(model, name, **parameters)
    with torch.no_grad():
        y = model(x)
        counted = [row.tokens_out for row in tokred.report(model).layers]
        announced = tokred.flops(model, name, (3, SIZE, SIZE), **parameters).tokens
        if tokred.make(name, **parameters).uneven:
            assert all(found <= most for found, most in zip(counted, announced, strict=True))
        else:
            assert counted == announced
        come_back = tokred.make(name, **parameters).joins(len(model.blocks)) is not None
        assert (min(counted) if come_back else counted[-1]) < model.patch_embed.num_patches
        assert torch.isfinite(y).all()
        for i in range(len(x)):
            torch.testing.assert_close(model(x[i : i + 1]), y[i : i + 1], rtol=1e-4, atol=2e-5)


def _lacks(model, family: str, name: str, parameters: dict) -> str | None:
    """Something that the method reads and a model of this family cannot supply."""
    found = set()
    if getattr(model, "cls_token", None) is None:
        found.add("class_attention")
    if "relpos" in family or "beit" in family:
        found.add("attention")  # a bias for each pair of tokens
    if "parallel" in family or "post-norm" in family:
        found |= {"queries", "transform"}  # blocks that are run whole
    if find(model).pooled and tokred.make(name, **parameters).gradients:
        found |= {"module", "gates"}  # the head reads tokens that are only softly gone
    return min(found & tokred.make(name, **parameters).reads, default=None)


@pytest.mark.parametrize("family", each(ALIKE, TIMM))
def test_merging_duplicates_changes_nothing(family):
    """Tokens without position data, each there twice: merging every pair must leave all outputs as they were."""
    model = build(family)
    # 25 patches, 24 of them 12 pairs of equal neighbours (of unlike parity); there are no positions.
    patches = torch.cat([torch.randn(2, 12, 3, 8, 8).repeat_interleave(2, 1), torch.randn(2, 1, 3, 8, 8)], 1)
    x = patches.view(2, 5, 5, 3, 8, 8).permute(0, 3, 1, 4, 2, 5).reshape(2, 3, SIZE, SIZE)
    with torch.no_grad():
        if model.pos_embed is not None:
            model.pos_embed.zero_()
        y = model(x)
        tokred.apply(model, "tome", r=[6, 0, 0])
        merged = model(x)
    assert sorted(len(g) for g in tokred.trace(model).groups()[0])[-7:] == [1, 2, 2, 2, 2, 2, 2]
    torch.testing.assert_close(merged, y, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", each(ROPE, TIMM))
def test_rope_tables_follow_their_tokens(family):
    """Pruning with gathered tables equals running the same tokens with the same rows, block by block."""
    model, x = build(family), images(2)
    tokred.apply(model, "random_prune", r=[5, 0, 0])
    with torch.no_grad():
        y = model(x)
        kept = tokred.trace(model).representative
        tokred.remove(model)
        # The same by hand: block 0 whole up to the middle, then only the kept rows with their own rows of the table.
        z, rope = model._pos_embed(model.patch_embed(x))
        z = model.norm_pre(z)
        tables = list(rope) if getattr(model, "rope_mixed", False) else [rope] * 3
        prefix = model.num_prefix_tokens
        rows = kept[0, prefix:] - prefix
        first = model.blocks[0]
        if "post-norm" in family:
            z = first(z, rope=tables[0])[:, kept[0]]
        else:
            from tokred.adapters.encoder.block import branch

            z = z + branch(first, first.attn(first.norm1(z), rope=tables[0]), 1)
            z = z[:, kept[0]]
            z = z + branch(first, first.mlp(first.norm2(z)), 2)
        for block, table in zip(model.blocks[1:], tables[1:], strict=True):
            z = block(z, rope=table[..., rows, :])
        expected = model.forward_head(model.norm(z))
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", each(ROPE, TIMM))
def test_rope_tables_follow_through_two_reductions(family):
    """The rows of the second are rows of the first: positions compose."""
    model, x = build(family), images(2)
    with torch.no_grad():
        tokred.apply(model, "random_prune", r=[5, 4, 3])
        y = model(x)
        kept = [record.state.representative for record in _records(model)]
        tokred.remove(model)
        z, rope = model._pos_embed(model.patch_embed(x))
        z = model.norm_pre(z)
        tables = list(rope) if getattr(model, "rope_mixed", False) else [rope] * 3
        prefix, here = model.num_prefix_tokens, torch.arange(z.shape[1])
        for block, table, after in zip(model.blocks, tables, [k[0] for k in kept], strict=True):
            table = table[..., here[prefix:] - prefix, :]
            rows = torch.tensor([here.tolist().index(t) for t in after.tolist()])
            if "post-norm" in family:
                z = block(z, rope=table)[:, rows]
            else:
                from tokred.adapters.encoder.block import branch

                z = z + branch(block, block.attn(block.norm1(z), rope=table), 1)
                z = z[:, rows]
                z = z + branch(block, block.mlp(block.norm2(z)), 2)
            here = after
        expected = model.forward_head(model.norm(z))
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5)


def _records(model):
    from tokred.adapters.encoder.host import shared_of

    return [record for _, record in sorted(shared_of(model)[0][2].records.items())]


@pytest.mark.parametrize("case", METHODS)
def test_positions_are_those_of_all_steps_as_one(case):
    model = build("vit")
    tokred.apply(model, case.partition("-")[0], **METHODS[case])
    with torch.no_grad():
        model(images())
    for record in _records(model):
        if record.state.steps:
            assert torch.equal(record.state.representative, record.state.composed().representative)


def test_what_a_method_keeps_of_each_token_goes_on_with_it():
    from tokred import Reduction
    from tokred.adapters.encoder.state import TokenState

    x, kept = torch.randn(2, 5, 4), torch.tensor([[0, 2, 4], [0, 1, 3]])
    before = TokenState(5, rows={"score": torch.arange(10).view(2, 5)}, notes={"sum": torch.ones(2, 1)})
    after, y = before.advance(Reduction.keep(kept, 5), x, False)
    assert after.rows["score"].tolist() == [[0, 2, 4], [5, 6, 8]]
    assert after.notes == before.notes
    assert torch.equal(y[1], x[1, kept[1]])


@pytest.mark.parametrize(("expose", "short"), [("none", [22, 18, 14]), ("last", [22, 18, 26]), ("all", [26, 26, 26])])
def test_which_blocks_give_back_full_length(expose, short):
    model, seen = build("vit"), []
    tokred.apply(model, "tome", r=4, expose=expose)
    for block in model.blocks:
        block.register_forward_hook(lambda m, i, o: seen.append(o.shape[1]))
    with torch.no_grad():
        model(images())
    assert seen == short


def test_split_blocks_equal_their_hosts():
    """The composition that is used to split a block in the middle is the host's own."""
    from tokred.adapters.encoder.block import branch

    for family in ("vit", "vit-layerscale (DeiT-3)", "eva (EVA)", "beit (own bias)", "relpos"):
        model = build(family)
        block, x = model.blocks[0], torch.randn(2, 26, 48)
        with torch.no_grad():
            half = x + branch(block, block.attn(block.norm1(x)), 1)
            assert torch.equal(half + branch(block, block.mlp(block.norm2(half)), 2), block(x)), family


def test_copies_carry_the_patch_and_no_tensors():
    model, x = build("vit"), images()
    plain = len(pickle.dumps(model))
    tokred.apply(model, "tome", r=4)
    with torch.no_grad():
        y = model(x)
        for clone in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), _saved(model)):
            assert torch.equal(clone(x), y)
            assert type(clone.blocks[0]).__name__ == "Block"
            tokred.remove(clone)
            assert not torch.equal(clone(x), y)
        assert torch.equal(model(x), y)
    assert len(pickle.dumps(model)) < plain + 6000, "the state of the last batch travels along"


def _saved(model):
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize("family", ["eva02 (rope, swiglu)", "dinov3 (rope, registers)"])
def test_copies_of_rope_models_keep_their_key_taps(family):
    model, x = build(family), images()
    tokred.apply(model, "tome", r=4)
    with torch.no_grad():
        y = model(x)
        assert torch.equal(copy.deepcopy(model)(x), y)
        assert torch.equal(pickle.loads(pickle.dumps(model))(x), y)


@pytest.mark.parametrize("family", ["vit", "dinov3 (rope, registers)", "beit (own bias)"])
def test_intermediate_maps_are_restored_not_scrambled(family):
    model, x = build(family), images(2)
    with torch.no_grad():
        shapes = [f.shape for f in model.forward_intermediates(x, intermediates_only=True, norm=False)]
        tokred.apply(model, "tome", r=4)
        plain = model(x)
        maps = model.forward_intermediates(x, intermediates_only=True, norm=False)
        assert [f.shape for f in maps] == shapes
        index = tokred.trace(model).index[:, model.num_prefix_tokens :]
        last = maps[-1].flatten(2).transpose(1, 2)
        for b in range(2):
            for slot in index[b].unique():
                rows = last[b][index[b] == slot]
                assert torch.equal(rows, rows[:1].expand_as(rows)), "a group is not piecewise constant"
        assert torch.equal(model(x), plain)


def test_mean_pooling_weights_by_size():
    """The mean over restored tokens is the mean of the merged ones weighted by size."""
    model, x = build("vit-mean"), images(2)
    tokred.apply(model, "tome", r=6)
    with torch.no_grad():
        restored = model.forward_features(x)
        assert restored.shape[1] == 25
        tokred.apply(model, "tome", r=6, expose="none")
        short = model.forward_features(x)
        size = tokred.trace(model).sizes()
    weighted = (short * size.unsqueeze(-1)).sum(1) / size.sum(1, keepdim=True)
    torch.testing.assert_close(restored.mean(1), weighted, rtol=1e-5, atol=1e-6)


def test_where_restricts_the_blocks():
    model, x = build("vit"), images()
    tokred.apply(model, "tome", r=4, where=lambda name, block: name != "blocks.1")
    with torch.no_grad():
        model(x)
    assert [row.tokens_out for row in tokred.report(model).layers] == [22, 22, 18]


def test_a_model_inside_another_is_found():
    inner = build("vit")
    outer = torch.nn.Sequential(inner, torch.nn.Linear(7, 2))
    tokred.apply(outer, "tome", r=4)
    with torch.no_grad():
        outer(images())
    assert tokred.report(outer).layers[-1].tokens_out == 14
    tokred.remove(outer)
    assert type(inner.blocks[0]).__dict__.get("_tokred_host_class") is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_half_precision_without_nan(dtype):
    model, x = build("vit").to(dtype), images().to(dtype)
    tokred.apply(model, "tome", r=4)
    with torch.no_grad():
        y = model(x)
        assert y.dtype == dtype
        assert torch.isfinite(y).all()
        flat = model(torch.zeros_like(x))
        assert torch.isfinite(flat).all(), "all tokens equal"


@pytest.mark.parametrize(
    ("name", "reason"),
    [("swin_tiny_patch4_window7_224", "windows"), ("hiera_tiny_224", "mask units"), ("resnet18", "no flat list"),
     ("cait_xxs24_224", "talking-heads"), ("naflexvit_base_patch16_gap", "padding mask")],
)  # fmt: skip
def test_refused_models_say_why_and_stay_as_they_were(name, reason):
    model = without_weights(name)
    classes = [type(m) for m in model.modules()]
    with pytest.raises(tokred.UnsupportedModelError, match=reason):
        tokred.apply(model, "tome", r=4)
    assert [type(m) for m in model.modules()] == classes
    assert all(not row.works and reason in row.reason for row in tokred.supports(model))


def test_unfused_attention_is_refused():
    model = build("vit")
    model.blocks[1].attn.fused_attn = False
    with pytest.raises(tokred.UnsupportedModelError, match=r"blocks\.1 is not fused"):
        tokred.apply(model, "tome", r=4)


@pytest.mark.parametrize("family", each(FAMILIES, TIMM))
def test_multiply_adds_are_those_of_the_model(family):
    # The network that makes biases runs over offsets, and is counted as if it did over tokens. Older releases of timm
    # make the angles of mixed rotations by products, which are not counted.
    _assert_counted(build(family), SIZE, 5e-2 if "relpos" in family else 2e-3)


@pytest.mark.parametrize("name", ["test_vit3", "vit_dlittle_patch16_reg1_gap_256", "vit_dpwee_patch16_reg1_gap_256"])
def test_multiply_adds_of_what_pools_and_of_two_attentions_in_one(name):
    timm = pytest.importorskip("timm")
    if not timm.is_model(name):
        pytest.skip(f"this timm has no {name}")
    model = timm.create_model(name, num_classes=10, **({} if "test" in name else {"depth": 2})).eval()
    _assert_counted(model, model.patch_embed.img_size[0])


def _assert_counted(model, size, share=1e-3):
    x = torch.randn(1, 3, size, size)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter, torch.no_grad():
        model.requires_grad_(False)(x)
    assert tokred.flops(model, None, (3, size, size)).macs == pytest.approx(counter.get_total_flops() / 2, rel=share)
