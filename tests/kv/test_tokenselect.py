"""TokenSelect: the worked examples of its paper, the laws of its votes and lists, and models."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

pytest.importorskip("transformers")

import tokred
from tests.kv.test_shadowkv import ANGLE, Turning, dense, query
from tests.kv.test_store_models import GREEDY, LOGITS
from tests.kv.tiny import FAMILIES, build, padded, prompt
from tokred.errors import MissingInputError
from tokred.kv import CacheSite, Padding, TokenSelect
from tokred.kv.stores import tokenselect
from tokred.kv.turning import turned

B, H, D, DV = 2, 2, 8, 6


pytestmark = pytest.mark.usefixtures("no_grad")


def rows(n: int, b: int = B, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(b, H, n, d, generator=generator) for d in (D, DV))  # type: ignore[return-value]


def add(shelf, k: Tensor, v: Tensor, n: int, mask: Tensor | None = None) -> None:
    """Rows, and the end of the forward that they came in, after which there are ``n``."""
    shelf.append(k, v)
    every = torch.zeros(len(k), H, n, D)
    shelf.settle(CacheSite(k=every, v=every, padding=None if mask is None else Padding(mask[:, :n]), rope=Turning()))


def step(shelf, k: Tensor, v: Tensor, q: Tensor, mask: Tensor | None = None) -> Tensor | None:
    """A query at the end of rows of which the last is new."""
    shelf.append(k[:, :, -1:], v[:, :, -1:])
    return shelf.attend(query(q, mask))


def listed(shelf, sample: int = 0) -> list[int]:
    return shelf._chosen.tokens[sample].nonzero().view(-1).tolist()


# ---------------------------------------------------------------- worked examples

LOGITS_OF_HEADS = torch.tensor([[[2.0, 0, 0, 1], [0, 3, 0, 0], [0, 0, 1, 1]]])
ALL = torch.ones(1, 4, dtype=torch.bool)


def test_votes():
    soft = TokenSelect().votes(LOGITS_OF_HEADS, ALL)[0]
    assert torch.allclose(soft, torch.tensor([0.788084, 1.087114, 0.491441, 0.633362]), atol=1e-6)
    assert soft.sum() == pytest.approx(3)
    assert soft.topk(2).indices.sort().values.tolist() == [0, 1]
    assert TokenSelect(vote="raw").votes(LOGITS_OF_HEADS, ALL)[0].tolist() == [2, 3, 1, 2]
    assert TokenSelect(vote="hard", budget=1).votes(LOGITS_OF_HEADS, ALL)[0].tolist() == [1, 1, 1, 0]
    pooled = TokenSelect(vote="raw", pool=3).votes(LOGITS_OF_HEADS, ALL)[0]
    assert pooled.tolist() == [3, 3, 3, 2]
    some = torch.tensor([[True, True, False, False]])
    assert TokenSelect().votes(LOGITS_OF_HEADS, some)[0, :2].sum() == pytest.approx(3)


def test_fingerprints_that_are_alike_take_the_list_over():
    a, b, c = torch.tensor([[1.0, 0, 1], [1, 0.1, 0.9], [0, 1, 0]])
    assert F.cosine_similarity(a, b, 0) == pytest.approx(0.995871, abs=1e-6)
    assert F.cosine_similarity(a, c, 0) == 0
    store = TokenSelect(budget=2, sinks=1, recent=8, positions="true")
    shelf, (k, v) = store.open(), rows(30, 1)
    add(shelf, k[:, :, :27], v[:, :, :27], 27)
    found = []
    for i, q in enumerate((a, b, c)):
        # A fingerprint holds the queries of all heads, here of three channels that are not zero.
        full = F.pad(q, (0, D - 3)).expand(1, H, 1, D)
        step(shelf, k[:, :, : 28 + i], v[:, :, : 28 + i], full)
        found.append(shelf._chosen.fingerprint[0, :3].tolist())
        shelf.settle(None)
    assert found == [a.tolist(), a.tolist(), c.tolist()]


@pytest.mark.parametrize("positions", ["true", "compact"])
def test_segments(positions):
    store = TokenSelect(budget=2, sinks=2, recent=3, positions=positions)
    shelf, (k, v) = store.open(), rows(10)
    add(shelf, k[:, :, :6], v[:, :, :6], 6)
    shelf.append(k[:, :, 6:7], v[:, :, 6:7])
    assert shelf.complete, "seven tokens are all attended to: the model's own attention does that"
    shelf.crop(1)
    add(shelf, k[:, :, 6:7], v[:, :, 6:7], 7)
    add(shelf, k[:, :, 7:9], v[:, :, 7:9], 9)
    q = torch.randn(B, H, 1, D, generator=torch.Generator().manual_seed(4))
    assert step(shelf, k, v, q) is not None
    assert all(set(listed(shelf, i)) <= {2, 3, 4, 5, 6} for i in range(B))
    assert all(len(listed(shelf, i)) == 2 for i in range(B))


def test_compact_positions():
    """Tokens 0, 1, 3, 5, 7, 8, 9 are at 0 to 6, the query at 6; for the vote it is at 3, and keys have not turned."""
    store = TokenSelect(budget=2, sinks=2, recent=3)
    shelf, (k, v) = store.open(), rows(10, 1)
    at = torch.arange(10)[None]
    plain = turned(k, at, ANGLE, back=True)
    q_plain = torch.randn(1, 2 * H, 1, D, generator=torch.Generator().manual_seed(4))
    add(shelf, k[:, :, :9], v[:, :, :9], 9)
    found = step(shelf, k, v, turned(q_plain, torch.tensor([[9]]), ANGLE))
    votes = (turned(q_plain, torch.tensor([[3]]), ANGLE).view(1, H, 2, D) @ plain.mT * D**-0.5).flatten(1, 2)
    best = votes[..., 2:7].softmax(-1).sum(1).topk(2).indices[0] + 2
    assert sorted(best.tolist()) == listed(shelf)
    tokens = [0, 1, *listed(shelf), 7, 8, 9]
    keys = turned(plain[:, :, tokens], torch.arange(7)[None], ANGLE)
    wanted = dense(turned(q_plain, torch.tensor([[6]]), ANGLE), keys, v[:, :, tokens])
    assert torch.allclose(found, wanted, atol=1e-5)
    assert torch.allclose(shelf.keys, k, atol=1e-5)


# ---------------------------------------------------------------- laws


def test_turning_is_undone_and_adds_up():
    x, a = torch.randn(1, 2, 4, 10), torch.arange(4)[None]
    assert torch.allclose(turned(turned(x, a, ANGLE), a, ANGLE, back=True), x, atol=1e-6)
    assert torch.allclose(turned(turned(x, a, ANGLE), a + 3, ANGLE), turned(x, 2 * a + 3, ANGLE), atol=1e-5)
    assert torch.equal(turned(x, a, ANGLE)[..., 8:], x[..., 8:])


@pytest.mark.parametrize("positions", ["true", "compact"])
@pytest.mark.parametrize("softcap", [None, 1.5])
def test_a_list_of_all_candidates_is_full_attention(positions, softcap):
    """In a padded batch; the longest sample has exactly as many rows as are searched, its neighbours fewer."""
    store = TokenSelect(budget=20, sinks=2, recent=3, positions=positions)
    mask = torch.ones(B, 26, dtype=torch.bool)
    mask[1, :11], mask[0, 4] = False, False
    shelf, (k, v) = store.open(), rows(26)
    if positions == "compact":
        k = turned(k, (mask.long().cumsum(1) - 1).clamp(min=0), ANGLE)
    add(shelf, k[:, :, :25], v[:, :, :25], 25, mask)
    assert not shelf.complete
    q = torch.randn(B, 2 * H, 1, D, generator=torch.Generator().manual_seed(4))
    shelf.append(k[:, :, 25:], v[:, :, 25:])
    found = shelf.attend(query(q, mask, softcap))
    logits = q.view(B, H, 2, D) @ k.mT * D**-0.5
    logits = logits if softcap is None else (logits / softcap).tanh() * softcap
    wanted = logits.masked_fill(~mask[:, None, None], -torch.inf).softmax(-1) @ v
    assert torch.allclose(found.view(wanted.shape), wanted, atol=1e-5)


def test_heads_of_a_group_are_alike_and_have_their_own_keys():
    store = TokenSelect(budget=3, sinks=1, recent=2, positions="true", theta=2)
    shelf, (k, v) = store.open(), rows(20, 1)
    k[:, 1] = 0
    add(shelf, k, v, 20)
    q = torch.randn(1, 4, 1, D, generator=torch.Generator().manual_seed(1))
    logits = shelf._logits(q[:, :, 0], query(q))
    votes = [store.votes(logits[:, h : h + 1], torch.ones(1, 20, dtype=torch.bool))[0] for h in range(4)]
    assert all(torch.allclose(votes[h], torch.full((20,), 1 / 20)) for h in (2, 3))
    assert all(votes[h].amax() > 2 / 20 for h in (0, 1))
    new = rows(1, 1, seed=8)
    shelf.append(*new)
    a = shelf.attend(query(q))
    swapped = shelf.attend(query(q[:, [1, 0, 2, 3]]))
    assert torch.allclose(a[:, [1, 0, 2, 3]], swapped, atol=1e-6)


def test_a_needle_is_found():
    store = TokenSelect(budget=1, sinks=1, recent=2, positions="true")
    shelf, (k, v) = store.open(), rows(20, 1)
    q = torch.zeros(1, H, 1, D)
    q[..., 0], k[..., 0] = 1.0, 0.0
    k[:, :, 7, 0] = 50.0
    add(shelf, k, v, 20)
    shelf.append(*rows(1, 1, seed=8))
    found = shelf.attend(query(q))
    assert listed(shelf) == [7]
    assert torch.allclose(found[0, :, 0], v[0, :, 7], atol=1e-3)


@pytest.mark.parametrize(("theta", "lists"), [(-1, 2), (2, 6)])
def test_lists_last_until_too_many_have_left_the_newest(theta, lists):
    store = TokenSelect(budget=3, sinks=1, recent=8, positions="true", theta=theta)
    shelf, (k, v) = store.open(), rows(40, 1)
    add(shelf, k[:, :, :24], v[:, :, :24], 24)
    seen, borders = [], []
    for n in range(25, 31):
        q = torch.randn(1, H, 1, D, generator=torch.Generator().manual_seed(n))
        found = step(shelf, k[:, :, :n], v[:, :, :n], q)
        border = int(shelf._chosen.border)
        borders.append(border)
        tokens = sorted({0, *listed(shelf), *range(border, n)})
        assert len(tokens) <= 1 + 3 + 8 + 4
        assert set(range(n - 8, n)) <= set(tokens), "the newest are always attended to"
        assert torch.allclose(found, dense(q, k[:, :, tokens], v[:, :, tokens]), atol=1e-5)
        seen.append(tuple(listed(shelf)))
        shelf.settle(None)
    assert len(set(borders)) == lists
    if theta < 0:
        assert len(set(seen[:5])) == 1


@pytest.mark.parametrize("positions", ["compact", "true"])
def test_a_step_puts_no_rows_together_that_nobody_reads(positions, monkeypatch):
    """What a site is shown is made when it is read, and is then what it was when it was shown."""
    shelf = TokenSelect(budget=4, sinks=1, recent=2, positions=positions).open()
    k, v = rows(42)
    add(shelf, k[:, :, :40], v[:, :, :40], 40)
    made = []
    restored = tokenselect._restored
    monkeypatch.setattr(tokenselect, "_restored", lambda *x: made.append(1) or restored(*x))
    assert step(shelf, k[:, :, :41], v[:, :, :41], torch.randn(B, 2 * H, 1, D)) is not None
    shown = shelf.show()
    assert not made
    assert shown[0].like.shape == (B, H, 41, D)
    shelf.settle(CacheSite(k=torch.zeros(B, H, 41, D), v=torch.zeros(B, H, 41, D), rope=Turning()))
    shelf.append(k[:, :, 41:], v[:, :, 41:])
    assert torch.allclose(shown[0].make(), k[:, :, :41], atol=1e-5)
    assert torch.equal(shown[1].make(), v[:, :, :41])
    assert len(made) == 2


def test_crops_and_samples():
    store = TokenSelect(budget=3, sinks=1, recent=4)
    shelf, (k, v) = store.open(), rows(30)
    add(shelf, k[:, :, :24], v[:, :, :24], 24)
    add(shelf, k[:, :, 24:], v[:, :, 24:], 30)
    kept = shelf.snapshot()
    q = torch.randn(B, H, 1, D, generator=torch.Generator().manual_seed(4))
    new = rows(1, seed=6)
    found = step(shelf, *new, q)
    shelf.restore(kept)
    index = torch.tensor([1, 1, 0])
    shelf.select(index, index.tolist)
    assert torch.allclose(step(shelf, *(x[index] for x in new), q[index]), found[index], atol=1e-6)
    shelf.restore(kept)
    shelf.crop(4)
    assert shelf.width == 26
    assert torch.allclose(shelf.keys, k[:, :, :26], atol=1e-5)


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"budget": 0}, ValueError, "budget must be an integer of at least 1, got 0"),
        ({"pool": 4}, ValueError, "pool must be odd, or 0 for none, got 4"),
        ({"theta": -2}, ValueError, "theta must be a number of at least -1"),
        ({"vote": "loud"}, ValueError, "vote is 'loud'; allowed are 'soft', 'raw', 'hard'"),
        ({"positions": "old"}, ValueError, "positions is 'old'; allowed are 'compact', 'true'"),
        ({"scaled": 1}, TypeError, "scaled must be True or False, got 1"),
    ],
)
def test_bad_parameters(given, error, message):
    with pytest.raises(error, match=message):
        tokred.make("tokenselect", **given)


# ---------------------------------------------------------------- models

SETTING = {"budget": 5, "sinks": 2, "recent": 6}


@pytest.mark.parametrize("positions", ["true", "compact"])
@pytest.mark.parametrize("family", ["llama", *(pytest.param(f, marks=pytest.mark.hosts) for f in FAMILIES[1:])])
def test_a_sample_is_answered_as_if_it_were_alone(family, positions):
    model = build(family)
    ids, mask, alone = padded((41, 24, 9))
    plain = model.generate(ids, attention_mask=mask, **LOGITS)
    tokred.apply(model, "tokenselect", positions=positions, **SETTING)
    together = model.generate(ids, attention_mask=mask, **LOGITS)
    for i, one in enumerate(alone):
        apart = model.generate(one, **LOGITS)
        assert all((a[0] - c[i]).abs().max() < 1e-4 for a, c in zip(apart.logits, together.logits, strict=True))
    assert torch.equal(together.logits[0], plain.logits[0]), "a prompt attends to everything"
    assert not torch.allclose(together.logits[-1][0], plain.logits[-1][0], atol=1e-3)
    # As many as there are, in a batch whose other samples are longer.
    assert torch.allclose(together.logits[2][2], plain.logits[2][2], atol=1e-4)


def test_short_contexts_are_the_models_own(model):
    plain = model.generate(prompt(30), **LOGITS)
    for given in ({"recent": 40}, {"budget": 40}):
        tokred.apply(model, "tokenselect", **{**SETTING, **given})
        assert all(map(torch.equal, model.generate(prompt(30), **LOGITS).logits, plain.logits))


def test_beams_turns_crops_and_drafts(model):
    ids, mask, _ = padded((41, 24))
    for positions in ("true", "compact"):
        tokred.apply(model, "tokenselect", positions=positions, **SETTING)
        assert model.generate(ids, attention_mask=mask, num_beams=3, **GREEDY).shape == (2, 47)
        assert model.generate(prompt(12).repeat(1, 4), prompt_lookup_num_tokens=3, **GREEDY).shape == (1, 54)
        cache = tokred.kv_cache(model)
        model(prompt(41), past_key_values=cache)
        wanted = model(prompt(41)).logits
        cache.crop(-5)
        again = model(prompt(41)[:, 36:], past_key_values=cache).logits
        assert torch.allclose(again, wanted[:, 36:], atol=1e-4), "several tokens attend to all rows"
        kept = cache.snapshot()
        a = model(prompt(1, seed=4), past_key_values=cache).logits
        cache.restore(kept)
        assert torch.equal(model(prompt(1, seed=4), past_key_values=cache).logits, a)


def test_what_does_not_go_is_refused(model):
    with pytest.raises(ValueError, match="cannot hold rows in the store 'tokenselect': eviction needs a store"):
        tokred.apply(model, "knorm", budget=9, store="tokenselect")
    other = build("glm4")
    with pytest.raises(MissingInputError, match="rotation"):
        tokred.apply(other, "tokenselect")
    tokred.apply(other, "tokenselect", positions="true", **SETTING)
    assert other.generate(prompt(41), **GREEDY).shape == (1, 47)
