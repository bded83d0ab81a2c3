"""The tiny language models, and policies that evict by chance: different rows in every layer, head and sample."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import transformers
from torch import Tensor

import tokred
from tests.registered import examples, stored
from tokred.adapters.tiny.kv import SMALL, build, padded, prompt
from tokred.adapters.tiny.weights import livelier
from tokred.kv import Budget, CacheSite, Score
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


# The laws of these are told apart in files of their own: the prompt is read again, or in chunks under a limit; tokens
# leave between layers too; heads stream without a budget; a network scores rows, or a file has to be there; rows are
# rounded too, or nothing is evicted.
APART = ("kvzip", "limited", "fastkv", "duoattention", "kvzap", "triattention", "lukv", "attention_matching", "rdkv")
APART += ("adore", "fastcache", *stored())
POLICIES: dict[str, Any] = {
    name: tokred.make(name, **given) for name, given in examples("cache").items() if name not in APART
}
