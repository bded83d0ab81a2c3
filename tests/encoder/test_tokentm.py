"""TokenTM: the card's worked examples and laws, the score of one layer, and the pruning method."""

from __future__ import annotations

import importlib

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import tokred
from tokred.encoder.importance import tokentm_class_row, tokentm_rollout, tokentm_score, tokentm_weights

E = torch.tensor([[[1.0, 0.0], [0.0, 2.0], [1.0, 1.0]]])
E_TILDE = torch.tensor([[[2.0, 0.0], [2.0, 0.0], [-1.0, 1.0]]])
A = torch.tensor([[[0.5, 0.3, 0.2], [0.2, 0.6, 0.2], [0.1, 0.3, 0.6]]])
LENGTH = E.norm(dim=-1)
W = tokentm_weights(E, E_TILDE)


def near(*values: float):
    return pytest.approx(list(values), abs=2e-6)


# ---------------------------------------------------------------- weights


def test_example_1_weights():
    assert W[0].tolist() == near(3.456701, 0.635825, 0.635825)
    assert tokentm_weights(E, E_TILDE, direction_only=True)[0].tolist() == near(1.728351, 0.635825, 0.635825)
    assert tokentm_weights(E, E_TILDE, length_only=True)[0].tolist() == near(2, 1, 1)


def test_laws_of_the_weights():
    g = torch.Generator().manual_seed(0)
    e, t = torch.randn(2, 7, 5, generator=g), torch.randn(2, 7, 5, generator=g)
    torch.testing.assert_close(tokentm_weights(e, e), torch.ones(2, 7))
    torch.testing.assert_close(tokentm_weights(e, t * 3), tokentm_weights(e, t) * 3)
    direction = tokentm_weights(e, t, direction_only=True)
    torch.testing.assert_close(tokentm_weights(e, t * 3, direction_only=True), direction)
    torch.testing.assert_close(direction.mean(1), torch.ones(2))
    assert direction.amax() / direction.amin() <= 7.3891
    turn = torch.linalg.qr(torch.randn(5, 5, generator=g)).Q
    torch.testing.assert_close(tokentm_weights(e @ turn, t @ turn), tokentm_weights(e, t))
    torch.testing.assert_close(tokentm_weights(e, t), direction * tokentm_weights(e, t, length_only=True))
    heads = torch.stack([t, e, t * 2], 1)
    found = tokentm_weights(e, heads)
    assert found.shape == (2, 3, 7)
    torch.testing.assert_close(found[:, 0], tokentm_weights(e, t))
    torch.testing.assert_close(found[:, 1], torch.ones(2, 7))


def test_degenerate_lengths_and_padding():
    e, t = E.clone(), E_TILDE.clone()
    e[0, 1] = 0
    w = tokentm_weights(e, t)
    assert w[0, 1] == 0
    assert w.isfinite().all()
    assert tokentm_weights(e, t, direction_only=True)[0, 1] > 0, "a cosine of 0"
    assert tokentm_weights(E, torch.zeros_like(E)).tolist() == [[0, 0, 0]]
    more = torch.cat([E, torch.full((1, 2, 2), 9.0)], 1), torch.cat([E_TILDE, torch.full((1, 2, 2), 4.0)], 1)
    mask = torch.tensor([[True, True, True, False, False]])
    torch.testing.assert_close(tokentm_weights(*more, mask=mask)[:, :3], W)
    heads = torch.stack([more[1], more[0]], 1)
    torch.testing.assert_close(tokentm_weights(more[0], heads, mask=mask)[:, 0, :3], W)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_weights_are_made_in_single_precision(dtype):
    e, t = E.to(dtype), E_TILDE.to(dtype)
    assert torch.equal(tokentm_weights(e, t), W)
    assert tokentm_weights(e, t).dtype == torch.float32


