"""Jumbo: the worked example and counts, its shared MLP, its weights, and that no method touches the class token."""

from __future__ import annotations

import copy

import pytest
import torch

pytest.importorskip("timm")

import tokred
from tokred.learn.jumbo import SIZES, Jumbo, jumbo, load_jumbo


def small(**more) -> Jumbo:
    """16 patches and three rows of a class token; every parameter is random."""
    torch.manual_seed(0)
    model = Jumbo(**{"width": 24, "heads": 2, "slices": 3, "depth": 3, "classes": 5, "image": 32, "patch": 8, **more})
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.2)
    return model.eval()


def images(n: int = 2) -> torch.Tensor:
    return torch.randn(n, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def test_worked_example():
    model = Jumbo(width=2, heads=1, slices=2, depth=1, classes=3, image=16, patch=8).eval()
    block = model.blocks[0]
    for p in (*block.attn.parameters(), *block.mlp.parameters(), *model.jumbo_mlp.parameters()):
        torch.nn.init.zeros_(p)
    model.jumbo_mlp.fc2.bias.data = torch.tensor([10.0, 20, 30, 40])
    x = torch.tensor([[[1.0, 2], [3, 4], [0, 2], [4, 6]]])
    out = block(x)
    assert out.tolist() == [[[11, 22], [33, 44], [0, 2], [4, 6]]]
    assert model.pool(out).tolist() == [[11, 22, 33, 44, 2, 4]]


@pytest.mark.parametrize(
    ("size", "count", "own"),
    [
        ("pico", 4779400, 2657088),
        ("nano", 8141672, 4722432),
        ("tiny", 17520424, 10622592),
        ("small", 66890344, 42478848),
        ("base", 131406568, 42478848),
    ],
)
def test_sizes_of_the_paper(size, count, own):
    try:
        with torch.device("meta"):
            model = jumbo(size)
    except RuntimeError:  # timm before 1.0.24 computes values while it builds
        if count > 2e7:
            pytest.skip("the installed timm cannot build a model without memory for its weights")
        model = jumbo(size)
    assert sum(p.numel() for p in model.parameters()) == count
    assert sum(p.numel() for p in model.jumbo_mlp.parameters()) == own
    wide = SIZES[size].slices * SIZES[size].width
    assert sum(p.numel() for p in model.jumbo_mlp.parameters() if p.ndim == 2) == 8 * wide**2


def test_it_begins_with_equal_classes_and_constant_depth():
    torch.manual_seed(0)
    model = Jumbo(width=24, heads=2, depth=3, image=32, patch=8, drop_path=0.1)
    with torch.no_grad():
        logits = model.eval()(images())
    torch.testing.assert_close(logits, torch.full((2, 1000), -6.907755))
    assert torch.nn.functional.cross_entropy(logits, torch.tensor([3, 999])) == pytest.approx(6.9078, abs=1e-4)
    assert {block.drop_path3.drop_prob for block in model.blocks} == {0.1}
    assert tuple(model.reg_token.shape) == (1, 6, 24)


def test_the_order_of_the_patches_does_not_matter():
    model, x = small(), torch.randn(2, 19, 24)
    order = torch.cat([torch.arange(3), 3 + torch.randperm(16)])
    with torch.no_grad():
        plain, moved = (model.forward_head(model.norm(model.blocks(t))) for t in (x, x[:, order]))
    torch.testing.assert_close(moved, plain, rtol=1e-4, atol=1e-4)


def test_one_row_with_the_patches_mlp_is_a_plain_vision_transformer():
    from timm.models.vision_transformer import VisionTransformer

    model = small(slices=1, share=False)
    plain = VisionTransformer(
        img_size=32, patch_size=8, embed_dim=24, num_heads=2, depth=3, num_classes=5, no_embed_class=True,
        norm_layer=torch.nn.LayerNorm,
    ).eval()  # fmt: skip
    for block in model.blocks:
        block.own.load_state_dict(block.mlp.state_dict())
        block.norm3.load_state_dict(block.norm2.state_dict())
    kept = {name.replace("reg_token", "cls_token"): t for name, t in model.state_dict().items()}
    rest = plain.load_state_dict({name: t for name, t in kept.items() if not name.startswith("head")}, strict=False)
    assert rest.missing_keys == ["head.weight", "head.bias"]
    with torch.no_grad():
        torch.testing.assert_close(
            model.forward_features(images()), plain.forward_features(images()), rtol=0, atol=1e-5
        )


def test_the_shared_mlp_learns_from_all_blocks():
    model = small()
    apart = small(share=False)
    state = model.state_dict()
    mine = {name.replace("jumbo_mlp.", f"blocks.{i}.own."): t for i in range(3) for name, t in state.items()}
    apart.load_state_dict({name: t for name, t in mine.items() if name in apart.state_dict()})
    y = [m(images()) for m in (model, apart)]
    torch.testing.assert_close(*y)
    for one in y:
        one.square().sum().backward()
    every = [block.own.fc1.weight.grad for block in apart.blocks]
    assert all(g.abs().sum() > 0 for g in every)
    torch.testing.assert_close(model.jumbo_mlp.fc1.weight.grad, sum(every), rtol=1e-4, atol=1e-4)
    assert sum(name.startswith("jumbo_mlp") for name in state) == 4
    copied = copy.deepcopy(model)
    torch.nn.init.zeros_(copied.jumbo_mlp.fc2.weight)
    assert not torch.equal(copied(images()), y[0]), "the blocks of a copy share the copy's"
    assert torch.equal(model(images()), y[0])


@pytest.mark.parametrize(
    ("name", "settings"),
    [("tome", {"r": 3}), ("random_prune", {"r": 3}), ("cropr", {"r": 3}), ("bavit", {"mode": "ratio", "dim": 12})],
)
def test_methods_leave_the_class_token_alone(name, settings):
    model, x = small(), images()
    with torch.no_grad():
        y = model(x)
        tokred.apply(model, name, **settings)
        reduced = model(x)
        seen = tokred.trace(model).representative
    assert reduced.isfinite().all()
    assert not torch.equal(reduced, y)
    assert seen.shape[1] < 19
    assert (seen[:, :3] == torch.arange(3)).all()
    if name == "tome":
        with torch.no_grad():
            assert torch.equal(tokred.apply(model, "tome", r=0)(x), y)


def test_merged_patches_count_by_their_size_in_the_mean():
    model, x = small(), images(1)
    tokred.apply(model, "tome", r=4)
    with torch.no_grad():
        out = model.forward_features(x)
        pooled = model.pool(out)
    trace = tokred.trace(model)
    size = trace.sizes()[0, 3:]
    assert size.max() > 1
    rows = trace.gather(out)[0, 3:]
    torch.testing.assert_close(pooled[0, 72:], (rows * size[:, None]).sum(0) / 16, rtol=1e-4, atol=1e-5)


def test_what_reads_a_class_token_reads_the_mean_of_its_rows():
    model, x = small(), images()
    tokred.apply(model, "evit", kappa=0.5, blocks=(0,), fuse=False)
    with torch.no_grad():
        model(x)
        block = tokred.apply(small(), "tome", r=0).blocks[0]
        tokens = block.norm1(model._pos_embed(model.patch_embed(x)))
        q, k, _ = block.attn.qkv(tokens).view(2, 19, 3, 2, 12).permute(2, 0, 3, 1, 4)
        looks = (q[:, :, :3] @ k.transpose(2, 3) / 12**0.5).softmax(-1)
    expected = looks.mean((1, 2))[:, 3:].topk(8).indices
    found = tokred.trace(model).representative
    assert found.shape == (2, 11)
    assert (found[:, 3:].sort(1).values == 3 + expected.sort(1).values).all()
    # By the first row alone, others would stay.
    assert (looks[:, :, 0].mean(1)[:, 3:].topk(8).indices.sort(1).values != expected.sort(1).values).any()


@pytest.mark.parametrize("setting", ["evit kappa=0.5", "ats", "ppt r=3", "skipvit split=0 join=2"])
def test_methods_of_a_class_token_run(setting):
    model = tokred.apply(small(), setting)
    with torch.no_grad():
        assert model(images()).isfinite().all()
    assert tokred.report(model).macs < tokred.report(model).macs_unpatched


def test_the_head_of_the_first_version_reads_the_class_token_alone():
    model, x = small(head="class", share=False), images()
    assert model.head.in_features == 3 * 24
    with torch.no_grad():
        out = model.forward_features(x)
        logits = model(x)
        torch.testing.assert_close(logits, model.head(out[:, :3].flatten(1)))
        assert model.pool(out).shape == (2, 72)
        model.reset_classifier(0)
        assert model(x).shape == (2, 72)
        # Nothing pools the patches, so what is merged does not come back for it.
        tokred.apply(model, "tome", r=3)
        model(x)
    assert tokred.report(model).layers[-1].tokens_out == 10
    with pytest.raises(ValueError, match="global_pool must be None"):
        model.reset_classifier(3, "avg")
    with pytest.raises(ValueError, match="head is 'both'; allowed are 'concat', 'class'"):
        small(head="both")


def test_weights(tmp_path):
    model, other = small(), small(classes=5)
    for p in other.parameters():
        torch.nn.init.zeros_(p)
    theirs = {name.replace("reg_token", "jumbo_token"): t for name, t in model.state_dict().items()}
    theirs["cls_token"] = torch.zeros(1, 1, 24)
    torch.save(theirs, tmp_path / "model.pt")
    with torch.no_grad():
        assert torch.equal(load_jumbo(other, tmp_path / "model.pt")(images()), model(images()))
    safe = pytest.importorskip("safetensors.torch")
    safe.save_file(model.state_dict(), tmp_path / "model.safetensors")
    load_jumbo(other, tmp_path / "model.safetensors")
    larger = load_jumbo(small(image=48), theirs)
    assert larger.pos_embed.shape[1] == 36
    torch.testing.assert_close(larger.reg_token, model.reg_token)
    with pytest.raises(ValueError, match=r"blocks.0.attn.proj.bias must be \(48,\), got \(24,\)"):
        load_jumbo(small(width=48), theirs)
    with pytest.raises(ValueError, match=r"these are not the weights of this model: head.weight .*, got none"):
        load_jumbo(small(), {k: v for k, v in theirs.items() if k != "head.weight"})
    torch.save({"epoch": 3}, tmp_path / "model.pt")
    with pytest.raises(ValueError, match="does not hold tensors by their names"):
        load_jumbo(small(), tmp_path / "model.pt")


def test_other_heads():
    model = small()
    model.reset_classifier(0)
    assert model(images()).shape == (2, 4 * 24)
    model.reset_classifier(7)
    assert model(images()).shape == (2, 7)


def test_refusals():
    for wrong, text in (
        ({"slices": 0}, "slices must be an integer of at least 1, got 0"),
        ({"width": 25}, "width must be a multiple of heads=3, got 25"),
        ({"drop_path": 1.0}, "drop_path"),
    ):
        with pytest.raises(ValueError, match=text):
            Jumbo(**wrong)
    with pytest.raises(ValueError, match="size is 'huge'; allowed are 'pico'"):
        jumbo("huge")
    with pytest.raises(ValueError, match="global_pool must be None"):
        small().reset_classifier(3, "token")
