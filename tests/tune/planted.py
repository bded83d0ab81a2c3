"""Searches whose answer is known: times by count, and outputs that say what was removed where."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tokred
from tokred.core.schedules import amounts
from tokred.tuning.engine import Engine

FIXED = 0.1  # share of the time that no method saves


def counted(share: Callable[[Engine, Any], float]) -> Callable[..., list[list[float]]]:
    """A clock that counts instead of measuring."""

    def times(self: Engine, methods: Any, rounds: int, seed: int = 0) -> list[list[float]]:
        ratios = [1.0, *(FIXED + (1 - FIXED) * share(self, method) for method in methods)]
        return [[r * (1 + 0.01 * i) for i in range(rounds)] for r in ratios]

    return times


def by_tokens(engine: Engine, method: Any) -> float:
    """The share of tokens that enter and leave the blocks, and a little for each block that acts."""
    layers = tokred.flops(engine.model, method, tuple(engine.timed[0].shape)).layers
    most = layers[0].tokens_in * len(layers)
    acting = sum(x.tokens_in != x.tokens_out for x in layers) / len(layers)
    enter, leave = sum(x.tokens_in for x in layers) / most, sum(x.tokens_out for x in layers) / most
    return 0.4 * enter + 0.6 * leave + 0.05 * acting


def images(count: int = 64, batch: int = 8, seed: int = 0) -> list[tuple[Tensor, Tensor]]:
    """Batches of random pictures and labels."""
    g = torch.Generator().manual_seed(seed)
    return [
        (torch.randn(batch, 3, 40, 40, generator=g), torch.randint(0, 7, (batch,), generator=g))
        for _ in range(count // batch)
    ]


def harm(model: nn.Module, batch: Any, *, first: bool = True) -> Tensor:
    """An output that is worse by each removed token, most in the first (or last) blocks: ``(B, 1)``, 0 is unpatched."""
    from tokred.adapters import find

    model(batch[0][:1])  # a report tells of a forward
    found = tokred.patched(model)
    depth = len(find(model).choose("auto").blocks)
    bad = 0.0
    for method in found:
        per = amounts(method.r, depth) if hasattr(method, "r") else [0] * depth
        bad += sum(r * (depth - i if first else i + 1) ** 2 for i, r in enumerate(per))
    x = batch[0]
    return -bad * (1 + 0.1 * x.flatten(1).mean(1, keepdim=True))


def level(output: Tensor, batch: Any) -> Tensor:
    """A metric of :func:`harm`, higher is better."""
    return output[:, 0]


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Times are counts."""
    monkeypatch.setattr(Engine, "times", counted(by_tokens))
