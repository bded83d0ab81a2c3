"""RDKV: bits shared out written out, the store that holds them, and plain eviction as what is left without codes."""

from __future__ import annotations

import pytest
import torch

import tokred
from tests.kv.test_stores import near, rows
from tokred.kv import CacheSite, Water, WindowSum, Zones
from tokred.kv.budgets.water import KEYS, VALUES, hull, water
from tokred.kv.stores.zones import BITS, CHANNELS, Chunk

WORTH = torch.tensor([8, 4, 2, 1, 0.5, 0.1])


pytestmark = pytest.mark.usefixtures("no_grad")


def cost(bits: torch.Tensor) -> float:
    left = {0: 1.0, **dict(VALUES)}
    return sum(s * left[b] for s, b in zip(WORTH.tolist(), bits.tolist(), strict=True))


# ---------------------------------------------------------------- bits


@pytest.mark.parametrize(
    ("mean", "bits", "error"),
    [
        (1, [4, 2, 0, 0, 0, 0], 4.9584),
        (2, [4, 4, 2, 2, 0, 0], 1.7016),
        (4, [4, 4, 4, 4, 4, 2], 0.2451),
        (8, [8] * 6, None),
    ],
)
def test_bits_written_out(mean, bits, error):
    found = water(WORTH, VALUES, torch.tensor([6 * mean]))
    assert found.tolist() == bits
    if error is not None:
        assert cost(found) == pytest.approx(error, abs=1e-4)
    assert torch.equal(water(1000 * WORTH, VALUES, torch.tensor([6 * mean])), found), "a factor changes nothing"


def test_bits_of_many():
    worth = torch.rand(3, 2, 40, generator=torch.Generator().manual_seed(0))
    for mean in (0.5, 3, 7, 15.9, 16):
        bits = water(worth, VALUES, torch.full((3, 2, 1), mean * 40))
        assert (bits.sum(-1) <= mean * 40).all(), "never over"
        assert (bits.sum(-1) > mean * 40 - 8).all()
        ranked = bits.gather(-1, worth.argsort(-1, descending=True))
        assert (ranked.diff(dim=-1) <= 0).all(), "more for what is worth more"
    assert (bits == 16).all()
    hidden = water(torch.where(worth < 0.5, -1.0, worth), VALUES, torch.full((3, 2, 1), 999))
    assert torch.equal(hidden == 0, worth < 0.5)
    assert water(torch.ones(4), VALUES, torch.tensor([5])).tolist() == [2, 2, 0, 0], "of equals the first"


def test_a_table_with_a_bump_is_passed_over():
    assert [step[:2] for step in hull(VALUES)] == [(0, 2), (2, 4), (4, 8), (8, 16)]
    assert [step[2] for step in hull(VALUES)] == pytest.approx([0.344, 0.1491, 0.003438, 6e-6], abs=1e-6)
    assert [step[:2] for step in hull(((2, 0.9), (4, 0.1), (8, 0.0)))] == [(0, 4), (4, 8)]
    assert [step[:2] for step in hull(KEYS)] == [(0, 2), (2, 4), (4, 8)]


def test_how_many_bits_a_head_has():
    """1024 rows of 8192: two bits a value; where 2048 rows stay, eight a channel."""
    budget = Water(1024, v_table=((8, 0.01),))
    q, k = torch.randn(1, 2, 4, 8), torch.randn(1, 1, 8192, 8)
    site = CacheSite(q=q, k=k, v=k)
    kept = budget.heads(site, torch.rand(1, 1, 8192), None, (1024,))
    assert kept.tolist() == [[2048]]
    assert site.rows[BITS].mean() == 2
    assert (site.notes[CHANNELS] == 8).all()


def test_who_is_never_evicted_is_paid_first():
    guard = torch.zeros(1, 1, 40, dtype=torch.bool)
    guard[..., :3] = True
    k = torch.randn(1, 1, 40, 8)
    site = CacheSite(q=k, k=k, v=k)
    score = torch.arange(40.0).view(1, 1, 40)
    Water(8).heads(site, score, guard, (8,))
    bits = site.rows[BITS][0, 0]
    assert (bits[:3] == 16).all()
    assert bits.sum() <= 16 * 8
    assert bits[3:].sum() <= 16 * 5
    assert torch.equal(bits[3:].sort().values, bits[3:])


