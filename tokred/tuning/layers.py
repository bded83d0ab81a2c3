"""Gains of a cache's layers by more rows, and shapes that follow from them.

A shape by a few knots over the depth cannot say "layers 3 and 17". So the search asks each layer: at the best shape so
far it alone holds everything, and a quarter of the samples says how much is gained. Rows then go where they gain most.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from tokred.tuning.space import SHARES, Plan, normed

# Exponent of a gain, and the part of the rows that is shared out by gains.
MIXES = ((1.0, 0.5), (0.5, 0.5), (1.0, 1.0), (0.5, 0.25))


def groups(depth: int, most: int) -> list[range]:
    """Neighbouring layers, in at most so many groups of about the same size."""
    count = max(1, min(depth, most))
    return [range(depth * i // count, depth * (i + 1) // count) for i in range(count)]


def restored(plan: Plan, step: int, layers: Sequence[int]) -> tuple[Plan, int]:
    """The plan at a step with some layers that keep everything, and the step that it then stands at."""
    depth, share = plan.base.depth, 1 - step / SHARES
    rows = [min(1.0, share * depth * w) for w in plan.weights or normed([1.0] * depth)]
    rows = [1.0 if i in layers else row for i, row in enumerate(rows)]
    return replace(plan, weights=normed(rows)), max(0, round(SHARES * (1 - sum(rows) / depth)))


def shared(plan: Plan, gains: Sequence[float]) -> Iterator[Plan]:
    """Shapes whose rows go to the layers that gain by them, from boldest to most careful.

    Args:
        plan: whose weights they start from.
        gains: of each layer, on any scale; what is not above 0 counts as nothing.
    """
    weights = plan.weights or normed([1.0] * plan.base.depth)
    for power, part in MIXES:
        raised = [max(0.0, gain) ** power for gain in gains]
        mean = sum(raised) / len(raised)
        if mean > 0:
            mixed = [w * (1 - part + part * gain / mean) for w, gain in zip(weights, raised, strict=True)]
            yield replace(plan, weights=normed([w + 1e-6 for w in mixed]))
