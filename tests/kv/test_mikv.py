"""MiKV: which rows are rounded, by what attention, and how keys are balanced."""

from __future__ import annotations

import pytest
import torch

import tokred
from tests.kv.test_stores import D, Plain, near, rows, same, some_step, take
from tokred.kv import CacheSite, MiKV
from tokred.kv.stores.codecs import Affine
from tokred.kv.stores.mikv import Balanced, MiKVShelf


@pytest.fixture(autouse=True)
def plain_torch(monkeypatch):
    monkeypatch.setenv("TOKRED_KERNELS", "torch")
    with torch.no_grad():
        yield


def full(shelf: MiKVShelf) -> list[int]:
    """Slots of the first head that are in full precision, of a cache that has lost none."""
    encoded = shelf._sides[0].encoded
    return [i for i, place in enumerate(shelf._index[0, 0].tolist()) if place >= encoded]


def test_a_balanced_key_written_out():
    k = torch.tensor([0.5, -1, 4, 0.25]).view(1, 1, 1, 4)
    q = torch.tensor([4.0, 1, 1, 0.25])
    plain = Affine(2, 4)
    codes, scale, zero = parts = plain.encode(k, None)
    assert codes.item() == 1 + (0 << 2) + (3 << 4) + (1 << 6)
    assert (zero.item(), scale.item()) == (-1, pytest.approx(1.666667, abs=1e-3))
    assert plain.decode(parts, torch.float32).flatten().tolist() == pytest.approx([0.666667, -1, 4, 0.666667], abs=4e-3)
    factors = torch.tensor([2.0, 1, 0.5, 0.5]).view(1, 1, 1, 4)
    code = Balanced(plain, factors)
    codes, scale, zero = parts = code.encode(k, None)
    assert codes.item() == 2 + (0 << 2) + (3 << 4) + (1 << 6)
    restored = code.decode(parts, torch.float32)
    assert restored.flatten().tolist() == [0.5, -1, 4, 0]
    assert (k.flatten() @ q).item() == 5.0625
    assert (plain.decode(plain.encode(k, None), torch.float32).flatten() @ q).item() == pytest.approx(
        5.833333, abs=2e-2
    )
    assert code.scores(q.view(1, 1, 1, 4), parts).item() == 5.0


def test_factors_written_out():
    q = torch.tensor([[4.0, 1, 0, 0.25], [-1, 0.5, 1, 0]])[None, None]
    k = torch.tensor([[1.0, 0, -4, 1], [0, 1, 2, 0], [0, 0, 0, 0]])[None, None]
    shelf = MiKV(high=0.34).open()
    shelf.append(k, k)
    shelf.settle(CacheSite(q=q, k=k, v=k))
    codec = shelf._sides[0].codec
    assert isinstance(codec, Balanced)
    assert codec.factors.flatten().tolist() == [2, 1, 0.5, 0.5]
    assert not isinstance(shelf._sides[1].codec, Balanced), "values are not balanced"
    k[..., 1] = 0
    shelf = MiKV(high=0.34).open()
    shelf.append(k, k)
    shelf.settle(CacheSite(q=q, k=k, v=k))
    assert shelf._sides[0].codec.factors[..., 1].item() == 1, "a channel without numbers is left alone"


def test_factors_do_not_depend_on_where_the_size_of_a_channel_lies():
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(1, 1, 20, 8, generator=generator) for _ in range(2))
    size = torch.tensor([4.0, 0.25, 1, 2, 1, 16, 1, 0.5])
    found = []
    for a, b in ((q, k), (q / size, k * size)):
        shelf = MiKV().open()
        shelf.append(b, b)
        shelf.settle(CacheSite(q=a, k=b, v=b))
        found.append(shelf._sides[0].parts[0].rows)
    assert (found[0] == found[1]).float().mean() > 0.95  # but for factors' own rounding
    code = Balanced(Affine(8, 8), torch.rand(1, 1, 1, 8) + 0.5)
    parts = code.encode(k, None)
    assert torch.allclose(code.scores(q, parts), q @ code.decode(parts, torch.float32).mT, atol=1e-4)


