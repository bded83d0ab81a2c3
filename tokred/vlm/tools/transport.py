"""Optimal transport between tokens, by a few of Sinkhorn's rounds."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

# Costs of so many pairs are held at once.
BLOCK = 1 << 22

Cost = Callable[[int, int], Tensor]


def transport(cost: Cost, n: int, m: int, *, eps: float = 0.1, rounds: int = 3, block: int = BLOCK) -> Tensor:
    """The largest mass that each source sends to one target, ``(B, n)`` float32, both sides having even masses.

    In the domain of logarithms, and block by block where there are many pairs, so that the plan is never stored.

    Args:
        cost: ``cost(first, end)`` gives the costs ``(B, end - first, m)`` of some sources.
        n: sources.
        m: targets.
        eps: weight of entropy, positive.
        rounds: of Sinkhorn, at least 1; each ends with the targets, whose masses are then exact.
        block: pairs of a block.
    """
    step = max(1, block // m)
    whole = cost(0, n) / -eps if step >= n else None

    def blocks() -> Iterator[tuple[slice, Tensor]]:
        if whole is not None:
            yield slice(0, n), whole
        else:
            for i in range(0, n, step):
                yield slice(i, min(n, i + step)), cost(i, min(n, i + step)) / -eps

    v: Tensor | None = None
    for _ in range(rounds):
        parts, sums = [], []
        for _rows, logs in blocks():
            u = -math.log(n) - (logs if v is None else logs + v.unsqueeze(1)).logsumexp(2)
            parts.append(u)
            sums.append((logs + u.unsqueeze(2)).logsumexp(1))
        v = -math.log(m) - torch.stack(sums).logsumexp(0)
    assert v is not None  # there is at least one round
    best = [(logs + v.unsqueeze(1)).amax(2) + u for u, (_, logs) in zip(parts, blocks(), strict=True)]
    return torch.cat(best, 1).exp()
