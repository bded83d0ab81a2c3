"""PyramidDrop and FastV: the cards' numbers and selections, and the law on a model."""

from __future__ import annotations

import pytest
import torch

import tokred
from tokred.core.attention import Attention
from tokred.methods.vlm.fastv import FastV
from tokred.methods.vlm.pyramiddrop import PyramidDrop
from tokred.vlm.in_llm import LayerSite


def heads_of(rows):
    """Attention whose last row gives these shares, ``(H, N)``: keys are the logs, the query is one."""
    k = rows.log()[None, :, :, None]
    return Attention(torch.ones(1, rows.shape[0], rows.shape[1], 1), k, scale=1.0, causal=True)


def test_counts():
    assert PyramidDrop().counts(576) == (576, 288, 144, 72)
    assert PyramidDrop().counts(577) == (577, 288, 144, 72)
    assert PyramidDrop().boundaries(32) == (8, 16, 24)
    assert PyramidDrop().boundaries(28) == (7, 14, 21)
    assert sum(c * 8 for c in PyramidDrop().counts(576)) / 32 == 270.0
    assert sum(c * 7 for c in PyramidDrop().counts(1000)) / 28 == 468.75
    assert FastV().left(5) == 2
    assert FastV().left(7) == 4
    assert (3 * 576 + 29 * FastV(layer=3).left(576)) / 32 == 315


def test_fastv_selection_and_ties():
    rows = torch.tensor([[0.1, 0.2, 0.05, 0.15, 0.3, 0.2], [0.1, 0.1, 0.25, 0.05, 0.2, 0.3]])
    visual = torch.tensor([[False, True, True, True, True, False]])
    site = LayerSite(x=torch.zeros(1, 6, 2), visual=visual, before=heads_of(rows), layer=2, depth=4)
    torch.testing.assert_close(
        site.row_scores(1, of="before")[0, 1:5], torch.tensor([0.15, 0.15, 0.10, 0.25]), rtol=1e-5, atol=1e-6
    )
    # A tie up to rounding is no tie: the scores of the card, exactly.
    exact = torch.tensor([[0, 0.15, 0.15, 0.10, 0.25, 0]])
    assert site.keep_visual(site.best_visual(exact, 2)).representative.tolist() == [[0, 1, 4, 5]]


def test_pyramiddrop_score_and_composition():
    keys = torch.tensor([[1.0, 0], [0, 1], [2, 0], [1, 1], [0.5, 0], [0, 0]])[None, None]
    queries = torch.tensor([1.0, 0]).expand(1, 1, 6, 2)
    visual = torch.tensor([[False, True, True, True, True, False]])
    own = Attention(queries, keys, causal=True)
    site = LayerSite(x=torch.zeros(1, 6, 2), visual=visual, own=own, layer=1, depth=2)
    expected = torch.tensor([0.1749, 0.0863, 0.3548, 0.1749, 0.1228, 0.0863])
    torch.testing.assert_close(site.row_scores(1)[0], expected, rtol=1e-3, atol=1e-4)
    step = PyramidDrop(layers=(1,), ratios=(0.5,)).reduce(site)
    assert step.representative.tolist() == [[0, 2, 3, 5]]


def test_grouped_heads_average_like_repeated_ones():
    g = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 4, 7, 8, generator=g), torch.randn(2, 2, 7, 8, generator=g)
    visual = torch.ones(2, 7, dtype=torch.bool)
    one, two = (Attention(q, x, causal=True) for x in (k, k.repeat_interleave(2, 1)))
    one, two = (LayerSite(x=torch.zeros(2, 7, 2), visual=visual, own=own).row_scores(1) for own in (one, two))
    torch.testing.assert_close(one, two)
    logits = q[:, :, -1:] @ k.repeat_interleave(2, 1).mT / 8**0.5
    torch.testing.assert_close(one, logits.softmax(-1).mean(1)[:, 0])