@pytest.mark.parametrize(("low", "bits"), [(2, 2.5), (3, 3.5), (4, 4.5)])
def test_bits_of_a_number(low, bits):
    rows_ = torch.empty(1, 1, 0, 128, dtype=torch.float16)
    form = MiKV(low=low).forms(rows_, rows_)[0]
    assert form.codec.row_bits(rows_) == bits * 128
    share = {(0.2, 2): 0.325, (0.2, 3): 0.375, (0.5, 2): 0.578125}
    for (high, of), size in share.items():
        if of == low:
            assert (high * 16 + (1 - high) * bits) / 16 == pytest.approx(size)


def test_who_stays():
    """Ten rows, a fifth: the newest, and the one that received most of the others."""
    k, v = rows(10)
    shelf = MiKV().open()
    shelf.append(k, v)
    q = torch.randn(2, 6, 10, D, generator=torch.Generator().manual_seed(0))
    site = CacheSite(q=q, k=k, v=v)
    shelf.settle(site)
    received = site.columns(group="sum")[0, 0, :9]
    assert full(shelf) == [int(received.argmax()), 9]
    assert shelf._sides[0].encoded == shelf._sides[1].encoded == 8
    kept = full(shelf)
    for n, most in ((11, 3), (12, 3), (13, 3), (14, 3), (15, 3), (16, 4)):
        shelf.append(*rows(1, n))
        shelf.settle(None)
        now = full(shelf)
        assert len(now) == most
        assert n - 1 in now
        assert set(now) <= {*kept, n - 1}, "nothing comes back"
        kept = now
    assert sorted(shelf._index[0, 0].tolist()) == list(range(16))


def test_equal_rows_go_the_newer_first():
    shelf = MiKV(high=0.5, recent=0.0).open()
    shelf.append(*rows(8))
    shelf.settle(None)
    assert full(shelf) == [0, 1, 2, 3]
    shelf = MiKV(high=0.5, recent=1.0).open()
    shelf.append(*rows(8))
    shelf.settle(None)
    assert full(shelf) == [4, 5, 6, 7]


@pytest.mark.parametrize("ragged", [False, True])
def test_any_course_of_events_with_nothing_rounded(ragged):
    shelf, plain = MiKV(high=0.3, low=16, recent=0.2).open(), Plain()
    for seed in range(8):
        for n in (9, 1, 2):
            shelf.append(*rows(n, 10 * seed + n))
            plain.append(*rows(n, 10 * seed + n))
            q = torch.randn(2, 3, n, D, generator=torch.Generator().manual_seed(seed))
            slots = shelf.positions(plain.seen)
            k, v = shelf.show()
            site = CacheSite(q=q, k=k, v=v, positions=slots, seen=plain.seen, ragged=shelf._ragged)
            if n == 2:
                step = some_step(plain, plain.k.shape[2] - (seed % 3), ragged, seed)
                shelf.take(step, plain.slots if slots is None else slots)
                take(plain, step)
            shelf.settle(site)
            same(shelf, plain, 0.0)
            wanted = -(-3 * shelf.width // 10)
            assert shelf._sides[0].tail.count == wanted == shelf._received.shape[2]
        index = torch.tensor([1, 0]) if seed % 2 else torch.tensor([1, 1])
        shelf.select(index, index.tolist)
        plain.each(lambda x, index=index: x[index])
        same(shelf, plain, 0.0)


def test_a_step_counts_as_much_attention_as_its_site_would(monkeypatch):
    found = []
    for slow in (None, "not here"):
        monkeypatch.setattr(Affine, "why_slow", lambda self, query, slow=slow: slow)
        shelf = MiKV(low=4).open()
        k, v = rows(20)
        shelf.append(k, v)
        shelf.settle(CacheSite(q=torch.randn(2, 6, 20, D, generator=torch.Generator().manual_seed(1)), k=k, v=v))
        shelf.append(*rows(1, 1))
        q = torch.randn(2, 6, 1, D, generator=torch.Generator().manual_seed(2))
        answer = shelf.attend(tokred.kv.stores.Query(q, None, None, lambda count: None))
        assert (answer is None) == (slow is not None)
        shelf.settle(CacheSite(q=q, k=shelf.keys, v=shelf.values))
        found.append((shelf._received, shelf._index))
    assert near(found[0][0], found[1][0], 1e-5)
    assert torch.equal(found[0][1], found[1][1])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"high": 1.5}, "high must lie in"),
        ({"low": 5}, "low must be one of 2, 3, 4, 8, 16 bits, got 5"),
        ({"recent": -0.1}, "recent must lie in"),
        ({"block": 0}, "block"),
        ({"group": 1}, "group"),
    ],
)
def test_bad_parameters(given, message):
    with pytest.raises(ValueError, match=message):
        MiKV(**given)


