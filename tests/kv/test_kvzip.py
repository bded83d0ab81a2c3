"""KVzip: the context is repeated, its rows are judged by that, and nothing of it stays."""

from __future__ import annotations

import copy

import pytest
import torch

import tokred
from tests.kv.test_scores import close, site
from tokred.kv import CacheSite, Global, Padding, Reconstruction, When
from tokred.kv.repeat import REPEATED, Piece, Probe, Repeats, pieces, tokens_of

transformers = pytest.importorskip("transformers")

from tests.kv.masked import evicted_rows, masked_reference  # noqa: E402
from tests.kv.tiny import FAMILIES, build, llava, padded, prompt  # noqa: E402
from tokred.kernels.decode_attention import SENTINEL  # noqa: E402

GREEDY = {"max_new_tokens": 6, "do_sample": False}


pytestmark = pytest.mark.usefixtures("no_grad")


def span(*numbers: int) -> torch.Tensor:
    return torch.tensor(numbers, dtype=torch.int64)


# ---------------------------------------------------------------- the score, without a host


def test_worked_example():
    """Sinks: position 0; piece: 1 to 3; tokens 4 and 5 repeat it."""
    whole = site()
    probe = Probe(Repeats(chunk=3, sinks=1), recorded=4)
    probe.piece = Piece((span(1, 2, 3),), (span(),), ())
    # Three are repeated, but the example feeds two: the rows of the fixture are what they are.
    probe.piece = _Fed((span(1, 2, 3),), (span(),), (), 2)
    probe.see(site(q=whole.q[:, :, 4:]))
    four = CacheSite(k=whole.k[:, :, :4], v=whole.v[:, :, :4])
    four.rows[REPEATED] = probe.scores(0, four, None)
    close(four.rows[REPEATED][..., 1:], [0.209894, 0.42569, 0.204221])
    policy = tokred.make("kv", score=Reconstruction(sinks=1), budget=0.5, sinks=1)
    close(policy.scores(four), [1.42569, 0.209894, 0.42569, 0.204221])
    assert policy.shrink(four, four.rows[REPEATED], (2,)).representative.tolist() == [[[0, 2]]]


class _Fed:
    """A piece that feeds another number of tokens than it repeats."""

    def __init__(self, slots, before, instruction, count):
        self.slots, self.before, self.instruction, self.fed = slots, before, instruction, (count,)


def test_the_maximum_is_that_of_the_whole_matrix_in_double_precision():
    torch.manual_seed(0)
    q, k = torch.randn(2, 4, 5, 8, dtype=torch.float64), torch.randn(2, 2, 20, 8, dtype=torch.float64)
    probe = Probe(Repeats(chunk=5, sinks=2), recorded=15)
    probe.piece = Piece((span(3, 4, 5, 6, 7),) * 2, (span(),) * 2, ())
    probe.see(CacheSite(q=q, k=k, v=k))
    rows = [0, 1, 3, 4, 5, 6, 7, *range(15, 20)]
    logits = q @ k[:, :, rows].repeat_interleave(2, 1).mT / 8**0.5
    hidden = torch.arange(12) > torch.arange(7, 12)[:, None]
    best = logits.masked_fill(hidden, -torch.inf).softmax(-1)[..., 2:7].amax(2).view(2, 2, 2, 5).amax(2)
    assert torch.allclose(probe.best[0][..., 3:8].double(), best, atol=1e-7)
    assert (probe.best[0][..., 8:] == 0).all()


def test_padding_changes_no_score():
    torch.manual_seed(0)
    q, k = torch.randn(1, 4, 3, 8), torch.randn(1, 2, 9, 8)
    alone, both = Probe(Repeats(chunk=3, sinks=1), recorded=6), Probe(Repeats(chunk=3, sinks=1), recorded=8)
    alone.piece = Piece((span(1, 2, 3),), (span(),), ())
    alone.see(CacheSite(q=q, k=k, v=k))
    pad = lambda x, n: torch.cat([torch.full((1, x.shape[1], 2, 8), 9.0), x, torch.full((1, x.shape[1], n, 8), 9.0)], 2)  # noqa: E731
    mask = torch.tensor([[False, False, *[True] * 9, False]])
    both.piece = Piece((span(3, 4, 5),), (span(),), ())
    both.see(CacheSite(q=pad(q, 1)[:, :, 2:], k=pad(k, 1), v=pad(k, 1), padding=Padding(mask)))
    assert torch.allclose(both.best[0][..., 2:], alone.best[0], atol=1e-6)


