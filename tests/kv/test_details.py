"""Details of scores and layers that decide which rows stay, each written out by hand; and calls at the edges."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("transformers")

import tokred
from tests.kv.test_turns import TURNS, turns
from tests.kv.tiny import POLICIES, build, padded, prompt
from tests.registered import stored
from tokred import kv
from tokred.adapters.kv.rope import LayerRope
from tokred.kv import CacheSite, Padding, When
from tokred.kv.engine import Engine

pytestmark = pytest.mark.usefixtures("no_grad")


def weights_of(q, k, mask=None):
    """``[B, H, M, N]`` causal attention."""
    m, n = q.shape[2], k.shape[2]
    k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
    logits = q @ k.mT * q.shape[-1] ** -0.5
    hidden = torch.arange(n) > torch.arange(n - m, n)[:, None]
    hidden = hidden if mask is None else hidden | ~mask[:, None, None]
    return logits.masked_fill(hidden, -torch.inf).softmax(-1).nan_to_num(0.0)


def random_site(n=20, m=20, **more):
    g = torch.Generator().manual_seed(3)
    q, k = torch.randn(2, 4, m, 8, generator=g) * 2, torch.randn(2, 2, n, 8, generator=g) * 2
    return CacheSite(q=q, k=k, v=k, **more)


# ---------------------------------------------------------------- scores


@pytest.mark.parametrize("group", ["mean", "sum", "max"])
@pytest.mark.parametrize("pooling", ["avg", "max"])
@pytest.mark.parametrize("pool", [1, 3])
def test_a_window_combines_the_heads_of_a_group_as_it_is_told(group, pooling, pool):
    site, size = random_site(), 6
    rows = weights_of(site.q, site.k)[:, :, -size:].mean(2)
    rows[..., -size:] = 0
    smooth = torch.nn.functional.avg_pool1d if pooling == "avg" else torch.nn.functional.max_pool1d
    each = rows.view(2, 2, 2, 20)
    if pooling == "avg":  # over the heads first, which for a mean or a sum is the same
        each = {"mean": each.mean(2), "sum": each.sum(2), "max": each.amax(2)}[group]
        expected = smooth(each, pool, 1, pool // 2)
    else:
        each = smooth(rows, pool, 1, pool // 2).view(2, 2, 2, 20)
        expected = {"mean": each.mean(2), "sum": each.sum(2), "max": each.amax(2)}[group]
    assert torch.allclose(kv.Window(size, pool, pooling, group)(site), expected, atol=1e-6)


@pytest.mark.parametrize("parts", [(20,), (7, 13), (12, 1, 1, 6)])
def test_decay_counts_the_queries_of_each_forward(parts):
    """``gamma ** (how many queries came later)``, whatever forwards they came in."""
    whole = random_site()
    later = torch.arange(19, -1, -1.0)
    expected = (weights_of(whole.q, whole.k) * 0.8 ** later[:, None]).sum(2).view(2, 2, 2, 20).sum(2)
    rows, score, stop = {}, kv.ColumnSum(0.8), 0
    for count in parts:
        start, stop = stop, stop + count
        rows = {k: torch.nn.functional.pad(v, (0, count)) for k, v in rows.items()}
        site = CacheSite(q=whole.q[:, :, start:stop], k=whole.k[:, :, :stop], v=whole.k[:, :, :stop], rows=rows)
        score.observe(site)
    assert torch.allclose(score(site), expected, atol=1e-5)


def test_padding_between_tokens_has_no_vote():
    mask = torch.ones(2, 20, dtype=torch.bool)
    mask[1, 9:13] = False
    rows = weights_of(random_site().q, random_site().k, mask) * mask[:, None, :, None]
    expected = rows.sum(2).view(2, 2, 2, 20).sum(2)
    site = random_site(padding=Padding(mask))
    score = kv.ColumnSum()
    score.observe(site)
    assert torch.allclose(score(site), expected, atol=1e-5)
    last = rows[:, :, -1].mean(1, keepdim=True).expand(-1, 2, -1)
    assert torch.allclose(kv.LastQuery()(site), last, atol=1e-6)
    newest = rows[1, :, [6, 7, 8, 13, 14, 15, 16, 17, 18, 19]].sum(1).view(2, 2, 20).mean(1)
    assert torch.allclose(site.columns(10)[1], newest, atol=1e-6)


def test_expected_attention_looks_at_the_positions_that_come_next():
    """The first is the one that the next token will have, for every sample by its own length."""
    asked = []

    class Rope:
        def unrotate(self, q):
            return q

        def mean(self, start, count):
            asked.append((start, count))
            return torch.ones(8), torch.zeros(8)

    mask = torch.arange(20) >= torch.tensor([[0], [6]])
    site = random_site(padding=Padding(mask), rope=Rope())
    kv.Expected(future=7)(site)
    assert asked == [(20, 7), (14, 7)]


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3"])
def test_the_rotary_embedding_is_the_models_own(family):
    """Undone it gives what was not rotated; ahead it is the mean over exactly the positions asked for."""
    model = build(family)
    seen = {}
    observe = Engine.observe

    def watched(self, layer, site, before):
        seen[layer.index] = site
        observe(self, layer, site, before)

    tokred.apply(model, "expected_attention", budget=9, sinks=1, future=6)
    attentions = [m for n, m in model.named_modules() if n.endswith("self_attn")]
    full = [a for a in attentions if getattr(a, "layer_type", "full_attention") == "full_attention"]
    flat, handles = {}, []
    for i, attention in enumerate(full):
        norm = getattr(attention, "q_norm", None)
        source = attention.q_proj if norm is None else norm
        handles.append(source.register_forward_hook(lambda m, a, out, i=i: flat.update({i: out})))
    Engine.observe = watched
    try:
        model(prompt(17))
    finally:
        Engine.observe = observe
        for handle in handles:
            handle.remove()
    assert seen.keys() == flat.keys()
    for i, site in seen.items():
        plain = flat[i].view(1, 17, 4, 16).transpose(1, 2) if flat[i].ndim == 3 else flat[i]
        plain = plain if plain.shape[1] == 4 else plain.transpose(1, 2)
        assert torch.allclose(site.rope.unrotate(site.q), plain, atol=1e-4)
        rope: LayerRope = site.rope
        extra = () if rope.layer_type is None else (rope.layer_type,)
        cos, sin = rope.embedding(torch.zeros(1, 1, 1), torch.arange(17, 23)[None], *extra)
        ours = rope.mean(17, 6)
        assert torch.allclose(ours[0], cos[0].mean(0), atol=1e-6)
        assert torch.allclose(ours[1], sin[0].mean(0), atol=1e-6)
        tables = rope.part(4, 5).tables
        assert torch.equal(tables[0], rope.tables[0][:, 5:9])


def test_a_temperature_rises_with_a_samples_own_tokens():
    mask = torch.ones(2, 20, dtype=torch.bool)
    mask[1, 12:16] = False
    score = kv.Gumbel(1.0, 5.0, steps=8)
    both = random_site(padding=Padding(mask), prompt=(12, 12), generated=8)
    score.observe(both)
    for i in range(2):
        rows = mask[i]
        one = CacheSite(
            q=both.q[i : i + 1, :, rows], k=both.k[i : i + 1, :, rows], v=both.v[i : i + 1, :, rows], prompt=(12,)
        )
        one.generated = int(rows.sum()) - 12
        score.observe(one)
        assert torch.allclose(score(both)[i][:, rows], score(one)[0], atol=1e-5)


def test_noise_differs_between_heads_and_layers():
    site, other = random_site(layer=0), random_site(layer=1)
    pair = torch.arange(20).view(1, 1, 20, 1), torch.arange(20).view(1, 1, 1, 20)
    drawn, deeper = kv.Gumbel().draw(site, *pair), kv.Gumbel().draw(other, *pair)
    assert len({tuple(head.flatten().tolist()) for head in (*drawn[0], *deeper[0])}) == 8


def test_a_gate_at_the_border_retrieves():
    split = kv.Split(((0.2, 0.5, 0.9),), 0.5)
    assert split.retrieves(0) == (False, True, True)


@pytest.mark.filterwarnings("ignore")
def test_shares_of_later_turns_count_all_tokens_so_far():
    model = tokred.apply(build("llama"), "snapkv", budget=0.5, window=4, turns=True)
    cache = tokred.kv_cache(model)
    for n, rows in ((20, 10), (12, 16), (8, 20)):
        model(prompt(n), past_key_values=cache)
        assert [layer.held for layer in cache.layers] == [rows] * 3


# ---------------------------------------------------------------- samples and layers


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["rpc", "expected", "snapkv_steps"])
def test_beams_carry_what_a_policy_noted(name):
    """Past its first eviction; beams cross, so that notes of another beam would choose other rows."""
    policy = {
        "rpc": POLICIES["rpc"],
        "expected": tokred.make("kv", score=kv.Expected(16, 2), budget=9, when=When(every=3), sinks=2, recent=1),
        "snapkv_steps": tokred.make("kv", score=kv.Window(5, 3), budget=9, when=When(every=3)),
    }[name]
    model = tokred.apply(build("llama"), policy)
    options = {"num_beams": 4, "max_new_tokens": 17, "do_sample": False, "eos_token_id": None, "length_penalty": 0.0}
    ids, mask, alone = padded((22, 14))
    both = model.generate(ids, attention_mask=mask, **options)
    for i, row in enumerate(alone):
        assert both[i, 22:].tolist() == model.generate(row, **options)[0, row.shape[1] :].tolist()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["rpc", "expected_attention", "kvzip", "cake"])
def test_notes_follow_the_samples(name):
    more = {"kvzip": {"chunk": 9}, "cake": {"window": 4}, "rpc": {"period": 8, "window": 3}}.get(name, {})
    model = tokred.apply(build("llama"), tokred.make(name, **more))
    ids = prompt(20, 3)
    cache = tokred.kv_cache(model, prompt=40)
    model(ids, past_key_values=cache)
    notes = {k: v for layer in cache.layers for k, v in layer.notes.items()}
    assert notes, "something waits for the rest of the prompt"
    before = {k: v.clone() for k, v in notes.items()}
    cache.reorder_cache(torch.tensor([2, 0, 0]))
    after = {k: v for layer in cache.layers for k, v in layer.notes.items()}
    for key, note in before.items():
        assert torch.equal(after[key], note[[2, 0, 0]]), key
    cache.batch_repeat_interleave(2)
    assert all(v.shape[0] == 6 for layer in cache.layers for v in layer.notes.values())


@pytest.mark.filterwarnings("ignore")
def test_padding_is_hidden_from_queries_over_flat_rows():
    """Rows that came after an eviction may be padding, whatever layout the older ones have."""
    model = build("llama", torch.float64)
    policy = tokred.make("kv", score=kv.KeyNorm(), budget=kv.Adaptive(9, safe=0.0), sinks=1, recent=2)
    tokred.apply(model, policy)
    logits = {}
    for sample in (None, 0, 1):
        cache, seen, found = tokred.kv_cache(model, layout="flat"), None, []
        for ids, mask in turns():
            if sample is not None:
                ids, mask = ids[sample : sample + 1, mask[sample].bool()], torch.ones(1, int(mask[sample].sum())).long()
            seen = mask if seen is None else torch.cat([seen, mask], 1)
            position = (seen.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
            given = {"attention_mask": seen} if sample is None else {}
            found.append(model(ids, position_ids=position, past_key_values=cache, **given).logits[:, -1])
        assert all(layer.shelf.flat is not None for layer in cache.layers)
        logits[sample] = found
    for t in range(len(TURNS)):
        for i in range(2):
            assert torch.allclose(logits[None][t][i], logits[i][t][0], atol=1e-9), (t, i)


# ---------------------------------------------------------------- edges


# These have no budget of their own, or need a file.
OTHERS = ("limited", "duoattention", "kvzap", "triattention", "lukv", "adore", "fastcache", *stored())
NAMES = [n for n in tokred.list_methods() if tokred.make(n).stage == "cache" and n not in OTHERS]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", NAMES)
def test_prompts_shorter_than_what_is_kept_are_left_alone(name):
    """Prompts of one token, and of fewer than a window: bit for bit the model's own answer."""
    model = build("llama")
    for n in (1, 3):
        plain = model.generate(prompt(n), max_new_tokens=3, do_sample=False, eos_token_id=None)
        expected = model(prompt(n)).logits
        budget = {} if name == "rpc" else {"cap": 100} if name == "fastkv" else {"budget": 200}
        with tokred.applied(model, name, **budget):
            assert torch.equal(model(prompt(n)).logits, expected)
            made = model.generate(prompt(n), max_new_tokens=3, do_sample=False, eos_token_id=None)
            assert torch.equal(made, plain)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", NAMES)
