"""Language models of transformers with three or four layers, two key heads, and prompts for them."""

from __future__ import annotations

import copy
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tokred.adapters.tiny.weights import livelier


class Family(NamedTuple):
    """One way of building one class.

    Attributes:
        name: of the family in transformers: its model is ``<name>ForCausalLM``, its configuration ``<name>Config``.
        options: of the configuration.
        config: class of the configuration, where it is called otherwise.
        attention: implementation, where it is not the usual one.
        unscaled: whether its logits are not divided by anything, so that trained norms of queries have to be small.
    """

    name: str
    options: dict[str, Any]
    config: str = ""
    attention: str = ""
    unscaled: bool = False


SMALL: dict[str, Any] = {
    "vocab_size": 97, "hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 512, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2,
}  # fmt: skip
GEMMA: dict[str, Any] = {
    **SMALL, "num_hidden_layers": 4, "sliding_window": 8, "query_pre_attn_scalar": 16,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
}  # fmt: skip
SHARING: dict[str, Any] = {
    **GEMMA, "num_hidden_layers": 6, "layer_types": ["sliding_attention", "full_attention"] * 3,
    "num_kv_shared_layers": 2, "hidden_size_per_layer_input": 16, "vocab_size_per_layer_input": 97,
}  # fmt: skip
HYBRID: dict[str, Any] = {**SMALL, "num_hidden_layers": 4}
LATENT: dict[str, Any] = {
    **{name: value for name, value in SMALL.items() if name != "head_dim"}, "num_key_value_heads": 4,
    "q_lora_rank": 16, "kv_lora_rank": 24, "qk_rope_head_dim": 8, "qk_nope_head_dim": 12, "v_head_dim": 16,
    "n_routed_experts": 4, "n_group": 1, "topk_group": 1, "num_experts_per_tok": 2, "moe_intermediate_size": 32,
    "first_k_dense_replace": 1,
}  # fmt: skip
MIXTURE: dict[str, Any] = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
LINEAR: dict[str, Any] = {
    "linear_key_head_dim": 8, "linear_value_head_dim": 8, "linear_num_key_heads": 2, "linear_num_value_heads": 4,
}  # fmt: skip
MAMBA: dict[str, Any] = {"mamba_n_heads": 6, "mamba_d_head": 16, "mamba_n_groups": 1, "mamba_d_state": 8}
FAMILIES: dict[str, Family] = {
    "llama": Family("Llama", SMALL),
    "qwen2": Family("Qwen2", SMALL),
    "qwen3": Family("Qwen3", SMALL),
    "mistral": Family("Mistral", {**SMALL, "sliding_window": None}),
    "gemma": Family("Gemma", SMALL),
    "gemma3": Family("Gemma3", GEMMA, "Gemma3TextConfig"),
    "gemma2": Family("Gemma2", {**GEMMA, "attn_logit_softcapping": 2.0}, attention="eager"),
    "olmo2": Family("Olmo2", SMALL),
    "phi3": Family("Phi3", SMALL),
    "granite": Family("Granite", SMALL),
    "cohere": Family("Cohere", SMALL),
    "mixtral": Family("Mixtral", {**SMALL, "num_local_experts": 2}),
    "gpt_neox": Family("GPTNeoX", SMALL),
    "smollm3": Family("SmolLM3", SMALL),
    "glm4": Family("Glm4", SMALL),
    # A logit in every softmax that belongs to no key.
    "gpt_oss": Family("GptOss", {**GEMMA, **MIXTURE, "num_local_experts": 4}, attention="eager"),
    # Layers that attend to the rows of an earlier layer.
    "gemma3n": Family("Gemma3n", {
        **SHARING, "activation_sparsity_pattern": [0.0] * 6, "laurel_rank": 8,
    }, "Gemma3nTextConfig"),
    "gemma4": Family("Gemma4", {
        **SHARING, "global_head_dim": 24, "num_global_key_value_heads": 1,
    }, "Gemma4TextConfig", unscaled=True),
    # One latent a token, of which all heads make keys and values.
    "deepseek_v3": Family("DeepseekV3", LATENT),
    "deepseek_v2": Family("DeepseekV2", {**LATENT, "head_dim": 8}),
    # Layers that keep a state beside layers that keep rows.
    "qwen3_next": Family("Qwen3Next", {
        **HYBRID, **MIXTURE, **LINEAR, "layer_types": ["linear_attention", "full_attention"] * 2,
        "shared_expert_intermediate_size": 32,
    }),
    "qwen3_5": Family("Qwen3_5", {
        **HYBRID, **LINEAR, "layer_types": ["linear_attention", "full_attention"] * 2,
    }, "Qwen3_5TextConfig"),
    "olmo_hybrid": Family("OlmoHybrid", {
        **HYBRID, **LINEAR, "linear_num_value_heads": 2, "layer_types": ["linear_attention", "full_attention"] * 2,
    }),
    "lfm2": Family("Lfm2", {**HYBRID, "layer_types": ["conv", "full_attention", "conv", "full_attention"]}),
    "jamba": Family("Jamba", {
        **HYBRID, "attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1,
        "num_experts": 4, "num_experts_per_tok": 2, "use_mamba_kernels": False,
    }),
    "bamba": Family("Bamba", {**HYBRID, **MAMBA, "attn_layer_indices": [1, 3]}),
    "granite_hybrid": Family("GraniteMoeHybrid", {
        **HYBRID, **MAMBA, "layer_types": ["mamba", "attention"] * 2, "num_local_experts": 4,
        "num_experts_per_tok": 2, "shared_intermediate_size": 32,
    }),
}  # fmt: skip
# Refused, with the reason.
REFUSED: dict[str, Family] = {
    "gptj": Family("GPTJ", {
        "vocab_size": 97, "n_positions": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, "rotary_dim": 8,
    }),
}  # fmt: skip


def build(name: str, dtype: torch.dtype = torch.float32, seed: int = 0, **more: Any) -> Any:
    """A model in evaluation mode, with weights that make rows matter.

    Args:
        name: a family, refused ones included.
        dtype: of its weights.
        seed: of its weights.
        more: other options of its configuration.
    """
    import transformers as t

    row = (FAMILIES | REFUSED)[name]
    torch.manual_seed(seed)
    config = getattr(t, row.config or f"{row.name}Config")(**{**copy.deepcopy(row.options), **more})
    kind = getattr(t, f"{row.name}ForCausalLM")
    model = kind._from_config(config, attn_implementation=row.attention) if row.attention else kind(config)
    if row.unscaled:
        for norm in (part for label, part in model.named_parameters() if "q_norm" in label):
            norm.data.mul_(SMALL["head_dim"] ** -0.5)
    return livelier(model).to(dtype).eval()


def prompt(n: int = 29, b: int = 1, seed: int = 1) -> Tensor:
    """``[B, N]`` token ids, none of them special."""
    return torch.randint(3, 95, (b, n), generator=torch.Generator().manual_seed(seed))


def padded(lengths: tuple[int, ...], seed: int = 1) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Prompts of several lengths as one left-padded batch: ids, mask, and each alone."""
    alone = [prompt(n, seed=seed + i) for i, n in enumerate(lengths)]
    width = max(lengths)
    ids, mask = torch.zeros(len(lengths), width, dtype=torch.long), torch.zeros(len(lengths), width, dtype=torch.long)
    for i, row in enumerate(alone):
        ids[i, width - row.shape[1] :], mask[i, width - row.shape[1] :] = row[0], 1
    return ids, mask, alone