def test_pieces_of_samples_of_different_lengths():
    real = torch.tensor([[False] * 6 + [True] * 5, [True] * 11])
    found = list(pieces(Repeats(4, 2, (90,), (91, 92), 1), real, (5, 11)))
    assert [[s.tolist() for s in p.slots] for p in found] == [
        [[8, 9, 10], [2, 3, 4, 5]], [[], [6, 7, 8, 9]], [[], [10]],
    ]  # fmt: skip
    assert [p.fed for p in found] == [(4, 5), (0, 7), (0, 4)]
    context = torch.arange(11).expand(2, -1) + 50
    embed = torch.nn.Embedding(100, 3)
    tokens, meant = tokens_of(found[1], context, embed)
    assert tokens[1].tolist() == [91, 92, 55, 56, 57, 58, 59]
    assert meant.tolist() == [[False] * 7, [True] * 7]
    vectors, _ = tokens_of(found[1], embed(context), embed)
    assert torch.equal(vectors[1], embed(tokens[1]))


def test_pieces_of_a_later_turn_leave_no_sinks_out():
    found = list(pieces(Repeats(8, 4), torch.ones(1, 3, dtype=torch.bool), (20,)))
    assert [p.slots[0].tolist() for p in found] == [[0, 1, 2]]


# ---------------------------------------------------------------- the budget of all layers


def test_global_budget_evicts_the_lowest_of_all_layers_and_heads():
    torch.manual_seed(0)
    sites = [CacheSite(k=torch.zeros(2, 2, 10, 4), v=torch.zeros(2, 2, 10, 4), layer=i, depth=3) for i in range(3)]
    scores = [torch.rand(2, 2, 10) for _ in sites]
    none = [torch.zeros(1, 1, 10, dtype=torch.bool)] * 3
    counts = Global(0.3).together(sites, scores, none)
    whole = torch.stack(scores, 1).flatten(1)
    for b in range(2):
        border = whole[b].sort().values[int(0.7 * 60)]
        for layer in range(3):
            assert counts[layer][b].tolist() == (scores[layer][b] >= border).sum(-1).tolist()
    assert sum(c.sum(1) for c in counts).tolist() == [18, 18]
    guard = [torch.arange(10)[None, None] < 4] * 3
    assert sum(c.sum(1) for c in Global(0.3).together(sites, scores, guard)).tolist() == [24, 24]
    assert Global(1.0).together(sites, scores, none) is None
    assert Global(10).together(sites, scores, none) is None


# ---------------------------------------------------------------- in a model


def by_hand(model, ids, chunk, sinks, lead=()):
    """Scores from the eager attention of the plain model, with the whole matrices."""
    plain = copy.deepcopy(model)
    plain.set_attn_implementation("eager")
    n, found = ids.shape[1], None
    for start in range(sinks, n, chunk):
        part = ids[:, start : start + chunk]
        both = torch.cat([ids, torch.tensor([lead], dtype=torch.int64).view(1, -1), part], 1)
        weights = plain(both, output_attentions=True).attentions
        rows = [*range(sinks), *range(start, start + part.shape[1]), *range(n, both.shape[1])]
        here = []
        for w in weights:
            some = w.double()[:, :, n:][..., rows]
            some = some / some.sum(-1, keepdim=True)
            best = some[..., sinks : sinks + part.shape[1]].amax(2)
            here.append(best.view(len(ids), 2, 2, -1).amax(2))
        found = here if found is None else [torch.cat(x, 2) for x in zip(found, here, strict=True)]
    return found


