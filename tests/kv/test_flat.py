"""Rows that lie flat: the laws of the cache hold as in a rectangle, and memory is what is held."""

from __future__ import annotations

import pickle
import random

import pytest
import torch

pytest.importorskip("transformers")

from torch.multiprocessing.reductions import StorageWeakRef

import tokred
from tests.kv.masked import farthest
from tests.kv.tiny import Scatter, build, padded, prompt
from tokred.kernels.decode_attention import SENTINEL
from tokred.kv import Adaptive, KeyNorm, Merge, When, Window
from tokred.kv.stores import Shelf
from tokred.kv.stores.flat import FlatRows, FlatShelf, attend_to_both, flatten
from tokred.kv.stores.rectangle import RectangleShelf

GREEDY = {"max_new_tokens": 6, "do_sample": False}
GATES = ((0.9, 0.1), (0.2, 0.8), (0.1, 0.3))
UNEVEN = {
    "scatter": Scatter(10),
    "adakv": tokred.make("adakv", budget=9, score=Window(4, 3), safe=0.0),
    "duoattention": tokred.make("duoattention", gates=GATES, sinks=2, recent=5),
    "merge": tokred.make(
        "kv", score=KeyNorm(), budget=Adaptive(9, safe=0.0), fate=Merge(2), when=When(every=1), sinks=1, recent=2
    ),
    "turns": tokred.make("kv", score=KeyNorm(), budget=Adaptive(9), when=When(turns=True), sinks=1),
    "windows": tokred.make(
        "kv", score=Window(4, 3), budget=Adaptive(9, safe=0.0), when=When(turns=True, every=3), recent=4
    ),
    "h2o": tokred.make("h2o", budget=0.4),  # uneven by the samples' lengths alone
}


pytestmark = pytest.mark.usefixtures("no_grad")


@pytest.fixture(scope="module")
def llama():
    return build("llama")


@pytest.fixture(autouse=True)
def unpatched(request):
    yield
    if "llama" in request.fixturenames:
        tokred.remove(request.getfixturevalue("llama"))


def both(model, policy):
    """A patched model, and an empty cache of each layout."""
    tokred.apply(model, policy)
    return [tokred.kv_cache(model, layout=layout) for layout in ("flat", "rectangle")]


def step_of(model, cache, ids, mask=None, position=None):
    return model(ids, attention_mask=mask, position_ids=position, past_key_values=cache).logits


def near(a, c, within=1e-6):
    return bool((a - c).abs().max() <= within * max(1.0, float(c.abs().max())))


def equal_rows(ours, theirs):
    """Whether two layers hold the same rows, whatever stands in the empty ones."""
    a, c = ours.positions, theirs.positions
    if not torch.equal(a, c):
        return False
    real = a != SENTINEL
    return all(near(getattr(ours, n)[real], getattr(theirs, n)[real], 1e-5) for n in ("keys", "values"))


# ---------------------------------------------------------------- the rows themselves


def ragged(seed, b=2, heads=3, n=7, d=4):
    """A rectangle with empty rows at the end of each head, of random lengths, some of them 0."""
    rng = random.Random(seed)
    counts = [rng.randint(0, n) for _ in range(b * heads)]
    counts[rng.randrange(b * heads)] = n
    torch.manual_seed(seed)
    keys, values = torch.randn(b, heads, n, d), torch.randn(b, heads, n, d)
    meant = torch.arange(n) < torch.tensor(counts).view(b, heads, 1)
    slots = torch.arange(n, dtype=torch.int32).expand(b, heads, n)
    return keys, values, slots, counts, meant


def made(seed, **shape) -> tuple[FlatRows, torch.Tensor, torch.Tensor, torch.Tensor]:
    keys, values, slots, counts, meant = ragged(seed, **shape)
    index = torch.arange(keys.shape[2]).expand(slots.shape)
    return flatten(None, keys, values, slots, index, counts, meant), keys, values, meant


@pytest.mark.parametrize("seed", range(6))
def test_flat_rows_come_back(seed):
    flat, keys, values, meant = made(seed)
    assert flat.rows == int(meant.sum())
    assert torch.equal(flat.rectangle(flat.keys, None)[meant], keys[meant])
    slots = flat.rectangle(flat.slots, None)
    assert torch.equal(slots != SENTINEL, meant)
    later = torch.randn(2, 3, 2, 4)
    wide = flat.rectangle(flat.values, later)
    assert torch.equal(wide[:, :, :-2][meant], values[meant])
    assert torch.equal(wide[:, :, -2:], later)


