"""Laws of every store that the registry knows, against plain tensors; and what a policy makes of a store."""

from __future__ import annotations

import importlib
import sys
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from torch import Tensor

import tokred
from tokred.core.method import from_dict
from tokred.core.reduction import Reduction
from tokred.core.registry import parts
from tokred.kernels.decode_attention import SENTINEL
from tokred.kv import CacheSite, Flat, Half, Merge, Rectangle, Store
from tokred.kv.described import POSITION, Made, Place
from tokred.kv.parts import as_part
from tokred.kv.stores import ABILITIES, Query
from tokred.kv.stores.coded import Coded
from tokred.kv.stores.store import missing
from tokred.kv.stores.tight import Tight

B, H, D, DV = 2, 3, 8, 6
STORES = [n for n in parts if issubclass(parts.get(n), Store) and parts.get(n).__module__.startswith("tokred.")]


@pytest.fixture(autouse=True)
def nothing_is_compiled(monkeypatch):
    monkeypatch.setenv("TOKRED_KERNELS", "torch")


def rows(n: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(B, H, n, d, generator=generator).to(dtype) for d in (D, DV))  # type: ignore[return-value]


# Which heads of six numbers do not fit; or whose rows are foretold by a network. See test_formats.py, test_nsnquant.py,
# test_tokenbutler.py.
for _other in ("oscar", "nsnquant", "tokenbutler"):
    STORES.remove(_other)


def tolerance(store: Store, dtype: torch.dtype = torch.float32) -> float:
    """How far settled rows may be from those that were given: not at all, where as many bits are held."""
    if isinstance(store, Coded | Tight):
        return 3.0  # of numbers of -4 to 4, more than once; what rounding does is told in test_coded.py
    keys, values = rows(1, dtype=dtype)
    bits = 8 * (store.row_bytes(keys, values) - POSITION) / (D + DV)
    return 0.0 if bits >= 8 * dtype.itemsize else 4 * 2.0 ** -(bits / 2)


def near(found: Tensor, wanted: Tensor, most: float) -> bool:
    assert found.dtype == wanted.dtype
    return torch.equal(found, wanted) if most == 0 else bool((found - wanted).abs().max() <= most)


def read(x: Tensor | Made) -> Tensor:
    return x.make() if isinstance(x, Made) else x


class Plain:
    """Rows as plain tensors: what every shelf has to equal."""

    def __init__(self) -> None:
        self.k, self.v = torch.zeros(B, H, 0, D), torch.zeros(B, H, 0, DV)
        self.slots = torch.zeros(B, H, 0, dtype=torch.int32)
        self.seen = 0

    def append(self, k: Tensor, v: Tensor) -> None:
        new = torch.arange(self.seen, self.seen + k.shape[2], dtype=torch.int32).expand(*k.shape[:2], -1)
        self.k, self.v = torch.cat([self.k, k], 2), torch.cat([self.v, v], 2)
        self.slots, self.seen = torch.cat([self.slots, new], 2), self.seen + k.shape[2]

    def each(self, change) -> None:
        self.k, self.v, self.slots = change(self.k), change(self.v), change(self.slots)


def same(shelf, plain: Plain, most: float) -> None:
    """Real rows stand at the same places; empty ones hold anything, and nobody asks for rows that are not there."""
    real = plain.slots != SENTINEL
    width = int(real.sum(-1).max()) if real.numel() else 0
    later = shelf.positions(plain.seen)
    assert shelf.width == plain.k.shape[2] or (shelf.width >= width and later is not None)
    positions = plain.slots if later is None else later
    shown = zip(shelf.show(), (plain.k, plain.v), strict=True)
    for made, wanted in ((shelf.keys, plain.k), (shelf.values, plain.v), *shown):
        found = read(made)
        there = positions != SENTINEL
        assert torch.equal(there.sum(-1), real.sum(-1))
        assert near(found[there], wanted[real], most)
        like = made.like if isinstance(made, Made) else made
        assert like.shape == found.shape
        assert like.dtype == wanted.dtype
    assert torch.equal(positions[positions != SENTINEL], plain.slots[real])


def some_step(plain: Plain, keep: int, ragged: bool, seed: int) -> Reduction:
    """Rows of every head, in order, of which the first ones are meant."""
    generator = torch.Generator().manual_seed(seed)
    n = plain.k.shape[2]
    real = plain.slots != SENTINEL
    score = torch.rand(plain.slots.shape, generator=generator).masked_fill(~real, -1)
    index = score.topk(keep, -1).indices.sort(-1).values
    if not ragged:
        return Reduction.keep(index, n)
    counts = torch.randint(1, keep + 1, (*plain.slots.shape[:2], 1), generator=generator)
    counts[0, 0] = keep
    meant = (torch.arange(keep) < counts) & real.gather(2, index)
    return Reduction.keep(index, n, meant)