def test_wrong_weights_are_refused():
    with pytest.raises(ValueError, match="exclude each other"):
        tokentm_weights(E, E_TILDE, length_only=True, direction_only=True)
    with pytest.raises(ValueError, match="e_tilde must be"):
        tokentm_weights(E, E_TILDE[:, :2])


# ---------------------------------------------------------------- roll-out


def test_example_2_one_layer():
    c = tokentm_rollout([A], [W], LENGTH)[0].tolist()
    assert c[0] == near(2.728351, 0.381495, 0.179838)
    assert c[1] == near(0.691340, 2.762990, 0.179838)
    assert c[2] == near(0.345670, 0.381495, 1.953729)
    row = tokentm_class_row([A], [W], LENGTH)[0, 1:]
    assert row.tolist() == near(0.381495, 0.179838)
    assert (row / row.sum()).tolist() == near(0.679623, 0.320377)


def test_example_3_two_layers():
    assert tokentm_rollout([A, A], [W, W], LENGTH)[0, 0].tolist() == near(7.619726, 1.616397, 0.773412)
    assert tokentm_class_row([A, A], [W, W], LENGTH)[0].tolist() == near(7.619726, 1.616397, 0.773412)


def test_example_4_plain_roll_out():
    assert tokentm_rollout([A])[0, 0].tolist() == near(1.5, 0.3, 0.2)
    row = tokentm_class_row([A])[0]
    assert row.tolist() == near(1.5, 0.3, 0.2)
    assert (row[1:] / row[1:].sum()).tolist() == near(0.6, 0.4)
    eye = torch.eye(3)
    torch.testing.assert_close(tokentm_rollout([A, A]), (eye + A) @ (eye + A))


def random_layers(depth, n, heads, seed):
    """Sites, their matrices, weights (per head where there are several) and weights of the MLPs."""
    g = torch.Generator().manual_seed(seed)
    sites, matrices, weights, mlps = [], [], [], []
    for _ in range(depth):
        q, k = torch.randn(2, 3, n, 4, generator=g), torch.randn(2, 3, n, 4, generator=g)
        sites.append(tokred.Site(x=torch.zeros(2, n, 1), q=q, k=k))
        matrices.append((q @ k.mT / 2).softmax(-1))
        weights.append(torch.rand(2, *([3] if heads else []), n, generator=g) + 0.2)
        mlps.append(torch.rand(2, n, generator=g))
    return sites, matrices, weights, mlps, torch.rand(2, n, generator=g) + 0.5


