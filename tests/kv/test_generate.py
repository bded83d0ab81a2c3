"""What users do with ``generate``: beams, several sequences, drafts, second turns, many questions, chunks."""

from __future__ import annotations

import copy

import pytest
import torch

pytest.importorskip("transformers")

import transformers

import tokred
from tests.kv.masked import evicted_rows, masked_reference
from tests.kv.tiny import POLICIES, Scatter, build, padded, prompt
from tokred.adapters import contract
from tokred.adapters.contract import attention_of
from tokred.kv import When

GREEDY = {"max_new_tokens": 8, "do_sample": False}
ONCE = ["snapkv", "knorm", "adakv", "criticalkv", "expected_attention", "pyramidkv"]


pytestmark = pytest.mark.usefixtures("no_grad")


@pytest.fixture(params=["llama", "gemma3"])
def model(request):
    return build(request.param)


def reference_of(model, policy, ids, mask=None):
    """The model that hides what ``policy`` evicts from this prompt."""
    tokred.apply(model, policy)
    cache = tokred.kv_cache(model)
    model(ids, attention_mask=mask, past_key_values=cache)
    return masked_reference(tokred.remove(copy.deepcopy(model)), evicted_rows(cache, ids.shape[1]), ids.shape[1])


# ---------------------------------------------------------------- ways of decoding


@pytest.mark.parametrize("batch", ["one", "padded"])
def test_greedy_equals_masking(model, batch):
    ids, mask, _ = padded((24, 15)) if batch == "padded" else (prompt(24), None, None)
    reference = reference_of(model, Scatter(10), ids, mask)
    ours = model.generate(ids, attention_mask=mask, **GREEDY)
    assert torch.equal(ours, reference.generate(ids, attention_mask=mask, **GREEDY))


def test_generate_equals_a_loop_with_true_positions(model):
    ids = prompt(24)
    tokred.apply(model, Scatter(10))
    made = model.generate(ids, **GREEDY)
    cache, tokens = tokred.kv_cache(model), ids
    step, position = ids, torch.arange(24)[None]
    for _ in range(8):
        logits = model(step, past_key_values=cache, position_ids=position).logits
        step = logits[:, -1:].argmax(-1)
        tokens, position = torch.cat([tokens, step], 1), position[:, -1:] + 1
    assert torch.equal(tokens, made)


@pytest.mark.parametrize("options", [{"num_beams": 3}, {"num_beams": 3, "num_return_sequences": 3}])
def test_beams(model, options):
    ids, mask, _ = padded((24, 15))
    reference = reference_of(model, Scatter(10), ids, mask)
    ours = model.generate(ids, attention_mask=mask, max_new_tokens=6, do_sample=False, **options)
    theirs = reference.generate(ids, attention_mask=mask, max_new_tokens=6, do_sample=False, **options)
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("name", [n for n in POLICIES if n != "squeezeattention"])
def test_beams_carry_the_state_of_every_policy(name):
    """Beams of a batch equal the beams of each prompt alone."""
    model = build("llama")
    tokred.apply(model, POLICIES[name])
    options = {"num_beams": 3, "max_new_tokens": 6, "do_sample": False}
    ids, mask, alone = padded((22, 14))
    both = model.generate(ids, attention_mask=mask, **options)
    for i, row in enumerate(alone):
        one = model.generate(row, **options)
        assert both[i, 22 : 22 + 6].tolist()[: one.shape[1] - row.shape[1]] == one[0, row.shape[1] :].tolist(), name


def test_several_sequences_of_one_prompt(model):
    tokred.apply(model, POLICIES["snapkv"])
    torch.manual_seed(0)
    made = model.generate(prompt(20), do_sample=True, num_return_sequences=4, max_new_tokens=5)
    assert made.shape == (4, 25)
    assert len({tuple(row.tolist()) for row in made}) > 1


# ---------------------------------------------------------------- drafts