# ---------------------------------------------------------------- models


def course(model, ids, mask, more):
    """Logits behind a prompt, and behind every token of ``more``."""
    cache, out, new = tokred.kv_cache(model), [], ids
    for token in [None, *more.split(1, -1)]:
        if token is not None:
            new, mask = token, torch.cat([mask, mask.new_ones(token.shape)], 1)
        positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -new.shape[1] :]
        given = {"attention_mask": mask, "position_ids": positions, **tokred.cache_kwargs(cache)}
        logits = model(new, **given).logits
        last = mask[:, -new.shape[1] :].cumsum(1).argmax(1)
        out.append(logits[torch.arange(len(mask)), last])
    return torch.stack(out, 1)


class TestModel:
    """A tiny Llama with its cache in two precisions."""

    @pytest.fixture
    def model(self, monkeypatch):
        pytest.importorskip("transformers")
        from tests.kv.tiny import build

        monkeypatch.setattr(Affine, "why_slow", lambda self, query: None)
        return build("llama")

    def test_everything_high_is_the_model_itself(self, model):
        from tests.kv.test_store_models import LOGITS, padded

        ids, mask, _ = padded((29, 17))
        plain = model.generate(ids, attention_mask=mask, **LOGITS)
        for given in ({"high": 1.0}, {"low": 16}):
            tokred.apply(model, "mikv", **given)
            found = model.generate(ids, attention_mask=mask, **LOGITS)
            assert all((a - b).abs().max() < 2e-5 for a, b in zip(found.logits, plain.logits, strict=True))

    @pytest.mark.parametrize("name", ["snapkv", "h2o", "adakv", "kvzip"])
    def test_with_policies(self, model, name):
        from tests.kv.test_store_models import course, padded, policies

        ids, mask, _ = padded((29, 17))
        found = []
        for store in (MiKV(low=16), MiKV(low=8), "rectangle"):
            tokred.apply(model, policies(store)[name])
            found.append(course(model, tokred.kv_cache(model), ids, mask, lambda cache: None))
        real = mask.bool()
        assert torch.equal(found[0][0][real], found[2][0][real])
        assert all((a - b).abs().max() < 2e-5 for a, b in zip(found[0][1:], found[2][1:], strict=True))
        assert (found[1][-1] - found[2][-1]).abs().max() < 0.3

    def test_a_model_in_float64(self, model):
        from tests.kv.test_store_models import LOGITS, prompt

        plain = model.double().generate(prompt(30), **LOGITS)
        tokred.apply(model, "mikv", low=16)
        found = model.generate(prompt(30), **LOGITS)
        assert all((a - b).abs().max() < 2e-5 for a, b in zip(found.logits, plain.logits, strict=True))

    @pytest.mark.parametrize("side", ["left", "right"])
    @pytest.mark.parametrize("given", [{}, {"high": 0.5, "low": 8, "recent": 0.2}, {"high_bits": 8}])
    def test_a_share_is_of_a_samples_own_rows(self, model, side, given):
        """Also at steps at which the share of one sample grows, and that of the batch does not."""
        from tests.kv.tiny import prompt

        alone, more = [prompt(n, seed=n) for n in (20, 57, 33)], prompt(14, 3, seed=5)
        ids, mask = torch.zeros(3, 57, dtype=torch.long), torch.zeros(3, 57, dtype=torch.long)
        for i, one in enumerate(alone):
            n = one.shape[1]
            where = slice(57 - n, None) if side == "left" else slice(None, n)
            ids[i, where], mask[i, where] = one[0], 1
        tokred.apply(model, "mikv", **given)
        found = course(model, ids, mask, more)
        for i, one in enumerate(alone):
            wanted = course(model, one, torch.ones_like(one), more[i : i + 1])
            assert (found[i] - wanted[0]).abs().max() < 2e-4

    def test_beams_run_and_drafts_are_refused(self, model):
        from tests.kv.test_store_models import GREEDY, prompt

        tokred.apply(model, "mikv")
        assert model.generate(prompt(20, 2), num_beams=3, **GREEDY).shape == (2, 26)
        with pytest.raises(ValueError, match="a store that can take the newest rows back"):
            model.generate(prompt(6).repeat(1, 4), prompt_lookup_num_tokens=3, **GREEDY)
        with pytest.raises(ValueError, match="the fate 'merge' needs a store that can average rows"):
            tokred.apply(model, "zeromerge", budget=9, tail=3, store="mikv")


