"""Formats that rotate rows or leave numbers out: examples written out, and the laws that all formats share."""

from __future__ import annotations

import pytest
import torch

import tokred
from tests.kv.test_coded import course_of_events, held
from tokred.kernels.packed_rows import unpack
from tokred.kv import Mustafar, NSNQuant, Oscar, Turbo
from tokred.kv.stores import Query
from tokred.kv.stores.codebooks import codebook
from tokred.kv.stores.codecs import Affine
from tokred.kv.stores.mustafar import Largest
from tokred.kv.stores.nsnquant import LookedUp, hartley
from tokred.kv.stores.rotated import LEVELS, Directions, Rotated, Spans, hadamard, levels_of, spectral_rotation, turned

EXAMPLE = torch.tensor([1, -2, 0.5, 3, 0, 1, -1, 2]).view(1, 1, 1, 8)


@pytest.fixture(autouse=True)
def plain_torch(monkeypatch):
    monkeypatch.setenv("TOKRED_KERNELS", "torch")
    with torch.no_grad():
        yield


# ---------------------------------------------------------------- Mustafar


def test_the_largest_numbers_written_out():
    x = torch.tensor([0.1, -0.5, 0.3, -0.2, 0.9, -0.05, 0.4, 0.6]).view(1, 1, 1, 8)
    code = Largest(4, 8)
    values, bits = parts = code.encode(x, None)
    assert values.flatten().tolist() == x.flatten()[[1, 4, 6, 7]].tolist()
    assert bits.item() == 0b01001011
    restored = code.decode(parts, torch.float32)
    assert restored.flatten().tolist() == [
        0,
        x[..., 1].item(),
        0,
        0,
        x[..., 4].item(),
        0,
        x[..., 6].item(),
        x[..., 7].item(),
    ]
    assert restored.sum().item() == pytest.approx(1.4)
    assert all(map(torch.equal, code.encode(restored, None), parts))
    assert torch.equal(code.decode(code.encode(4 * x, None), torch.float32), 4 * restored)


def test_bits_of_64_numbers_written_out():
    x = torch.zeros(1, 1, 1, 64)
    x[..., [0, 3, 10, 63]] = 1
    bits = Largest(4, 64).encode(x, None)[1]
    assert bytes(bits.flatten().tolist()).hex() == "9020000000000001"


def test_of_equal_numbers_the_first_stay_and_as_many_as_said():
    x = torch.ones(1, 1, 2, 10, dtype=torch.bfloat16)
    code = Largest(3, 10)
    assert code.decode(code.encode(x, None), x.dtype)[0, 0].tolist() == [[1.0] * 3 + [0.0] * 7] * 2
    for sparsity, keep in {0.5: 64, 0.7: 39, 0.0: 128}.items():
        form = Mustafar(sparsity).forms(torch.empty(1, 1, 0, 128), torch.empty(1, 1, 0, 128))[0]
        assert getattr(form.codec, "keep", 128) == keep


def test_bytes_of_what_is_left():
    """Two bytes a number and a bit for each of 128: 56 % of dense at a half, 36 % with 39 left."""
    k = torch.randn(1, 2, 500, 128).half()
    for sparsity, row in {0.5: 64 * 2 + 16, 0.7: 39 * 2 + 16}.items():
        shelf = Mustafar(sparsity, sparsity).open()
        shelf.append(k, k)
        shelf.settle(None)
        assert held(shelf) == 2 * 2 * (468 * row + 32 * 128 * 2)


# ---------------------------------------------------------------- rotations


def test_a_rotation_is_its_own_inverse():
    for width in (1, 2, 8, 64):
        assert torch.allclose(hadamard(width) @ hadamard(width), torch.eye(width), atol=1e-6)


@pytest.mark.parametrize(
    ("bits", "codes", "exact", "plain"),
    [(3, [5, 2, 2, 6, 4, 5, 2, 5], 0.089699, 0.072942), (4, [11, 5, 4, 13, 8, 11, 4, 10], 1.228207, 1.152966)],
)
def test_a_direction_written_out(bits, codes, exact, plain):
    code = Directions(bits, 8)
    packed, length = parts = code.encode(EXAMPLE, None)
    assert length.item() == 4.5
    assert unpack(packed, bits, -1, 8).flatten().tolist() == codes
    q = torch.tensor([1, 0, 2, -1, 1, 1, 0, 0.5])
    assert (EXAMPLE.flatten() @ q).item() == 1
    assert (code.decode(parts, torch.float32).flatten() @ q).item() == pytest.approx(exact, abs=1e-5)
    loose = Directions(bits, 8, correct=False)
    assert (loose.decode(parts, torch.float32).flatten() @ q).item() == pytest.approx(plain, abs=1e-5)
    longer = code.encode(4 * EXAMPLE, None)
    assert torch.equal(longer[0], packed)
    assert longer[1].item() == 18