@pytest.mark.parametrize("seed", range(6))
def test_some_of_the_flat_and_of_the_later_rows_are_laid_flat_again(seed):
    flat, keys, _, meant = made(seed)
    later = torch.randn(2, 3, 2, 4)
    wide = torch.cat([keys, later], 2)
    real = torch.cat([meant, torch.ones(2, 3, 2, dtype=torch.bool)], 2)
    rng = random.Random(seed)
    index, chosen = torch.zeros(2, 3, 9, dtype=torch.long), torch.zeros(2, 3, 9, dtype=torch.bool)
    counts = []
    for i in range(2):
        for j in range(3):
            there = real[i, j].nonzero().view(-1).tolist()
            kept = sorted(rng.sample(there, rng.randint(0, len(there))))
            index[i, j, : len(kept)], chosen[i, j, : len(kept)] = torch.tensor(kept, dtype=torch.long), True
            counts.append(len(kept))
    again = flatten(flat, later, later, torch.zeros(2, 3, 9, dtype=torch.int32), index, counts, chosen)
    expected = wide.gather(2, index[..., None].expand(-1, -1, -1, 4))[chosen]
    assert torch.equal(again.keys, expected)
    if not counts or max(counts) == 0:
        assert again.rows == 0
    fewer = flatten(again, None, None, *_front(again))
    assert torch.equal(fewer.keys, again.rectangle(again.keys, None)[:, :, :1][_front(again)[-1]])


def _front(flat):
    """The first row of every head that has one."""
    lengths = flat.offsets.diff().view(flat.samples, flat.heads, 1)
    meant = lengths > 0
    index = torch.zeros(flat.samples, flat.heads, 1, dtype=torch.long)
    return index.int(), index, meant.flatten().int().tolist(), meant


def test_samples_are_selected():
    flat, keys, _, meant = made(3)
    some = flat.select([1, 1, 0])
    assert torch.equal(some.rectangle(some.keys, None)[meant[[1, 1, 0]]], keys[[1, 1, 0]][meant[[1, 1, 0]]])
    assert flat.select([0, 1]) is flat


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_attention_to_flat_and_later_rows_is_attention_to_all(dtype, softcap):
    for seed in range(4):
        flat, keys, values, meant = made(seed)
        flat = flat._replace(keys=flat.keys.to(dtype), values=flat.values.to(dtype))
        query = torch.randn(2, 6, 1, 4).to(dtype)
        later = torch.randn(2, 2, 3, 3, 4).to(dtype)
        mask = torch.tensor([[False, True, True], [False, False, False]])
        for shown in (None, mask):
            out = attend_to_both(query, flat, later[0], later[1], shown, 0.3, softcap)
            visible = torch.ones(2, 3) > 0 if shown is None else shown
            seen = torch.cat([meant, visible[:, None].expand(-1, 3, -1)], 2).repeat_interleave(2, 1)
            wide = [torch.cat([x.to(dtype), y], 2).repeat_interleave(2, 1).double() for x, y in
                    ((keys, later[0]), (values, later[1]))]  # fmt: skip
            logits = query.double() @ wide[0].mT * 0.3
            logits = logits if softcap is None else torch.tanh(logits / softcap) * softcap
            weights = logits.masked_fill(~seen[:, :, None], -torch.inf).softmax(-1).nan_to_num(0.0)
            within = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 2e-2}[dtype]
            assert (out.double() - weights @ wide[1]).abs().max() < within


# ---------------------------------------------------------------- laws


def evicting(model, batch):
    """Largest distances of :func:`farthest`, of a model whose cache holds its rows flat."""
    ids, mask, _ = padded((29, 17, 6)) if batch == "padded" else (prompt(29), None, None)
    cache, _ = both(model, Scatter(10))
    logits = step_of(model, cache, ids, mask)
    assert all(layer.shelf.flat is not None for layer in cache.layers if hasattr(layer, "positions"))
    return farthest(model, cache, logits, ids, mask, [prompt(m, len(ids), seed=20 + m) for m in (1, 1, 4, 1)])


