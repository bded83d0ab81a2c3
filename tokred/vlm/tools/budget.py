"""Budgets: how many of an image's tokens may stay, as a number or as a share."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction

from tokred.core.checks import is_count

Budget = int | float


def as_budget(value: object, name: str = "budget") -> Budget:
    """A number of tokens, or a share of them, checked.

    Args:
        value: an integer of at least 1, or a float in (0, 1].
        name: of the argument, for the message.

    Raises:
        ValueError: it is neither.
    """
    if is_count(value, 1) or (isinstance(value, float) and 0 < value <= 1):
        return value  # type: ignore[return-value]
    raise ValueError(
        f"{name} must be a number of tokens (an integer of at least 1) or a share in (0, 1], got {value!r}"
    )


def count_of(budget: Budget, n: int) -> int:
    """How many of ``n`` tokens a budget leaves: the number, at most ``n``, or the rounded share (half to even), at
    least one."""
    kept = budget if isinstance(budget, int) else max(1, round(round(n * budget, 9)))
    return min(kept, n)


def left_of(ratio: float, n: int) -> int:
    """How many of ``n`` tokens stay where a share ``ratio`` leaves: rounded (half to even), at least one."""
    return max(1, round(round(n * (1 - ratio), 9))) if n else 0


def ratio_of(count: int, n: int) -> float:
    """The share that leaves ``n`` tokens where ``count`` of them stay, by whichever way of rounding ``n (1 - ratio)``
    down: half a token above what stays."""
    return max(0.0, 1 - (count + 0.5) / n)


def largest_remainder(weights: Sequence[float], total: int) -> list[int]:
    """Whole numbers in proportion to weights that add up to a total.

    Each gets its share rounded down; what is left goes one by one to the largest fractions, the first where they are
    alike. Weights that are all zero share alike.

    Args:
        weights: not negative, at least one.
        total: not negative.
    """
    exact = [Fraction(w) for w in weights]
    if not any(exact):
        exact = [Fraction(1)] * len(exact)
    shares = [w * total / sum(exact) for w in exact]
    whole = [math.floor(s) for s in shares]
    order = sorted(range(len(shares)), key=lambda i: (whole[i] - shares[i], i))
    for i in order[: total - sum(whole)]:
        whole[i] += 1
    return whole


def shared_out(weights: Sequence[float], total: int, low: int, high: int) -> list[int]:
    """Whole numbers between two bounds: ``low`` for each, and the rest of the total in proportion to weights.

    What would exceed ``high`` is shared out anew among the others, until nothing does.

    Args:
        weights: not negative.
        total: to be met; as near as the bounds allow.
        low, high: bounds of each number.
    """
    found = [low] * len(weights)
    open_, rest = list(range(len(weights))), max(0, min(total, high * len(weights)) - low * len(weights))
    while open_:
        more = largest_remainder([weights[i] for i in open_], rest)
        over = [i for i, m in zip(open_, more, strict=True) if m > high - low]
        for i, m in zip(open_, more, strict=True):
            found[i] = low + min(m, high - low)
        if not over:
            break
        rest -= (high - low) * len(over)
        open_ = [i for i in open_ if i not in over]
    return found