@pytest.mark.parametrize(
    ("bits", "codes", "scale"), [(3, [4, 0, 4, 7, 3, 4, 1, 6], 0.714286), (4, [9, 0, 8, 15, 6, 9, 3, 12], 1 / 3)]
)
def test_a_value_of_turbo_written_out(bits, codes, scale):
    code = Turbo(bits).forms(EXAMPLE, EXAMPLE)[1].codec
    packed, step, least = code.encode(EXAMPLE, None)
    found = unpack(packed, bits, -1, 8).flatten().tolist()
    assert [abs(a - b) for a, b in zip(found, codes, strict=True)].count(0) >= 6, "all but those half-way"
    assert (step.item(), least.item()) == (pytest.approx(scale, abs=1e-3), -2)


def test_levels_are_as_many_as_codes():
    assert {2 * len(levels) for levels in LEVELS.values()} == {4, 8, 16}
    for bits, size in {3: 102, 4: 134}.items():
        k = torch.empty(1, 1, 0, 128)
        key, value = Turbo(bits).forms(k, k)
        assert (key.codec.row_bits(k) + value.codec.row_bits(k)) / 8 == size
        k = torch.empty(1, 1, 0, 64)
        key, value = Turbo(bits).forms(k, k)
        assert (key.codec.row_bits(k) + value.codec.row_bits(k)) / 8 == {3: 54, 4: 70}[bits]


def test_a_rotation_of_the_queries_written_out():
    q = torch.tensor([[2.0, 0, 1, 0], [1, 1, 0, 0], [3, 0, 0, 1], [1, 0, 1, 1]])
    rotation, values = spectral_rotation(q.T @ q / 4)
    assert values.tolist() == pytest.approx([0.157168, 0.25, 0.377335, 4.215497], abs=1e-5)
    assert torch.allclose(rotation @ rotation.T, torch.eye(4).double(), atol=1e-9)
    k = torch.tensor([1, -2, 0.5, 3]).double() @ rotation
    assert k.tolist() == pytest.approx([3.457488, -0.326794, -0.865514, -1.199945], abs=1e-5)


def test_clipping_brings_a_row_down_to_one_of_its_numbers():
    x = turned(torch.tensor([3.457488, -0.326794, -0.865514, -1.199945])).view(1, 1, 1, 4)  # rotated: these again
    free, cut = Rotated(Affine(2, 4)), Rotated(Affine(2, 4), 0.6)
    codes, scale, _ = free.encode(x, None)
    assert (codes.item(), scale.item()) == (7, pytest.approx(1.552478, abs=1e-3))
    codes, scale, _ = cut.encode(x, None)
    assert (codes.item(), scale.item()) == (7, pytest.approx(0.799963, abs=1e-3))


def test_rotated_queries_meet_the_codes():
    k = torch.randn(2, 3, 20, 16, generator=torch.Generator().manual_seed(0))
    q, w = torch.randn(2, 3, 2, 16), torch.rand(2, 3, 2, 20)
    code = Rotated(Affine(2, 16), 0.9)
    parts = code.encode(k, None)
    restored = code.decode(parts, torch.float32)
    assert torch.allclose(code.scores(q, parts), q @ restored.mT, atol=1e-4)
    assert torch.allclose(code.sums(w, parts), w @ restored, atol=1e-4)
    fine = Rotated(Affine(8, 16))
    assert (fine.decode(fine.encode(k, None), torch.float32) - k).abs().max() < 0.1


def test_first_and_newest_tokens_stay_as_they_are():
    k, v = (torch.randn(1, 2, 41, 8, generator=torch.Generator().manual_seed(i)) for i in (0, 1))
    shelf = Oscar(sinks=3, recent=5, block=4).open()
    for a, b in zip(k.split((30, 1, 10), 2), v.split((30, 1, 10), 2), strict=True):
        shelf.append(a, b)
        shelf.settle(None)
    for found, wanted, side in zip((shelf.keys, shelf.values), (k, v), shelf._sides, strict=True):
        assert (side.apart, side.encoded, side.tail.count) == (3, 32, 6)
        assert torch.equal(found[:, :, :3], wanted[:, :, :3])
        assert torch.equal(found[:, :, -6:], wanted[:, :, -6:])
        assert not torch.equal(found[:, :, 3:-6], wanted[:, :, 3:-6])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Affine, "why_slow", lambda self, query: None)
        q = torch.randn(1, 4, 1, 8)
        answer = shelf.attend(Query(q, None, None, lambda count: None))
    wide = [x.repeat_interleave(2, 1) for x in (shelf.keys, shelf.values)]
    assert torch.allclose(answer, (q @ wide[0].mT * 8**-0.5).softmax(-1) @ wide[1], atol=1e-5)


# ---------------------------------------------------------------- queries that meet codes


CODES = [
    *(Directions(bits, 16, correct) for bits, correct in ((2, True), (2, False), (3, True), (4, True))),
    *(Spans(bits, 16) for bits in (2, 3)),
    Largest(5, 16),
    *(LookedUp(bits, 16, 8, side, 8, angles) for bits, side, angles in (
        (1, 16, None), (2, 4, None), (2, 4, torch.tensor([1.0, 0.3, 0.1])))),
]  # fmt: skip