@pytest.mark.parametrize("batch", ["one", "padded"])
@pytest.mark.parametrize("family", ["llama", "gemma3", "gemma2"])
def test_evicting_equals_masking(family, batch):
    ours, rounding = evicting(build(family), batch)
    assert ours < 2 * rounding < 1e-5


# Gemma 2's own attention takes its softmax in float32.
@pytest.mark.parametrize("batch", ["one", "padded"])
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_in_double_precision_to_the_last_digits(family, batch):
    assert evicting(build(family, torch.float64), batch)[0] < 1e-12


@pytest.mark.parametrize("name", UNEVEN)
def test_both_layouts_are_the_same_cache(llama, name):
    """Prompt, steps, a second turn, steps: logits, positions, rows and state."""
    ids, mask, _ = padded((24, 15))
    flat, rectangle = both(llama, UNEVEN[name])
    for tokens in (ids, *(prompt(m, 2, seed=m + 9) for m in (1, 1, 5, 1, 1, 1))):
        mask = torch.cat([mask, torch.ones_like(tokens)], 1)[:, : flat.get_seq_length() + tokens.shape[1]]
        position = (mask.cumsum(1) - 1).clamp(min=0)[:, -tokens.shape[1] :]
        a, c = (step_of(llama, cache, tokens, mask, position) for cache in (flat, rectangle))
        assert near(a[mask[:, -tokens.shape[1] :].bool()], c[mask[:, -tokens.shape[1] :].bool()], 2e-6)
    for ours, theirs in zip(flat.layers, rectangle.layers, strict=True):
        assert isinstance(theirs.shelf, RectangleShelf)
        assert not isinstance(theirs.shelf, FlatShelf)
        assert equal_rows(ours, theirs)
        assert ours.rows.keys() == theirs.rows.keys()
    assert any(layer.shelf.flat is not None for layer in flat.layers)
    assert flat.nbytes < rectangle.nbytes


@pytest.mark.parametrize("name", UNEVEN)
def test_rows_of_a_batch_equal_the_same_prompt_alone(llama, name):
    ids, mask, alone = padded((31, 20, 7))
    tokred.apply(llama, UNEVEN[name])
    options = {"return_dict_in_generate": True, "output_logits": True, **GREEDY}
    cache = tokred.kv_cache(llama, layout="flat")
    made = llama.generate(ids, attention_mask=mask, past_key_values=cache, **options)
    assert any(layer.shelf.flat is not None for layer in cache.layers)
    for i, row in enumerate(alone):
        one = llama.generate(row, past_key_values=tokred.kv_cache(llama, layout="flat"), **options)
        for a, c in zip(made.logits, one.logits, strict=False):
            assert (a[i] - c[0]).abs().max() < 2e-5, (name, i)


@pytest.mark.parametrize("name", UNEVEN)
def test_beams(llama, name):
    ids, mask, _ = padded((22, 14))
    flat, rectangle = both(llama, UNEVEN[name])
    options = {"num_beams": 3, "max_new_tokens": 6, "do_sample": False, "attention_mask": mask}
    ours, theirs = (llama.generate(ids, past_key_values=cache, **options) for cache in (flat, rectangle))
    assert torch.equal(ours, theirs)
    assert any(layer.shelf.flat is not None for layer in flat.layers)


def test_reorder_repeat_and_select(llama):
    ids, mask, _ = padded((20, 11, 16))
    flat, rectangle = both(llama, Scatter(8))
    for cache in (flat, rectangle):
        step_of(llama, cache, ids, mask)
        step_of(llama, cache, prompt(2, 3), torch.cat([mask, mask.new_ones(3, 2)], 1))
        cache.reorder_cache(torch.tensor([2, 0, 0]))
        cache.batch_repeat_interleave(2)
        cache.batch_select_indices(torch.tensor([0, 3, 1]))
    for ours, theirs in zip(flat.layers, rectangle.layers, strict=True):
        assert ours.shelf.flat is not None
        assert equal_rows(ours, theirs)
        assert ours.clock == theirs.clock
    longer = torch.cat([mask[[2, 0, 2]], mask.new_ones(3, 3)], 1)
    a, c = (step_of(llama, cache, prompt(1, 3), longer) for cache in (flat, rectangle))
    assert near(a, c)


