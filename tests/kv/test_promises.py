"""What ``supports`` promises of a language model runs, and what it refuses it refuses for the true reason."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("transformers")

import transformers

import tokred
from tests.kv.tiny import SMALL, prompt
from tokred.adapters import find
from tokred.errors import UnsupportedModelError

HALVES = ["sliding_attention", "full_attention"] * 2
LINEAR = {"linear_key_head_dim": 8, "linear_value_head_dim": 8, "linear_num_key_heads": 2, "linear_num_value_heads": 4}
STATES = ["linear_attention", "full_attention"] * 2
MAMBA2 = {"mamba_n_heads": 6, "mamba_d_head": 16, "mamba_n_groups": 1, "mamba_d_state": 8}
GPT = {"vocab_size": 97, "n_embd": 48, "n_layer": 4, "n_head": 4, "n_positions": 256}
MOE = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
SHARED = {"layer_types": HALVES, "num_kv_shared_layers": 2, "hidden_size_per_layer_input": 16,
          "vocab_size_per_layer_input": 97, "sliding_window": 8}  # fmt: skip
LATENT = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 16,
          "n_routed_experts": 4, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 4, "head_dim": 8,
          "num_key_value_heads": 4}  # fmt: skip
MAMBA = {"vocab_size": 97, "hidden_size": 48, "num_hidden_layers": 4, "state_size": 8}

# Class, and what its configuration needs besides the usual sizes.
WORKS = {
    "Llama": {},
    "Mistral": {"sliding_window": None},
    "Mixtral": {"sliding_window": None, "num_local_experts": 4},
    "Qwen2": {},
    "Qwen3": {},
    "Qwen3Moe": {**MOE, "mlp_only_layers": [0, 2]},
    "Gemma": {},
    "Gemma2": {"layer_types": HALVES, "sliding_window": 8, "query_pre_attn_scalar": 16},
    "Gemma3": {"layer_types": HALVES, "sliding_window": 8, "query_pre_attn_scalar": 16},
    "Phi": {},
    "Phi3": {"sliding_window": None},
    "Glm4": {},
    "Granite": {},
    "Olmo2": {},
    "Olmoe": MOE,
    "Cohere": {},
    "Cohere2": {"layer_types": HALVES, "sliding_window": 8},
    "Exaone4": {"layer_types": HALVES, "sliding_window": 8},
    "SmolLM3": {"no_rope_layers": [1, 0, 1, 0]},
    "Ernie4_5": {},
    "Nemotron": {},
    "Persimmon": {},
    "SeedOss": {},
    "Starcoder2": {"sliding_window": None},
    "GPTNeoX": {},
    "BioGpt": {},
    "OPT": {"ffn_dim": 64, "word_embed_proj_dim": 48},
    "GPT2": GPT,
    "GPTBigCode": GPT,
    "GptOss": {"layer_types": HALVES, **MOE, "sliding_window": 8},
    "Gemma3n": {**SHARED, "activation_sparsity_pattern": [0.0] * 4, "laurel_rank": 8},
    "Gemma4": {**SHARED, "global_head_dim": 24},
    "DeepseekV2": LATENT,
    "DeepseekV3": LATENT,
    "Lfm2": {"layer_types": ["conv", "conv", "conv", "full_attention"]},
    "Qwen3Next": {**MOE, **LINEAR, "layer_types": STATES, "shared_expert_intermediate_size": 32},
    "Qwen3_5": {**LINEAR, "layer_types": STATES},
    "OlmoHybrid": {**LINEAR, "layer_types": STATES, "linear_num_value_heads": 2},
    "Jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1,
              "num_experts": 4, "num_experts_per_tok": 2, "use_mamba_kernels": False},
    "Bamba": {"attn_layer_indices": [1, 3], **MAMBA2},
    "GraniteMoeHybrid": {"layer_types": ["mamba", "attention"] * 2, **MAMBA2, "num_local_experts": 4,
                         "num_experts_per_tok": 2, "shared_intermediate_size": 32},
}  # fmt: skip
# What the reason has to say.
REFUSED = {
    "MiniMax": ({**MOE, "layer_types": ["linear_attention", "full_attention"] * 2},
                "in a cache of a class of its own, MiniMaxCache"),
    "Mamba": (MAMBA, "keep a recurrent state instead of keys and values"),
    "FalconMamba": (MAMBA, "keep a recurrent state instead of keys and values"),
    "Mamba2": ({**MAMBA, "num_heads": 6, "head_dim": 16, "n_groups": 1},
               "keep a recurrent state instead of keys and values"),
    "Rwkv": ({"vocab_size": 97, "hidden_size": 48, "attention_hidden_size": 48, "num_hidden_layers": 2},
             "keep a recurrent state ('state') instead of keys and values"),
    "RecurrentGemma": ({"lru_width": 48, "attention_window_size": 8, "num_hidden_layers": 3},
                       "all of its layers that keep rows have a sliding window"),
    "Doge": ({"sliding_window": None}, "makes a mask of its own, which evicted rows do not fit"),
    "DiffLlama": ({}, "attends to other keys and values than its cache holds"),
    "JetMoe": ({"kv_channels": 12, "num_local_experts": 4, "num_experts_per_tok": 2, "num_key_value_heads": 2},
               "attends to other keys and values than its cache holds"),
    "Mllama": ({"cross_attention_layers": [1, 3]}, "keeps rows of images, which are no tokens of the text"),
    "Falcon": ({"num_kv_heads": 2}, "its attention cannot be exchanged"),
    "Bloom": ({"n_head": 4, "n_layer": 2}, "its attention cannot be exchanged"),
}  # fmt: skip
# Layers that do not turn queries and keys: what undoes a rotation would be wrong there.
STILL = ("Cohere2", "Exaone4", "SmolLM3", "GPT2", "OPT", "BioGpt", "Jamba", "GraniteMoeHybrid")


pytestmark = pytest.mark.usefixtures("no_grad")


def model_of(name: str, more: dict):
    """A tiny model of a class; skipped where this release of transformers has none."""
    cls = getattr(transformers, f"{name}ForCausalLM", None) or getattr(transformers, f"{name}LMHeadModel", None)
    if cls is None:
        pytest.skip(f"this transformers has no {name}")
    kind = cls.config_class
    sizes = {**SMALL, "num_hidden_layers": 4} if name not in ("GPT2", "GPTBigCode", "Mamba", "FalconMamba", "Mamba2",
                                                              "Rwkv") else {}  # fmt: skip
    sizes = {
        k: v
        for k, v in sizes.items()
        if k != "head_dim" or name not in ("Mllama", "JetMoe", "GPTNeoX", "Olmoe", "Persimmon", "Falcon", "Bloom")
    }
    torch.manual_seed(0)
    return cls._from_config(kind(**{**sizes, **more})).eval()


def smaller(method: str) -> dict:
    return {
        "snapkv": {"budget": 9, "window": 4}, "criticalkv": {"budget": 9, "score": tokred.kv.Window(4)},
        "pyramidkv": {"budget": 9, "window": 2}, "adakv": {"budget": 9, "score": tokred.kv.Window(4)},
        "cake": {"budget": 9, "window": 4}, "lagkv": {"budget": 9, "lag": 4}, "rpc": {"period": 8, "window": 2},
        "limited": {"limit": "1 MiB", "chunk": 32}, "kvzip": {"chunk": 9}, "duoattention": {},
        "kvzap": {"tau": 0.0, "recent": 4, "hidden": 4}, "triattention": {"stats": "prompt", "least": 1, "budget": 4},
    }.get(method, {"budget": 9})  # fmt: skip


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", WORKS)
def test_what_is_promised_runs(name):
    model, ids = model_of(name, WORKS[name]), prompt(20)
    plain = model(ids).logits
    promised = {r.method: r.works for r in tokred.supports(model)}
    for method in ("snapkv", "streaming_llm", "h2o", "zeromerge"):
        assert promised[method], method
    assert not (promised["expected_attention"] and name in STILL)
    for method in ("snapkv", "streaming_llm"):
        tokred.apply(model, method, budget=1000)
        assert torch.equal(model(ids).logits, plain), "nothing to evict, nothing changed"
        tokred.apply(model, method, **smaller(method))
        made = model.generate(ids, max_new_tokens=4, do_sample=False, eos_token_id=None)
        assert made.shape == (1, 24)
        rows = [row.rows for row in tokred.report(model).layers]
        # Layers that read another's rows have none.
        assert [n for n in rows if n][-1] == (12 if method == "snapkv" else 9)
    for method in ("expected_attention", "criticalkv", "squeezeattention", "kvzip", "cake", "kvzap", "triattention"):
        if promised[method]:
            tokred.apply(model, method, **smaller(method))
            assert model(ids).logits.isfinite().all(), method
        else:
            with pytest.raises(tokred.MissingInputError):
                tokred.apply(model, method, **smaller(method))
    assert torch.equal(tokred.remove(model)(ids).logits, plain)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused_says_why(name):
    more, why = REFUSED[name]
    model, ids = model_of(name, more), prompt(20)
    plain = model(ids).logits
    rows = {r.method: r for r in tokred.supports(model)}
    for method in ("snapkv", "streaming_llm"):
        assert not rows[method].works
        assert why in rows[method].reason, rows[method].reason
        with pytest.raises(UnsupportedModelError) as error:
            tokred.apply(model, method, **smaller(method))
        assert why in str(error.value)
        with pytest.raises(UnsupportedModelError) as error:
            find(model, "cache")
        assert why in str(error.value)
    assert torch.equal(model(ids).logits, plain)


def test_trying_a_layer_needs_neither_memory_nor_luck():
    """Looking at a model draws no random numbers and leaves its configuration alone."""
    model = model_of("Llama", {})
    before, state = model.config.to_dict(), torch.random.get_rng_state()
    tokred.supports(model)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert model.config.to_dict() == before
    assert model.config._attn_implementation == "sdpa"