def repetitive(n: int = 24) -> torch.Tensor:
    return prompt(6).repeat(1, n // 6)


@pytest.mark.parametrize("name", ONCE)
def test_prompt_lookup_and_assisted_decoding_equal_greedy(name):
    model, assistant, ids = build("llama"), build("llama", seed=3, num_hidden_layers=1), repetitive()
    drafts = []
    handle = model.model.embed_tokens.register_forward_pre_hook(lambda m, a: drafts.append(a[0].shape[1]))
    tokred.apply(model, POLICIES[name])
    greedy = model.generate(ids, **GREEDY)
    drafts.clear()
    assert torch.equal(model.generate(ids, prompt_lookup_num_tokens=3, **GREEDY), greedy)
    assert drafts[0] > ids.shape[1], "the first forward holds the prompt and drafts"
    assert torch.equal(model.generate(ids, assistant_model=assistant, **GREEDY), greedy)
    handle.remove()


def test_drafts_on_a_model_with_sliding_windows():
    model, ids = build("gemma3"), repetitive()
    tokred.apply(model, POLICIES["snapkv"])
    greedy = model.generate(ids, **GREEDY)
    assert torch.equal(model.generate(ids, prompt_lookup_num_tokens=3, **GREEDY), greedy)


@pytest.mark.parametrize("name", ["h2o", "tova", "zeromerge", "rpc", "cake", "squeezeattention", "keyformer"])
def test_drafts_are_refused_where_they_could_not_be_taken_back(name):
    model, ids = build("llama"), repetitive()
    tokred.apply(model, POLICIES[name])
    with pytest.raises(ValueError, match="take back tokens"):
        model.generate(ids, prompt_lookup_num_tokens=3, **GREEDY)
    assert model.generate(ids, **GREEDY).shape == (1, 32)


def test_drafts_on_a_filled_cache_are_refused():
    model, ids = build("llama"), repetitive()
    tokred.apply(model, POLICIES["snapkv"])
    cache = tokred.kv_cache(model)
    model(ids, past_key_values=cache)
    before = cache.layers[0].keys
    with pytest.raises(ValueError, match="start from an empty cache"):
        model.generate(torch.cat([ids, ids], 1), past_key_values=cache, prompt_lookup_num_tokens=3, **GREEDY)
    assert cache.layers[0].keys is before


def test_a_patched_model_is_not_its_own_assistant():
    model = tokred.apply(build("llama"), "kivi")
    with pytest.raises(ValueError, match=r"assistant_early_exit makes the patched model its own.*prompt_lookup"):
        model.generate(repetitive(), assistant_early_exit=1, **GREEDY)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "name", ["kivi", *(pytest.param(n, marks=pytest.mark.hosts) for n in ("snapkv", "streaming_llm"))]
)
def test_a_compiled_model_reads_as_without(name):
    torch._dynamo.reset()
    model, ids = tokred.apply(build("llama"), name), prompt(40)
    with torch.no_grad():
        found = torch.compile(model, backend="eager")(ids).logits
        torch.testing.assert_close(found, model(ids).logits)
    torch._dynamo.reset()


def test_attention_that_was_switched_meanwhile_stays():
    """What the user chose holds, in the patch that follows and without it."""
    model, ids = tokred.apply(build("llama"), "snapkv", budget=0.5, window=4), prompt(40)
    model.set_attn_implementation("eager")
    with pytest.raises(tokred.BypassedError, match=r"call tokred\.apply again"):
        model(ids)
    tokred.apply(model, "snapkv", budget=0.5, window=4)
    model(ids)
    tokred.remove(model)
    assert attention_of(model.config) == "eager"
    model.set_attn_implementation("sdpa")
    tokred.apply(model, "snapkv", budget=0.5, window=4)
    model.set_attn_implementation("eager")
    tokred.remove(model)
    assert attention_of(model.config) == "eager"


def test_a_patched_model_is_no_assistant():
    model, assistant = build("llama"), build("llama", seed=3)
    tokred.apply(assistant, POLICIES["snapkv"])
    with pytest.raises(ValueError, match="an assistant takes back tokens"):
        model.generate(repetitive(), assistant_model=assistant, **GREEDY)


# ---------------------------------------------------------------- turns


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_a_second_turn_appends_at_true_positions(family):
    model = build(family)
    first, second = prompt(24), prompt(7, seed=4)
    reference = reference_of(model, Scatter(10), first)
    cache, full = tokred.kv_cache(model), transformers.DynamicCache(config=model.config)
    for m, c in ((model, cache), (reference, full)):
        m.made = m.generate(first, past_key_values=c, **GREEDY)
    assert torch.equal(model.made, reference.made)
    longer = torch.cat([model.made, second], 1)
    ours = model.generate(longer, past_key_values=cache, **GREEDY)
    assert torch.equal(ours, reference.generate(longer, past_key_values=full, **GREEDY))
    assert cache.get_seq_length() == longer.shape[1] + 7
    rows = [layer.keys.shape[2] for layer in cache.layers if not layer.is_sliding]
    assert max(rows) < cache.get_seq_length()


