"""Encoder-decoders: rows of the encoder leave the cross-attention, once the decoder has asked what is to be heard."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("transformers")

import transformers

import tokred
from tests.kv.tiny import POLICIES, Scatter, prompt
from tokred.adapters.tiny.weights import livelier
from tokred.kernels.decode_attention import SENTINEL
from tokred.methods.kv.h2o import ColumnSum

GREEDY = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
SIZES = {
    "vocab_size": 97, "d_model": 48, "encoder_layers": 2, "decoder_layers": 3, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2, "decoder_start_token_id": 3,
}  # fmt: skip
WHISPER = {
    "num_mel_bins": 8, "max_source_positions": 30, "max_target_positions": 40, "suppress_tokens": None,
    "begin_suppress_tokens": None,
}  # fmt: skip


pytestmark = pytest.mark.usefixtures("no_grad")


def build(name: str = "Bart", dtype: torch.dtype = torch.float32):
    t = transformers
    torch.manual_seed(0)
    if name == "Whisper":
        model = t.WhisperForConditionalGeneration(t.WhisperConfig(**SIZES, **WHISPER))
    else:
        kind = t.MarianMTModel if name == "Marian" else getattr(t, f"{name}ForConditionalGeneration")
        config = getattr(t, f"{name}Config")(**SIZES, max_position_embeddings=128, forced_eos_token_id=None)
        model = kind(config)
    return livelier(model).to(dtype).eval()


def heard(model, length: int = 30):
    """Inputs of the encoder: of two lengths, where it has tokens."""
    if "Whisper" in type(model).__name__:
        sounds = torch.randn(2, 8, 60, generator=torch.Generator().manual_seed(0))
        return {"input_features": sounds.to(model.dtype)}
    ids, mask = prompt(length, 2), torch.ones(2, length, dtype=torch.long)
    mask[1, length - 10 :] = 0
    return {"input_ids": ids, "attention_mask": mask}


NAMES = [
    "Bart",
    *(pytest.param(n, marks=pytest.mark.hosts) for n in ("Whisper", "Marian", "MBart", "Pegasus", "M2M100")),
]


@pytest.mark.parametrize("name", NAMES)
def test_nothing_to_evict_changes_nothing(name):
    model = build(name)
    given, asked = heard(model), prompt(6, 2, seed=3)
    plain = model(**given, decoder_input_ids=asked).logits
    made = model.generate(**given, **GREEDY)
    tokred.apply(model, "snapkv", budget=1.0, window=4)
    assert torch.equal(model(**given, decoder_input_ids=asked).logits, plain)
    assert torch.equal(model.generate(**given, **GREEDY), made)
    tokred.apply(model, "snapkv", budget=9, window=4)
    model.generate(**given, **GREEDY)
    assert [(row.seen, row.rows) for row in tokred.report(model).layers] == [(30, 9)] * 3
    tokred.remove(model)
    assert torch.equal(model(**given, decoder_input_ids=asked).logits, plain)


def hide(monkeypatch, hidden):
    """Let the model's own attention hide rows ``[B, H, N]`` of each layer that are given in ``hidden``."""
    own = torch.nn.functional.scaled_dot_product_attention

    def attention(q, k, v, attn_mask=None, **more):
        rows = hidden.get("layer")
        if rows is None or k.shape[2] != rows.shape[2]:
            return own(q, k, v, attn_mask=attn_mask, **more)
        mask = rows[:, :, None].expand(-1, -1, q.shape[2], -1)
        return own(q, k, v, attn_mask=mask if attn_mask is None else mask & attn_mask, **more)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", attention)


@pytest.mark.parametrize("name", NAMES)
def test_rows_that_are_gone_are_as_if_they_were_hidden(name, monkeypatch):
    model = build(name, torch.float64)
    given, first, steps = heard(model), prompt(5, 2, seed=3), [prompt(n, 2, seed=4 + n) for n in (1, 3, 1)]

    def run():
        out = model(**given, decoder_input_ids=first, use_cache=True)
        cache, logits = out.past_key_values, [out.logits]
        for step in steps:
            encoded = (out.encoder_last_hidden_state,)
            mask = {k: v for k, v in given.items() if k == "attention_mask"}
            logits.append(model(encoder_outputs=encoded, decoder_input_ids=step, past_key_values=cache, **mask).logits)
        return logits, cache

    tokred.apply(model, Scatter(9))
    ours, cache = run()
    tokred.remove(model)
    assert [x.keys.shape[2] for x in cache.cross_attention_cache.layers] == [12, 15, 18]
    hidden, calls = {}, [0] * 3

    def enter(i):
        def hook(module, args):
            calls[i] += 1
            slots = cache.cross_attention_cache.layers[i].positions.long()
            kept = torch.zeros(2, 4, 31, dtype=torch.bool)
            kept.scatter_(2, torch.where(slots == SENTINEL, 30, slots), True)
            hidden["layer"] = kept[..., :30] if calls[i] > 1 else None

        return hook

    for i, layer in enumerate(model.model.decoder.layers):
        layer.encoder_attn.register_forward_pre_hook(enter(i))
        layer.encoder_attn.register_forward_hook(lambda *_: hidden.clear())
    hide(monkeypatch, hidden)
    theirs, _ = run()
    for a, b in zip(ours, theirs, strict=True):
        assert (a - b).abs().max() < 1e-10


def test_a_policy_waits_until_its_window_has_been_asked():
    model = build()
    tokred.apply(model, "snapkv", budget=9, window=4)
    given, cache, rows = heard(model), tokred.kv_cache(model), []
    encoded = model.get_encoder()(**given)
    for n in range(6):
        step = prompt(1, 2, seed=n)
        model(encoder_outputs=encoded, attention_mask=given["attention_mask"], decoder_input_ids=step,
              past_key_values=cache)  # fmt: skip
        rows.append(cache.cross_attention_cache.layers[0].keys.shape[2])
    assert rows == [30, 30, 30, 9, 9, 9]
    assert cache.get_seq_length() == 6
    slots = cache.cross_attention_cache.layers[0].positions
    assert slots[1].max() < 20, "padding of the encoder has left"


