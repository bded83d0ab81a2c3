"""Positions inside the cache: the first rows move up behind those that have left."""

from __future__ import annotations

import copy

import pytest
import torch

pytest.importorskip("transformers")

import transformers
from transformers import DynamicCache

import tokred
from tests.kv.tiny import build, padded, prompt
from tokred.adapters.contract import cache_kwargs
from tokred.adapters.kv.layer import TokLayer
from tokred.adapters.tiny.kv import FAMILIES as ALL
from tokred.core.versions import release
from tokred.kernels.decode_attention import SENTINEL
from tokred.kv.turning import turned

SINKS, BUDGET = 3, 9

pytestmark = pytest.mark.usefixtures("no_grad")


def policy(positions: str = "cache", **more):
    return tokred.make("streaming_llm", **{"budget": BUDGET, "sinks": SINKS, "positions": positions, **more})


def angle(model) -> torch.Tensor:
    """By which pairs of channels turn from one position to the next."""
    return model.model.rotary_emb.inv_freq.float()


def numbered(model, ids: torch.Tensor, first: int) -> list[torch.Tensor]:
    """Logits of the paper's own form: each step sees sinks and window with the positions 0, 1, 2 ... of their places in
    the cache. ``first`` tokens are the prompt, of which sinks and window are left; then one comes at a time.
    """
    cache = DynamicCache()
    found = [model(ids[:, :first], **cache_kwargs(cache)).logits]
    places = list(range(first))
    for t in range(first, ids.shape[1] + 1):
        gone = max(0, len(places) - BUDGET)
        kept = [*range(SINKS), *range(SINKS + gone, len(places))]
        new = torch.arange(len(kept))
        by = new - torch.tensor([places[i] for i in kept])
        for layer in cache.layers:
            layer.keys, layer.values = (x[:, :, kept] for x in (layer.keys, layer.values))
            layer.keys = turned(layer.keys, by[None], angle(model))
        places = new.tolist()
        if t == ids.shape[1]:
            break
        at = torch.tensor([[len(places)]])
        found.append(model(ids[:, t : t + 1], position_ids=at, **cache_kwargs(cache)).logits)
        places.append(len(places))
    return found