def test_a_second_turn_can_be_compressed_too():
    model = build("llama")
    first, second = prompt(24), prompt(17, seed=4)
    for turns, rows in ((False, 10 + 17), (True, 10)):
        tokred.apply(model, "snapkv", budget=10, window=4, turns=turns)
        cache = tokred.kv_cache(model)
        model(first, past_key_values=cache)
        model(second, past_key_values=cache)
        assert {layer.keys.shape[2] for layer in cache.layers} == {rows}
        assert cache.get_seq_length() == 41


@pytest.mark.parametrize("name", ["snapkv", "keydiff", "adakv", "lagkv"])
def test_second_turns_of_a_padded_batch_equal_each_alone(name):
    model = build("llama")
    when = {"snapkv": {"window": 4, "pool": 3}, "adakv": {"score": tokred.kv.Window(4, 3)}, "lagkv": {"lag": 4}}
    policy = tokred.make(name, budget=10, **when.get(name, {}))
    policy = tokred.make("kv", score=policy.parts.score, budget=policy.parts.budget, when=When(turns=True), sinks=1)
    tokred.apply(model, policy)
    ids, mask, alone = padded((21, 13))
    more = prompt(9, 2, seed=7)
    cache = tokred.kv_cache(model)
    first = (mask.cumsum(1) - 1).clamp(min=0)
    model(ids, attention_mask=mask, position_ids=first, past_key_values=cache)
    longer = torch.cat([mask, torch.ones_like(more)], 1)
    position = (longer.cumsum(1) - 1)[:, -9:]
    a = model(more, attention_mask=longer, position_ids=position, past_key_values=cache).logits
    step = prompt(1, 2, seed=8)
    last = torch.cat([longer, torch.ones_like(step)], 1)
    b = model(step, attention_mask=last, position_ids=position[:, -1:] + 1, past_key_values=cache).logits
    for i, row in enumerate(alone):
        one = tokred.kv_cache(model)
        model(row, past_key_values=one)
        assert torch.allclose(model(more[i : i + 1], past_key_values=one).logits[0], a[i], atol=2e-5)
        assert torch.allclose(model(step[i : i + 1], past_key_values=one).logits[0], b[i], atol=2e-5)


@pytest.mark.parametrize("name", ["snapkv", "h2o", "zeromerge", "rpc", "cake"])
def test_many_questions_on_one_context(name):
    model, context = build("llama"), prompt(26)
    tokred.apply(model, POLICIES[name])
    cache = tokred.kv_cache(model)
    model(context, past_key_values=cache)
    kept, held = cache.snapshot(), cache.nbytes
    fresh = copy.deepcopy(cache)
    for seed in (5, 6):
        ids = torch.cat([context, prompt(4, seed=seed)], 1)
        first = model.generate(ids, past_key_values=cache, **GREEDY)
        other = copy.deepcopy(fresh)
        assert torch.equal(model.generate(ids, past_key_values=other, **GREEDY), first), "a copy answers the same"
        cache.restore(kept)
        assert cache.get_seq_length() == 26
        assert cache.nbytes == held
        assert torch.equal(model.generate(ids, past_key_values=cache, **GREEDY), first)
        cache.restore(kept)


def test_questions_by_cropping():
    model, context = build("llama"), prompt(26)
    tokred.apply(model, POLICIES["snapkv"])
    cache = tokred.kv_cache(model)
    model(context, past_key_values=cache)
    ids = torch.cat([context, prompt(4, seed=5)], 1)
    first = model.generate(ids, past_key_values=cache, **GREEDY)
    cache.crop(26 - cache.get_seq_length())
    assert cache.get_seq_length() == 26
    assert torch.equal(model.generate(ids, past_key_values=cache, **GREEDY), first)
    rows = cache.layers[0].keys.shape
    cache.crop(27 - cache.get_seq_length())
    with pytest.raises(ValueError, match="rows were evicted when the cache had seen 26"):
        cache.crop(-2)
    assert cache.layers[0].keys.shape[2] == rows[2] - cache_gone(rows, cache)


def cache_gone(rows, cache) -> int:
    return rows[2] - cache.layers[0].keys.shape[2]


# ---------------------------------------------------------------- chunks