@pytest.mark.parametrize("code", CODES, ids=lambda c: f"{type(c).__name__} {c.row_bits(torch.empty(1, 1, 0, 16))}")
def test_products_and_sums_are_those_of_the_rows(code):
    k = torch.randn(2, 3, 40, 16, generator=torch.Generator().manual_seed(0))
    q, w = torch.randn(2, 3, 2, 16), torch.rand(2, 3, 2, 40)
    parts = code.encode(k, None)
    rows = code.decode(parts, torch.float32)
    assert code.why_slow(q) is None
    assert torch.allclose(code.scores(q, parts), q @ rows.mT, atol=1e-4)
    assert torch.allclose(code.sums(w, parts), w @ rows, atol=1e-4)
    with torch.enable_grad():
        assert code.why_slow(q.clone().requires_grad_()) == "a gradient is asked for"


@pytest.mark.parametrize("store", [Turbo(2), Turbo(3), Mustafar(window=3), NSNQuant(window=8, pre_rope=False)], ids=str)
def test_a_step_never_holds_all_rows(store, monkeypatch):
    """The answer is that over the restored rows, and whatever a step makes meanwhile is of some of them."""
    monkeypatch.setattr("tokred.kernels.coded_rows.reference.BLOCK", 64)
    monkeypatch.setattr("tokred.kv.stores.codecs.BLOCK", 64)
    k, v = (torch.randn(1, 2, 1601, 16, generator=torch.Generator().manual_seed(i)) for i in (0, 1))
    shelf = store.open()
    shelf.append(k, v)
    shelf.settle(None)
    shelf.append(k[:, :, :1], v[:, :, :1])
    q = torch.randn(1, 4, 1, 16)
    wide = [x.repeat_interleave(2, 1) for x in (shelf.keys, shelf.values)]
    with torch.autograd.profiler.profile(profile_memory=True) as profile:
        answer = shelf.attend(Query(q, None, None, lambda count: None))
    assert torch.allclose(answer, (q @ wide[0].mT * 16**-0.5).softmax(-1) @ wide[1], atol=1e-4)
    largest = max(e.cpu_memory_usage for e in profile.function_events)
    assert largest < shelf.keys.nbytes / 4, "logits and notes of all rows, and rows of some"


# ---------------------------------------------------------------- all of them


@pytest.mark.parametrize("code", [Directions(2, 16), LookedUp(2, 48, 4, 16, 16), LookedUp(1, 16, 4, 16, 16)], ids=repr)
def test_gradients_are_kept_after_codes_were_made_in_inference_mode(code):
    """What all rows are turned by, and looked up in, is made once."""
    for known in (hadamard, hartley, levels_of, codebook):
        known.cache_clear()
    rows = torch.randn(1, 1, 4, code.width)
    with torch.inference_mode():
        parts = code.encode(rows, None)
    with torch.enable_grad():
        again = code.encode(rows.clone().requires_grad_(), None)
    assert all(map(torch.equal, parts, again))


NOTHING = [
    Mustafar(0.0, 0.0, window=2),
    Oscar(bits=16, sinks=3, recent=2, block=2),
    Turbo(bits=16),
]


@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("store", NOTHING, ids=lambda s: s.name)
def test_any_course_of_events_with_nothing_rounded(store, ragged):
    assert course_of_events(store, 0.0, ragged)[2] > 2


@pytest.mark.parametrize("method", ["mustafar", "oscar", "turbo"])
def test_models(method):
    pytest.importorskip("transformers")
    from tests.kv.test_store_models import GREEDY, LOGITS, build, padded, policies, prompt

    model = build("llama")
    ids, mask, _ = padded((29, 17))
    plain = model.generate(ids, attention_mask=mask, **LOGITS)
    cls = tokred.core.registry.methods.get(method)
    tokred.apply(model, method, **cls.nothing)
    found = model.generate(ids, attention_mask=mask, **LOGITS)
    assert all(map(torch.equal, found.logits, plain.logits)), "settings that do nothing"
    tokred.apply(model, method, **cls.example)
    found = model.generate(ids, attention_mask=mask, **LOGITS)
    assert torch.equal(found.logits[0], plain.logits[0])
    assert all(x.isfinite().all() for x in found.logits)
    assert not torch.equal(found.logits[-1], plain.logits[-1])
    for policy in ("snapkv", "h2o"):
        tokred.apply(model, policies(tokred.make(method, **cls.example).parts.store)[policy])
        assert model.generate(prompt(30, 2), num_beams=2, **GREEDY).shape == (2, 36)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Mustafar(1.0), r"k_sparsity must lie in \[0, 1\), got 1.0"),
        (lambda: Oscar(bits=9), "bits must be one of"),
        (lambda: Oscar(clip_v=2), r"clip_v must lie in \[0, 1\], got 2"),
        (lambda: Turbo(bits=5), "bits must be one of 2, 3, 4, 16 bits, got 5"),
        (lambda: Turbo().check(*[torch.zeros(1, 1, 0, 80)] * 2), "a power of two"),
        (lambda: Oscar().check(*[torch.zeros(1, 1, 0, 96)] * 2), "key heads of 96 numbers cannot be rotated: oscar"),
    ],
)
def test_bad_parameters(make, message):
    with pytest.raises(ValueError, match=message):
        make()