def take(plain: Plain, step: Reduction) -> None:
    index = step.representative
    plain.k = plain.k.gather(2, index.unsqueeze(-1).expand(-1, -1, -1, D))
    plain.v = plain.v.gather(2, index.unsqueeze(-1).expand(-1, -1, -1, DV))
    plain.slots = plain.slots.gather(2, index)
    if step.mask is not None:
        plain.slots = plain.slots.masked_fill(~step.mask, SENTINEL)


def slots_of(shelf, plain: Plain) -> Tensor:
    found = shelf.positions(plain.seen)
    return plain.slots if found is None else found


# ---------------------------------------------------------------- laws of a shelf


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", STORES)
def test_rows_are_shown_as_they_were_given(name, dtype):
    store = parts.get(name)()
    shelf = store.open()
    assert shelf.width == 0
    assert shelf.keys is None
    assert shelf.values is None
    given = [rows(n, n, dtype) for n in (7, 1, 3)]
    for i, (k, v) in enumerate(given):
        shelf.append(k, v)
        fresh = read(shelf.show()[0])[:, :, -k.shape[2] :], read(shelf.show()[1])[:, :, -k.shape[2] :]
        assert all(torch.equal(a, b) for a, b in zip(fresh, (k, v), strict=True)), "until they are settled"
        shelf.settle(None)
        wanted = [torch.cat(x, 2) for x in zip(*given[: i + 1], strict=True)]
        assert near(shelf.keys, wanted[0], tolerance(store, dtype))
        assert near(read(shelf.show()[1]), wanted[1], tolerance(store, dtype))
        assert (shelf.width, shelf.samples) == (wanted[0].shape[2], B)
        assert not shelf.moved
        assert shelf.positions(wanted[0].shape[2]) is None


@pytest.mark.parametrize("settled", [False, True])
@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("name", STORES)
def test_any_course_of_events_equals_plain_tensors(name, ragged, settled):
    store = parts.get(name)()
    if not {"take", *(["ragged"] if ragged else [])} <= store.can:
        pytest.skip(f"{name} cannot, and says so")
    shelf, plain, most = store.open(), Plain(), tolerance(store)
    for seed in range(4):
        for n in (9, 1, 2):
            k, v = rows(n, 10 * seed + n)
            shelf.append(k, v)
            plain.append(k, v)
            if settled:
                shelf.settle(None)
        step = some_step(plain, 6, ragged, seed)
        shelf.take(step, slots_of(shelf, plain))
        take(plain, step)
        same(shelf, plain, most)
        assert shelf.moved
        if shelf.width < plain.k.shape[2]:  # all heads are shorter than was asked for
            plain.each(lambda x: x[:, :, : shelf.width])
        shelf.settle(None)
        same(shelf, plain, most)
        kept, held = shelf.snapshot(), (plain.k, plain.v, plain.slots, plain.seen)
        shelf.append(*rows(5, seed))
        plain.append(*rows(5, seed))
        shelf.settle(None)
        if "crop" in store.can:
            shelf.crop(3)
            plain.each(lambda x: x[:, :, :-3])
            plain.seen -= 3
            same(shelf, plain, most)
        index = torch.tensor([1, 0]) if seed % 2 else torch.tensor([1, 1])
        shelf.select(index, index.tolist)
        plain.each(lambda x, index=index: x[index])
        same(shelf, plain, most)
        shelf.restore(kept)
        plain.k, plain.v, plain.slots, plain.seen = held
        same(shelf, plain, most)


@pytest.mark.parametrize("name", STORES)
def test_more_and_fewer_samples(name):
    shelf, plain = parts.get(name)().open(), Plain()
    shelf.append(*rows(5))
    plain.append(*rows(5))
    shelf.settle(None)
    for index in (torch.tensor([0, 0, 1, 1, 1]), torch.tensor([4]), torch.tensor([0])):
        shelf.select(index, index.tolist)
        plain.each(lambda x, index=index: x[index])
        assert shelf.samples == len(index)
        same(shelf, plain, tolerance(parts.get(name)()))