# ---------------------------------------------------------------- rows that matter in a code too


def test_sizes_of_both_parts_written_out():
    rows_ = torch.empty(1, 1, 0, 128, dtype=torch.float16)
    for high_bits, size in {16: 0.325, 8: 0.23125, 4: 0.18125, 2: 0.15625}.items():
        store = MiKV(high_bits=high_bits)
        low = store.forms(rows_, rows_)[0].codec.row_bits(rows_)
        assert (0.2 * store.upper(rows_).row_bits(rows_) + 0.8 * low) / (16 * 128) == pytest.approx(size)


@pytest.mark.parametrize(("high_bits", "most"), [(8, 0.05), (4, 0.5)])
def test_rows_that_matter_are_rounded_too(high_bits, most):
    exact, rounded = (MiKV(high=0.3, low=16, high_bits=b).open() for b in (16, high_bits))
    for n in (20, 1, 1, 3, 1):
        k, v = rows(n, n)
        q = torch.randn(2, 6, n, D, generator=torch.Generator().manual_seed(n))
        for shelf in (exact, rounded):
            shelf.append(k, v)
            assert torch.equal(shelf.newest[0][:, :, -n:], k), "a forward's own rows are as they came"
            site = CacheSite(q=q, k=exact.keys, v=exact.values)
            shelf.settle(site)
        assert torch.equal(exact._index, rounded._index)
        assert 0 < (exact.keys - rounded.keys).abs().max() < most
    assert rounded._sides[0].tail.count == 8 == exact._sides[0].tail.count
    assert rounded._sides[0].tail.fresh.count == 0
    index = torch.tensor([1, 1])
    whole = rounded.keys
    rounded.select(index, index.tolist)
    assert torch.equal(rounded.keys, whole[index])
    detached = rows(2, 9)
    rounded.append(*detached)
    assert torch.equal(rounded.detach(1)[0], detached[0][:, :, 1:])
    assert torch.equal(rounded.keys[:, :, :-1], whole[index])


def test_survivors_of_snapkv_in_eight_bits_and_the_rest_in_two():
    window = tokred.kv.Window(4, 3)
    k, v = rows(30)
    q = torch.randn(2, 6, 30, D, generator=torch.Generator().manual_seed(1))
    site = CacheSite(q=q, k=k, v=v)
    store = MiKV(high=0.4, recent=1 / 3, high_bits=8, score=window, balance=False)
    shelf = store.open()
    shelf.append(k, v)
    shelf.settle(site)
    assert set(full(shelf)) == {*window(site)[0, 0, :26].topk(8).indices.tolist(), 26, 27, 28, 29}
    high = torch.zeros(2, 30, dtype=torch.bool)
    error = (shelf.keys - k).abs().amax(-1)
    encoded = shelf._sides[0].encoded
    high = shelf._index >= encoded
    assert error[high].max() < 0.03 < error[~high].mean()
    assert tokred.MiKV(score="window").parts.store.judge == tokred.kv.Window()
    with pytest.raises(ValueError, match="score is 'column_sum', which has to see every token"):
        MiKV(score="column_sum")
    with pytest.raises(ValueError, match="high_bits must be one of 2, 4, 8, 16 bits, got 3"):
        MiKV(high_bits=3)