def test_rows_by_weight():
    g = torch.Generator().manual_seed(0)
    q, k = torch.randn(1, 2, 7, 8, generator=g), torch.randn(1, 2, 7, 8, generator=g)
    site = LayerSite(x=torch.zeros(1, 7, 2), own=Attention(q, k, causal=True))
    causal = torch.ones(7, 7).tril().bool()
    maps = (q @ k.mT / 8**0.5).masked_fill(~causal, -torch.inf).softmax(-1)
    chosen = torch.tensor([[False, False, True, False, True, True, False]])
    torch.testing.assert_close(site.row_scores(chosen), maps[:, :, [2, 4, 5]].mean(2).mean(1))
    torch.testing.assert_close(site.row_scores(3, heads="none"), maps[:, :, 4:].mean(2))
    with pytest.raises(ValueError, match="no token"):
        site.row_scores(torch.zeros(1, 7))


def test_the_attention_of_a_decoder_layer_is_its_own_and_causal():
    g = torch.Generator().manual_seed(0)
    q, k = torch.randn(1, 2, 7, 8, generator=g), torch.randn(1, 2, 10, 8, generator=g)
    own = Attention(q, k, causal=True, window=6)
    site = LayerSite(x=torch.zeros(1, 7, 2), own=lambda: own, before=Attention(q, q))
    assert site.attention is own
    torch.testing.assert_close(site.row_scores(1, heads="none"), own.columns(rows=slice(6, 7))[..., 3:])
    with pytest.raises(ValueError, match=r"causal: make 'before' with Attention\(\.\.\., causal=True\)"):
        site.row_scores(1, of="before")
    with pytest.raises(TypeError, match="attention"):  # it is called own here
        LayerSite(x=torch.zeros(1, 7, 2), attention=own)


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: PyramidDrop(ratios=(0.25, 0.5)), "increase"),
        (lambda: PyramidDrop(ratios=()), "ratios"),
        (lambda: PyramidDrop(layers=(4, 2), ratios=(0.5, 0.25)), "increase"),
        (lambda: PyramidDrop(layers=(4,), ratios=(0.5, 0.25)), "as many"),
        (lambda: PyramidDrop(layers=(0,), ratios=(0.5,)), "at least 1"),
        (lambda: PyramidDrop().check(3), "at least 4"),
        (lambda: FastV(layer=0), "at least 1"),
        (lambda: FastV(ratio=1.0), "ratio"),
        (lambda: FastV(query="first"), "query"),
    ],
)
def test_bad_parameters(make, match):
    with pytest.raises(ValueError, match=match):
        make()


def test_pyramiddrop_on_a_model():
    pytest.importorskip("transformers")
    from tests.vlm import oracle, tiny

    model = tiny.llava()
    layers = model.model.language_model.layers
    batch = tiny.prompts([[3, "image", 5], [2, "image", 1, "image", 4], [9]])
    for method in (PyramidDrop(), PyramidDrop(layers=(2,), ratios=(0.4,), per_image=True)):
        _, keeps = oracle.agree(model, layers, method, batch, num_beams=2)
        last = keeps[max(keeps)] & (batch["input_ids"] == tiny.IMAGE).repeat_interleave(2, 0)
        share = method.ratios[-1]
        assert last.sum(1)[::2].tolist() == [int(16 * share), 2 * int(16 * share), 0]
    with tokred.applied(model, PyramidDrop()):
        out = model(**batch, use_cache=True)
        assert [row.visual for row in tokred.report(model).layers] == [(16, 32, 0), (8, 16, 0), (4, 8, 0), (2, 4, 0)]
        assert out.past_key_values.get_seq_length() == batch["input_ids"].shape[1]
    stock = model(**batch).logits
    with tokred.applied(model, PyramidDrop(ratios=(1.0, 1.0, 1.0))):
        assert torch.equal(model(**batch).logits, stock)