@pytest.mark.parametrize("lead", [(), (7, 8, 9)])
def test_scores_of_a_model_are_those_of_its_whole_attention(lead):
    model, ids = build("llama", torch.float64), prompt(23)
    expected = by_hand(model, ids, 6, 2, lead)
    seen = []

    class Spy(Reconstruction):
        def __call__(self, site):
            seen.append(super().__call__(site))
            return seen[-1]

    score = Spy(chunk=6, sinks=2, instruction=lead, overlap=0)
    tokred.apply(model, "kv", score=score, budget=9)
    model(ids, use_cache=True)
    assert len(seen) == 3
    for ours, theirs in zip(seen, expected, strict=True):
        assert torch.allclose(ours[..., 2:].double(), theirs, atol=1e-6)
        assert (ours[..., :2] > 1).all()


@pytest.mark.parametrize("family", [*FAMILIES, "gemma2"])
@pytest.mark.parametrize("batch", ["one", "padded"])
def test_evicting_equals_masking_and_the_passes_leave_no_trace(family, batch):
    # Sums in two orders: double precision, where attention hides padding by an infinity and not by a large number.
    model = build(family, torch.float32 if family == "gemma2" else torch.float64)
    ids, mask, _ = padded((27, 17, 6)) if batch == "padded" else (prompt(27), None, None)
    n, b = ids.shape[1], len(ids)
    plain = model(ids, attention_mask=mask, use_cache=True)
    tokred.apply(model, "kvzip", budget=0.4, chunk=10, sinks=2)
    cache = tokred.kv_cache(model)
    out = model(ids, attention_mask=mask, past_key_values=cache)
    assert torch.equal(out.logits, plain.logits)
    assert cache.get_seq_length() == n
    assert not any(layer.rows or layer.notes for layer in cache.layers if hasattr(layer, "rows"))
    for ours, theirs in zip(cache.layers, plain.past_key_values.layers, strict=True):
        if ours.is_sliding:
            assert torch.equal(ours.keys, theirs.keys)
    hidden = evicted_rows(cache, n)
    held = sum(int((~h).sum()) for h in hidden if h is not None)
    lengths = [n] if mask is None else mask.sum(1).tolist()
    layers = len([h for h in hidden if h is not None])
    assert held == sum(m * 2 * layers - int(m * 2 * layers * 0.6 + 1e-9) for m in lengths)
    reference = masked_reference(tokred.remove(copy.deepcopy(model)), hidden, n)
    full = reference(ids, attention_mask=mask, use_cache=True).past_key_values
    for step in (prompt(1, b, seed=5), prompt(3, b, seed=6)):
        mask = None if mask is None else torch.cat([mask, torch.ones_like(step)], 1)
        a = model(step, attention_mask=mask, past_key_values=cache).logits
        c = reference(step, attention_mask=mask, past_key_values=full).logits
        assert (a - c).abs().max() < 1e-6 * max(1.0, float(c.abs().max()))


@pytest.mark.parametrize("options", [{}, {"budget": "uniform"}, {"instruction": (5, 6), "later": (7,), "overlap": 2}])
def test_rows_of_a_batch_equal_the_prompt_alone(options):
    model = tokred.apply(build("llama"), "kvzip", **{"budget": 0.4, "chunk": 8, "sinks": 2, **options})
    ids, mask, alone = padded((29, 20, 7))
    kinds = {"return_dict_in_generate": True, "output_logits": True, **GREEDY}
    made = model.generate(ids, attention_mask=mask, **kinds)
    for i, row in enumerate(alone):
        one = model.generate(row, **kinds)
        for a, c in zip(made.logits, one.logits, strict=False):
            assert (a[i] - c[0]).abs().max() < 2e-5
        for ours, theirs in zip(made.past_key_values.layers, one.past_key_values.layers, strict=True):
            shift = ids.shape[1] - row.shape[1]
            for a, c in zip(ours.positions[i], theirs.positions[0], strict=True):
                kept = [p - shift for p in a.tolist() if p != SENTINEL]
                assert kept == [p for p in c.tolist() if p != SENTINEL]