def test_shares_of_very_short_prompts(name):
    """A share of a token or two keeps at least one; nothing fails."""
    model = build("llama")
    share = {} if name in ("rpc", "fastkv") else {"budget": 0.3}
    with tokred.applied(model, name, **share):
        for n in (1, 2, 5):
            ids = prompt(n, 2)
            assert model.generate(ids, max_new_tokens=4, do_sample=False, eos_token_id=None).shape == (2, n + 4)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", POLICIES)
def test_sites_without_samples(name):
    class Rope:
        def unrotate(self, q):
            return q

        def mean(self, start, count):
            return torch.ones(8), torch.zeros(8)

    for mask in (None, Padding(torch.ones(0, 30, dtype=torch.bool))):
        q, k = torch.zeros(0, 4, 30, 8), torch.zeros(0, 2, 30, 8)
        site = CacheSite(q=q, k=k, v=k, padding=mask, rope=Rope(), projection=lambda: torch.zeros(16, 32))
        policy = POLICIES[name]
        policy.parts.score.observe(site)
        step = policy.shrink(site, policy.parts.score(site), ())
        assert step.representative.shape[:2] == (0, 2)


def test_a_batch_without_samples_is_refused():
    model = tokred.apply(build("llama"), "snapkv", budget=9, window=4)
    with pytest.raises(ValueError, match="holds no samples"):
        model(torch.zeros(0, 7, dtype=torch.long))
    assert model(prompt(20)).logits.isfinite().all(), "the model works on"


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["snapkv", "h2o", "expected_attention", "adakv", "zeromerge", "kvzip"])
def test_a_sample_of_padding_alone(name):
    """It has nothing to keep; its batch-mate is not touched by it."""
    model = build("llama", torch.float64)
    more = {"snapkv": {"window": 4}, "adakv": {"score": kv.Window(4)}, "kvzip": {"chunk": 9}}.get(name, {})
    tokred.apply(model, name, budget=0.5, **more)
    ids, mask = prompt(16, 2), torch.ones(2, 16, dtype=torch.long)
    mask[1] = 0
    cache, alone = tokred.kv_cache(model, layout="rectangle"), tokred.kv_cache(model, layout="rectangle")
    model(ids, attention_mask=mask, past_key_values=cache)
    model(ids[:1], past_key_values=alone)
    for ours, theirs in zip(cache.layers, alone.layers, strict=True):
        kept = [[[p for p in head if p < 16] for head in layer.positions[0].tolist()] for layer in (ours, theirs)]
        assert kept[0] == kept[1]
