"""Zero-TPrune: the card's worked examples and laws, and the method on small models."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import tokred
from tokred.methods.encoder.zero_tprune import emphasise

A1 = [[0.4, 0.3, 0.2, 0.1], [0.3, 0.4, 0.2, 0.1], [0.2, 0.5, 0.2, 0.1], [0.1, 0.6, 0.2, 0.1]]
A2 = [[0.25] * 4] * 4
A3 = [[0.1, 0.1, 0.7, 0.1], [0.2, 0.2, 0.4, 0.2], [0.3, 0.1, 0.5, 0.1], [0.1, 0.2, 0.3, 0.4]]


def attention_site(*heads, **options) -> tokred.Site:
    """A site whose attention is these matrices."""
    a = (
        torch.tensor(heads, dtype=torch.float32)[None]
        if not isinstance(heads[0], torch.Tensor)
        else torch.stack(heads, 1)
    )
    b, h, n, _ = a.shape
    eye = torch.eye(n).expand(b, h, n, n)
    return tokred.Site(**{"x": torch.zeros(b, n, 1), "q": a.log(), "k": eye, "scale": 1.0, "prefix": 1, **options})


def matrix(*heads) -> torch.Tensor:
    return torch.tensor(heads, dtype=torch.float32)[None]


def random_site(b=2, h=3, n=12, seed=0, **options) -> tokred.Site:
    g = torch.Generator().manual_seed(seed)
    x, q, k = (torch.randn(b, *s, generator=g) for s in ((n, 5), (h, n, 4), (h, n, 4)))
    return tokred.Site(**{"x": x, "q": q * 2, "k": k, "prefix": 1, **options})


def keys(*degrees: float) -> torch.Tensor:
    a = torch.tensor(degrees).deg2rad()
    return torch.stack([a.cos(), a.sin()], -1)[None, None]


# ---------------------------------------------------------------- page rank and heads


def test_example_1_one_round_with_a_boosted_class_token():
    site, method = attention_site(A1, A2, A3), tokred.ZeroTPrune(blocks=(0,), rho=0.5)
    start = method.start(site)
    assert start[0].tolist() == pytest.approx([0.4, 0.2, 0.2, 0.2])
    s = site.attention.power(start, 1)
    for found, wanted in zip(
        s[0].tolist(), ([0.28, 0.42, 0.2, 0.1], [0.25] * 4, [0.16, 0.14, 0.52, 0.18]), strict=True
    ):
        assert found == pytest.approx(wanted, abs=1e-6)
    patches = s[..., 1:]
    variances = (patches / patches.mean(-1, keepdim=True)).var(-1, unbiased=False)
    assert variances[0].tolist() == pytest.approx([0.310185, 0, 0.370748], abs=1e-6)
    assert method.importances(site, 1)[0].tolist() == pytest.approx([0.313050, 0.393954, 0.145602], abs=1e-6)


def test_example_1_uniform_start():
    site, method = attention_site(A1, A2, A3), tokred.ZeroTPrune(blocks=(0,), rho=0.5, cls_boost=1.0)
    s = site.attention.power(method.start(site), 1)
    assert s[0, 0].tolist() == pytest.approx([0.25, 0.45, 0.2, 0.1], abs=1e-6)
    assert s[0, 2].tolist() == pytest.approx([0.175, 0.15, 0.475, 0.2], abs=1e-6)
    wanted = [0.335410, 0.364434, 0.158114]
    assert method.importances(site, 1)[0].tolist() == pytest.approx(wanted, abs=1e-6)
    without = tokred.ZeroTPrune(blocks=(0,), rho=0.5)
    no_class = attention_site(A1, A2, A3, class_token=False)
    assert without.importances(no_class, 1)[0].tolist() == pytest.approx(wanted, abs=1e-6), "no class token: uniform"


@pytest.mark.parametrize("boost", [None, 1.0])
def test_example_1_fifty_rounds_forget_the_start(boost):
    site = attention_site(A1, A2, A3)
    method = tokred.ZeroTPrune(blocks=(0,), rho=0.5, cls_boost=boost, tolerance=0)
    s = site.attention.power(method.start(site), 50)
    assert s[0, 0].tolist() == pytest.approx([0.288889, 0.411111, 0.2, 0.1], abs=1e-6)
    assert s[0, 2].tolist() == pytest.approx([0.212366, 0.129032, 0.497312, 0.161290], abs=1e-6)
    assert method.importances(site, 50)[0].tolist() == pytest.approx([0.304682, 0.379024, 0.134191], abs=1e-6)
    stopped = tokred.ZeroTPrune(blocks=(0,), rho=0.5, cls_boost=boost)
    assert stopped.importances(site, 50)[0].tolist() == pytest.approx([0.304682, 0.379024, 0.134191], abs=1e-4)


def test_example_3_without_the_head_filter():
    method = tokred.ZeroTPrune(blocks=(0,), rho=0.5, v_min=0, v_max=10)
    found = method.importances(attention_site(A1, A2, A3), 1)
    assert found[0].tolist() == pytest.approx([0.293542, 0.352562, 0.186994], abs=1e-6)


def test_uniform_and_doubly_stochastic_attention_keep_the_uniform_vector():
    double = [[0.5, 0.3, 0.2, 0.0001], [0.2, 0.5, 0.3, 0.0001], [0.3, 0.2, 0.5, 0.0001], [0.0001, 0.0001, 0.0001, 1]]
    site = attention_site(A2, double)
    s = site.attention.power(torch.full((1, 4), 0.25), 20)
    torch.testing.assert_close(s[0, 0], torch.full((4,), 0.25))
    torch.testing.assert_close(s[0, 1], torch.full((4,), 0.25), rtol=0, atol=2e-3)


def test_heads_are_combined_by_the_root_mean_square():
    g = torch.Generator().manual_seed(0)
    s = torch.rand(2, 3, 7, generator=g)
    torch.testing.assert_close(emphasise(s[:, :1], 0, 1e9), s[:, 0])
    torch.testing.assert_close(emphasise(s, 0, 1e9), s.square().mean(1).sqrt())
    twice = torch.cat([s, s], 1)
    torch.testing.assert_close(emphasise(twice, 0.01, 0.7), emphasise(s, 0.01, 0.7))
    torch.testing.assert_close(emphasise(s, 5, 6), emphasise(s, 0, 1e9)), "no head survives: all are kept"
    torch.testing.assert_close(emphasise(s * 3, 0.01, 0.7), emphasise(s, 0.01, 0.7) * 3)
    assert emphasise(torch.zeros(1, 2, 3), 0.01, 0.7).tolist() == [[0, 0, 0]]


# ---------------------------------------------------------------- similarity


def test_example_2_the_nearest_copies_among_the_unimportant_go():
    site = tokred.Site(x=torch.zeros(1, 6, 1), k=keys(0, 5, 50, 48, 100, 58))
    importance = torch.tensor([[0.9, 0.1, 0.5, 0.3, 0.7, 0.2]])
    method = tokred.ZeroTPrune(blocks=(0,), rho=1.0, r_s=2)
    assert method._distinct(site, importance, 2, None).tolist() == [[True, False, True, False, True, True]]
    assert method._distinct(site, importance, 1, None).tolist() == [[True, True, True, False, True, True]]
    count = torch.tensor([[6]])
    assert torch.equal(method._distinct(site, importance, 2, count), method._distinct(site, importance, 2, None))


def test_a_duplicate_in_the_lower_half_goes_first_and_ties_go_to_the_lower_index():
    k = torch.nn.functional.normalize(torch.randn(1, 2, 8, 4, generator=torch.Generator().manual_seed(0)), dim=-1)
    k[:, :, 6] = k[:, :, 1]
    site = tokred.Site(x=torch.zeros(1, 8, 1), k=k)
    importance = torch.tensor([[8.0, 7, 6, 5, 4, 3, 2, 1]])
    for heads in ("concat", "mean"):
        method = tokred.ZeroTPrune(blocks=(0,), rho=1.0, r_s=1, heads=heads)
        assert method._distinct(site, importance, 1, None)[0].tolist().index(False) == 6
    same = tokred.Site(x=torch.zeros(1, 8, 1), k=torch.ones(1, 1, 8, 4))
    assert method._distinct(same, importance.flip(1), 2, None)[0].tolist() == [False, False] + [True] * 6


# ---------------------------------------------------------------- the layer


@given(
    st.integers(1, 24), st.integers(0, 3), st.integers(0, 2), st.integers(0, 9), st.floats(0.05, 1),
    st.integers(0, 2**31),
)  # fmt: skip
@settings(deadline=None, max_examples=60)
def test_counts_and_order(free, prefix, suffix, r, rho, seed):
    n = free + prefix + suffix
    method = tokred.ZeroTPrune(blocks=(0,), rho=rho, r_s=r, T=(3, 2, 1))
    site = random_site(n=n, seed=seed, prefix=prefix, suffix=suffix)
    step = method.reduce(site)
    kept = math.ceil(round(rho * (free - min(r, free // 2)), 9))
    assert (
        step.slots
        == prefix + suffix + kept
        == method.tokens(n, tokred.Place(layer=0, depth=1, prefix=prefix, suffix=suffix))
    )
    assert step.trivial == (kept == free)
    rows = step.representative
    assert (rows.diff(dim=1) > 0).all()
    assert rows[:, :prefix].tolist() == [list(range(prefix))] * 2
    assert rows[:, step.slots - suffix :].tolist() == [list(range(n - suffix, n))] * 2
    alone = tokred.Site(x=site.x[1:], q=site.q[1:], k=site.k[1:], prefix=prefix, suffix=suffix)
    assert torch.equal(method.reduce(alone).representative, rows[1:])


def test_the_second_ranking_is_among_survivors_with_their_rows_renormalised():
    site = random_site(b=1, n=11, seed=4)
    method = tokred.ZeroTPrune(blocks=(0,), rho=0.5, r_s=3, T=(4, 4, 4), v_min=0, v_max=1e9, tolerance=0)
    a = (site.q @ site.k.mT / 2).softmax(-1)
    start = torch.tensor([math.sqrt(11)] + [1.0] * 10)
    first = ((start / start.sum()) @ a[0]).square().mean(0).sqrt()[1:]
    order = first.argsort(descending=True).tolist()
    unit = torch.nn.functional.normalize(site.k.transpose(1, 2).flatten(2)[0, 1:], dim=-1)
    best = {i: max((unit[i] @ unit[j]).item() for j in order[:5]) for i in order[5:]}
    gone = sorted(best, key=lambda i: -best[i])[:3]
    alive = [0] + [i + 1 for i in range(10) if i not in gone]
    part = a[:, :, alive][:, :, :, alive]
    part = part / part.sum(-1, keepdim=True)
    s = torch.tensor([math.sqrt(8)] + [1.0] * 7)
    s = (s / s.sum()).expand(1, 3, 1, 8)
    for _ in range(4):
        s = s @ part
    second = s[0, :, 0, 1:].square().mean(0).sqrt()
    kept = sorted(alive[i + 1] for i in second.argsort(descending=True)[:4].tolist())
    assert method.reduce(site).representative[0].tolist() == [0, *kept]


def test_one_stage_alone():
    site = random_site(n=13)
    similar = tokred.ZeroTPrune(blocks=(0,), rho=1.0, r_s=4).reduce(site)
    assert similar.slots == 9
    important = tokred.ZeroTPrune(blocks=(0,), rho=0.5, r_s=0, T=(1, 1, 1)).reduce(site)
    assert important.slots == 7
    scores = tokred.ZeroTPrune(blocks=(0,), rho=0.5).importances(site, 1)
    best = scores.topk(6, 1).indices.sort(1).values + 1
    assert torch.equal(important.representative[:, 1:], best)
    assert tokred.ZeroTPrune(blocks=(0,), rho=1.0, r_s=0).reduce(site).trivial


@pytest.mark.parametrize(("r", "rho"), [(0, 0.5), (3, 0.6), (3, 1.0)])
def test_padding_changes_no_sample(r, rho):
    method = tokred.ZeroTPrune(blocks=(0,), rho=rho, r_s=r, T=(5, 5, 5))
    full = random_site(b=1, n=16, seed=5, prefix=1, suffix=1)
    lengths = [16, 12, 5, 3]
    mask = torch.zeros(4, 16, dtype=torch.bool)
    alone = []
    for i, length in enumerate(lengths):
        rows = torch.tensor([*range(length - 1), 15])
        mask[i, rows] = True
        one = tokred.Site(x=full.x[:, rows], q=full.q[:, :, rows], k=full.k[:, :, rows], prefix=1, suffix=1)
        alone.append(rows[method.reduce(one).representative[0]].tolist())
    x, q, k = (t.expand(4, *t.shape[1:]) for t in (full.x, full.q, full.k))
    step = method.reduce(tokred.Site(x=x, q=q, k=k, prefix=1, suffix=1, mask=mask))
    found = [row[real].tolist() for row, real in zip(step.representative, step.mask, strict=True)]
    assert found == alone
    assert step.slots == len(alone[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_equal_tokens_go_by_index(dtype):
    ones = torch.ones(1, 2, 9, 4, dtype=dtype)
    site = tokred.Site(x=torch.ones(1, 9, 3, dtype=dtype), q=ones, k=ones, prefix=1)
    step = tokred.ZeroTPrune(blocks=(0,), rho=0.5, r_s=2).reduce(site)
    # Patches 1 to 4 count as the more important half; of the others the first two go, then the last ones.
    assert step.representative.tolist() == [[0, 1, 2, 3]]


def test_a_gradient_is_no_hindrance():
    site = random_site()
    grown = tokred.Site(x=site.x, q=site.q.clone().requires_grad_(), k=site.k.clone().requires_grad_(), prefix=1)
    method = tokred.ZeroTPrune(blocks=(0,), rho=0.5, r_s=2)
    assert torch.equal(method.reduce(grown).representative, method.reduce(site).representative)


# ---------------------------------------------------------------- parameters


def test_places_retention_and_rounds_follow_the_depth():
    method = tokred.ZeroTPrune()
    acting = {i: method.stages(i, 12) for i in range(12) if method.stages(i, 12) != (1.0, 0)}
    assert acting == {0: (1.0, 10), 2: (0.9, 10), 5: (0.8, 10), 8: (0.7, 10), 10: (1.0, 10)}
    n, found = 197, []
    for layer in range(12):
        n = method.tokens(n, tokred.Place(layer=layer, depth=12, prefix=1))
        found.append(n)
    assert found == [187, 187, 160, 160, 160, 121, 121, 121, 78, 78, 68, 68]
    assert method.stages(0, 3) == (0.9, 10), "several on one block: the lowest retention"
    assert method.stages(0, 1) == (1.0, 0)
    one = tokred.ZeroTPrune(blocks=[4], rho=0.5, r_s=0)
    assert one.stages(4, 12) == (0.5, 0)
    assert one.stages(3, 12) == (1.0, 0)


@pytest.mark.parametrize(
    ("parameters", "match"),
    [
        ({"rho": 0}, r"rho \(the kept share\) must lie in \(0, 1\], got 0"),
        ({"rho": (0.5, 0.5)}, "rho has 2 entries for 5 blocks"),
        ({"blocks": (1,)}, "rho has 5 entries for 1 blocks"),
        ({"blocks": (-1,), "rho": 0.5}, "blocks must be non-negative"),
        ({"r_s": -1}, "r_s must be an integer of at least 0, got -1"),
        ({"r_s": 1.5}, "r_s must be an integer"),
        ({"T": (1, 2)}, "T must be three numbers"),
        ({"T": (1, 0, 1)}, "T and T_prime must be an integer of at least 1, got 0"),
        ({"T_prime": 0}, "T and T_prime must be an integer"),
        ({"v_min": 1.0}, "v_min and v_max must be 0 <= v_min <= v_max, got 1.0 and 0.7"),
        ({"cls_boost": 0}, "cls_boost must be a positive number or None, got 0"),
        ({"heads": "max"}, "heads is 'max'; allowed are 'concat', 'mean'"),
        ({"tolerance": -1}, "tolerance must not be negative"),
    ],
)
def test_bad_parameters_get_a_clear_error(parameters, match):
    with pytest.raises(ValueError, match=match):
        tokred.make("zero_tprune", **parameters)


def test_blocks_must_exist():
    with pytest.raises(ValueError, match="blocks names"):
        tokred.ZeroTPrune(blocks=(12,), rho=0.5).check(12)


# ---------------------------------------------------------------- in a model

FAMILIES = ["vit", "vit-mean", "vit-registers (DINOv2)", "vit-parallel-scaling", "eva02 (rope, swiglu)",
            "dinov3 (rope, registers)"]  # fmt: skip


def vit_of(**options):
    from tokred.adapters.tiny import timm as tables

    return tables.made(tables.FAMILIES["vit"], **options)


@pytest.fixture
def tiny():
    pytest.importorskip("timm")
    from tests.encoder import tiny_timm

    return tiny_timm


@pytest.mark.parametrize("family", FAMILIES)
def test_models(tiny, family):
    model, x = tiny.build(family), tiny.images()
    options = {"blocks": (0, 1), "rho": 0.8, "r_s": 2}
    with torch.no_grad():
        y = model(x)
        assert torch.equal(tokred.apply(model, "zero_tprune", blocks=(0, 1), rho=1.0, r_s=0)(x), y)
        tokred.apply(model, "zero_tprune", **options)
        z = model(x)
        layers = tokred.report(model).layers
        prefix = model.num_prefix_tokens
        assert [row.tokens_out - prefix for row in layers] == [19, 14, 14]
        assert [row.tokens_in - prefix for row in layers] == [25, 19, 14]
        counted = tokred.flops(model, "zero_tprune", (3, tiny.SIZE, tiny.SIZE), **options).tokens
        assert [row.tokens_out for row in layers] == counted
        for i in range(len(x)):
            torch.testing.assert_close(model(x[i : i + 1]), z[i : i + 1], rtol=1e-4, atol=2e-5)
        assert not torch.allclose(z, y)
        assert torch.equal(tokred.remove(model)(x), y)


def test_the_layer_stands_after_the_block(tiny):
    """Block 0 runs whole; what it returns is its output at the kept rows, chosen by its own attention."""
    model, x = tiny.build("vit"), tiny.images()
    with torch.no_grad():
        plain = model.blocks[0](model._pos_embed(model.patch_embed(x)))
        seen = []
        model.blocks[0].register_forward_hook(lambda m, a, o: seen.append(o))
        tokred.apply(model, "zero_tprune", blocks=(0,), rho=0.6, r_s=3)
        model(x)
    rows = tokred.trace(model).representative
    assert torch.equal(seen[0], plain.gather(1, rows.unsqueeze(-1).expand(-1, -1, 48)))


def test_the_class_token_is_known_from_the_host(tiny, monkeypatch):
    """Registers alone are no class token."""
    found, plain = [], tokred.ZeroTPrune.start
    monkeypatch.setattr(
        tokred.ZeroTPrune, "start", lambda self, site: found.append(site.class_token) or plain(self, site)
    )
    only_registers = vit_of(class_token=False, reg_tokens=2, global_pool="avg").eval()
    models = {"vit": True, "vit-mean": False, "vit-registers (DINOv2)": True, only_registers: False}
    for model, known in models.items():
        model = tiny.build(model) if isinstance(model, str) else model
        tokred.apply(model, "zero_tprune", blocks=(0,), rho=0.5)
        found.clear()
        with torch.no_grad():
            model(tiny.images())
        assert set(found) == {known}, model


def test_relative_positions_are_refused(tiny):
    with pytest.raises(tokred.MissingInputError, match="attention"):
        tokred.apply(tiny.build("beit (own bias)"), "zero_tprune")


def test_a_training_step_reaches_every_parameter(tiny):
    model, x = tiny.build("vit").train(), tiny.images()
    tokred.apply(model, "zero_tprune", blocks=(0, 1), rho=0.8, r_s=2)
    model(x).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.slow
def test_compiles_to_one_graph(tiny):
    torch._dynamo.reset()
    model = tiny.build("vit")
    tokred.apply(model, "zero_tprune", blocks=(0, 1), rho=0.8, r_s=2, T=(3, 2, 1))
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(tiny.images()), model(tiny.images()), rtol=1e-4, atol=1e-5)