def test_channels_by_queries_and_keys():
    k, q = torch.randn(2, 2, 9, 4), torch.randn(2, 4, 9, 4)
    found = Water(window=3).channels(CacheSite(q=q, k=k, v=k))
    wanted = q[:, :, -3:].square().mean(2).view(2, 2, 2, 4).mean(2) * k.square().mean(2)
    assert near(found, wanted, 1e-6)


def test_averages_are_mirrored_at_the_ends():
    x = torch.tensor([[[1.0, 2, 4, 8, 16]]])
    assert WindowSum(1, 3)._averaged(x).flatten().tolist() == pytest.approx([5 / 3, 7 / 3, 14 / 3, 28 / 3, 32 / 3])
    assert WindowSum(1, 5)._averaged(x[..., :1]).tolist() == [[[1]]]


# ---------------------------------------------------------------- the store


def test_numbers_of_every_level_come_back():
    k, v = torch.randn(3, 20, 8), torch.randn(3, 20, 6)
    some = torch.Generator().manual_seed(0)
    levels = torch.tensor([0, 2, 4, 8, 16])
    r, c = levels[torch.randint(0, 5, (3, 20), generator=some)], levels[torch.randint(0, 5, (3, 8), generator=some)]
    chunk = Chunk.of(k, v, r, c)
    keys, values = (chunk.restored(i, torch.float32) for i in (0, 1))
    real, there = (r > 0)[..., None], (c > 0)[:, None]
    assert not values[~real.expand_as(values)].any()
    assert not keys[~(real & there).expand_as(keys)].any()
    assert torch.equal(values[r == 16], v[r == 16])
    whole = real & (c == 16)[:, None]
    assert torch.equal(keys[whole], k[whole])
    for bits, most in ((8, 0.02), (4, 0.25), (2, 1.2)):
        assert (values - v)[r == bits].abs().max() < most
        mask = real & (c == bits)[:, None]
        assert (keys - k)[mask].abs().max() < most
    held = sum(t.nbytes for t in (*chunk.keys.codes, *chunk.values.codes))
    numbers = sum(int((r == b).sum()) * 6 * b + int((real & (c == b)[:, None]).sum()) * b for b in (2, 4, 8))
    assert numbers / 8 <= held <= numbers / 8 + 6


def filled(store: Zones, n: int, bits: torch.Tensor, channels: torch.Tensor):
    shelf, (k, v) = store.open(), rows(n)
    shelf.append(k, v)
    site = CacheSite(q=k, k=k, v=v, rows={BITS: bits.expand(k.shape[:3]).float()})
    site.notes[CHANNELS] = channels.expand(k.shape[0], k.shape[1], k.shape[3])
    shelf.settle(site)
    return shelf, k, v


def test_later_rows_are_rounded_when_as_many_newer_ones_stand_behind_them():
    shelf, k, _ = filled(Zones(later=8, block=3), 9, torch.tensor(8), torch.tensor(8))
    assert (len(shelf._chunks), shelf._tail[0].count) == (1, 0)
    for i in range(7):
        shelf.append(*rows(1, i))
        shelf.settle(None)
        assert (len(shelf._chunks), shelf._tail[0].count) == ((1, i + 1) if i < 5 else (2, i - 2))
    assert shelf.width == 16
    assert near(shelf.keys[:, :, :9], k, 0.05)
    kept, whole = shelf.snapshot(), shelf.keys
    for count in (2, 4, 7):
        shelf.crop(count)
        assert torch.equal(shelf.keys, whole[:, :, : 16 - count])
        shelf.restore(kept)
    index = torch.tensor([1, 1])
    shelf.select(index, index.tolist)
    assert torch.equal(shelf.keys, whole[index])