@pytest.mark.parametrize(
    "name", ["snapkv", "h2o", "keyformer", "observed_attention", "rpc", "zeromerge", "squeezeattention"]
)
def test_chunked_prefill_equals_one_forward(name):
    """Compression waits for the end of the prompt; scores are the same, since every query has been seen."""
    model, ids = build("llama"), prompt(26)
    policy = POLICIES[name]
    if name == "snapkv":
        policy = tokred.make("snapkv", budget=14, window=9, pool=3)
    tokred.apply(model, policy)
    whole = model.generate(ids, return_dict_in_generate=True, **GREEDY)
    parts = model.generate(ids, return_dict_in_generate=True, prefill_chunk_size=7, **GREEDY)
    for a, b in zip(whole.past_key_values.layers, parts.past_key_values.layers, strict=True):
        assert (a.positions is None) == (b.positions is None)
        assert a.positions is None or torch.equal(a.positions, b.positions)
    assert torch.equal(whole.sequences, parts.sequences)
    cache = tokred.kv_cache(model, prompt=26)
    for chunk in ids.split(10, 1):
        model(chunk, past_key_values=cache)
    again = tokred.kv_cache(model)
    model(ids, past_key_values=again)
    assert [r.rows for r in cache.layer_rows()] == [r.rows for r in again.layer_rows()]


def test_chunk_by_chunk_never_holds_more_than_its_limit_and_a_chunk():
    model, ids = build("llama"), prompt(120)
    tokred.apply(model, "keydiff", budget=20)
    cache, held = tokred.kv_cache(model), []
    for chunk in ids.split(10, 1):
        model(chunk, past_key_values=cache)
        held.append(cache.layers[0].keys.shape[2])
    assert held == [10, *[20] * 11]
    assert cache.get_seq_length() == 120
    assert model(prompt(1), past_key_values=cache).logits.isfinite().all()


def second_turn(model):
    """A cache that has seen 47 tokens, and the whole sequence, with 18 more."""
    cache = tokred.kv_cache(model)
    first = model.generate(prompt(40), past_key_values=cache, **GREEDY)
    return cache, torch.cat([first, prompt(17, seed=5)], 1)


def test_the_host_goes_on_in_chunks_since_the_version_that_the_contract_names():
    model = build("llama", torch.float64)
    cache = transformers.DynamicCache(config=model.config)
    first = model.generate(prompt(40), past_key_values=cache, **GREEDY)
    ids = torch.cat([first, prompt(17, seed=5)], 1)
    more = {"max_new_tokens": 1, "prefill_chunk_size": 8, "return_dict_in_generate": True, "output_logits": True}
    found = model.generate(ids, past_key_values=cache, **more).logits[0]
    assert ((found - model(ids).logits[:, -1]).abs().max() < 1e-5) == contract.goes_on_in_chunks()


@pytest.mark.parametrize("policy", [POLICIES["knorm"], tokred.Limited("knorm", "30 KiB", 8)])
def test_a_second_turn_in_chunks(policy):
    model = tokred.apply(build("llama"), policy)
    cache, ids = second_turn(model)
    assert cache.get_seq_length() == 47
    other = copy.deepcopy(cache)
    for part in ids[:, 47:-1].split(8, 1):
        model(part, past_key_values=other)
    made = model.generate(ids, past_key_values=other, prefill_chunk_size=8, **GREEDY)
    if contract.goes_on_in_chunks():
        assert torch.equal(model.generate(ids, past_key_values=cache, prefill_chunk_size=8, **GREEDY), made)
    else:
        with pytest.raises(ValueError, match=r"in chunks \(prefill_chunk_size=8\).* has seen 47 .*5\.21 mends that"):
            model.generate(ids, past_key_values=cache, prefill_chunk_size=8, **GREEDY)
        assert cache.get_seq_length() == 47


@pytest.mark.parametrize("policy", [POLICIES["knorm"], tokred.Limited("knorm", "30 KiB", 20)])
def test_a_second_turn_of_one_chunk_is_read_in_one_piece_where_the_host_reads_chunks_wrong(policy, monkeypatch):
    model = tokred.apply(build("llama"), policy)
    cache, ids = second_turn(model)
    other = copy.deepcopy(cache)
    expected = model(ids[:, 47:], past_key_values=other).logits[:, -1]
    monkeypatch.setattr("tokred.adapters.kv.generate.goes_on_in_chunks", lambda: False)
    with pytest.raises(ValueError, match="at most 17 in a forward"):
        model.generate(ids, past_key_values=cache, prefill_chunk_size=17, **GREEDY)
    assert cache.get_seq_length() == 47
    more = {"return_dict_in_generate": True, "output_logits": True, "prefill_chunk_size": 18}
    found = model.generate(ids, past_key_values=cache, **more, **GREEDY)
    assert (found.logits[0] - expected).abs().max() < 1e-5, "but for rounding: generate asks for the last token alone"
    assert cache.get_seq_length() == 47 + 18 + 7
