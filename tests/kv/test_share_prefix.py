"""RelayAttention: the worked example, and caches of batches that begin with one prefix."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("transformers")

import tokred
from tests.kv.tiny import build, prompt
from tests.registered import examples
from tokred.errors import NothingRecordedError, UnsupportedModelError
from tokred.kernels.attention import attention_with_lse
from tokred.kv.stores import Rectangle, shared
from tokred.kv.stores.shared import fused

GREEDY = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None}
LOGITS = {"return_dict_in_generate": True, "output_logits": True, **GREEDY}
PREFIX = prompt(21)
ALL = ("snapkv", {"budget": 1.0})
SNAP = ("snapkv", {"budget": 9, "window": 4, "pool": 3})


pytestmark = pytest.mark.usefixtures("no_grad")


def batch(lengths=(6, 6, 6)):
    """Prompts that begin alike: ids and mask, padded behind the prefix, and each sample alone."""
    width = max(lengths)
    ids = torch.zeros(len(lengths), 21 + width, dtype=torch.long)
    mask, alone = torch.zeros_like(ids), []
    for i, n in enumerate(lengths):
        own = prompt(n, seed=5 + i)
        ids[i, :21], mask[i, :21] = PREFIX[0], 1
        ids[i, 21 + width - n :], mask[i, 21 + width - n :] = own[0], 1
        alone.append(torch.cat([PREFIX, own], 1))
    return ids, mask, alone


def logits(model, ids, cache=None, **more):
    given = {} if cache is None else tokred.cache_kwargs(cache)
    return torch.stack(model.generate(ids, **given, **LOGITS, **more).logits, 1)


# ------------------------------------------------------------------ two parts of one attention


def test_worked_example():
    q = torch.tensor([[[[1.0, 0.5]]]])
    prefix = torch.eye(2)[None, None]
    own = torch.tensor([[1.0, 1], [-1, 0], [0, 2]])[None, None], torch.tensor([[2.0, 2], [3, 0], [0, 3]])[None, None]
    first, second = attention_with_lse(q, prefix, prefix), attention_with_lse(q, *own)
    close = lambda a, b: torch.allclose(a.view(-1), torch.tensor(b), atol=1e-5)  # noqa: E731
    assert close(first.output, [0.587479, 0.412521])
    assert close(first.lse, [1.239022])
    assert close(second.output, [1.341309, 2.192621])
    assert close(second.lse, [1.688149])
    assert close(torch.sigmoid(first.lse - second.lse), [0.389568])
    out, lse = fused([first.output, second.output], [first.lse, second.lse])
    assert close(out, [1.047641, 1.499151])
    assert close(lse, [2.181738])


def test_any_split_is_the_attention_over_all():
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 3, n, 8) for n in (5, 12, 12))
    whole = F.scaled_dot_product_attention(q, k, v)
    for cuts in ((4, 8), (1, 11), (5, 4, 3), (3, 3, 3, 3), (12, 0), (0, 12)):
        parts = [attention_with_lse(q, a, b) for a, b in zip(k.split(cuts, 2), v.split(cuts, 2), strict=True)]
        outs, lses = [p.output for p in parts], [p.lse for p in parts]
        found, _ = fused(outs, lses)
        assert torch.allclose(found, whole, atol=1e-6)
        moved, _ = fused(outs, [x + 3.0 for x in lses])
        assert torch.allclose(moved, whole, atol=1e-5)
        assert torch.allclose(fused(outs[::-1], lses[::-1])[0], whole, atol=1e-6)


def test_segments_without_rows():
    out = torch.tensor([[1.0, 2.0]])
    none = torch.full((1,), -torch.inf)
    nan = torch.full((1, 2), torch.nan)
    assert torch.equal(fused([out, nan], [torch.zeros(1), none])[0], out)
    zero, lse = fused([nan, nan], [none, none])
    assert torch.equal(zero, torch.zeros(1, 2))
    assert lse.item() == -torch.inf


# ------------------------------------------------------------------ models


MORE = ("mistral", "phi3", "granite", "mixtral", "olmo2", "gpt_neox", "smollm3")
HOSTS = ["llama", "gemma3", "gemma2", "gpt_oss", *(pytest.param(n, marks=pytest.mark.hosts) for n in MORE)]


@pytest.mark.parametrize("family", HOSTS)
def test_a_shared_prefix_is_the_prompt(family):
    """Also with windows, which keep rows of their own, and with caps and sinks, which attend to all rows at once."""
    model = build(family)
    windows = getattr(model.config, "sliding_window", None)
    ids, mask, alone = batch((6, 6, 6) if windows else (6, 4, 5))
    wanted = [logits(model, one) for one in alone]
    tokred.apply(model, ALL[0], **ALL[1])
    cache = tokred.share_prefix(model, PREFIX)
    found = logits(model, ids, cache, attention_mask=mask)
    assert all(torch.allclose(a, b[0], atol=2e-5) for a, b in zip(found, wanted, strict=True))
    assert cache.get_seq_length() == 21 + 6 + 3


def test_no_row_of_the_prefix_is_repeated(model, monkeypatch):
    tokred.apply(model, ALL[0], **ALL[1])
    ids, _, _ = batch()
    cache, wanted = tokred.share_prefix(model, PREFIX), logits(model, ids)

    def repeated(*args):
        raise AssertionError("all rows at once were asked for")

    monkeypatch.setattr(shared.SharedShelf, "_both", repeated)
    assert torch.allclose(logits(model, ids, cache), wanted, atol=1e-5)


def test_the_prefix_is_held_once(model):
    tokred.apply(model, ALL[0], **ALL[1])
    row = 2 * 2 * 16 * 4 * 3  # keys and values of two heads in three layers
    for b in (1, 4, 32):
        ids = torch.cat([PREFIX.expand(b, -1), prompt(5, b=b)], 1)
        cache = tokred.share_prefix(model, PREFIX)
        model(ids[:, 21:], **tokred.cache_kwargs(cache))
        assert cache.nbytes == row * (21 + 5 * b)
        assert cache.layer_rows()[0].dense_bytes * 3 == row * 26 * b


@pytest.mark.parametrize(
    ("name", "options"),
    [
        SNAP,
        ("adakv", {"budget": 9, "score": {"part": "window", "size": 4, "pool": 3}}),
        ("kvzip", {"budget": 9, "chunk": 8}),
        ("kivi", {"bits": 4, "group_size": 4, "residual_length": 8}),
        ("snapkv", {**SNAP[1], "store": "half"}),
    ],
)
def test_a_compressed_prefix_is_shared(model, name, options):
    """Every sample goes on as it does alone, on the same rows."""
    tokred.apply(model, name, **options)
    ids, mask, alone = batch((6, 4, 6))
    cache = tokred.kv_cache(model)
    model(PREFIX, **tokred.cache_kwargs(cache))
    made = tokred.share_prefix(model, cache)
    found = logits(model, ids, made, attention_mask=mask)
    before = cache.snapshot()
    for one, wanted in zip(alone, found, strict=True):
        cache.restore(before)
        # Rows of a store in few bits stay as they came behind a shared prefix, and are rounded behind one's own.
        least = 0.3 if name == "kivi" else 0.02 if "store" in options else 1e-5
        assert torch.allclose(logits(model, one, cache)[0], wanted, atol=least)
    assert made.layer_rows()[0].rows < 21 + 9 or name == "kivi"


def test_beams_crops_snapshots_and_second_turns(model):
    tokred.apply(model, ALL[0], **ALL[1])
    ids, _, _ = batch((6, 6))
    beams = {"num_beams": 3, **GREEDY}
    wanted = model.generate(ids, **beams)
    cache = tokred.share_prefix(model, PREFIX)
    assert torch.equal(model.generate(ids, **tokred.cache_kwargs(cache), **beams), wanted)
    cache.reset()
    assert cache.get_seq_length() == 21
    before = cache.snapshot()
    first = logits(model, ids, cache)
    for _ in range(2):
        cache.restore(before)
        assert torch.equal(logits(model, ids, cache), first)
    # A second turn, and back to the first.
    seen = cache.get_seq_length()
    more = torch.cat([model.generate(ids, **GREEDY), prompt(5, b=2, seed=3)], 1)
    again = logits(model, more, cache)
    assert torch.allclose(again, logits(model, more), atol=1e-5)
    cache.crop(seen - cache.get_seq_length())
    assert torch.allclose(logits(model, more, cache), again, atol=1e-6)
    cache.crop(21 - cache.get_seq_length())
    assert torch.allclose(logits(model, ids, cache), first, atol=1e-6)
    with pytest.raises(ValueError, match="21 are a prefix that is shared"):
        cache.crop(20 - cache.get_seq_length())


def test_one_prefix_for_several_batches(model):
    tokred.apply(model, ALL[0], **ALL[1])
    prefix = tokred.kv_cache(model)
    model(PREFIX, **tokred.cache_kwargs(prefix))
    one, two = tokred.share_prefix(model, prefix), tokred.share_prefix(model, prefix)
    ids, _, _ = batch()
    assert torch.equal(logits(model, ids, one), logits(model, ids, two))
    assert prefix.get_seq_length() == 21
    assert one.layers[0].shelf.common.keys.data_ptr() == prefix.layers[0].keys.data_ptr()


# ------------------------------------------------------------------ bad input


def test_what_is_refused(model, tmp_path):
    with pytest.raises(NothingRecordedError, match=r"tokred.apply\(model, 'snapkv', budget=1.0\)"):
        tokred.share_prefix(model, PREFIX)
    for name, options, why in (
        ("h2o", {"budget": 9}, "goes on evicting"),
        ("snapkv", {**SNAP[1], "turns": True}, "goes on evicting"),
        ("limited", {}, "keeps to a limit"),
        *(
            (name, examples("cache")[name], "chooses rows anew")
            for name in ("tokenselect", "shadowkv", "streamingtom_cache")
        ),
    ):
        tokred.apply(model, name, **(options or {"limit": "1 MiB"}))
        with pytest.raises(ValueError, match=why):
            tokred.share_prefix(model, PREFIX)
    tokred.apply(model, ALL[0], **ALL[1])
    with pytest.raises(ValueError, match="prefix must be"):
        tokred.share_prefix(model, prompt(5, b=2))
    with pytest.raises(TypeError, match="belongs to none"):
        tokred.share_prefix(model, "text")
    with pytest.raises(ValueError, match="holds no tokens"):
        tokred.share_prefix(model, tokred.kv_cache(model))
    cache = tokred.kv_cache(model)
    model(prompt(5, b=2), **tokred.cache_kwargs(cache))
    with pytest.raises(ValueError, match="this cache holds 2"):
        tokred.share_prefix(model, cache)
    made = tokred.share_prefix(model, PREFIX)
    for again in (lambda: tokred.share_prefix(model, made), lambda: tokred.save_cache(model, made, tmp_path / "a")):
        with pytest.raises(ValueError, match="shares a prefix with others"):
            again()
    ids, mask, _ = batch((6, 4))
    mask[1, 0] = 0
    with pytest.raises(ValueError, match="hides some of the 21 tokens of the shared prefix"):
        model.generate(ids, attention_mask=mask, **tokred.cache_kwargs(made), **GREEDY)


@dataclass(frozen=True)
class Searching(Rectangle):
    """Rows that can be evicted too, and are searched."""

    name: ClassVar[str] = "searching"
    searches: ClassVar[bool] = True


@dataclass(frozen=True)
class Answering(Rectangle):
    """Rows that cannot be evicted, and are not searched."""

    name: ClassVar[str] = "answering"
    can: ClassVar[frozenset[str]] = frozenset({"attend", "crop"})


def test_a_store_says_itself_whether_it_searches(model):
    tokred.apply(model, tokred.KVPolicy(score="key_norm", budget=1.0, store=Searching()))
    with pytest.raises(ValueError, match="chooses rows anew"):
        tokred.share_prefix(model, PREFIX)
    tokred.apply(model, tokred.KVPolicy(score="key_norm", budget=1.0, store=Answering()))
    assert tokred.share_prefix(model, PREFIX).get_seq_length() == 21


def test_windows_count_padding_as_tokens():
    """Those of the host do: what stands in front of the padding would be seen less far than in the sample alone."""
    model = tokred.apply(build("gemma3"), ALL[0], **ALL[1])
    ids, mask, _ = batch((6, 4))
    cache = tokred.share_prefix(model, PREFIX)
    with pytest.raises(ValueError, match="windows count padding"):
        model.generate(ids, attention_mask=mask, **tokred.cache_kwargs(cache), **GREEDY)


def test_layers_that_cannot_share():
    model = tokred.apply(build("qwen3_next"), ALL[0], **ALL[1])
    with pytest.raises(UnsupportedModelError, match=r"layer 0 .* cannot share a prefix"):
        tokred.share_prefix(model, PREFIX)
    model = tokred.apply(build("llama"), ALL[0], **ALL[1], where=lambda name, _: ".1." in name)
    with pytest.raises(UnsupportedModelError, match="the policy does not act on it"):
        tokred.share_prefix(model, PREFIX)