def test_crop_takes_the_newest_tokens_back(llama):
    cache, _ = both(llama, Scatter(10))
    step_of(llama, cache, prompt(29))
    kept = cache.snapshot()
    step_of(llama, cache, prompt(7, seed=2))
    cache.crop(-5)
    a = step_of(llama, cache, prompt(1, seed=3))
    assert cache.get_seq_length() == 32
    cache.crop(-3)
    with pytest.raises(ValueError, match="rows were evicted"):
        cache.crop(-1)
    assert cache.get_seq_length() == 29
    cache.restore(kept)
    step_of(llama, cache, prompt(7, seed=2)[:, :2])
    assert near(step_of(llama, cache, prompt(1, seed=3)), a)


@pytest.mark.parametrize("name", UNEVEN)
def test_many_questions_on_one_context(llama, name):
    context = prompt(26, 2)
    cache, _ = both(llama, UNEVEN[name])
    step_of(llama, cache, context)
    kept, held, other = cache.snapshot(), cache.nbytes, pickle.loads(pickle.dumps(cache))
    ids = torch.cat([context, prompt(4, 2, seed=5)], 1)
    first = llama.generate(ids, past_key_values=cache, **GREEDY)
    cache.restore(kept)
    assert cache.nbytes == held
    assert torch.equal(llama.generate(ids, past_key_values=cache, **GREEDY), first)
    assert torch.equal(llama.generate(ids, past_key_values=other, **GREEDY), first)


def test_drafts_equal_greedy(llama):
    ids = prompt(6).repeat(1, 4)
    tokred.apply(llama, Scatter(10))
    greedy = llama.generate(ids, **GREEDY)
    cache = tokred.kv_cache(llama, layout="flat")
    assert torch.equal(llama.generate(ids, prompt_lookup_num_tokens=3, past_key_values=cache, **GREEDY), greedy)
    assert cache.layers[0].shelf.flat is not None


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype):
    model = build("llama", dtype)
    ids, mask, _ = padded((24, 15))
    flat, rectangle = both(model, Scatter(10))
    for tokens in (ids, prompt(1, 2, seed=2), prompt(3, 2, seed=3), prompt(1, 2, seed=4)):
        mask = torch.cat([mask, torch.ones_like(tokens)], 1)[:, : flat.get_seq_length() + tokens.shape[1]]
        a, c = (step_of(model, cache, tokens, mask) for cache in (flat, rectangle))
    assert flat.layers[0].shelf.flat.keys.dtype == dtype
    assert flat.layers[0].keys.dtype == dtype
    assert near(a.float(), c.float(), 0.05)


def test_with_gradients_recorded(llama):
    flat, rectangle = both(llama, Scatter(10))
    found = []
    for cache in (flat, rectangle):
        step_of(llama, cache, prompt(29))
        with torch.enable_grad():
            logits = step_of(llama, cache, prompt(1, seed=2))
            logits.square().sum().backward()
        found.append((logits.detach(), [p.grad for p in llama.parameters()]))
        llama.zero_grad(set_to_none=True)
    assert near(found[0][0], found[1][0])
    assert all(near(a, c, 1e-4) for a, c in zip(found[0][1], found[1][1], strict=True))


def test_what_a_merge_of_uneven_heads_weighs(llama):
    """Every token is in one row, whatever the number of rows of its head."""
    tokred.apply(llama, UNEVEN["merge"])
    cache = tokred.kv_cache(llama)
    step_of(llama, cache, prompt(29))
    lengths = set()
    for layer in cache.layers:
        real = layer.positions != SENTINEL
        assert (layer.weights * real).sum(-1).tolist() == [[29.0, 29.0]]
        lengths.update(real.sum(-1).flatten().tolist())
    assert len(lengths) > 1, "heads differ"


# ---------------------------------------------------------------- memory


def storages(layer):
    """Bytes of every storage that a layer keeps alive."""
    found, todo, seen = {}, [layer.__dict__], set()
    while todo:
        value = todo.pop()
        if isinstance(value, torch.Tensor):
            found[value.untyped_storage().data_ptr()] = value.untyped_storage().nbytes()
        elif isinstance(value, dict):
            todo += [v for k, v in value.items() if k != "engine"]
        elif isinstance(value, tuple | list):
            todo += list(value)
        elif isinstance(value, Shelf):
            todo.append(vars(value))
        seen.add(id(value))
    return found


