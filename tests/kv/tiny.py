"""Tiny random language models, and policies that evict by chance: different rows in every layer, head and sample."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import transformers
from torch import Tensor

import tokred
from tokred.kv import Budget, CacheSite, Score, When
from tokred.kv.policy import CachePolicy, Parts

SMALL = {
    "vocab_size": 97, "hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 512, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2,
}  # fmt: skip
GEMMA = {**SMALL, "num_hidden_layers": 4, "sliding_window": 8, "query_pre_attn_scalar": 16}
FAMILIES = ("llama", "qwen3", "mistral", "gemma3")


def build(name: str, dtype: torch.dtype = torch.float32, seed: int = 0, **more: Any) -> Any:
    """A model of a family, in evaluation mode."""
    torch.manual_seed(seed)
    t = transformers
    if name == "llama":
        model = t.LlamaForCausalLM(t.LlamaConfig(**{**SMALL, **more}))
    elif name == "qwen3":
        model = t.Qwen3ForCausalLM(t.Qwen3Config(**{**SMALL, **more}))
    elif name == "mistral":
        model = t.MistralForCausalLM(t.MistralConfig(**{**SMALL, "sliding_window": None, **more}))
    elif name == "gemma3":
        kinds = ["sliding_attention", "full_attention"] * 2
        model = t.Gemma3ForCausalLM(t.Gemma3TextConfig(**{**GEMMA, "layer_types": kinds, **more}))
    elif name == "gemma2":
        kinds = ["sliding_attention", "full_attention"] * 2
        config = t.Gemma2Config(**{**GEMMA, "layer_types": kinds, "attn_logit_softcapping": 2.0, **more})
        model = t.Gemma2ForCausalLM._from_config(config, attn_implementation="eager")
    elif name == "olmo2":
        model = t.Olmo2ForCausalLM(t.Olmo2Config(**{**SMALL, **more}))
    elif name == "gptj":
        model = t.GPTJForCausalLM(
            t.GPTJConfig(vocab_size=97, n_positions=64, n_embd=32, n_layer=2, n_head=4, rotary_dim=8)
        )
    else:
        raise ValueError(name)
    # Weights of the usual size make attention nearly even; larger ones make rows matter.
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim == 2:
                p.mul_(4)
    return model.to(dtype).eval()


def llava(seed: int = 0) -> Any:
    """A language model with vision around a tiny Llama."""
    torch.manual_seed(seed)
    t = transformers
    vision = t.CLIPVisionConfig(
        hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=16, patch_size=8
    )
    config = t.LlavaConfig(vision_config=vision, text_config=t.LlamaConfig(**SMALL), image_token_index=96)
    model = t.LlavaForConditionalGeneration(config)
    with torch.no_grad():
        for p in model.model.language_model.parameters():
            if p.ndim == 2:
                p.mul_(4)
    return model.eval()


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


@dataclass(frozen=True)
class Chance(Score):
    """Random scores that differ between layers, heads and tokens, but not with batch or padding."""

    reads: ClassVar[frozenset[str]] = frozenset({"k"})

    def __call__(self, site: CacheSite) -> Tensor:
        head = torch.arange(site.heads).view(1, -1, 1)
        return torch.sin((site.token + 1.0) * (12.9898 + 3.1 * head + 7.7 * site.layer)).expand(site.k.shape[:3])


@dataclass(frozen=True)
class Uneven(Budget):
    """Another number of rows in every layer and head."""

    amount: float | int | str = 10
    step: int = 3

    def share(self, n, place, layer, depth):
        return min(n, int(self.amount) + self.step * (layer + 1))

    def heads(self, site, score, guard, counts):
        head = torch.arange(site.heads)[None]
        rows = torch.tensor(counts)[:, None] - self.step * head
        return torch.minimum(rows.clamp(min=1), torch.tensor(site.lengths)[:, None])


@dataclass(frozen=True)
class Scatter(CachePolicy):
    """Evict by chance, unevenly."""

    uneven: ClassVar[bool] = True
    name: ClassVar[str] = "scatter"

    amount: int = 10

    @property
    def parts(self) -> Parts:
        return Parts(Chance(), Uneven(self.amount), recent=1)


POLICIES: dict[str, Any] = {
    "snapkv": tokred.make("snapkv", budget=9, window=4, pool=3),
    "h2o": tokred.make("h2o", budget=9),
    "tova": tokred.make("tova", budget=9),
    "streaming_llm": tokred.make("streaming_llm", budget=9, sinks=2),
    "knorm": tokred.make("knorm", budget=9),
    "keydiff": tokred.make("keydiff", budget=9, turns=False),
    "lagkv": tokred.make("lagkv", budget=9, lag=4, sinks=2),
    "expected_attention": tokred.make("expected_attention", budget=9, sinks=2, future=16),
    "criticalkv": tokred.make("criticalkv", budget=9, score=tokred.kv.Window(4, 3)),
    "observed_attention": tokred.make("observed_attention", budget=9),
    "random_evict": tokred.make("random_evict", budget=9),
    "keyformer": tokred.make("keyformer", budget=9),
    "pyramidkv": tokred.make("pyramidkv", budget=9, window=2, pool=3, beta=4),
    "adakv": tokred.make("adakv", budget=9, score=tokred.kv.Window(4, 3)),
    "cake": tokred.make("cake", budget=9, window=4, pool=3),
    "squeezeattention": tokred.make("squeezeattention", budget=9, sinks=2),
    "zeromerge": tokred.make("zeromerge", budget=9, dense=2, tail=3),
    "rpc": tokred.make("rpc", period=4, window=2, ratio=2, pool=3),
    "kv": tokred.make("kv", score="key_norm", budget=tokred.kv.Adaptive(9), when=When(every=2), sinks=1, recent=2),
}  # fmt: skip
