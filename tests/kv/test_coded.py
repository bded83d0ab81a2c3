"""Formats of few bits: how codes are made and packed, and that what happens to a cache happens to its rows."""

from __future__ import annotations

import copy

import pytest
import torch

from tests.kv.test_stores import DV, B, D, H, Plain, read, rows, same, some_step, take
from tokred.core.reduction import Reduction
from tokred.kernels.decode_attention import SENTINEL
from tokred.kernels.packed_rows import bytes_of, pack, unpack
from tokred.kv import KIVI, CacheSite, Merge, Padding
from tokred.kv.described import Place
from tokred.kv.stores import Query
from tokred.kv.stores.codecs import Affine
from tokred.kv.stores.coded import Coded, CodedShelf
from tokred.kv.stores.grown import Grown

TINY = {"group_size": 2, "residual_length": 4}


@pytest.fixture(autouse=True)
def plain_torch(monkeypatch):
    """Compiled loops and kernels have tests of their own."""
    monkeypatch.setenv("TOKRED_KERNELS", "torch")
    with torch.no_grad():
        yield


def held(shelf: CodedShelf) -> int:
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in shelf.tensors}.values())


def filled(store: Coded, n: int, seed: int = 0) -> CodedShelf:
    shelf = store.open()
    shelf.append(*rows(n, seed))
    shelf.settle(None)
    return shelf