@pytest.mark.parametrize("layout", ["flat", "rectangle"])
@pytest.mark.parametrize("name", ["adakv", "duoattention", "scatter"])
def test_evicted_rows_are_freed_and_what_is_held_is_counted(llama, name, layout):
    tokred.apply(llama, UNEVEN[name])
    cache, old = tokred.kv_cache(llama, layout=layout), []
    before = [layer.apply for layer in cache.layers]
    for layer, apply in zip(cache.layers, before, strict=True):

        def noting(step, score, layer=layer, apply=apply):
            old.extend(StorageWeakRef(t.untyped_storage()) for t in layer.newest)
            apply(step, score)

        layer.apply = noting
    step_of(llama, cache, prompt(200))
    evicted = len(old)
    assert evicted == 2 * sum(layer.compressed for layer in cache.layers) > 0
    assert all(reference.expired() for reference in old), "the storage of the whole prompt is gone"
    for layer in cache.layers:
        del layer.apply
        assert layer.nbytes == sum(storages(layer).values())
    step_of(llama, cache, prompt(1, seed=2))
    assert cache.nbytes == sum(sum(storages(layer).values()) for layer in cache.layers)
    if layout == "flat":
        for layer in cache.layers:
            if layer.shelf.flat is not None:
                rows = int((layer.positions != SENTINEL).sum()) - 2 * (layer.width - layer.shelf.flat.width)
                assert layer.shelf.flat.keys.untyped_storage().nbytes() == rows * 16 * 4


@pytest.mark.parametrize("name", ["adakv", "duoattention"])
def test_flat_holds_what_the_policy_keeps(llama, name):
    ids = prompt(200)
    policy = UNEVEN[name] if name == "duoattention" else tokred.make("adakv", budget=0.25, score=Window(4, 3), safe=0.0)
    tokred.apply(llama, policy)
    held = {}
    for layout in ("rectangle", "flat", "auto"):
        cache = tokred.kv_cache(llama, layout=layout)
        step_of(llama, cache, ids)
        held[layout] = cache.nbytes
        report = tokred.report(llama)
        assert report.bytes == cache.nbytes
        kept = sum(int((layer.positions != SENTINEL).sum()) for layer in cache.layers if layer.compressed)
        kept += sum(2 * layer.width for layer in cache.layers if not layer.compressed)
        least = kept * (2 * 16 * 4)
        assert least <= cache.nbytes
        if layout == "flat":
            assert cache.nbytes <= least + kept * 4 + 3 * 3 * 8, "rows, their slots, and where heads begin"
    assert held["flat"] < held["rectangle"]
    assert held["auto"] <= held["rectangle"]
    if name == "duoattention":
        # Two heads of four in the first two layers keep 200 rows, the others 7.
        assert held["auto"] == held["flat"] < 0.6 * held["rectangle"]


def test_auto_is_flat_where_a_rectangle_would_waste_much(llama):
    ids, mask, _ = padded((40, 38))
    for lengths, flat in (((40, 38), False), ((40, 20), True)):
        ids, mask, _ = padded(lengths)
        tokred.apply(llama, "knorm", budget=0.5)
        cache = tokred.kv_cache(llama)
        step_of(llama, cache, ids, mask)
        assert {layer.shelf.flat is not None for layer in cache.layers} == {flat}
    tokred.apply(llama, "knorm", budget=9)
    for layout in ("auto", "flat"):
        cache = tokred.kv_cache(llama, layout=layout)
        step_of(llama, cache, ids, mask)
        assert all(layer.shelf.flat is None for layer in cache.layers), "nothing is wasted"
    with pytest.raises(ValueError, match="allowed are 'auto', 'rectangle', 'flat'"):
        tokred.kv_cache(llama, layout="ragged")


def test_crop_frees_what_it_takes_back(llama):
    tokred.apply(llama, "snapkv", budget=9, window=4)
    cache = tokred.kv_cache(llama)
    step_of(llama, cache, prompt(20))
    step_of(llama, cache, prompt(200, seed=2))
    cache.crop(-200)
    assert {layer.keys.untyped_storage().nbytes() for layer in cache.layers} == {9 * 2 * 16 * 4}
    assert all(layer.nbytes == sum(storages(layer).values()) for layer in cache.layers)