@pytest.mark.parametrize(
    ("family", "batch"),
    [("llama", 2), *(pytest.param(n, b, marks=pytest.mark.hosts) for n in ("qwen3", "mistral") for b in (1, 2))],
)
def test_steps_are_those_of_a_cache_that_is_numbered_anew(family, batch):
    """Slack of less than a row: moved before every step."""
    model, ids = build(family), prompt(40, batch)
    expected = numbered(model, ids, 12)
    with tokred.applied(model, policy()):
        cache = tokred.kv_cache(model)
        own = [model(ids[:, :12], **cache_kwargs(cache)).logits]
        own += [model(ids[:, t : t + 1], **cache_kwargs(cache)).logits for t in range(12, 40)]
    for a, b in zip(own, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_where_nothing_has_left_nothing_moves():
    model, ids = build("llama"), prompt(BUDGET, 2)
    with tokred.applied(model, policy("cache")):
        moved = model(ids).logits
    with tokred.applied(model, policy("text")):
        assert torch.equal(moved, model(ids).logits)


def test_the_distance_of_the_sinks_no_longer_grows():
    model, ids = build("llama"), prompt(200)
    keys = {}
    for positions in ("text", "cache"):
        with tokred.applied(model, policy(positions)):
            cache = tokred.kv_cache(model)
            for part in ids.split(1, 1):
                model(part, **cache_kwargs(cache))
            keys[positions] = cache.layers[0].keys[:, :, :SINKS], cache.layers[0].front
    first, pristine = keys["cache"]
    assert keys["text"][1] is None
    assert torch.equal(keys["text"][0], pristine), "they are turned from what they were"
    by = torch.full((1, SINKS), 200 - 1 - BUDGET)  # the gap when the last token came
    torch.testing.assert_close(first, turned(pristine, by, angle(model)), rtol=1e-4, atol=1e-4)


# Families that turn no keys, other channels than halves, or by more than one number; and latents.
REFUSED = {
    "cohere", "jamba", "gptj", "gpt_neox", "glm4", "gpt_oss", "deepseek_v3", "deepseek_v2", "qwen3_5", "granite_hybrid",
}  # fmt: skip
MOVED = [name for name in ALL if name not in REFUSED]


def check_keys(model) -> None:
    """First rows see nothing but one another, so that the model makes the same keys of them alone, further on."""
    ids, n = prompt(40), 30
    with tokred.applied(model, policy(every=0)):
        cache = tokred.kv_cache(model)
        model(ids[:, :n], **cache_kwargs(cache))
        model(ids[:, n : n + 1], **cache_kwargs(cache))
    moved = {i: layer.shelf.keys[:, :, :SINKS] for i, layer in enumerate(cache.layers) if isinstance(layer, TokLayer)}
    assert moved
    there, by = DynamicCache(config=model.config), n - BUDGET
    model(ids[:, :SINKS], position_ids=torch.arange(by, by + SINKS)[None], **cache_kwargs(there))
    for i, keys in moved.items():
        torch.testing.assert_close(keys, there.layers[i].keys, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    "family", [n if n in ("llama", "gemma3") else pytest.param(n, marks=pytest.mark.hosts) for n in MOVED]
)
def test_keys_are_those_that_the_model_makes_there(family):
    check_keys(build(family))


# SmolLM3 has layers whose keys know no position.
@pytest.mark.parametrize("family", [*sorted(REFUSED), "smollm3"])
def test_families_whose_keys_cannot_be_moved_are_refused(family):
    model = build(family, **({"no_rope_layers": [1, 0, 1]} if family == "smollm3" else {}))
    error, why = ValueError, r"not all keys of .* are turned by the one position of their token"
    if family == "gptj" and release(transformers.__version__) < release("5.24"):
        error, why = tokred.UnsupportedModelError, "its attention cannot be exchanged"  # whatever the policy
    with pytest.raises(error, match=why):
        tokred.apply(model, policy(every=0))
    assert not tokred.patched(model)


def test_samples_of_a_padded_batch_have_gaps_of_their_own():
    model = build("llama")
    ids, mask, apart = padded((30, 17))
    rows = {}
    with tokred.applied(model, policy()):
        cache = tokred.kv_cache(model)
        model(ids, attention_mask=mask, **cache_kwargs(cache))
        for _ in range(3):
            mask = torch.cat([mask, mask.new_ones(2, 1)], 1)
            both = model(prompt(1, 2), attention_mask=mask, **cache_kwargs(cache)).logits
        for i, text in enumerate(apart):
            alone = tokred.kv_cache(model)
            model(text, **cache_kwargs(alone))
            for _ in range(3):
                rows[i] = model(prompt(1, 2)[i : i + 1], **cache_kwargs(alone)).logits
    for i in rows:
        torch.testing.assert_close(both[i], rows[i][0], rtol=1e-4, atol=1e-4)


def test_a_snapshot_a_copy_and_other_samples_take_the_first_rows_along(tmp_path):
    model, ids = build("llama"), prompt(40, 2)
    with tokred.applied(model, policy()):
        cache = tokred.kv_cache(model)
        model(ids[:, :12], **cache_kwargs(cache))
        for t in range(12, 20):
            model(ids[:, t : t + 1], **cache_kwargs(cache))
        kept, twin = cache.snapshot(), copy.deepcopy(cache)
        tokred.save_cache(model, cache, tmp_path / "rows.safetensors")
        read = tokred.load_cache(model, tmp_path / "rows.safetensors")

        def goes_on(one, order=(0, 1)):
            return torch.cat([model(ids[list(order), t : t + 1], **cache_kwargs(one)).logits for t in range(20, 30)], 1)

        expected = goes_on(cache)
        assert torch.equal(goes_on(twin), expected)
        assert torch.equal(goes_on(read), expected)
        cache.restore(kept)
        assert torch.equal(goes_on(cache), expected)
        cache.restore(kept)
        cache.reorder_cache(torch.tensor([1, 0]))
        torch.testing.assert_close(goes_on(cache, (1, 0)), expected[[1, 0]])
        # What they were before they were moved is held too, and is counted.
        layer = cache.layers[0]
        assert layer.nbytes >= layer.front.nbytes + layer.keys.nbytes + layer.values.nbytes


@pytest.mark.parametrize("chunk", [0, 4])
def test_a_budget_in_bytes_is_of_these_too(chunk):
    model, ids, budget = build("llama"), prompt(60), 9_000
    held = {}
    for positions in ("text", "cache"):
        when = tokred.kv.When(every=1, chunk=chunk)
        one = tokred.make(
            "kv", score="recency", budget=f"{budget} B", sinks=SINKS, when=when, store="rectangle", positions=positions
        )
        with tokred.applied(model, one):
            cache = tokred.kv_cache(model)
            for part in ids.split(chunk or 1, 1):
                model(part, **cache_kwargs(cache))
            held[positions] = cache.nbytes
            assert (cache.layers[0].front is None) == (positions == "text")
    assert max(held.values()) <= budget
    assert held["cache"] > 0.8 * budget


@pytest.mark.parametrize("store", ["flat", "rectangle"])
def test_a_patch_is_taken_back_and_copied(store):
    model, ids = build("llama"), prompt(24)
    plain = model(ids).logits
    patched = tokred.apply(model, policy(store=store))
    twin = copy.deepcopy(patched)
    answers = []
    for one in (patched, twin):
        cache = tokred.kv_cache(one)
        one(ids[:, :16], **cache_kwargs(cache))
        answers.append(torch.cat([one(ids[:, t : t + 1], **cache_kwargs(cache)).logits for t in range(16, 24)], 1))
    assert torch.equal(*answers)
    assert torch.equal(tokred.remove(model)(ids).logits, plain)


def test_bad_settings_are_refused_and_the_model_is_as_it_was():
    with pytest.raises(ValueError, match="positions is 'window'; allowed are 'cache', 'text'"):
        policy("window")
    model = build("llama")
    for setting, why in (
        (policy(sinks=0), "keeps no first rows"),
        (policy(store="half"), "cannot let its first rows stand elsewhere"),
    ):
        with pytest.raises(ValueError, match=f"positions='cache' moves the first rows of the cache: .*{why}"):
            tokred.apply(model, setting)
        assert not tokred.patched(model)


def test_a_model_that_turns_nothing_is_refused():
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=97)).eval()
    with pytest.raises(ValueError, match=r"not all keys of .* are turned by the one position of their token"):
        tokred.apply(model, policy())


