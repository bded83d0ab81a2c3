"""The tiny language models, and policies that evict by chance: different rows in every layer, head and sample."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import transformers
from torch import Tensor

import tokred
from tokred.adapters.tiny.kv import SMALL, build, padded, prompt
from tokred.adapters.tiny.weights import livelier
from tokred.kv import Budget, CacheSite, Score, When
from tokred.kv.policy import CachePolicy, Parts

__all__ = ["FAMILIES", "POLICIES", "SMALL", "Chance", "Scatter", "Uneven", "build", "llava", "padded", "prompt"]

FAMILIES = ("llama", "qwen3", "mistral", "gemma3")


def llava(seed: int = 0) -> Any:
    """A language model with vision around a tiny Llama."""
    torch.manual_seed(seed)
    t = transformers
    vision = t.CLIPVisionConfig(
        hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=16, patch_size=8
    )
    config = t.LlavaConfig(vision_config=vision, text_config=t.LlamaConfig(**SMALL), image_token_index=96)
    model = t.LlavaForConditionalGeneration(config)
    livelier(model.model.language_model)
    return model.eval()


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