@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("name", STORES)
def test_merged_rows_are_weighted_means(name, ragged):
    store = parts.get(name)()
    if "merge" not in store.can:
        pytest.skip(f"{name} cannot, and says so")
    shelf, plain = store.open(), Plain()
    shelf.append(*rows(12, 3))
    plain.append(*rows(12, 3))
    weights = torch.rand(B, H, 12) + 0.5
    counts = torch.tensor([[5, 3, 4], [4, 5, 2]]) if ragged else (5, 5)
    score = torch.rand(B, H, 12, generator=torch.Generator().manual_seed(4))
    step = Merge(2).reduce(CacheSite(k=plain.k, v=plain.v), score, None, counts)
    assert (step.mask is not None) == ragged
    shelf.merge(step, slots_of(shelf, plain), weights)
    for b in range(B):
        for h in range(H):
            members = [{int(i)} for i in step.representative[b, h]]
            for source, slot in zip(step.source[b, h].tolist(), step.target[b, h].tolist(), strict=True):
                if slot >= 0:
                    members[slot].add(source)
            slots = shelf.positions(12)[b, h]
            for j, group in enumerate(members):
                if step.mask is not None and not step.mask[b, h, j]:
                    assert j >= len(slots) or slots[j] == SENTINEL
                    continue
                w = weights[b, h, list(group)]
                wanted = (plain.k[b, h, list(group)] * w[:, None]).sum(0) / w.sum()
                assert near(shelf.keys[b, h, j], wanted, tolerance(store) + 1e-6)
                assert slots[j] == max(group)


@pytest.mark.parametrize("name", STORES)
def test_detached_rows_come_again(name):
    shelf = parts.get(name)().open()
    shelf.append(*rows(9))
    k, v = shelf.detach(3)
    assert torch.equal(k, rows(9)[0][:, :, -3:])
    assert torch.equal(v, rows(9)[1][:, :, -3:])
    assert shelf.width == 6
    shelf.settle(None)
    shelf.append(k, v)
    assert torch.equal(read(shelf.show()[0])[:, :, -3:], k)


@pytest.mark.parametrize("name", STORES)
def test_an_answer_without_unpacking_is_the_attention_over_the_rectangle(name):
    store = parts.get(name)()
    shelf, plain = store.open(), Plain()
    for n in (9, 1):
        shelf.append(*rows(n, n))
        plain.append(*rows(n, n))
        if n > 1 and "ragged" in store.can:
            step = some_step(plain, 6, True, 1)
            shelf.take(step, slots_of(shelf, plain))
            take(plain, step)
        if n > 1:
            shelf.settle(None)
    q = torch.randn(B, 2 * H, 1, D, generator=torch.Generator().manual_seed(1))
    found = shelf.attend(Query(q, None, 5.0, lambda count: None))
    assert (found is not None) <= ("attend" in store.can)
    assert shelf.complete or found is not None or isinstance(store, Coded | Tight)  # nothing is compiled here
    if found is None:
        return
    places = shelf.positions(10)
    hidden = torch.zeros(B, H, 10, dtype=torch.bool) if places is None else places == SENTINEL
    k, v, hidden = (x.repeat_interleave(2, 1) for x in (shelf.keys, shelf.values, hidden))
    logits = 5 * torch.tanh(q @ k.mT * D**-0.5 / 5)
    wanted = logits.masked_fill(hidden[:, :, None], -torch.inf).softmax(-1) @ v
    assert (found - wanted).abs().max() < 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", STORES)
def test_rows_cost_what_they_are_said_to(name, dtype):
    """Measured by storage: settled rows, rows that have come, and rows of uneven heads."""
    store = parts.get(name)()
    k, v = rows(200, dtype=dtype)
    row, fresh = store.row_bytes(k, v), store.fresh_bytes(k, v)
    settled = Place(H, row, whole=store.whole_rows(k, v)).held(200)
    assert row <= fresh

    def held(shelf) -> int:
        return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in shelf.tensors}.values())

    shelf = store.open()
    shelf.append(k, v)
    notes = B * store.note_bytes(H, D, uneven=False)
    assert held(shelf) <= B * H * 200 * fresh + notes
    shelf.settle(None)
    # Of formats a row has its share of evicted ones and of room, a third and an eighth, which there are none of here.
    least = 0.45 if isinstance(store, Coded | Tight) else 0.5
    assert B * H * 200 * (row - POSITION) * least < held(shelf) <= B * settled + notes
    if "tight" not in store.can:
        with pytest.raises(ValueError, match="without empty rows"):
            store.tight()
        return
    store = store.tight()
    shelf, plain = store.open(), Plain()
    shelf.append(k, v)
    plain.append(k.float(), v.float())
    step = some_step(plain, 100, True, 2)
    shelf.take(step, plain.slots)
    shelf.settle(None)
    heads = sum(Place(1, row, whole=store.whole_rows(k, v)).held(int(n)) for n in step.mask.sum(-1).flatten())
    assert held(shelf) <= heads + B * store.note_bytes(H, D, uneven=True)


