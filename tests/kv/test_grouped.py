"""StreamingTOM's memory: the card's example of four bits, which groups are attended to, and a language model."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import tokred
from tokred.adapters.tiny import kv as tiny
from tokred.kv import Grouped
from tokred.kv.stores import Query
from tokred.kv.stores.grouped import Codes

ROWS = torch.tensor([[0, 1], [0.3, 2], [1, 5], [0.52, 2.2]])


def test_worked_example():
    made = Codes.of(ROWS[None, None])
    both = torch.stack([made.codes & 15, made.codes >> 4], -1).flatten(2)
    assert both.view(4, 2).tolist() == [[0, 0], [5, 4], [15, 15], [8, 5]]
    expected = torch.tensor([[0, 1], [1 / 3, 2.0667], [1, 5], [0.5333, 2.3333]])
    torch.testing.assert_close(made.rows()[0, 0], expected, atol=5e-5, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_four_bits(dtype):
    """Half a step is lost at most, the ends of each channel are exact, and a constant channel is."""
    x = torch.randn(2, 3, 7, 5, generator=torch.Generator().manual_seed(0)).to(dtype)
    x[..., 2] = 1.5
    made = Codes.of(x)
    back = made.rows()
    assert back.dtype == dtype
    step = (x.amax(2) - x.amin(2)).float()[:, :, None] / 15
    slack = 0.5 + (1e-3 if dtype == torch.float32 else 0.1)
    assert bool(((back - x).abs().float() <= slack * step + 1e-6).all())
    for end in (torch.Tensor.amin, torch.Tensor.amax):
        assert torch.equal(end(back, 2), end(x, 2))
    assert torch.equal(back[..., 2], x[..., 2])
    assert made.codes.shape == (2, 3, 18)


def shelf(frames: int, g: torch.Generator, **given: int):
    """A shelf with two first rows and frames of three, and what went in."""
    made = Grouped(sinks=2, **given).open()
    keys, values = torch.randn(2, 1, 2, 2 + 3 * frames, 4, generator=g).unbind(0)
    for first, last in [(0, 2), *((2 + 3 * t, 5 + 3 * t) for t in range(frames))]:
        made.append(keys[:, :, first:last], values[:, :, first:last])
        made.settle(None)
    return made, keys, values


def padless(count: int) -> None:
    return None


def test_queries_attend_to_the_nearest_groups():
    g = torch.Generator().manual_seed(0)
    made, keys, _ = shelf(6, g, groups=2)
    q = torch.randn(1, 4, 3, 4, generator=g)
    means = keys[:, :, 2:].unflatten(2, (6, 3)).mean(3)
    near = F.cosine_similarity(q.view(1, 2, 2, 3, 1, 4), means[:, :, None, None], dim=-1).mean((1, 2, 3))
    best = near[0].argsort(descending=True)[:2].sort().values
    assert made.chosen(q)[0].tolist() == best.tolist()
    new = torch.randn(2, 1, 2, 3, 4, generator=g)
    made.append(*new)
    found = made.attend(Query(q, None, None, padless))
    rows = torch.cat([torch.arange(2), *(torch.arange(2 + 3 * i, 5 + 3 * i) for i in best.tolist())])
    k, v = (torch.cat([x[:, :, rows], n], 2) for x, n in zip((made.keys, made.values), new, strict=True))
    seen = torch.arange(11) <= torch.arange(8, 11)[:, None]
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=seen, enable_gqa=True)
    torch.testing.assert_close(found, expected)
    assert torch.equal(made.keys[:, :, :2], keys[:, :, :2]), "the first rows are not rounded"


def test_the_oldest_group_leaves():
    made, keys, _ = shelf(6, torch.Generator().manual_seed(1), groups=2, most=4)
    assert made.width == 2 + 4 * 3
    assert made.moved
    assert made.positions(20)[0, 0].tolist() == [0, 1, *range(8, 20)]
    torch.testing.assert_close(made.keys[:, :, 2:].amax((2, 3)), keys[:, :, 8:].amax((2, 3)))


def test_a_question_is_part_of_no_group():
    made, _, _ = shelf(2, torch.Generator().manual_seed(2), groups=2)
    before = made.snapshot()
    made.ask()
    made.append(*torch.randn(2, 1, 2, 5, 4))
    made.settle(None)
    assert made.newest[0].shape[2] == 5
    made.restore(before)
    assert not made.asked
    assert made.width == 8


def test_single_tokens_wait_for_a_frame_or_for_enough_of_them():
    for given, left in (({}, 3), ({"group": 2}, 1)):
        made, _, _ = shelf(1, torch.Generator().manual_seed(3), groups=2, **given)
        for _ in range(3 if not given else 2):
            made.append(*torch.randn(2, 1, 2, 1, 4))
            made.settle(None)
        assert made._tail[0].shape[2] == left


@torch.no_grad()
def test_all_groups_are_the_dense_model_up_to_rounding():
    model, ids = tiny.build("llama"), tiny.prompt(40)
    expected = model(ids).logits[:, -8:]
    tokred.apply(model, "streamingtom_cache", groups=99, sinks=2)
    cache = tokred.kv_cache(model)
    for first in range(0, 32, 8):
        model(ids[:, first : first + 8], **tokred.cache_kwargs(cache))
    found = model(ids[:, 32:], **tokred.cache_kwargs(cache)).logits
    assert cache.get_seq_length() == 40
    near = F.cosine_similarity(found, expected, dim=-1)
    assert bool((near > 0.98).all()), near
    assert not torch.allclose(found, expected, atol=1e-5)


def test_batches_generate():
    """Samples choose groups of their own; one in a batch is one alone."""
    model, ids = tiny.build("llama"), torch.cat([tiny.prompt(24), tiny.prompt(24).flip(1)])
    tokred.apply(model, "streamingtom_cache", groups=2, group=4, sinks=2)
    whole = model.generate(ids, max_new_tokens=5, do_sample=False)
    for i in range(2):
        assert model.generate(ids[i : i + 1], max_new_tokens=5, do_sample=False)[0].tolist() == whole[i].tolist()
    rows = tokred.report(model).layers[0]
    assert rows.rows == rows.seen


@pytest.mark.parametrize("given", [{"groups": 0}, {"group": 0}, {"sinks": -1}, {"most": 0}])
def test_bad_parameters(given):
    with pytest.raises(ValueError, match=f"{next(iter(given))} must be"):
        tokred.make("streamingtom_cache", **given)
