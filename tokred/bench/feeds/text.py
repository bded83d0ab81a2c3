"""``Text``: a language model reads the beginning of a text as its prompt, and is scored on the rest."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from tokred import adapters, api
from tokred.adapters.contract import cache_argument, cache_name
from tokred.bench.feeds.feed import Feed
from tokred.bench.feeds.reader import Reader

SHARE = 0.75  # of a text that is the prompt
CHUNK = 8  # tokens fed at once to policies that evict while tokens are generated


class Text(Feed):
    """The first three quarters of a text are the prompt, the rest is scored from the cache.

    The output is the logits ``(B, M, V)`` of the last ``M`` tokens.
    """

    name = "text"
    stages = ("layer", "cache")
    usual = "perplexity"

    def __init__(self, tokenizer: Any = None) -> None:
        self.reader = Reader(tokenizer)

    def prepare(self, item: Any, index: int = 0) -> dict[str, Any]:
        """A dictionary with ``input_ids`` ``(B, N)``.

        Raises:
            ValueError, TypeError: there are no token ids, too few, or padding on the right.
        """
        if self.reader.tool is not None and _texts(item):
            item = self.reader.read(item)
        if isinstance(item, list | tuple) and item and all(isinstance(i, int) for i in item):
            item = torch.tensor([item])
        elif isinstance(item, list | tuple) and item and isinstance(item[0], Tensor):
            item = item[0]
        if isinstance(item, Tensor):
            item = {"input_ids": item}
        if not isinstance(item, Mapping) or not isinstance(item.get("input_ids"), Tensor):
            raise TypeError(
                f"a batch of data for a language model is a dict with 'input_ids' (B, N), or token ids, "
                f"got {type(item).__name__}: tokenise texts first, or give tokenizer"
            )
        batch = dict(item)
        ids = batch["input_ids"] if batch["input_ids"].ndim > 1 else batch["input_ids"][None]
        if ids.ndim != 2 or ids.is_floating_point():
            raise ValueError(f"input_ids are whole numbers (B, N), got {ids.dtype} {tuple(ids.shape)}")
        if ids.shape[1] < 8:
            raise ValueError(f"a text has at least 8 tokens, of which a quarter is scored, got {ids.shape[1]}")
        mask = batch.get("attention_mask")
        if isinstance(mask, Tensor) and bool(mask.all()):
            mask = None
        if mask is not None:
            mask = mask.reshape(ids.shape)
            if bool((mask.diff(dim=1) < 0).any()) or not bool(mask[:, self.prompt(ids) - 1].all()):
                raise ValueError(
                    "attention_mask: padding must stand on the left, within the first three quarters of each text"
                )
        return {**batch, "input_ids": ids, "attention_mask": mask}

    @staticmethod
    def prompt(ids: Tensor) -> int:
        """Tokens of the prompt, whose last one is fed with those that are scored: it predicts the first of them."""
        return int(ids.shape[1] * SHARE) - 1

    def cache(self, model: nn.Module) -> tuple[Any, bool]:
        """An empty cache, and whether its rows leave at every step."""
        found = [m for m in api.patched(model) if m.stage == "cache"]
        if not found:
            from transformers import DynamicCache

            config = getattr(model, "config", None)
            return (DynamicCache() if config is None else DynamicCache(config=config)), False
        policy: Any = found[0]
        return api.kv_cache(model), bool(policy.parts.when.every)

    def run(self, model: nn.Module, batch: Any) -> Tensor:
        ids, mask = batch["input_ids"], batch["attention_mask"]
        cache, stepwise = self.cache(model)
        n, end = self.prompt(ids), ids.shape[1] - 1
        self._forward(model, ids, mask, 0, n, cache)
        step = CHUNK if stepwise else end
        parts = [self._forward(model, ids, mask, i, min(i + step, end), cache) for i in range(n, end, step)]
        return torch.cat(parts, 1)

    def probe(self, model: Any, batch: Any) -> int:
        ids = batch["input_ids"]
        self._forward(model, ids, batch["attention_mask"], 0, self.prompt(ids), self.cache(model)[0])
        return len(ids)

    @staticmethod
    def _forward(model: nn.Module, ids: Tensor, mask: Tensor | None, start: int, end: int, cache: Any) -> Tensor:
        given: dict[str, Any] = {}
        if mask is not None:
            given = {"attention_mask": mask[:, :end]}
            given["position_ids"] = (mask[:, :end].cumsum(1) - 1).clamp(min=0)[:, start:]
        if start == 0:
            given["logits_to_keep"] = 1  # of a prompt no logits are scored, and all of them may not fit
        given[_cache_name(model)] = cache
        out = model(input_ids=ids[:, start:end], use_cache=True, **given)
        logits: Tensor = out.logits
        return logits


def _texts(item: Any) -> bool:
    return isinstance(item, str) or (isinstance(item, list | tuple) and all(isinstance(one, str) for one in item))


def _cache_name(model: nn.Module) -> str:
    """Argument that takes the cache: of the model's own forward, else (``**kwargs``) of the one that it hands it to."""
    return cache_argument(model.forward) or cache_name(type(adapters.find(model, "cache").model).forward)