@pytest.mark.parametrize("name", STORES)
def test_a_store_is_a_part_like_any_other(name):
    store = parts.get(name)()
    assert as_part(name, Store, "store") == store
    assert as_part(store.to_dict(), Store, "store") == store
    assert store.can <= ABILITIES.keys()
    policy = tokred.KVPolicy(store=name)
    assert from_dict(policy.to_dict()) == policy
    assert policy.parts.store == store
    for preset in ("snapkv", "cake", "rpc", "duoattention", "kvzip"):
        made = tokred.make(preset, store=name)
        assert made.parts.store == store
        assert from_dict(made.to_dict()) == made


def test_bad_stores():
    with pytest.raises(ValueError, match="store is 'hal'; did you mean 'half'"):
        tokred.KVPolicy(store="hal")
    with pytest.raises(TypeError, match=r"store must be a store of tokred\.kv"):
        tokred.SnapKV(store="window")
    with pytest.raises(ValueError, match="dtype must be 'bfloat16' or 'float16', got 'int8'"):
        Half("int8")
    with pytest.raises(ValueError, match="waste must lie in"):
        Flat(1.5)


def test_what_is_missing_is_said_in_words():
    assert missing(Flat(), {"take": "eviction", "tight": "a limit"}) == ""
    found = missing(Rectangle(), {"take": "eviction", "tight": "a limit"})
    assert found == "a limit needs a store that can hold uneven heads without empty rows"


def test_half_keeps_what_float16_cannot_hold_finite():
    shelf = Half("float16").open()
    k, v = rows(3)
    shelf.append(k * 1e6, v)
    shelf.settle(None)
    assert shelf.keys.isfinite().all()
    assert shelf.keys.abs().max() == torch.finfo(torch.float16).max


@dataclass(frozen=True)
class Bare(Rectangle):
    """A rectangle that can do little, which its shelf is never asked for more than."""

    name: ClassVar[str] = "little"
    can: ClassVar[frozenset[str]] = frozenset({"take"})


@pytest.mark.parametrize(
    ("policy", "why"),
    [
        (tokred.ZeroMerge(budget=9, tail=3, store=Bare()), "the fate 'merge' needs a store that can average rows"),
        (tokred.AdaKV(store=Bare()), "the budget 'adaptive' needs a store that can hold different numbers"),
        (
            tokred.Limited(tokred.AdaKV(store="rectangle")),
            "under a hard limit needs a store that can hold uneven",
        ),
    ],
)
def test_a_policy_that_needs_more_is_refused_before_anything_is_touched(policy, why):
    with pytest.raises(ValueError, match=why):
        policy.check(3)


def test_two_parts_of_one_name_are_an_error_that_names_both():
    with pytest.raises(ValueError, match=r"'half' is taken by tokred\.kv\.stores\.half:Half; .*test_stores:"):

        @dataclass(frozen=True)
        class Half(Rectangle):
            name: ClassVar[str] = "half"

    assert parts.get("half").__module__ == "tokred.kv.stores.half"


@pytest.mark.parametrize(
    ("module", "name"),
    [("tokred.kv.scores", "Window"), ("tokred.kv.scores.window", "pooled"), ("tokred.kv.scores.gumbel", "gumbel")],
)
def test_scores_are_found_under_their_old_paths(module, name, monkeypatch):
    for known in [m for m in sys.modules if m.startswith("tokred.kv.scores")]:
        monkeypatch.delitem(sys.modules, known)
    with pytest.warns(tokred.errors.MovedWarning, match="has moved to tokred"):
        assert getattr(importlib.import_module(module), name).__name__ == name


def test_every_score_has_a_row_in_the_table_and_a_name_in_the_package():
    scores = {name: parts.get(name) for name in parts if issubclass(parts.get(name), tokred.kv.Score)}
    ours = {name: cls for name, cls in scores.items() if cls.__module__.startswith("tokred.")}
    assert ours.keys() == tokred.methods.SCORES.keys()
    for cls in ours.values():
        assert getattr(tokred.kv, cls.__name__) is cls
        assert cls.__name__ in tokred.kv.__all__
    with pytest.raises(AttributeError, match="has no attribute 'Windows'"):
        _ = tokred.kv.Windows