@pytest.mark.parametrize("budget", [1.0, 1000])
def test_keep_all_is_bit_equal(budget):
    model, (ids, mask, _) = build("llama"), padded((23, 11))
    plain = model.generate(ids, attention_mask=mask, **GREEDY)
    calls = []
    model.model.layers[0].register_forward_pre_hook(lambda *a: calls.append(1))
    tokred.apply(model, "kvzip", budget=budget)
    assert torch.equal(model.generate(ids, attention_mask=mask, **GREEDY), plain)
    assert len(calls) == 6 + (budget == 1000), "one forward a token, and none to repeat where nothing can go"
    tokred.remove(model)
    assert torch.equal(model.generate(ids, attention_mask=mask, **GREEDY), plain)


def test_generate_equals_a_loop_and_many_questions_share_one_context():
    model, ids = tokred.apply(build("llama"), "kvzip", budget=0.4, chunk=10), prompt(24)
    made = model.generate(ids, **GREEDY)
    cache, tokens, step = tokred.kv_cache(model), ids, ids
    for _ in range(6):
        step = model(step, past_key_values=cache).logits[:, -1:].argmax(-1)
        tokens = torch.cat([tokens, step], 1)
    assert torch.equal(tokens, made)
    cache = tokred.kv_cache(model)
    model(ids, past_key_values=cache)
    before = cache.snapshot()
    first = model(prompt(3, seed=8), past_key_values=cache).logits
    cache.restore(before)
    model(prompt(5, seed=9), past_key_values=cache)
    cache.restore(before)
    assert torch.equal(model(prompt(3, seed=8), past_key_values=cache).logits, first)


def test_a_prompt_in_pieces_is_judged_as_one():
    model, ids = tokred.apply(build("llama"), "kvzip", budget=0.4, chunk=10), prompt(24)
    whole = model.generate(ids, return_dict_in_generate=True, **GREEDY)
    parts = model.generate(ids, return_dict_in_generate=True, prefill_chunk_size=7, **GREEDY)
    assert torch.equal(whole.sequences, parts.sequences)
    for ours, theirs in zip(parts.past_key_values.layers, whole.past_key_values.layers, strict=True):
        assert torch.equal(ours.positions, theirs.positions)


def test_what_is_evicted_is_freed():
    model = tokred.apply(build("llama"), "kvzip", budget=0.25, chunk=40)
    cache = tokred.kv_cache(model)
    model(prompt(200), past_key_values=cache)
    dense = sum(row.dense_bytes for row in cache.layer_rows())
    assert cache.nbytes < 0.35 * dense, "rows, their positions, and nothing of the repetition"


def test_embeddings_in_place_of_ids():
    model, ids = tokred.apply(build("llama"), "kvzip", budget=0.4, chunk=10), prompt(24)
    caches = [tokred.kv_cache(model) for _ in range(2)]
    model(ids, past_key_values=caches[0])
    model(inputs_embeds=model.get_input_embeddings()(ids), past_key_values=caches[1])
    for a, c in zip(caches[0].layers, caches[1].layers, strict=True):
        assert torch.equal(a.positions, c.positions)


def test_the_language_model_inside_a_vlm():
    model = tokred.apply(llava(), "kvzip", budget=0.5, chunk=6)
    pixels = torch.randn(1, 3, 16, 16)
    ids = torch.cat([torch.full((1, 4), 96), prompt(11)], 1)
    out = model.generate(input_ids=ids, pixel_values=pixels, return_dict_in_generate=True, **GREEDY)
    assert min(layer.keys.shape[2] for layer in out.past_key_values.layers) < 15


BUDGETS = {
    "global": Global(10), "adaptive": tokred.kv.Adaptive(10), "preference": tokred.kv.Preference(10, window=4),
    "squeeze": tokred.kv.Squeeze(10), "pyramid": tokred.kv.Pyramid(10, 4, 2), "uniform": tokred.kv.Uniform(10),
}  # fmt: skip


