"""Language models of transformers with layers of experts: several experts a token, shared ones beside them or none."""

from __future__ import annotations

from typing import Any

import torch

from tokred.adapters.tiny.kv import SMALL, Family
from tokred.adapters.tiny.weights import livelier

_FEW: dict[str, Any] = {**SMALL, "num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
_LOCAL: dict[str, Any] = {**SMALL, "num_local_experts": 8, "num_experts_per_tok": 2}
_STATES: dict[str, Any] = {
    "linear_key_head_dim": 8, "linear_value_head_dim": 8, "linear_num_key_heads": 2, "linear_num_value_heads": 4,
    "num_hidden_layers": 4, "layer_types": ["linear_attention", "full_attention"] * 2,
    "shared_expert_intermediate_size": 32,
}  # fmt: skip
FAMILIES: dict[str, Family] = {
    "mixtral": Family("Mixtral", {**_LOCAL, "sliding_window": None}),
    "qwen2_moe": Family("Qwen2Moe", {**_FEW, "shared_expert_intermediate_size": 48, "norm_topk_prob": False}),
    "qwen3_moe": Family("Qwen3Moe", {**_FEW, "norm_topk_prob": True, "mlp_only_layers": [0]}),
    "olmoe": Family("Olmoe", {k: v for k, v in {**_FEW, "norm_topk_prob": False}.items() if k != "head_dim"}),
    "gpt_oss": Family("GptOss", {
        **_LOCAL, "num_hidden_layers": 4, "sliding_window": 8,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
    }, attention="eager"),
    "flex_olmo": Family("FlexOlmo", {k: v for k, v in _FEW.items() if k != "head_dim"}),
    "qwen3_next": Family("Qwen3Next", {**_FEW, **_STATES}),
}  # fmt: skip
# Routers with scores of another kind.
REFUSED = {"deepseek_v3": "sigmoids and groups"}


def build(name: str, dtype: torch.dtype = torch.float32, seed: int = 0, **more: Any) -> Any:
    """A model in evaluation mode, whose experts differ and are not all chosen equally often.

    Args:
        name: a family.
        dtype: of its weights.
        seed: of its weights.
        more: other options of its configuration.
    """
    import transformers as t

    row = FAMILIES[name]
    torch.manual_seed(seed)
    config = getattr(t, row.config or f"{row.name}Config")(**{**row.options, **more})
    kind = getattr(t, f"{row.name}ForCausalLM")
    model = kind._from_config(config, attn_implementation=row.attention) if row.attention else kind(config)
    with torch.no_grad():
        for label, parameter in model.named_parameters():
            # what packs the weights of all experts has three dimensions; routers start with zeros in some families
            if parameter.ndim == 3 or parameter.abs().max() == 0:
                parameter.copy_(torch.randn_like(parameter) * (0.08 if "bias" not in label else 0.02))
    return livelier(model).to(dtype).eval()
