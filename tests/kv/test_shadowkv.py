"""ShadowKV: the worked examples of its paper, the laws of a shadow against plain tensors, and models."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

pytest.importorskip("transformers")

import tokred
from tests.kv.test_store_models import GREEDY, LOGITS
from tests.kv.tiny import FAMILIES, build, padded, prompt
from tokred.errors import MissingInputError
from tokred.kv import CacheSite, Padding, ShadowKV
from tokred.kv.stores import Query
from tokred.kv.stores.shadows import Rotation, Shadow, landmarks_of, low_rank
from tokred.kv.turning import turned

B, H, D, DV = 2, 3, 8, 6
ANGLE = 10000.0 ** -(torch.arange(4) / 4)
SMALL = ShadowKV(budget=8, rank=H * D, chunk=4, outliers=2, local=1)


class Turning:
    """A rotary embedding, as far as a shadow asks it."""

    def turns(self):
        return ANGLE, 1.0


pytestmark = pytest.mark.usefixtures("no_grad")


def rows(n: int, b: int = B, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(b, H, n, d, generator=generator) for d in (D, DV))  # type: ignore[return-value]


def dense(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    mask = None if mask is None else mask[:, None, None]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)


def query(q: Tensor, padding: Tensor | None = None, softcap: float | None = None) -> Query:
    return Query(q, None, softcap, lambda n: None if padding is None else padding[:, padding.shape[1] - n :])


def filled(store: ShadowKV, n: int, b: int = B, mask: Tensor | None = None):
    """A shelf after a prompt of random rows, and these."""
    shelf, (k, v) = store.open(), rows(n, b)
    shelf.append(k, v)
    shelf.settle(CacheSite(k=k, v=v, padding=None if mask is None else Padding(mask), rope=Turning()))
    return shelf, k, v


# ---------------------------------------------------------------- worked examples


KEYS = [[1, 0, 0], [1, 0.2, 0], [0, 1, 0], [0, 1, 0.2], [0, 0, 1], [1, 0, -1], [0.5, 0.5, 0], [0.5, 0.4, 0]]


def test_landmarks_and_outliers():
    mean, least = landmarks_of(torch.tensor(KEYS).view(1, 1, 4, 2, 3))
    assert torch.allclose(mean[0, 0], torch.tensor([[1, 0.1, 0], [0, 1, 0.1], [0.5, 0, 0], [0.5, 0.45, 0]]))
    assert torch.allclose(least[0, 0], torch.tensor([0.995037, 0.995037, 0, 0.998314]), atol=1e-6)


def example() -> Shadow:
    """Four chunks of two keys, without a local part, of which the third is an outlier."""
    store = ShadowKV(budget=2, rank=3, chunk=2, outliers=1, local=1)
    k = torch.tensor(KEYS + [[0.0, 0, 0]] * 2).view(1, 1, 10, 3)
    return Shadow.of(store, k, k, ANGLE[:1])


def test_queries_of_a_group_choose_together():
    shadow = example()
    assert shadow.outliers.tolist() == [[[2]]]
    assert shadow.ids.tolist() == [[[0, 1, 3]]]
    q = torch.tensor([[0, 2, 0.1], [1, 0, 0]])
    p = (q * 3**-0.5 @ shadow.landmarks[0, 0].T).softmax(-1)
    assert torch.allclose(p, torch.tensor([[0.187216, 0.532331, 0.280453], [0.432781, 0.242956, 0.324263]]), atol=1e-6)
    assert torch.allclose(p.amax(0), torch.tensor([0.432781, 0.532331, 0.324263]), atol=1e-6)
    chosen = [
        shadow._replace(store=ShadowKV(budget=n, chunk=2)).choose(q.view(1, 1, 2, 3) * 3**-0.5, None).tolist()
        for n in (2, 4)
    ]
    assert chosen == [[[[1]]], [[[0, 1]]]]
    assert shadow.choose(torch.zeros(1, 1, 2, 3), None).tolist() == [[[0]]], "ties go to the older chunk"


def test_counts_of_a_prompt():
    store = ShadowKV(budget=64, outliers=48)
    assert store.chunks(1003) == 121
    k, v = rows(1003, 1)
    shadow = Shadow.of(store, k, v, ANGLE)
    assert shadow.local_keys.shape[2] == 35
    assert shadow.landmarks.shape[2] == 73


def test_memory_of_the_device():
    """131,072 tokens, 8 heads of 128, rank 160: 0.160 of the cache; here without memory of that size."""
    with torch.device("meta"):
        n, h, d, c, store = 131072, 8, 128, 8, ShadowKV()
        m = store.chunks(n)
        sizes = (n * store.rank, h * store.rank * d, (m - 48) * h * d, 2 * 48 * c * h * d, 2 * store.budget * h * d)
    local = 2 * 4 * c * h * d
    assert (sum(sizes) + local) / (2 * n * h * d) == pytest.approx(0.160, abs=5e-4)
    # The same formula, of memory really held by a smaller shadow.
    store = ShadowKV(budget=16, rank=5, chunk=4, outliers=2, local=2)
    shelf, k, _ = filled(store, 103, 1)
    shelf.append(k[:, :, :1], k[:, :, :1, :DV])
    assert shelf.attend(query(k[:, :, -1:])) is not None
    m, nbytes = store.chunks(103), {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in shelf.tensors}
    elements = 4 * m * 5 + H * 5 * D + (m - 2) * H * D + (2 * 4 + 16 + 11 + 1) * H * (D + DV)
    on_host = 4 * m * H * DV
    assert sum(t.nbytes for t in shelf.away) == 4 * on_host
    index = 8 * H * (m - 2 + 2 + 4) + ANGLE.nbytes  # int64: landmarks, outliers, the buffer
    assert sum(nbytes.values()) == 4 * (elements + on_host) + index


# ---------------------------------------------------------------- laws


def test_low_rank_keys_come_back():
    generator = torch.Generator().manual_seed(3)
    for n in (7, 60):
        x = torch.randn(B, n, 5, generator=generator) @ torch.randn(B, 5, 24, generator=generator)
        factor, basis = low_rank(x, 5)
        assert factor.shape == (B, n, 5)
        assert torch.allclose(factor @ basis, x, atol=1e-5)
        u, s, v = torch.linalg.svd(x, full_matrices=False)
        factor, basis = low_rank(x, 2)
        assert torch.allclose(factor @ basis, u[..., :2] * s[:, None, :2] @ v[:, :2], atol=1e-4), "the nearest"


def test_rotation_is_the_usual_one_and_can_be_undone():
    x, turn = torch.randn(1, 1, 5, 4, 10), Rotation(ANGLE, 4)
    order = turn.pairs(10)
    assert order.tolist() == [0, 4, 1, 5, 2, 6, 3, 7, 8, 9]
    found = turn.turn_pairs(x[..., order], torch.arange(5)[None, None])[..., order.argsort()]
    at = torch.arange(20.0)[:, None] * ANGLE
    cos, sin = torch.cat([at, at], -1).cos(), torch.cat([at, at], -1).sin()
    flat = x.flatten(2, 3)
    part = flat[..., :8]
    wanted = part * cos + torch.cat([-part[..., 4:], part[..., :4]], -1) * sin
    assert torch.allclose(found.flatten(2, 3), torch.cat([wanted, flat[..., 8:]], -1), atol=1e-5), "two do not turn"
    back = turned(found.flatten(2, 3), torch.arange(20)[None], ANGLE, back=True)
    assert torch.allclose(back, flat, atol=1e-6)


def test_every_row_is_in_one_place():
    store = ShadowKV(budget=8, rank=4, chunk=4, outliers=2, local=2)
    shelf, k, _ = filled(store, 71)
    (shadow,) = shelf._shadows
    both = torch.cat([shadow.ids, shadow.outliers], -1).sort(-1).values
    assert torch.equal(both, torch.arange(store.chunks(71)).expand_as(both))
    assert store.chunks(71) * 4 + shadow.local_keys.shape[2] == 71
    assert torch.equal(shadow.local_keys, k[:, :, store.chunks(71) * 4 :])
    assert shelf.width == 71


@pytest.mark.parametrize("softcap", [None, 1.5])
def test_all_chunks_and_full_rank_are_full_attention(softcap):
    shelf, k, v = filled(SMALL, 61)
    (shadow,) = shelf._shadows
    every = ShadowKV(budget=64, rank=H * D, chunk=4, outliers=2, local=1)
    shelf._shadows = (shadow._replace(store=every),)
    generator = torch.Generator().manual_seed(7)
    for _ in range(3):
        q, new = torch.randn(B, 2 * H, 1, D, generator=generator), rows(1, seed=9)
        shelf.append(*new)
        k, v = torch.cat([k, new[0]], 2), torch.cat([v, new[1]], 2)
        if softcap is None:
            wanted = dense(q, k, v)
        else:
            logits = q.view(B, H, 2, D) @ k.mT * D**-0.5
            wanted = ((logits / softcap).tanh() * softcap).softmax(-1) @ v
        assert torch.allclose(shelf.attend(query(q, softcap=softcap)).view(wanted.shape), wanted, atol=1e-5)
        assert torch.allclose(shelf.keys, k, atol=1e-5)
        assert torch.equal(shelf.values, v)


def test_chosen_chunks_are_what_is_attended_to_and_those_of_before_are_not_made_again(monkeypatch):
    shelf, k, v = filled(SMALL, 61)
    made, rebuilt = [], Shadow.rebuilt
    monkeypatch.setattr(Shadow, "rebuilt", lambda self, ids: made.append(ids.shape[2]) or rebuilt(self, ids))
    generator = torch.Generator().manual_seed(2)
    q = torch.randn(B, H, 1, D, generator=generator)
    for step in range(6):
        new = rows(1, seed=step)
        shelf.append(*new)
        k, v = torch.cat([k, new[0]], 2), torch.cat([v, new[1]], 2)
        q = q + 0.3 * torch.randn(q.shape, generator=generator)
        found = shelf.attend(query(q))
        (shadow,), (buffer,) = shelf._shadows, shelf._buffers
        seen = torch.zeros(B, H, 61 + step + 1, dtype=torch.bool)
        chunks = torch.cat([shadow.outliers, buffer.ids], -1)
        seen[:, :, : SMALL.chunks(61) * 4].view(B, H, -1, 4).scatter_(2, chunks[..., None].expand(-1, -1, -1, 4), True)
        seen[:, :, SMALL.chunks(61) * 4 :] = True
        wanted = F.scaled_dot_product_attention(q, k, v, attn_mask=seen[:, :, None])
        assert torch.allclose(found, wanted, atol=1e-5)
        assert (~seen).any()
    assert made[0] == 2
    assert len(made) < 6 or min(made) < 2, "what stays is not made again"


def test_the_buffer_is_what_would_be_made_anew():
    (shadow,) = filled(ShadowKV(budget=16, rank=5, chunk=4, outliers=2, local=1), 61)[0]._shadows

    def ids(*rows):
        return torch.tensor(rows).repeat(B, H // len(rows), 1)

    buffer = None
    for chosen in (
        ids([1, 3, 6, 8]),
        ids([1, 3, 6, 8], [1, 4, 6, 8], [0, 3, 5, 8]),
        ids([1, 2, 6, 8], [1, 4, 6, 8], [3, 5, 7, 8]),
        ids([9, 10, 11, 12]),
    ):
        buffer = shadow.bring(chosen, buffer)
        order = buffer.ids.argsort(-1)
        assert torch.equal(buffer.ids.gather(2, order), chosen)
        for found, wanted in ((buffer.keys, shadow.rebuilt(chosen)), (buffer.values, shadow.fetched(chosen))):
            in_order = found.gather(2, order[..., None].expand_as(found))
            assert torch.allclose(in_order, wanted, atol=1e-6)
    assert shadow.bring(chosen, buffer) is buffer
    with torch.inference_mode():
        assert shadow.bring(ids([8, 9, 10, 11]), buffer).keys is not buffer.keys, "of another mode"


def test_where_values_are_changes_nothing():
    found = []
    for offload in (True, False):
        shelf, k, _ = filled(ShadowKV(budget=8, rank=5, chunk=4, outliers=2, local=1, offload=offload), 61)
        shelf.append(*rows(1, seed=5))
        found.append(shelf.attend(query(k[:, :, -1:])))
        assert bool(list(shelf.away)) == offload
    assert torch.equal(*found)


def test_padded_samples_have_shadows_of_their_own():
    mask = torch.ones(3, 61, dtype=torch.bool)
    mask[1, :30], mask[2, :45] = False, False
    mask[0, 20:23] = False  # between two tokens
    shelf, k, v = filled(SMALL, 61, 3, mask)
    new = rows(2, 3, seed=4)
    shelf.append(*(x[:, :, :1] for x in new))
    shelf.append(*(x[:, :, 1:] for x in new))
    padding = torch.cat([mask, torch.tensor([[True, True], [False, True], [True, True]])], 1)
    q = torch.randn(3, H, 1, D, generator=torch.Generator().manual_seed(8))
    found = shelf.attend(query(q, padding))
    assert torch.allclose(shelf.keys[1, :, 30:61], k[1, :, 30:], atol=1e-5)
    for i in range(3):
        one = SMALL.open()
        alone = [x[i : i + 1, :, mask[i]] for x in (k, v)]
        one.append(*alone)
        one.settle(CacheSite(k=alone[0], v=alone[1], rope=Turning()))
        later = padding[i, 61:]
        one.append(*(x[i : i + 1, :, later] for x in new))
        wanted = dense(q[i : i + 1], *one.newest) if one.complete else one.attend(query(q[i : i + 1]))
        assert torch.allclose(found[i : i + 1], wanted, atol=1e-5), i
    assert [bool(s.ids.shape[2]) for s in shelf._shadows] == [True, True, False]
    index = torch.tensor([2, 0])
    shelf.select(index, index.tolist)
    assert torch.allclose(shelf.attend(query(q[index], padding[index])), found[index], atol=1e-6)


def test_crops_snapshots_and_refreshed_shadows():
    shelf, k, v = filled(SMALL, 61)
    new = rows(5, seed=4)
    shelf.append(*new)
    kept = shelf.snapshot()
    shelf.crop(3)
    assert not shelf.complete
    assert torch.allclose(shelf.keys, torch.cat([k, new[0][:, :, :2]], 2), atol=1e-5)
    shelf.crop(10)  # into the prompt, which becomes a rectangle again
    assert shelf.complete
    assert torch.allclose(shelf.keys, k[:, :, :53], atol=1e-5)
    shelf.restore(kept)
    assert torch.allclose(shelf.keys, torch.cat([k, new[0]], 2), atol=1e-5)
    for refresh, before in ((0, 61), (6, 61), (5, 66)):
        shelf, k, v = filled(ShadowKV(budget=8, rank=H * D, chunk=4, outliers=2, local=1, refresh=refresh), 61)
        shelf.append(*new)
        k, v = torch.cat([k, new[0]], 2), torch.cat([v, new[1]], 2)
        shelf.settle(CacheSite(k=k, v=v, rope=Turning()))
        assert shelf._slots_before == before
        assert torch.allclose(shelf.keys, k, atol=1e-5)


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"budget": 12}, ValueError, "budget must be a multiple of chunk=8, got 12"),
        ({"budget": 0}, ValueError, "budget must be an integer of at least 8, got 0"),
        ({"rank": 0}, ValueError, "rank must be an integer of at least 1, got 0"),
        ({"local": 0}, ValueError, "local must be an integer of at least 1"),
        ({"offload": 1}, TypeError, "offload must be True or False, got 1"),
    ],
)
def test_bad_parameters(given, error, message):
    with pytest.raises(error, match=message):
        tokred.make("shadowkv", **given)


# ---------------------------------------------------------------- models


SETTING = {"budget": 8, "chunk": 4, "outliers": 1, "local": 1}
# All chunks, by a budget that no prompt here fills, but for the rule that then nothing is made.
ALL = {**SETTING, "budget": 400, "rank": 1 << 10}


def near(a, c, most: float) -> bool:
    return all((x - y).abs().max() < most for x, y in zip(a.logits, c.logits, strict=True))


@pytest.mark.parametrize(
    "family", ["llama", *(pytest.param(f, marks=pytest.mark.hosts) for f in (*FAMILIES[1:], "qwen3_next"))]
)
def test_every_chunk_of_full_rank_is_the_models_own_answer(family, monkeypatch):
    """Also where only some channels of a head turn."""
    model = build(family)
    ids, mask, _ = padded((61, 40))
    plain = model.generate(ids, attention_mask=mask, **LOGITS)
    monkeypatch.setattr(ShadowKV, "chunks", lambda self, n: max(0, n // self.chunk - self.local))
    tokred.apply(model, "shadowkv", **ALL)
    found = model.generate(ids, attention_mask=mask, **LOGITS)
    assert near(found, plain, 1e-3)
    tokred.apply(model, "shadowkv", **{**ALL, "rank": 1})
    assert not near(model.generate(ids, attention_mask=mask, **LOGITS), plain, 1e-3), "shadows are what is attended to"


def test_prompts_no_longer_than_what_is_attended_to_are_exact(model):
    for n in (3, 19):
        assert ShadowKV(**SETTING).chunks(n) == 0
        plain = model.generate(prompt(n), **LOGITS)
        tokred.apply(model, "shadowkv", **SETTING)
        assert all(map(torch.equal, model.generate(prompt(n), **LOGITS).logits, plain.logits))
        tokred.remove(model)


def test_a_sample_is_answered_as_if_it_were_alone(model):
    ids, mask, alone = padded((61, 34, 12))
    tokred.apply(model, "shadowkv", rank=9, **SETTING)
    together = model.generate(ids, attention_mask=mask, **LOGITS)
    for i, one in enumerate(alone):
        apart = model.generate(one, **LOGITS)
        assert all((a[0] - c[i]).abs().max() < 1e-4 for a, c in zip(apart.logits, together.logits, strict=True))


def test_a_prompt_in_chunks_is_one_prompt(model):
    tokred.apply(model, "shadowkv", rank=9, **SETTING)
    whole = model.generate(prompt(61), **LOGITS)
    assert near(model.generate(prompt(61), prefill_chunk_size=16, **LOGITS), whole, 1e-4)


def test_drafts_second_turns_and_crops(model):
    tokred.apply(model, "shadowkv", rank=9, **SETTING)
    ids = prompt(12).repeat(1, 4)
    assert model.generate(ids, prompt_lookup_num_tokens=3, **GREEDY).shape == (1, 54)
    cache = tokred.kv_cache(model)
    model(ids, past_key_values=cache)
    model(prompt(6, seed=3), past_key_values=cache)
    a = model(prompt(1, seed=4), past_key_values=cache).logits
    cache.crop(-1)
    assert torch.equal(model(prompt(1, seed=4), past_key_values=cache).logits, a)
    kept = cache.snapshot()
    cache.crop(-20)
    assert model(prompt(1), past_key_values=cache).logits.isfinite().all()
    cache.restore(kept)
    assert cache.get_seq_length() == 55


def test_beams_and_memory(model):
    ids, mask, _ = padded((61, 40))
    tokred.apply(model, "shadowkv", rank=9, **SETTING)
    assert model.generate(ids, attention_mask=mask, num_beams=3, **GREEDY).shape == (2, 67)
    tokred.apply(model, "shadowkv", budget=16, rank=8, chunk=8, outliers=1, local=1)
    cache = tokred.kv_cache(model)
    model(prompt(400), past_key_values=cache)
    for row in cache.layer_rows():
        assert row.rows == 400
        # Values in host memory are half of all; of the keys, a landmark for eight and eight numbers for 32 are left.
        assert row.away_bytes / row.dense_bytes == pytest.approx(0.5, abs=0.03)
        assert 0.15 < (row.bytes - row.away_bytes) / row.dense_bytes < 0.32
    assert "in host memory" in str(tokred.report(model))


def test_what_does_not_go_is_refused(model):
    with pytest.raises(ValueError, match="snapkv cannot hold rows in the store 'shadowkv': eviction needs a store"):
        tokred.apply(model, "snapkv", budget=99, store="shadowkv")
    with pytest.raises(MissingInputError, match="rotation"):
        tokred.apply(build("glm4"), "shadowkv")