@pytest.mark.parametrize("when", [When(every=3), When(turns=True), When(every=2, turns=True)])
@pytest.mark.parametrize("budget", BUDGETS)
def test_it_meets_every_budget_and_time(budget, when):
    fate = tokred.kv.Merge(1) if budget in ("uniform", "pyramid") else "evict"
    score = Reconstruction(chunk=9, sinks=1)
    policy = tokred.make("kv", score=score, budget=BUDGETS[budget], when=when, sinks=1, recent=1, fate=fate)
    model, (ids, mask, _) = tokred.apply(build("llama"), policy), padded((24, 13))
    cache = tokred.kv_cache(model)
    model(ids, attention_mask=mask, past_key_values=cache)
    for i, count in enumerate((1, 1, 5, 1, 1, 1)):
        step = prompt(count, 2, seed=30 + i)
        mask = torch.cat([mask, torch.ones_like(step)], 1)
        assert model(step, attention_mask=mask, past_key_values=cache).logits.isfinite().all()
    assert sum(layer.keys.shape[2] for layer in cache.layers) < 3 * 34
    assert cache.get_seq_length() == 34


def test_beams():
    model = tokred.apply(build("llama"), "kvzip", budget=0.4, chunk=8)
    ids, mask, alone = padded((22, 14))
    both = model.generate(ids, attention_mask=mask, num_beams=3, **GREEDY)
    for i, row in enumerate(alone):
        one = model.generate(row, num_beams=3, **GREEDY)
        assert both[i, 22:].tolist()[: one.shape[1] - row.shape[1]] == one[0, row.shape[1] :].tolist()


def test_critical_around_it():
    score = tokred.kv.Critical(Reconstruction(chunk=9, sinks=1))
    model = tokred.apply(build("llama"), "kv", score=score, budget=8, sinks=1)
    cache = tokred.kv_cache(model)
    model(prompt(24), past_key_values=cache)
    assert [layer.keys.shape[2] for layer in cache.layers] == [8, 8, 8]


# ---------------------------------------------------------------- bad input


def test_a_pass_that_breaks_leaves_the_cache_as_it_was():
    model = tokred.apply(build("llama"), "kvzip", budget=0.4, chunk=10)
    calls = []

    def fail(module, args):
        calls.append(1)
        if len(calls) == 3:
            raise RuntimeError("out of memory")

    handle = model.model.layers[1].register_forward_pre_hook(fail)
    cache = tokred.kv_cache(model)
    with pytest.raises(RuntimeError, match="out of memory"):
        model(prompt(24), past_key_values=cache)
    handle.remove()
    assert cache.engine.probe is None
    assert [layer.keys.shape[2] for layer in cache.layers] == [24] * 3
    assert cache.get_seq_length() == 24


def test_refusals():
    with pytest.raises(TypeError, match=r"instruction must be token ids, as tokenizer\.encode"):
        tokred.KVzip(instruction="Repeat the context")
    with pytest.raises(ValueError, match="at least 0"):
        Reconstruction(later=(1, -2))
    with pytest.raises(ValueError, match="chunk must be an integer of at least 1, got 0"):
        Reconstruction(chunk=0)
    with pytest.raises(ValueError, match="share must lie in"):
        tokred.KVzip(budget=0.0)
    with pytest.raises(tokred.MissingInputError, match="apply the policy to a model"):
        tokred.KVzip().reduce(site())
    model = tokred.apply(build("llama"), "kvzip", budget=0.4)
    with pytest.raises(ValueError, match="prompt lookup"):
        model.generate(prompt(24), prompt_lookup_num_tokens=3, **GREEDY)


def test_settings_are_written_and_read():
    policy = tokred.KVzip(budget=0.3, instruction=[1, 2], chunk=64)
    again = tokred.from_dict(policy.to_dict())
    assert again.parts == policy.parts
    assert policy.parts.score.repeats == Repeats(64, 4, (1, 2), (1, 2), 8)


def test_instructions_in_words():
    class Letters:
        def encode(self, text, add_special_tokens):
            assert not add_special_tokens
            return [ord(c) for c in text]

    policy = tokred.KVzip.instructed(Letters(), first="again", later="from", budget=0.5)
    assert policy.instruction == tuple(map(ord, "\n\nagain\n\n"))
    assert policy.later == tuple(map(ord, "\n\nfrom\n\n"))
