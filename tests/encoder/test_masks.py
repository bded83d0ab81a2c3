"""Masks that hosts take: hidden tokens never merge with visible ones, and the answer is that of the masked model."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("timm")

import tokred
from tests.encoder import tiny_open_clip, tiny_timm
from tests.encoder.test_timm import METHODS
from tests.kinds import TIMM, each

HIDDEN = [[3, 4, 11, 20], [7], []]  # of 26 tokens, per sample


def hiding(n: int = 26, hidden: list[list[int]] = HIDDEN) -> Tensor:
    """``(3, N)`` bool, True where a token is seen."""
    seen = torch.ones(len(hidden), n, dtype=torch.bool)
    for row, gone in zip(seen, hidden, strict=True):
        row[gone] = False
    return seen


def forms(seen: Tensor) -> dict[str, Tensor]:
    """Masks that say the same."""
    b, n = seen.shape
    row = seen[:, None, None, :]
    added = torch.zeros(b, 1, 1, n).masked_fill(~row, float("-inf"))
    own = row | torch.eye(n, dtype=torch.bool)  # hidden tokens see themselves, so that no query sees nothing
    return {
        "bool": row,
        "bool of all queries": row.expand(b, 1, n, n),
        "bool written out": row.expand(b, 3, n, n).contiguous(),
        "float": added,
        "large number": torch.zeros(b, 1, 1, n).masked_fill(~row, -1e4),
        "lowest number": torch.zeros(b, 1, 1, n).masked_fill(~row, torch.finfo(torch.float32).min),
        "with the diagonal": torch.where(row & row.mT | ~row.mT & own, 0.0, float("-inf")),
    }


FAMILIES = [
    "vit", "vit-mean", "vit-mean-with-class (MAE)", "vit-registers (DINOv2)", "vit-post-norm", "eva (EVA)",
    "eva02 (rope, swiglu)", "dinov3 (rope, registers)", "rope-mixed", "deit-distilled",
]  # fmt: skip


def ready(family: str) -> tuple[nn.Module, Tensor, Tensor]:
    """A model, images, and what its mask shows."""
    model = tiny_timm.build(family)
    try:
        model(tiny_timm.images(1), attn_mask=None)
    except TypeError:
        pytest.skip("the model takes no mask")
    prefix = model.num_prefix_tokens
    return model, tiny_timm.images(), hiding(prefix + 25, [[t - 1 + prefix for t in row] for row in HIDDEN])


def groups_of(model: nn.Module, seen: Tensor) -> list[list[list[int]]]:
    """Groups of the last forward; none has hidden tokens beside others."""
    found = tokred.trace(model).groups()
    for sample, real in zip(found, seen, strict=True):
        for group in sample:
            assert len(group) < 2 or all(real[group]), "a hidden token was merged"
    return found


@pytest.mark.parametrize("form", [*forms(hiding())])
@pytest.mark.parametrize("name", ["tome", "tofu", "pitome"])
def test_forms_of_one_mask(form, name):
    model, x, seen = ready("vit")
    parameters = {"ratio": 0.8} if name == "pitome" else {"r": 4}
    tokred.apply(model, name, **parameters)
    with torch.no_grad():
        y = model(x, attn_mask=forms(seen)[form])
        groups = groups_of(model, seen)
        assert any(len(g) > 1 for g in groups[0])
        torch.testing.assert_close(model(x, attn_mask=forms(seen)["bool"]), y, rtol=1e-4, atol=1e-5)
        assert groups_of(model, seen) == groups


@pytest.mark.parametrize("family", each(FAMILIES, TIMM))
def test_the_masked_model_in_pairs_of_equal_patches(family):
    """Visible patches in equal pairs, and hidden ones like one of them: merging all pairs leaves every output."""
    model, _, _ = ready(family)
    if "rope" in family:
        pytest.skip("equal patches are not equal where positions turn them")
    prefix = model.num_prefix_tokens
    patches = torch.randn(2, 12, 3, 8, 8, generator=torch.Generator().manual_seed(3)).repeat_interleave(2, 1)
    patches = torch.cat([patches, patches[:, :1]], 1)
    patches[:, 6] = patches[:, 0]  # hidden: the partner of patch 7, which stays alone
    x = patches.view(2, 5, 5, 3, 8, 8).permute(0, 3, 1, 4, 2, 5).reshape(2, 3, 40, 40)
    seen = hiding(prefix + 25, [[prefix + 6, prefix + 24], [prefix + 6]])
    mask = seen[:, None, None, :]
    with torch.no_grad():
        if model.pos_embed is not None:
            model.pos_embed.zero_()
        y = model(x, attn_mask=mask)
        tokred.apply(model, "tome", r=[10, 0, 0])
        merged = model(x, attn_mask=mask)
        groups_of(model, seen)
        assert tokred.report(model).layers[-1].tokens_out == prefix + 15
    torch.testing.assert_close(merged, y, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "family", ["vit", "eva02 (rope, swiglu)", "dinov3 (rope, registers)", "vit-registers (DINOv2)"]
)
@pytest.mark.parametrize(
    "case", [c for c in METHODS if "grid" not in tokred.make(c.partition("-")[0], **METHODS[c]).reads]
)
def test_as_if_the_hidden_were_not_there(family, case):
    """The class token's answer is the same with other pixels under the mask."""
    model, x, seen = ready(family)
    name, parameters = case.partition("-")[0], METHODS[case]
    model.global_pool = "token"  # others read what the hidden tokens answer
    try:
        tokred.apply(model, name, **parameters)
    except tokred.MissingInputError:
        pytest.skip("does not run on this family")
    other = x.clone()
    maps = (~seen[:, model.num_prefix_tokens :]).view(3, 1, 5, 5).repeat_interleave(8, 2).repeat_interleave(8, 3)
    other = torch.where(maps, torch.randn_like(x), x)
    if name == "avit":  # whose scores of hidden tokens would count
        with pytest.raises(tokred.UnsupportedModelError, match="the batch holds padded tokens"):
            model(x, attn_mask=seen[:, None, None, :])
        return
    with torch.no_grad():
        y = model(x, attn_mask=seen[:, None, None, :])
        if tokred.make(name, **parameters).joins(len(model.blocks)) is None:  # else all are there again
            groups_of(model, seen)
        torch.testing.assert_close(model(other, attn_mask=seen[:, None, None, :]), y, rtol=1e-4, atol=2e-5)
        # Whether anything hidden is there does not change what a method does with the last sample.
        torch.testing.assert_close(model(x[2:]), y[2:], rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("family", ["vit", "vit-mean", "eva02 (rope, swiglu)"])
def test_keeping_all_visible_tokens_is_the_masked_model(family):
    """Removing what is hidden from nobody: with a mask and nothing to remove, bit for bit the host."""
    model, x, seen = ready(family)
    mask = seen[:, None, None, :]
    with torch.no_grad():
        y = model(x, attn_mask=mask)
        tokred.apply(model, "tome", r=0)
        assert torch.equal(model(x, attn_mask=mask), y)
        tokred.apply(model, "tome", r=4)
        assert not torch.allclose(model(x, attn_mask=mask), y)
        z = model(x)
        torch.testing.assert_close(model(x, attn_mask=torch.ones_like(mask)), z, rtol=1e-4, atol=1e-5)


def test_a_hidden_class_token_keeps_its_place():
    model, x, seen = ready("vit")
    seen[:, 0] = False
    mask = seen[:, None, None, :]
    with torch.no_grad():
        first = model.blocks[0]
        tokred.apply(model, "random_prune", r=[5, 0, 0])
        y = model(x, attn_mask=mask)
        kept = tokred.trace(model).representative
        assert kept[:, 0].tolist() == [0, 0, 0]
        tokred.remove(model)
        z = model.norm_pre(model._pos_embed(model.patch_embed(x)))
        z = z + first.attn(first.norm1(z), attn_mask=mask)
        z = z.gather(1, kept.unsqueeze(-1).expand(-1, -1, 48))
        z = z + first.mlp(first.norm2(z))
        own = seen.gather(1, kept)[:, None, None, :]
        for block in model.blocks[1:]:
            z = block(z, attn_mask=own)
    torch.testing.assert_close(model.forward_head(model.norm(z)), y, rtol=1e-4, atol=1e-5)


def pairs(n: int) -> dict[str, Tensor]:
    """Masks that hide pairs."""
    halves = torch.arange(n) < n // 2
    blocks = halves[:, None] == halves[None, :]
    return {
        "blocks": blocks,
        "causal": torch.ones(n, n, dtype=torch.bool).tril(),
        "float": torch.zeros(n, n).masked_fill(~blocks, float("-inf")),
        "heads": torch.stack([torch.ones(n), (torch.arange(n) != 5).float(), torch.ones(n)]).bool()[None, :, None, :],
        "of each sample": blocks.expand(3, 1, n, n).contiguous(),
    }


@pytest.mark.parametrize("form", pairs(4))
def test_masks_of_pairs_are_refused(form):
    model, x, _ = ready("vit")
    tokred.apply(model, "tome", r=4)
    with torch.no_grad(), pytest.raises(tokred.UnsupportedModelError, match="attn_mask hides pairs"):
        model(x, attn_mask=pairs(26)[form])
    with torch.no_grad():
        assert torch.isfinite(model(x)).all()


@pytest.mark.parametrize("name", ["tome", "evit"])
def test_causal_attention_is_refused(name):
    model, x, _ = ready("vit")
    if "is_causal" not in inspect.signature(model.forward).parameters:
        pytest.skip("this timm has no causal attention")
    tokred.apply(model, name, **({"r": [0, 0, 4]} if name == "tome" else {"kappa": 0.6, "blocks": (2,)}))
    with torch.no_grad(), pytest.raises(tokred.UnsupportedModelError, match="causal"):
        model(x, is_causal=True)


def test_a_bias_of_pairs_hides_nothing():
    """Numbers that are added to the logits follow their tokens, as relative positions do."""
    model, x, _ = ready("vit")
    bias = torch.randn(1, 3, 26, 26)
    tokred.apply(model, "random_prune", r=[5, 0, 0])
    with torch.no_grad():
        y = model(x, attn_mask=bias)
        kept = tokred.trace(model).representative
        tokred.remove(model)
        z = model.norm_pre(model._pos_embed(model.patch_embed(x)))
        first = model.blocks[0]
        z = z + first.attn(first.norm1(z), attn_mask=bias)
        rows = torch.arange(3)[:, None]
        z = z[rows, kept]
        z = z + first.mlp(first.norm2(z))
        own = bias.expand(3, -1, -1, -1)
        own = torch.stack([own[i][:, kept[i]][:, :, kept[i]] for i in range(3)])
        for block in model.blocks[1:]:
            z = block(z, attn_mask=own)
        torch.testing.assert_close(model.forward_head(model.norm(z)), y, rtol=1e-4, atol=1e-5)


def test_training_with_a_mask():
    model, x, seen = ready("vit-mean")
    model.train()
    tokred.apply(model, "tome", r=4)
    model(x, attn_mask=seen[:, None, None, :]).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("family", ["CLIP", "custom blocks", "mean pooling"])
def test_open_clip_blocks(family):
    tower: Any = tiny_open_clip.build(family).visual
    x, seen = torch.randn(3, 26, 48), hiding()
    custom = family == "custom blocks"
    added = torch.zeros(3, 1, 1, 26).masked_fill(~seen[:, None, None, :], float("-inf")).expand(3, 3, 26, 26)
    masks = [added.reshape(9, 26, 26), torch.zeros(26, 26).masked_fill(~seen[:1], float("-inf"))]
    if custom:
        masks += [~seen[:1].expand(26, 26), (added < 0).reshape(9, 26, 26)]
    tokred.apply(tower, "tome", r=4)
    for mask in masks:
        with torch.no_grad():
            tower.transformer(x, attn_mask=mask)
        groups_of(tower, seen if mask.ndim == 3 else seen[:1].expand(3, -1))
        assert max(len(g) for g in tokred.trace(tower).groups()[0]) > 1
    with torch.no_grad(), pytest.raises(tokred.UnsupportedModelError, match="pairs"):
        tower.transformer(x, attn_mask=torch.full((26, 26), float("-inf")).triu(1))