def test_scores_are_the_attention_of_the_decoders_queries():
    model, seen = build(), []
    given, asked = heard(model), prompt(6, 2, seed=3)
    model.set_attn_implementation("eager")
    expected = model(**given, decoder_input_ids=asked, output_attentions=True).cross_attentions[0].sum(2)
    model.set_attn_implementation("sdpa")

    class Spy(ColumnSum):
        def observe(self, site):
            super().observe(site)
            seen.append(self(site))

    tokred.apply(model, "kv", score=Spy(), budget=9)
    model(**given, decoder_input_ids=asked)
    found = seen[0]
    torch.testing.assert_close(found / found.sum(-1, keepdim=True), expected / expected.sum(-1, keepdim=True))


def test_noisy_scores_are_of_queries_that_see_every_row():
    """Padding of the rows is none of the queries', and no query stands among the rows: as without noise."""
    found = {}
    for noise in ("none", "constant"):
        score, seen = tokred.kv.Gumbel(noise=noise, start=1, end=1), []

        class Spy(type(score)):  # type: ignore[misc]
            def observe(self, site, seen=seen):
                super().observe(site)
                seen.append(self(site))

        model = build()
        given, asked = heard(model, 12), prompt(5, 2, seed=3)
        given["attention_mask"][1, 8:] = 0
        tokred.apply(model, "kv", score=Spy(noise=noise, start=1, end=1), budget=6)
        model(**given, decoder_input_ids=asked)
        found[noise] = seen[0]
    torch.testing.assert_close(found["constant"], found["none"])
    assert found["constant"][1].sum() > 1


@pytest.mark.parametrize("name", ["keyformer", "h2o", "snapkv"])
def test_a_padded_sample_is_as_by_itself(name):
    model = tokred.apply(build(), name, **({"budget": 6} | ({"window": 2} if name == "snapkv" else {})))
    given, asked = heard(model, 24), prompt(4, 2, seed=3)
    alone = {"input_ids": given["input_ids"][1:, :14]}

    def steps(batch, ids):
        cache = tokred.kv_cache(model)
        model(**batch, decoder_input_ids=ids[:, :3], **tokred.cache_kwargs(cache))
        return model(**batch, decoder_input_ids=ids[:, 3:], **tokred.cache_kwargs(cache)).logits

    torch.testing.assert_close(steps(given, asked)[1:], steps(alone, asked[1:]), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", list(POLICIES))
def test_policies_run_or_are_refused_for_what_an_encoder_cannot_give(name):
    model = build()
    given, works = heard(model), {r.method: r.works for r in tokred.supports(model)}[name]
    if not works:
        with pytest.raises(tokred.MissingInputError):
            tokred.apply(model, POLICIES[name])
        return
    tokred.apply(model, POLICIES[name])
    model.generate(**given, **GREEDY)
    assert tokred.report(model).layers[-1].rows < 30


def test_beams_go_on_with_the_rows_of_their_samples():
    model = build()
    tokred.apply(model, "snapkv", budget=9, window=4)
    given = heard(model)
    made = model.generate(**given, num_beams=2, **GREEDY)
    for i, n in enumerate((30, 20)):
        alone = model.generate(given["input_ids"][i : i + 1, :n], num_beams=2, **GREEDY)
        assert torch.equal(made[i], alone[0])


def test_what_would_be_wrong_is_refused():
    model = build()
    given = heard(model)
    tokred.apply(model, "snapkv", budget=9, window=4)
    with pytest.raises(ValueError, match="the mask of the decoder's tokens hides some"):
        model(
            **given, decoder_input_ids=prompt(4, 2), decoder_attention_mask=torch.tensor([[1, 1, 1, 1], [0, 1, 1, 1]])
        )
    with pytest.raises(TypeError, match="give an EncoderDecoderCache"):
        model(**given, decoder_input_ids=prompt(4, 2), past_key_values=transformers.DynamicCache())
    with pytest.raises(ValueError, match="ask about tokens that are taken back"):
        model.generate(given["input_ids"][:1], prompt_lookup_num_tokens=2, **GREEDY)
    with pytest.raises(ValueError, match="keeps rows that snapkv cannot evict"):
        model.generate(**given, cache_implementation="static", **GREEDY)
    dense = tokred.remove(model)(**given, decoder_input_ids=prompt(4, 2), use_cache=True).past_key_values
    tokred.apply(model, "snapkv", budget=9, window=4)
    with pytest.raises(ValueError, match="holds 30 tokens that snapkv has not seen"):
        model(**given, decoder_input_ids=prompt(1, 2), past_key_values=dense)


def test_a_bias_by_distance_is_refused_by_its_name():
    t = transformers
    config = t.T5Config(vocab_size=97, d_model=48, d_kv=12, d_ff=64, num_layers=2, num_decoder_layers=2, num_heads=4)
    with pytest.raises(
        tokred.UnsupportedModelError,
        match=r"adds a bias by distance to its logits|does not call the attention function",
    ):
        tokred.apply(t.T5ForConditionalGeneration(config), "snapkv", budget=9, window=4)


def test_rows_of_an_encoder_do_not_move_up():
    model = build()
    with pytest.raises(tokred.MissingInputError, match="is not told by where either stands"):
        tokred.apply(model, tokred.make("kv", score="key_norm", budget=4, sinks=2, positions="cache"))
    assert not tokred.patched(model)