@given(
    st.integers(1, 4), st.integers(1, 9), st.booleans(), st.booleans(), st.booleans(), st.integers(0, 2**31),
)  # fmt: skip
@settings(deadline=None, max_examples=40)
def test_top_down_equals_the_full_product(depth, n, heads, use_mlp, normalise, seed):
    sites, matrices, weights, mlps, length = random_layers(depth, n, heads, seed)
    options = {"mlp": mlps if use_mlp else None, "normalise": normalise}
    full = tokentm_rollout(matrices, weights, length, **options)
    assert (full >= 0).all()
    if normalise:
        torch.testing.assert_close(full.sum(-1), torch.ones(2, n))
    lazy = [lambda m=m: m for m in matrices]
    for attention in (matrices, sites, lazy):
        found = tokentm_class_row(attention, weights, length, **options)
        torch.testing.assert_close(found, full[:, 0], rtol=1e-4, atol=1e-5)
    pooled = torch.full((2, n), 1 / n)
    found = tokentm_class_row(sites, weights, length, row=pooled, **options)
    torch.testing.assert_close(found, full.mean(1), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(tokentm_rollout(sites, weights, length, **options), full, rtol=1e-4, atol=1e-5)
    if not heads:
        means = [m.mean(1) for m in matrices]
        torch.testing.assert_close(tokentm_rollout(means, weights, length, **options), full, rtol=1e-4, atol=1e-5)


def test_permuting_patches_permutes_scores():
    _, matrices, weights, _, length = random_layers(3, 8, False, 0)
    order = torch.cat([torch.tensor([0]), torch.randperm(7, generator=torch.Generator().manual_seed(1)) + 1])
    moved = tokentm_class_row(
        [m[:, :, order][..., order] for m in matrices], [w[:, order] for w in weights], length[:, order]
    )
    torch.testing.assert_close(moved, tokentm_class_row(matrices, weights, length)[:, order])


def test_rows_are_normalised_by_themselves_in_deep_models():
    _, matrices, _, _, _ = random_layers(13, 4, False, 0)
    torch.testing.assert_close(tokentm_rollout(matrices).sum(-1), torch.ones(2, 4))
    assert (tokentm_rollout(matrices[:12]).sum(-1) > 4000).all()
    torch.testing.assert_close(tokentm_class_row(matrices), tokentm_rollout(matrices)[:, 0])


def test_wrong_layers_are_refused():
    with pytest.raises(ValueError, match="holds no layer"):
        tokentm_rollout([])
    with pytest.raises(ValueError, match="weight has 1 layers, attention has 2"):
        tokentm_class_row([A, A], [W])
    with pytest.raises(ValueError, match="mlp has 2 layers, attention has 1"):
        tokentm_rollout([A], mlp=[W, W])


# ---------------------------------------------------------------- the score of one layer, and pruning by it


def one_layer(attention, **options) -> tokred.Site:
    n = len(attention[0])
    e, t = torch.randn(1, n, 4), torch.randn(1, n, 4)
    return tokred.Site(
        **{"x": torch.zeros(len(attention), n, 1), "class_attention": torch.tensor(attention), "prefix": 1,
           "transform": (e.expand(len(attention), -1, -1), t.expand(len(attention), -1, -1)), **options}
    )  # fmt: skip


def test_the_score_of_a_layer():
    site = tokred.Site(x=E, class_attention=A[:, 0], transform=lambda: (E, E_TILDE), prefix=1)
    assert tokentm_score(site)[0].tolist() == near(0.3 * 0.635825, 0.2 * 0.635825)
    assert tokentm_score(site, length_only=True)[0].tolist() == near(0.3, 0.2)
    # Without a first length and skip it is what one layer of the roll-out moves.
    moved = tokentm_class_row([A], [W])[0] - torch.tensor([1.0, 0, 0])
    torch.testing.assert_close(tokentm_score(site)[0], moved[1:])


def test_the_highest_scores_stay_in_their_order():
    site = one_layer([[0.1, 0.2, 0.3, 0.05, 0.15, 0.12, 0.08]])
    score = tokentm_score(site)[0]
    step = tokred.TokenTMPrune(keep=0.5, blocks=(0,)).reduce(site)
    assert step.representative.tolist() == [[0, *sorted(score.topk(3).indices.add(1).tolist())]]
    assert tokred.TokenTMPrune(keep=1.0, blocks=(0,)).reduce(site).trivial
    even = tokred.Site(x=E, class_attention=torch.full((1, 3), 0.3), transform=(E, E), prefix=0)
    assert tokred.TokenTMPrune(keep=0.5, blocks=(0,)).reduce(even).representative.tolist() == [[0, 1]], "ties"


def test_padding_changes_no_sample():
    torch.manual_seed(0)
    attention = torch.rand(1, 11).tolist()
    full = one_layer(attention * 2, suffix=1)
    rows = [0, 1, 2, 3, 4, 10]
    mask = torch.ones(2, 11, dtype=torch.bool)
    mask[0, 5:10] = False
    e, t = full.transform
    padded = tokred.Site(
        x=full.x, class_attention=full.class_attention, transform=(e, t), prefix=1, suffix=1, mask=mask
    )
    method = tokred.TokenTMPrune(keep=0.6, blocks=(0,))
    alone = tokred.Site(
        x=full.x[:1, rows], class_attention=full.class_attention[:1, rows], transform=(e[:1, rows], t[:1, rows]),
        prefix=1, suffix=1,
    )  # fmt: skip
    step = method.reduce(padded)
    assert step.mask.sum(1).tolist() == [5, 8]
    expected = [rows[i] for i in method.reduce(alone).representative[0].tolist()]
    assert step.representative[0][step.mask[0]].tolist() == expected


@pytest.mark.parametrize(
    ("parameters", "match"),
    [
        ({"keep": 0}, r"keep \(the kept share\) must lie in \(0, 1\], got 0"),
        ({"blocks": (-1,)}, "blocks must be non-negative"),
        ({"length_only": True, "direction_only": True}, "exclude each other"),
    ],
)
def test_bad_parameters_get_a_clear_error(parameters, match):
    with pytest.raises(ValueError, match=match):
        tokred.make("tokentm", **parameters)


def test_token_counts_and_settings():
    n, found = 197, []
    for layer in range(12):
        n = tokred.TokenTMPrune(keep=0.7).tokens(n, tokred.Place(layer=layer, depth=12, prefix=1))
        found.append(n)
    assert [found[i] for i in (2, 3, 6, 9, 11)] == [197, 139, 98, 69, 69]
    method = tokred.TokenTMPrune(keep=0.5, blocks=(1, 2), direction_only=True)
    assert tokred.from_dict(method.to_dict()) == method
    with pytest.raises(ValueError, match="blocks names"):
        method.check(2)


# ---------------------------------------------------------------- in a model


@pytest.fixture
def tiny():
    pytest.importorskip("timm")
    from tests.encoder import tiny_timm

    return tiny_timm


FAMILIES = ["vit", "vit-qknorm", "vit-no-bias", "deit-distilled", "eva02 (rope, swiglu)", "dinov3 (rope, registers)"]


def linear_parts(attn):
    """Value and output projection as one matrix per head, ``(H, C, C)``, from the parameters alone."""
    c = attn.proj.weight.shape[0]
    value = attn.qkv.weight[2 * c :] if attn.qkv is not None else attn.v_proj.weight
    heads = attn.num_heads
    out = attn.proj.weight.view(c, heads, -1).permute(1, 0, 2)
    return out @ value.view(heads, -1, c)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_transform_is_both_projections_without_their_biases(tiny, family):
    model, x = tiny.build(family), tiny.images(2)
    found = {}

    def note(site, **_):
        found[site.layer] = (*site.transform, site.class_attention)
        return torch.rand(site.shape[0], site.shape[1] - site.prefix)

    normed = []
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(importlib.import_module("tokred.methods.encoder.tokentm"), "tokentm_score", note)
        tokred.apply(model, "tokentm", keep=0.6, blocks=(1,))
        model.blocks[1].norm1.register_forward_hook(lambda m, a, o: normed.append(o))
        model(x)
        e, t, attention = found[1]
        assert torch.equal(e, normed[0])
        torch.testing.assert_close(t, e @ linear_parts(model.blocks[1].attn).sum(0).mT, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(attention.sum(1), torch.ones(2))


@pytest.mark.parametrize("family", FAMILIES)
def test_models(tiny, family):
    model, x = tiny.build(family), tiny.images()
    with torch.no_grad():
        y = model(x)
        assert torch.equal(tokred.apply(model, "tokentm", keep=1.0)(x), y)
        tokred.apply(model, "tokentm", keep=0.6, blocks=(0, 1))
        z = model(x)
        assert [row.tokens_out - model.num_prefix_tokens for row in tokred.report(model).layers] == [15, 9, 9]
        for i in range(len(x)):
            torch.testing.assert_close(model(x[i : i + 1]), z[i : i + 1], rtol=1e-4, atol=2e-5)
        assert torch.equal(tokred.remove(model)(x), y)


def test_hosts_without_it_refuse(tiny):
    for family, missing in (("vit-mean", "class_attention"), ("vit-parallel-scaling", "transform")):
        with pytest.raises(tokred.MissingInputError, match=missing):
            tokred.apply(tiny.build(family), "tokentm")