def test_empty_rows_are_no_first_rows():
    """Heads whose first rows differ stay as they are."""
    from tokred.adapters.kv.front import Front

    model, ids = build("llama"), prompt(20)
    with tokred.applied(model, tokred.make("streaming_llm", budget=BUDGET, sinks=SINKS)) as patched:
        cache = tokred.kv_cache(patched)
        patched(ids, **cache_kwargs(cache))
        layer = cache.layers[0]
        front = Front.__new__(Front)
        front.count = SINKS
        first, least = front._ends(layer)
        assert first.tolist()[0][0] == [0, 1, 2]
        assert least.tolist() == [20 - (BUDGET - SINKS)]
        layer.shelf._slots = layer.shelf._slots.clone()
        layer.shelf._slots[0, 0, 1] = SENTINEL
        assert front._ends(layer)[1].tolist() == [-1]


def test_a_limit_takes_the_positions_of_its_policy():
    """The policy inside says that first rows move up, and what they were is counted."""
    model, ids, limit = build("llama"), prompt(120), 30_000
    inner = tokred.make("streaming_llm", sinks=SINKS, positions="cache")
    with tokred.applied(model, tokred.Limited(inner, f"{limit} B", 8)):
        cache = tokred.kv_cache(model)
        for part in ids.split(8, 1):
            model(part, **cache_kwargs(cache))
        assert all(layer.front is not None for layer in cache.layers)
        assert cache.peak_bytes <= limit


@torch.enable_grad()
def test_what_gradients_are_kept_of_is_not_written_over():
    model, ids = build("llama").requires_grad_(True), prompt(24)

    def logits() -> torch.Tensor:
        cache = tokred.kv_cache(model)
        found = [model(ids[:, :16], **cache_kwargs(cache)).logits]
        found += [model(ids[:, t : t + 1], **cache_kwargs(cache)).logits for t in range(16, 24)]
        return torch.cat(found, 1)

    with tokred.applied(model, policy()):
        ours = logits()
        ours.square().sum().backward()
        assert model.model.layers[0].self_attn.k_proj.weight.grad.abs().sum() > 0
        with torch.no_grad():
            torch.testing.assert_close(logits(), ours, rtol=1e-4, atol=1e-4)