def test_prompts_that_fit_are_not_rounded():
    shelf, k, _ = filled(Zones(block=1), 9, torch.tensor(16), torch.tensor(16))
    shelf.append(*rows(5, 1))
    shelf.settle(None)
    assert shelf.complete
    assert torch.equal(shelf.keys[:, :, :9], k)


# ---------------------------------------------------------------- models


class TestModel:
    """A tiny Llama."""

    @pytest.fixture
    def model(self):
        pytest.importorskip("transformers")
        from tests.kv.tiny import build

        return build("llama")

    def test_without_codes_it_is_plain_eviction(self, model):
        from tests.kv.test_store_models import LOGITS, padded

        ids, mask, _ = padded((29, 17))
        found = []
        exact = Water(9, v_table=((16, 0.0),), k_table=((16, 0.0),), window=4)
        plain = tokred.KVPolicy(score=WindowSum(4, 3), budget=9, store="rectangle")
        for policy in (tokred.RDKV(budget=exact, window=4, pool=3), plain):
            tokred.apply(model, policy)
            found.append(model.generate(ids, attention_mask=mask, **LOGITS).logits)
        assert all((a - b).abs().max() < 2e-5 for a, b in zip(*found, strict=True))

    def test_codes_hold_more_rows_in_fewer_bytes_and_their_error_is_small(self, model):
        from tests.kv.test_store_models import LOGITS, prompt

        ids = prompt(200)
        plain = model.generate(ids, **LOGITS).logits
        tokred.apply(model, "rdkv", budget=100, window=8, pool=3)
        gap = max((a - b).abs().max().item() for a, b in zip(model.generate(ids, **LOGITS).logits, plain, strict=True))
        cache = tokred.kv_cache(model)
        model(ids, past_key_values=cache)
        assert gap < 0.5
        for row, layer in zip(cache.layer_rows(), cache.layers, strict=True):
            assert 100 < row.rows == -(-int((layer.positions < 200).sum()) // 2) <= layer.width, (
                "empty rows do not count"
            )
        assert cache.nbytes < 0.5 * sum(row.dense_bytes for row in cache.layer_rows())

    def test_beams_turns_drafts_and_padding(self, model):
        from tests.kv.test_store_models import GREEDY, course, padded, prompt

        tokred.apply(model, "rdkv", budget=9, window=4, pool=3, store=Zones(block=2))
        ids, mask, alone = padded((29, 17))
        together = course(model, tokred.kv_cache(model), ids, mask, lambda cache: None)
        for i, one in enumerate(alone):
            apart = tokred.kv_cache(model)
            wanted = model(one, past_key_values=apart).logits[:, -1]
            assert near(together[0][i, -1], wanted[0], 1e-4)
            tokens = prompt(1, 2, seed=31)[i : i + 1]
            # Positions are counted with padding here, and keys that are turned otherwise are rounded otherwise.
            assert near(together[1][i, -1], model(tokens, past_key_values=apart).logits[0, -1], 2e-2)
        assert model.generate(ids, attention_mask=mask, num_beams=3, **GREEDY).shape == (2, 35)
        assert model.generate(prompt(6).repeat(1, 4), prompt_lookup_num_tokens=3, **GREEDY).shape == (1, 30)

    def test_what_cannot_go_together_is_refused(self, model):
        cases = {
            "needs a store that can hold every row in the bits": lambda: tokred.apply(
                model, "rdkv", budget=40, store="kivi"
            ),
            "and 'uniform' says none": lambda: tokred.apply(model, "snapkv", budget=9, window=4, store="zones"),
            "at other times too": lambda: tokred.apply(
                model, tokred.KVPolicy(score="key_norm", budget=Water(9), when=tokred.kv.When(every=2), store="zones")
            ),
            "give a share": lambda: tokred.RDKV(budget="1 MiB"),
            "k_share": lambda: Water(9, k_share=1.0),
            "pairs of bits": lambda: Water(9, v_table=((3, 0.1),)),
            "later must be one of": lambda: Zones(later=3),
        }
        for message, make in cases.items():
            with pytest.raises(ValueError, match=message):
                make()