# ---------------------------------------------------------------- codes


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("count", [1, 6, 8, 32])
def test_codes_come_back_from_their_bytes(bits, count):
    codes = torch.randint(0, 2**bits, (3, count, 5), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    packed = pack(codes, bits, 1)
    assert packed.shape == (3, bytes_of(count, bits), 5)
    assert packed.dtype == torch.uint8
    assert torch.equal(unpack(packed, bits, 1, count), codes)
    assert torch.equal(unpack(pack(codes.mT.contiguous(), bits, -1), bits, -1, count), codes.mT)


def test_keys_by_channel_written_out():
    k = torch.tensor([[1.0, -2], [1.3, 0], [0.4, 6], [2.5, 2]])[None, None]
    codec = Affine(2, 4, tokens=True)
    codes, scale, zero = parts = codec.encode(k, None)
    assert codes.flatten().tolist() == [197, 180]
    assert torch.allclose(zero.float(), torch.tensor([0.4, -2]), atol=1e-3)
    assert torch.allclose(scale.float(), torch.tensor([0.7, 2.666667]), atol=1e-3)
    wanted = torch.tensor([[1.1, -2], [1.1, 0.666667], [0.4, 6], [2.5, 3.333333]])
    assert torch.allclose(codec.decode(parts, torch.float32)[0, 0], wanted, atol=3e-3)


def test_values_by_token_written_out():
    v = torch.tensor([[0.0, 1, 2, 4.5], [-1, -1, 2, 0]])[None, None]
    codec = Affine(2, 4)
    codes, scale, zero = parts = codec.encode(v, None)
    assert codes.flatten().tolist() == [212, 112]
    assert (zero.flatten().tolist(), scale.flatten().tolist()) == ([0, -1], [1.5, 1])
    assert codec.decode(parts, torch.float32)[0, 0].tolist() == [[0, 1.5, 1.5, 4.5], [-1, -1, 2, 0]]


@pytest.mark.parametrize("tokens", [False, True])
def test_a_group_of_one_number_is_that_number(tokens):
    codec, rows_ = Affine(2, 4, tokens), torch.full((1, 1, 4, 4), 2.0)
    assert torch.equal(codec.decode(codec.encode(rows_, None), torch.float32), rows_)


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
def test_errors_are_half_a_step_and_extremes_are_exact(bits):
    k = torch.randn(2, 3, 64, 8, generator=torch.Generator().manual_seed(1)) * 5
    codec = Affine(bits, 32, tokens=True)
    _, scale, zero = parts = codec.encode(k, None)
    error = (codec.decode(parts, torch.float32) - k).abs().unflatten(2, (2, 32))
    rounding = 2**-11 * (zero.abs().float() + (2**bits - 1) * scale.float())  # of float16
    assert (error <= (scale.float() / 2 + rounding).unsqueeze(3)).all()
    grouped = k.unflatten(2, (2, 32))
    for extreme in (grouped.argmin(3, True), grouped.argmax(3, True)):
        assert (error.gather(3, extreme).squeeze(3) <= 2 * rounding).all()


def test_a_channel_may_be_moved_and_scaled():
    k = torch.randint(-8, 9, (1, 1, 32, 4), generator=torch.Generator().manual_seed(1)).float()
    codec = Affine(2, 32, tokens=True)
    codes, scale, zero = codec.encode(k, None)
    moved = codec.encode(k + torch.tensor([0.0, 4, 0, 0]), None)
    assert torch.equal(moved[0], codes)
    assert (moved[2] - zero).flatten().tolist() == [0, 4, 0, 0]
    scaled = codec.encode(k * 4, None)
    assert torch.equal(scaled[0], codes)
    assert torch.equal(scaled[1], scale * 4)


def test_padding_widens_no_range():
    k = torch.randn(2, 3, 8, 6, generator=torch.Generator().manual_seed(1))
    real = torch.ones(2, 3, 8, dtype=torch.bool)
    real[0, :, :3] = real[1, 1] = False
    codec = Affine(2, 4, tokens=True)
    loud = torch.where(real[..., None], k, 1e4)
    for a, b in zip(codec.encode(loud, real), codec.encode(torch.where(real[..., None], k, -1e4), real), strict=True):
        assert torch.equal(a, b)
    found = codec.decode(codec.encode(loud, real), torch.float32)
    assert (found - k)[real].abs().max() < 2
    assert not found[1, 1].any()


# ---------------------------------------------------------------- which rows


def test_where_keys_and_values_are_cut():
    store = KIVI()
    for n, cuts in {300: (256, 128), 256: (256, 128), 128: (128, 0), 100: (0, 0)}.items():
        shelf = filled(store, n)
        assert tuple(side.encoded for side in shelf._sides) == (cuts[0], n - min(n, 128)), n
        assert tuple(side.tail.count for side in shelf._sides) == (n - cuts[0], min(n, 128)), n
    shelf = filled(store, 300)
    for i in range(84):
        shelf.append(*rows(1, i))
        shelf.settle(None)
        assert shelf._sides[0].tail.count < 128
        assert shelf._sides[1].tail.count == 128
    assert [side.encoded for side in shelf._sides] == [384, 256]


def test_chunks_give_the_codes_of_the_whole():
    k, v = rows(300)
    whole, chunks = filled(KIVI(), 300), KIVI().open()
    for a, b in zip(k.split(37, 2), v.split(37, 2), strict=True):
        chunks.append(a, b)
        chunks.settle(None)
    for one, other in zip(whole._sides, chunks._sides, strict=True):
        assert all(map(torch.equal, one.coded, other.coded))
        assert torch.equal(one.tail.rows, other.tail.rows)


def test_a_crop_takes_rows_of_the_tail_back_exactly_and_opens_a_group():
    k, v = rows(23)
    shelf = filled(KIVI(bits=8, group_size=4, residual_length=8), 23)
    before = shelf.keys, shelf.values
    kept = shelf.snapshot()
    for count in (3, 7, 9, 14, 22):
        shelf.restore(kept)
        shelf.crop(count)
        assert shelf.width == 23 - count
        left = shelf.keys, shelf.values
        assert all(torch.equal(a, b[:, :, : 23 - count]) for a, b in zip(left, before, strict=True)), count
        shelf.append(k[:, :, 23 - count :], v[:, :, 23 - count :])
        shelf.settle(None)
        assert (shelf.keys - k).abs().max() < 0.1


def test_two_futures_of_one_snapshot_do_not_meet():
    shelf = filled(KIVI(bits=4, **TINY), 9)
    shelf.append(*rows(1, 5))
    shelf.settle(None)
    kept, ends = shelf.snapshot(), []
    for seed in (1, 2):
        shelf.restore(kept)
        for i in range(3):
            shelf.append(*rows(1, 10 * seed + i))
            shelf.settle(None)
        ends.append((shelf.snapshot(), shelf.keys, shelf.values))
    for state, k, v in ends:
        shelf.restore(state)
        assert torch.equal(shelf.keys, k)
        assert torch.equal(shelf.values, v)
    other = copy.deepcopy(shelf)
    other.append(*rows(1, 77))
    shelf.append(*rows(1, 78))
    assert torch.equal(shelf.keys[:, :, -1:], rows(1, 78)[0])


def test_rows_grow_in_place_until_there_is_no_room():
    grown = Grown.of(torch.zeros(1, 1, 2, 3))
    first = grown.append(torch.ones(1, 1, 1, 3), 4)
    second = first.append(torch.ones(1, 1, 2, 3), 4)
    assert second.buffer is first.buffer
    again = first.append(torch.full((1, 1, 1, 3), 5.0), 4)
    assert again.buffer is not first.buffer
    assert second.rows[0, 0, :, 0].tolist() == [0, 0, 1, 1, 1]
    assert again.rows[0, 0, :, 0].tolist() == [0, 0, 1, 5]
    assert second.without_first(2).rows[0, 0, :, 0].tolist() == [1, 1, 1]
    assert second.first(0).buffer.numel() == 0
    wanted = torch.ones(1, 1, 1, 3, requires_grad=True)
    with torch.enable_grad():
        first.append(wanted, 4).rows.sum().backward()
    assert wanted.grad is not None


# ---------------------------------------------------------------- what happens to a cache


def course_of_events(store: Coded, most: float, ragged: bool) -> tuple[CodedShelf, Plain, int]:
    """Rows come, go, come back and are those of other samples: beside plain tensors. Also how often holes were left."""
    shelf, plain, indexed = store.open(), Plain(), 0
    for seed in range(8):
        for n in (9, 1, 2):
            shelf.append(*rows(n, 10 * seed + n))
            plain.append(*rows(n, 10 * seed + n))
            shelf.settle(None)
        step = some_step(plain, plain.k.shape[2] - (seed % 3), ragged, seed)
        slots = shelf.positions(plain.seen)
        shelf.take(step, plain.slots if slots is None else slots)
        take(plain, step)
        indexed += shelf._index is not None
        same(shelf, plain, most)
        shelf.settle(None)
        same(shelf, plain, most)
        kept, state = shelf.snapshot(), (plain.k, plain.v, plain.slots, plain.seen)
        shelf.append(*rows(5, seed))
        plain.append(*rows(5, seed))
        shelf.settle(None)
        shelf.crop(3)
        plain.each(lambda x: x[:, :, :-3])
        plain.seen -= 3
        same(shelf, plain, most)
        index = torch.tensor([1, 0]) if seed % 2 else torch.tensor([1, 1])
        shelf.select(index, index.tolist)
        plain.each(lambda x, index=index: x[index])
        same(shelf, plain, most)
        shelf.restore(kept)
        plain.k, plain.v, plain.slots, plain.seen = state
        same(shelf, plain, most)
    return shelf, plain, indexed


@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("bits", [16, 8])
def test_any_course_of_events_equals_plain_tensors(bits, ragged):
    """Bit for bit where nothing is rounded: through codes, evicted rows among them, and encoding anew."""
    shelf, plain, indexed = course_of_events(KIVI(bits=bits, **TINY), 0.0 if bits == 16 else 0.15, ragged)
    assert indexed > 2
    fewer = some_step(plain, plain.k.shape[2] // 2, False, 1)
    shelf.take(fewer, shelf.positions(plain.seen))
    assert shelf._index is None, "half are gone: the others are encoded anew"


@pytest.mark.parametrize("ragged", [False, True])
def test_rows_are_merged_and_others_keep_their_codes(ragged):
    store = KIVI(bits=16, **TINY)
    shelf = filled(store, 20, 3)
    k, v = rows(20, 3)
    counts = torch.tensor([[18, 17, 18], [17, 18, 16]]) if ragged else (18, 18)
    score = torch.rand(B, H, 20, generator=torch.Generator().manual_seed(4))
    step = Merge(2).reduce(CacheSite(k=k, v=v), score, None, counts)
    weights = torch.rand(B, H, 20) + 0.5
    slots = torch.arange(20, dtype=torch.int32).expand(B, H, 20)
    before = [side.coded[0].clone() for side in shelf._sides]
    shelf.merge(step, slots, weights)
    assert shelf._index is not None
    real = shelf.positions(20) != SENTINEL
    assert torch.allclose(shelf.keys[real], step.merge(k, weights)[real], atol=1e-6)
    assert torch.allclose(shelf.values[real], step.merge(v, weights)[real], atol=1e-6)
    assert [x.shape[2] for x in before] == [20, 16]
    assert all(torch.equal(s.coded[0][:, :, : x.shape[2]], x) for s, x in zip(shelf._sides, before, strict=True))
    shelf.append(*rows(2, 9))
    shelf.settle(None)
    assert torch.equal(shelf.keys[:, :, -2:], rows(2, 9)[0])


def test_evicted_rows_widen_no_range():
    """A row that went before its group was full counts no more."""
    shelf = filled(KIVI(group_size=4, residual_length=8), 11)
    k, v = rows(4, 1)
    k[:, :, 1] = 1e4
    shelf.append(k[:, :, :2], v[:, :, :2])
    shelf.settle(None)
    step = Reduction.keep(torch.arange(12).expand(B, H, 12), 13)
    shelf.take(step, torch.arange(13, dtype=torch.int32).expand(B, H, 13))
    assert shelf._index is not None
    shelf.append(k[:, :, 2:], v[:, :, 2:])
    shelf.append(*rows(3, 2))
    assert (shelf.keys[:, :, 8:] - 0).abs().max() < 100
    before = shelf.keys[:, :, 8:]
    shelf.settle(None)
    assert shelf._sides[0].encoded == 16
    assert (shelf.keys[:, :, 8:] - before).abs().max() < 2


# ---------------------------------------------------------------- one query


@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("case", ["plain", "padded", "evicted", "ragged", "merged"])
@pytest.mark.parametrize("bits", [2, 3, 8])
def test_an_answer_without_unpacking_is_the_attention_over_what_is_restored(case, bits, softcap, monkeypatch):
    shelf = KIVI(bits=bits, group_size=4, residual_length=8).open()
    shelf.append(*rows(30, 1))
    shelf.settle(None)
    if case in ("evicted", "ragged"):
        plain = Plain()
        plain.append(*rows(30, 1))
        shelf.take(some_step(plain, 27, case == "ragged", 1), plain.slots)
        assert shelf._index is not None
    if case == "merged":
        step = Merge(2).reduce(CacheSite(k=rows(30)[0], v=rows(30)[1]), torch.rand(B, H, 30), None, (28, 28))
        shelf.merge(step, torch.arange(30, dtype=torch.int32).expand(B, H, 30), None)
    shelf.append(*rows(1, 2))
    q = torch.randn(B, 2 * H, 1, D, generator=torch.Generator().manual_seed(1))
    mask = torch.ones(B, 31, dtype=torch.bool)
    if case == "padded":
        mask[0, :7] = False
    monkeypatch.setattr(Affine, "why_slow", lambda self, query: None)
    found = shelf.attend(Query(q, None, softcap, lambda count: mask[:, -count:] if case == "padded" else None))
    k, v = (x.repeat_interleave(2, 1) for x in (shelf.keys, shelf.values))
    logits = q @ k.mT * D**-0.5
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    if shelf.moved:
        hidden = (shelf.positions(31) == SENTINEL).repeat_interleave(2, 1)[:, :, None]
    else:
        hidden = ~mask[:, None, None]
    wanted = logits.masked_fill(hidden, -torch.inf).softmax(-1) @ v
    assert found.shape == (B, 2 * H, 1, DV)
    assert (found - wanted).abs().max() < 2e-5


def test_rows_are_restored_where_nothing_is_compiled():
    shelf = filled(KIVI(), 200)
    assert shelf.attend(Query(torch.randn(B, H, 1, D), None, None, lambda count: None)) is None
    assert not shelf.complete


def test_a_query_that_sees_padding_alone_gets_zeros(monkeypatch):
    monkeypatch.setattr(Affine, "why_slow", lambda self, query: None)
    shelf = filled(KIVI(bits=4, **TINY), 9)
    hidden = torch.zeros(B, 9, dtype=torch.bool)
    hidden[1] = True
    answer = shelf.attend(Query(torch.randn(B, H, 1, D), None, None, lambda count: hidden))
    assert not answer[0].any()
    assert answer[1].isfinite().all()


# ---------------------------------------------------------------- memory, and bad input


def test_bytes_are_those_of_codes():
    """Two bits and, in groups of 32, one more for scale and least number: measured by storage."""
    shelf = KIVI().open()
    k, v = (torch.randn(1, 2, 1024, 64) for _ in range(2))
    shelf.append(k, v)
    shelf.settle(None)
    codes = 2 * (1024 * 64 * 3 // 8 + (1024 - 128) * 64 * 3 // 8)
    assert held(shelf) == codes + 2 * 128 * 64 * 4
    for _ in range(3):
        shelf.append(k[:, :, :1], v[:, :, :1])
        shelf.settle(None)
    store = KIVI()
    place = Place(2, store.row_bytes(k, v), whole=store.whole_rows(k, v))
    assert held(shelf) <= place.held(1027) + store.note_bytes(2, 64, uneven=False)


def test_site_says_which_rows_are_padding():
    k, v = rows(8)
    k[0, :, :3] = 1e4
    shelf = KIVI(group_size=4, residual_length=8).open()
    shelf.append(k, v)
    mask = torch.ones(B, 8, dtype=torch.bool)
    mask[0, :3] = False
    shelf.settle(CacheSite(k=k, v=v, padding=Padding(mask)))
    assert (shelf.keys - k)[0, :, 3:].abs().max() < 2
    assert read(shelf.show()[0]).shape == k.shape


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"bits": 9}, "bits must be one of 1, 2, 3, 4, 5, 6, 7, 8, 16 bits, got 9"),
        ({"v_bits": 0}, "v_bits must be one of"),
        ({"group_size": 1}, "group_size"),
        ({"residual_length": 100}, "residual_length must be a multiple of group_size=32, got 100"),
        ({"residual_length": 0}, "residual_length"),
    ],
)
def test_bad_parameters(given, message):
    with pytest.raises(ValueError, match=message):
        KIVI(**given)


def test_heads_that_cannot_be_packed():
    with pytest.raises(ValueError, match="value heads of 37 numbers cannot be packed in groups of at most 32"):
        KIVI().check(torch.zeros(1, 1, 0, 37), torch.zeros(1, 1, 0, 37))
    KIVI().check(torch.zeros(1, 1, 0, 80), torch.zeros(1, 1, 0, 80))
