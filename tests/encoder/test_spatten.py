"""SpAtten: the card's worked examples and laws, and the method on small models."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import tokred
from tests.encoder.attention_matrices import matrix_site
from tokred.adapters.encoder.host import shared_of
from tokred.methods.encoder.spatten import ANSWERED, RECEIVED, codes, is_flat, keep_share, leading_bits, local_values

FIRST = [[0.5, 0.3, 0.1, 0.1], [0.2, 0.5, 0.2, 0.1], [0.1, 0.2, 0.6, 0.1], [0.25, 0.25, 0.25, 0.25]]
SECOND = [[0.10, 0.30, 0.60], [0.15, 0.20, 0.65], [0.50, 0.10, 0.40]]


def method(keep: float, **more) -> tokred.SpAtten:
    """Prunes after every layer, with a share that falls linearly."""
    return tokred.SpAtten(keep=keep, first=0, **more)


def kept(found: tokred.Reduction) -> list[list[int]]:
    mask = torch.ones_like(found.representative, dtype=torch.bool) if found.mask is None else found.mask
    return [row[m].tolist() for row, m in zip(found.representative, mask, strict=True)]


# ---------------------------------------------------------------- worked examples


def test_cascade():
    both = method(0.5)  # of four tokens: three after the first of two layers, two after the second
    one = matrix_site(FIRST, depth=2)
    step = both.reduce(one)
    assert one.rows[RECEIVED][0].tolist() == pytest.approx([1.05, 1.25, 1.15, 0.55], abs=1e-6)
    assert kept(step) == [[0, 1, 2]]
    carried = {RECEIVED: one.rows[RECEIVED].gather(1, step.representative)}
    two = matrix_site(SECOND, layer=1, depth=2, length=4, rows=dict(carried))
    step = both.reduce(two)
    assert two.rows[RECEIVED][0].tolist() == pytest.approx([1.80, 1.85, 2.80], abs=1e-6)
    assert kept(step) == [[1, 2]]
    local = matrix_site(SECOND, layer=1, depth=2, length=4)
    assert kept(both.reduce(local)) == [[0, 2]], "this layer alone would choose otherwise"


def test_heads():
    answers = torch.zeros(1, 3, 2, 2)
    answers[0, 0, 0], answers[0, 1, 1, 0], answers[0, 2, 1] = torch.tensor([-2.0, 4.0]), -1.2, torch.tensor([3.0, -3.0])
    even = [[[0.5, 0.5], [0.5, 0.5]]] * 3
    here = matrix_site(*even, depth=1, answers=answers)
    method(1.0, heads=2).reduce(here)
    assert here.notes[ANSWERED][0].tolist() == pytest.approx([6.0, 1.2, 6.0])
    assert here.alive.tolist() == [[True, False, True]]


def test_schedule():
    found = [keep_share(0.5, None, layer, 12) for layer in range(12)]
    expected = [1, 1, 1, 0.9444, 0.8889, 0.8333, 0.7778, 0.7222, 0.6667, 0.6111, 0.5556, 0.5]
    assert found == pytest.approx(expected, abs=5e-5)
    assert keep_share(0.001, 0, 3, 4) == 0.01
    assert keep_share(0.5, None, 23, 24) == 0.5
    assert [keep_share(0.5, None, layer, 24) for layer in (3, 4)] == [1.0, 1 - 0.5 / 20]


def test_bits():
    x = torch.tensor([0.7, -0.33, 0.12], dtype=torch.float64)
    code, scale = codes(x, 12)
    assert code.tolist() == [2047, -965, 351]
    assert float(scale) == pytest.approx(0.7 / 2047)
    assert (code >> 4).tolist() == [127, -61, 21]
    coarse, whole = leading_bits(code, scale, 4), leading_bits(code, scale, 0)
    assert coarse.tolist() == pytest.approx([0.6949, -0.3338, 0.1149], abs=5e-5)
    assert whole.tolist() == pytest.approx([0.7000, -0.3300, 0.1200], abs=5e-5)
    assert (coarse - whole).abs().max() < scale * 2**4


def test_local_values():
    p = torch.tensor([0.05, 0.40, 0.02, 0.30, 0.23])
    found = local_values(p, 0.6)
    assert found.nonzero().flatten().tolist() == [1, 3, 4]
    assert float(found.sum()) == pytest.approx(0.93)
    assert torch.equal(local_values(p, 1.0), p)
    assert local_values(torch.full((2, 4), 0.25), 0.5).bool().tolist() == [[True, True, False, False]] * 2


def test_rows_are_fetched_again_where_the_attention_is_flat():
    p = torch.tensor([[0.04] * 25, [0.5] + [0.5 / 24] * 24])
    assert is_flat(p).tolist() == [True, False]
    assert not is_flat(p, 0).any()
    assert is_flat(p, 1.01).all()


# ---------------------------------------------------------------- laws


@given(st.integers(2, 9), st.integers(1, 3), st.integers(0, 10_000))
@settings(max_examples=30, deadline=None)
def test_a_layer_gives_every_query_of_every_head(n, h, seed):
    a = torch.rand(1, h, n, n, generator=torch.Generator().manual_seed(seed)).softmax(-1)
    here = matrix_site(*a[0].tolist(), layer=0, depth=4)
    method(0.5).reduce(here)
    assert float(here.rows[RECEIVED].sum()) == pytest.approx(h * n, rel=1e-4)


def test_ties_keep_the_lower_token_and_head():
    even = [[[0.25] * 4] * 4] * 4
    here = matrix_site(*even, depth=1, answers=torch.ones(1, 4, 4, 2))
    assert kept(method(0.5, heads=2).reduce(here)) == [[0, 1]]
    assert here.alive.tolist() == [[True, True, False, False]]


def test_protected_tokens_stay_and_count():
    shunned = [[[0.01, 0.33, 0.33, 0.33]] * 4]
    assert kept(method(0.5).reduce(matrix_site(*shunned, depth=1, prefix=1))) == [[0, 1]]
    assert kept(method(0.5).reduce(matrix_site(*shunned, depth=1, prefix=1, suffix=1))) == [[0, 3]]
    assert kept(method(0.01).reduce(matrix_site(*shunned, depth=1, prefix=1, suffix=1))) == [[0, 3]]
    assert kept(method(0.01).reduce(matrix_site(*shunned, depth=1))) == [[1]]


def test_padding_receives_nothing_and_gives_nothing():
    wide = torch.rand(1, 2, 5, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    wide /= wide.sum(-1, keepdim=True)
    small = wide[:, :, :3, :3] / wide[:, :, :3, :3].sum(-1, keepdim=True)
    mask, totals = torch.tensor([[True, True, True, False, False]]), torch.tensor([3])
    answers = torch.randn(1, 2, 5, 2)
    padded = matrix_site(*wide[0].tolist(), depth=1, mask=mask, totals=totals, answers=answers)
    alone = matrix_site(*small[0].tolist(), depth=1, answers=answers[:, :, :3])
    one = method(0.6, heads=1)
    assert kept(one.reduce(padded)) == kept(one.reduce(alone))
    assert torch.allclose(padded.rows[RECEIVED][:, :3], alone.rows[RECEIVED], atol=1e-5)
    assert torch.allclose(padded.notes[ANSWERED], alone.notes[ANSWERED])
    assert torch.equal(padded.alive, alone.alive)


def test_only_surviving_heads_vote():
    one, two = [[0.9, 0.1], [0.9, 0.1]], [[0.2, 0.8], [0.2, 0.8]]
    here = matrix_site(one, two, depth=2, layer=0, alive=torch.tensor([[False, True]]))
    method(0.5).reduce(here)
    assert here.rows[RECEIVED][0].tolist() == pytest.approx([0.4, 1.6])


def test_heads_never_return_and_their_number_follows_the_schedule():
    two = method(1.0, heads=0.5)
    assert [two.heads_left(4, layer, 4) for layer in range(4)] == [4, 3, 3, 2]
    assert [tokred.SpAtten(heads=2).heads_left(8, layer, 12) for layer in (0, 3, 11)] == [8, 8, 2]
    assert [tokred.SpAtten(heads=[4, 2, 3]).heads_left(8, layer, 3) for layer in range(3)] == [4, 2, 2]
    even = [[[0.5, 0.5], [0.5, 0.5]]] * 2
    strong = torch.tensor([[[[9.0]], [[0.1]]]]).expand(1, 2, 2, 1)
    here = matrix_site(*even, depth=2, layer=1, answers=strong, alive=torch.tensor([[False, True]]))
    method(1.0, heads=[1, 1]).reduce(here)
    assert here.alive.tolist() == [[False, True]]


def test_refusals():
    with pytest.raises(ValueError, match="keep"):
        tokred.SpAtten(keep=0.0)
    with pytest.raises(ValueError, match="heads must be None, a share"):
        tokred.SpAtten(heads=0)
    with pytest.raises(ValueError, match=r"heads \(as a share\)"):
        tokred.SpAtten(heads=1.5)
    with pytest.raises(ValueError, match="first must be an integer"):
        tokred.SpAtten(first=-1)
    with pytest.raises(ValueError, match="heads has 2 entries, but the model has 12"):
        tokred.SpAtten(heads=[4, 2]).check(12)
    assert tokred.from_dict(tokred.SpAtten(0.3, heads=[4, 2]).to_dict()) == tokred.SpAtten(0.3, heads=(4, 2))


# ---------------------------------------------------------------- in models


@pytest.fixture(scope="module")
def vit():
    from tests.encoder.tiny_timm import build, images

    return build("vit"), images()


def test_nothing_to_remove_is_bit_equal(vit):
    model, x = vit
    with torch.no_grad():
        y = model(x)
        for options in ({"keep": 1.0}, {"keep": 1.0, "heads": 1.0}):
            tokred.apply(model, "spatten", **options)
            assert torch.equal(model(x), y)
    tokred.remove(model)


def test_tokens_are_nested_and_as_many_as_the_schedule_says(vit):
    model, x = vit
    tokred.apply(model, "spatten", keep=0.4, first=0, heads=1)
    with torch.no_grad():
        y = model(x)
        counts = [layer.tokens_out for layer in tokred.report(model).layers]
        depth, n = len(model.blocks), model.patch_embed.num_patches + 1
        assert counts == [math.ceil(round(n * keep_share(0.4, 0, layer, depth), 9)) for layer in range(depth)]
        for i in range(len(x)):
            torch.testing.assert_close(model(x[i : i + 1]), y[i : i + 1], rtol=1e-4, atol=2e-5)
    tokred.remove(model)


def test_a_pruned_head_adds_nothing(vit):
    """The same as the model whose output projection does not read those heads."""
    model, x = vit
    depth, heads = len(model.blocks), model.blocks[0].attn.num_heads
    tokred.apply(model, "spatten", keep=1.0, heads=[1] * depth)
    shared = shared_of(model)[0][2]
    with torch.no_grad():
        y = model(x[:1])
        alive = shared.records[0].state.heads[0]
        assert int(alive.sum()) == 1
        assert all(torch.equal(record.state.heads[0], alive) for record in shared.records.values())
        cut = copy.deepcopy(tokred.remove(model))
        for block in cut.blocks[1:]:
            weight = block.attn.proj.weight.view(block.attn.proj.weight.shape[0], heads, -1)
            weight.mul_(alive[None, :, None])
        torch.testing.assert_close(y, cut(x[:1]), rtol=1e-4, atol=2e-5)


def test_hosts_that_show_no_heads_run_without_head_pruning():
    pytest.importorskip("open_clip")
    from tests.encoder.tiny_open_clip import FAMILIES, build, inputs

    family = next(iter(FAMILIES))
    model = build(family)
    with pytest.raises(tokred.MissingInputError, match="heads"):
        tokred.apply(model, "spatten", keep=0.5, first=0, heads=1)
    tokred.apply(model, "spatten", keep=0.5, first=0)
    with torch.no_grad():
        model(*inputs(family, 2))
    assert tokred.report(model).layers[-1].tokens_out < tokred.report(model).layers[0].tokens_in
