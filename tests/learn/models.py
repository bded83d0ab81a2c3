"""Texts for the reference models, and what they write without a cache."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def drawn_text(words: int, n: int, b: int) -> Tensor:
    """``(b, n)`` ids, the same ones each time."""
    return torch.randint(0, words, (b, n), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def greedy(model: Any, ids: Tensor, steps: int) -> Tensor:
    """``ids`` and so many more, each by a forward of its own over the whole text."""
    for _ in range(steps):
        ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], 1)
    return ids
