"""Bytes of formats: newest rows, room and notes are counted, so that a limit holds. Measured by storage."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import tokred
from tests.kv.test_stores import STORES, B, H, Plain, rows, slots_of, some_step, take
from tokred.core.registry import parts
from tokred.kv import KIVI, MiKV, Mustafar, NSNQuant, Oscar, Squeeze, Turbo
from tokred.kv.described import POSITION, Place
from tokred.kv.stores import Query
from tokred.kv.stores.codecs import Affine
from tokred.kv.stores.coded import Coded

# Small windows, so that most rows are in codes; and besides them every format as it comes.
SMALL: dict[str, Coded] = {
    "kivi": KIVI(bits=4, group_size=4, residual_length=8),
    "mikv": MiKV(high=0.3, low=4),
    "mikv of 8 bits": MiKV(high=0.3, low=4, high_bits=8),
    "mustafar": Mustafar(window=4),
    "nsnquant": NSNQuant(window=8, pre_rope=False),
    "oscar": Oscar(bits=4, sinks=2, recent=5, block=4),
    "turbo": Turbo(),
}
NAMES = [n for n in parts if issubclass(parts.get(n), Coded) and parts.get(n).__module__.startswith("tokred.")]
FORMATS = {**SMALL, **{f"{name} as it comes": parts.get(name)() for name in NAMES}}


@pytest.fixture(autouse=True)
def plain_torch(monkeypatch):
    monkeypatch.setenv("TOKRED_KERNELS", "torch")
    with torch.no_grad():
        yield


def storage(tensors) -> int:
    seen = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors if t is not None}
    return sum(seen.values())


def test_every_format_is_here():
    assert {name.partition(" ")[0] for name in SMALL} == set(NAMES)
    assert set(NAMES) - set(STORES) == {"oscar", "nsnquant"}, "heads of six numbers do not fit these"


# ---------------------------------------------------------------- what a number of rows takes


@pytest.mark.parametrize("whole", [(), ((9, 100),), ((9, 100), (4, 30))])
def test_rows_and_bytes_say_the_same(whole):
    place = Place(heads=2, row_bytes=10, whole=whole)
    held = [place.held(n) for n in range(40)]
    assert [place.rows(x) for x in held] == list(range(40))
    assert [place.rows(x - 1) for x in held[1:]] == list(range(39))
    uneven = place.held(3) + place.held(21)
    assert uneven <= 2 * place.held(12), "layers of different lengths take no more than equal ones"
    assert place.held(5) == 2 * (50 + sum(more * min(5, n) for n, more in whole))


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("left", [3, 12, 40])
def test_no_number_of_rows_takes_more_than_is_said(name, left):
    """Rows come one at a time or several, and the worst go: after each settling, whatever there is by storage."""
    store, plain = FORMATS[name], Plain()
    if name in ("nsnquant", "oscar"):
        k, v = (torch.randn(B, H, 80, 8, generator=torch.Generator().manual_seed(i)) for i in (0, 1))
    else:
        k, v = rows(80)
    place = Place(H, store.row_bytes(k, v), B, 0, store.whole_rows(k, v))
    notes = store.note_bytes(H, max(k.shape[-1], v.shape[-1]), uneven=False)
    shelf, at, most = store.open(), 0, 0.0
    for n in [20, *[1] * 14, 7, *[1] * 9]:
        shelf.append(k[:, :, at : at + n], v[:, :, at : at + n])
        plain.append(*(x[:, :, at : at + n] for x in rows(80)))
        at += n
        if shelf.width > left:
            step = some_step(plain, left, False, at)
            shelf.take(step, slots_of(shelf, plain))
            take(plain, step)
        shelf.settle(None)
        held = storage(shelf.tensors)
        assert held <= B * (place.held(shelf.width) + notes), (at, shelf.width)
        most = max(most, held / B / (place.held(shelf.width) + notes))
    assert left < 40 or most > 0.2, "and not much less"


@pytest.mark.parametrize("name", ["kivi", "oscar", "turbo", "mikv of 8 bits"])
def test_rows_that_go_when_a_forward_is_over_do_not_wait_in_full(name):
    k, v = (torch.randn(B, H, 60, 8, generator=torch.Generator().manual_seed(i)) for i in (0, 1))
    found = []
    for late in (False, True):
        shelf, plain = FORMATS[name].open(), Plain()
        shelf.append(k, v)
        plain.append(*rows(60))
        if late:
            shelf.settle(None)
        shelf.take(some_step(plain, 30, False, 1), plain.slots)
        if not late:
            shelf.settle(None)
        found.append(storage(shelf.tensors))
    assert found[0] == found[1]


def test_attention_of_rows_that_went_is_counted_for_the_others(monkeypatch):
    """A step that answers from codes and evicts after that: what it gave to rows goes where they go."""
    monkeypatch.setattr(Affine, "why_slow", lambda self, query: None)
    shelf, plain = MiKV(high=0.5, low=4, balance=False).open(), Plain()
    for n, seed in ((20, 1), (1, 2)):
        shelf.append(*rows(n, seed))
        plain.append(*rows(n, seed))
        if n > 1:
            shelf.settle(None)
    before = shelf._received.clone()
    query = Query(torch.randn(B, H, 1, rows(1)[0].shape[-1]), None, None, lambda count: None)
    assert shelf.attend(query) is not None
    given = shelf._weights.clone()
    step = some_step(plain, 9, False, 3)
    places = shelf._places(step.representative, None) - shelf._sides[0].encoded
    shelf.take(step, plain.slots)
    wanted = (before + given).gather(2, places.clamp(min=0).long()).masked_fill(places < 0, 0.0)
    assert torch.equal(shelf._received, wanted)
    shelf.settle(None)
    assert shelf.width == 9


# ---------------------------------------------------------------- budgets and limits in bytes


@pytest.fixture
def watched(model):
    """A model, and what all layers of a cache hold after each attention, by storage."""
    pytest.importorskip("transformers")
    held: list[int] = []
    caches: list[Any] = []

    def note(*_) -> None:
        if caches:
            layers = caches[-1].layers
            held.append(sum(storage([*one.shelf.tensors, one.weights, *one.rows.values(), *(
                x for x in one.notes.values() if isinstance(x, torch.Tensor))]) for one in layers))  # fmt: skip

    hooks = [m.register_forward_hook(note) for n, m in model.named_modules() if n.endswith("self_attn")]
    yield model, caches, held
    for hook in hooks:
        hook.remove()


def read(model: Any, caches: list[Any], policy: Any, n: int, chunk: int, steps: int) -> Any:
    from tests.kv.tiny import prompt

    tokred.apply(model, policy)
    cache = tokred.kv_cache(model)
    caches.append(cache)
    for part in [*prompt(n).split(chunk, 1), *[prompt(1)] * steps]:
        model(part, past_key_values=cache)
    return cache


@pytest.mark.parametrize("name", FORMATS)
def test_a_budget_in_bytes_counts_the_newest_rows(name, watched):
    model, caches, held = watched
    policy = tokred.make("snapkv", budget="96 KiB", window=4, pool=3, store=FORMATS[name])
    cache = read(model, caches, policy, 500, 500, 0)
    assert cache.nbytes == held[-1] <= 96 * 1024
    assert cache.nbytes > 0.2 * 96 * 1024, "what there is is used"


@pytest.mark.parametrize("name", SMALL)
def test_a_limit_is_kept_by_storage(name, watched):
    model, caches, held = watched
    kib = 28 if name in ("nsnquant", "turbo") else 80  # or 180 rows would fit
    policy = tokred.Limited(tokred.make("snapkv", window=4, pool=3, store=FORMATS[name]), f"{kib} KiB", 20)
    cache = read(model, caches, policy, 180, 20, 6)
    assert max(held) <= cache.peak_bytes <= kib * 1024
    assert cache.peak_bytes > 0.5 * kib * 1024
    assert cache.get_seq_length() == 186
    assert not cache.layers[0].shelf.complete, "most rows are in codes"


def test_a_budget_over_all_layers_keeps_a_limit(watched):
    model, caches, held = watched
    policy = tokred.KVPolicy(score=tokred.kv.Window(4, 3), budget=Squeeze(), store=SMALL["kivi"])
    cache = read(model, caches, tokred.Limited(policy, "96 KiB", 8), 96, 8, 3)
    assert max(held) <= cache.peak_bytes <= 96 * 1024
    now = cache.nbytes
    for layer in cache.layers:
        layer.shelf.settle(None)
    assert cache.nbytes == now, "nothing waits in full precision when a forward is over"


def test_formats_whose_windows_are_larger_than_a_limit_hold_rows_as_they_come(watched):
    model, caches, held = watched
    policy = tokred.Limited(tokred.make("snapkv", window=4, pool=3, store="kivi"), "64 KiB", 16)
    cache = read(model, caches, policy, 128, 16, 3)
    assert max(held) <= 64 * 1024
    row = 2 * 16 * 4 + POSITION
    assert 30 < cache.layers[0].width < 64 * 1024 // (3 * 2 * row)


# ---------------------------------------------------------------- heads that hold different numbers of rows


ROWWISE = {
    "turbo": Turbo(),
    "mustafar": Mustafar(window=0),
    "oscar": Oscar(sinks=0, recent=0, block=1),
    "kivi": KIVI(group_size=2, residual_length=2),
}


@pytest.mark.parametrize("name", ROWWISE)
def test_tight_heads_hold_the_same_in_fewer_bytes(name):
    """Against the rectangle with its empty rows; of formats that round row by row the values are the same too."""
    store, padded = ROWWISE[name], ROWWISE[name].open()
    tight, plain = store.tight().open(), Plain()
    k, v = (torch.randn(B, H, 70, 8, generator=torch.Generator().manual_seed(i)) for i in (0, 1))
    begin, sizes = 0, (60, 1, 1, 5, 3)
    for i, n in enumerate(sizes):
        for shelf in (padded, tight):
            shelf.append(k[:, :, begin : begin + n], v[:, :, begin : begin + n])
        plain.append(*(x[:, :, begin : begin + n] for x in rows(70)))
        begin += n
        if i == 0:
            step = some_step(plain, 40, True, i)
            for shelf in (padded, tight):
                slots = shelf.positions(plain.seen)
                shelf.take(step, plain.slots if slots is None else slots)
            take(plain, step)
        for shelf in (padded, tight):
            shelf.settle(None)
        places = [shelf.positions(plain.seen) for shelf in (padded, tight)]
        assert torch.equal(*places)
        real = places[0] < 1000
        if name != "kivi":
            assert torch.equal(padded.keys[real], tight.keys[real])
            assert torch.equal(padded.values[real], tight.values[real])
        assert storage(tight.tensors) < 0.9 * storage(padded.tensors)
    q = torch.randn(B, 2 * H, 1, 8)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Affine, "why_slow", lambda self, query: None)
        found = tight.attend(Query(q, None, 5.0, lambda count: None))
    wide = [x.repeat_interleave(2, 1) for x in (tight.keys, tight.values, real)]
    logits = 5 * torch.tanh(q @ wide[0].mT * 8**-0.5 / 5)
    wanted = logits.masked_fill(~wide[2][:, :, None], -torch.inf).softmax(-1) @ wide[1]
    assert torch.allclose(found, wanted, atol=1e-4)


def test_uneven_heads_in_a_format_under_a_limit(watched):
    model, caches, held = watched
    policy = tokred.Limited(tokred.make("adakv", score=tokred.kv.Window(4, 3), store=SMALL["kivi"]), "80 KiB", 20)
    cache = read(model, caches, policy, 180, 20, 3)
    assert max(held) <= cache.peak_bytes <= 80 * 1024
    counts = (cache.layers[0].positions < 1000).sum(-1)
    assert (counts[..., 0] != counts[..., 1]).any()
    assert cache.layers[0].held < cache.layers[0].width, "the longest head does not decide"


def test_what_cannot_be_tight():
    with pytest.raises(ValueError, match="inner must be a format of kv other than 'mikv'"):
        tokred.kv.Tight("mikv")
    with pytest.raises(ValueError, match="without empty rows"):
        MiKV().tight()
