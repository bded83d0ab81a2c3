"""The goal of a search: so many times as fast, at most so much lost, or at most so much of the cache's memory."""

from __future__ import annotations

import math
from typing import NamedTuple


class Goal(NamedTuple):
    """One demand on the setting that is searched for.

    Attributes:
        kind: ``"speedup"``, ``"loss"`` or ``"memory"``.
        value: times as fast as the unpatched model; the quality that may be lost, in the metric's units (of
            perplexity the share that it may rise); or the share of the cache's bytes that may be held.
    """

    kind: str
    value: float

    def __str__(self) -> str:
        if self.kind == "speedup":
            return f"at least {self.value:g} times as fast"
        if self.kind == "loss":
            return f"a loss of at most {self.value:g}"
        return f"at most {self.value:.0%} of the cache's bytes"


def goal(speedup: float | None, loss: float | None, memory: float | None) -> Goal:
    """The one goal that the user gives.

    Raises:
        TypeError, ValueError: there is none, or more than one, or it cannot be.
    """
    given = {k: v for k, v in {"speedup": speedup, "loss": loss, "memory": memory}.items() if v is not None}
    if len(given) != 1:
        found = f"got {' and '.join(given)}" if given else "got none"
        raise ValueError(f"give one goal, speedup=1.5, loss=0.01 or memory=0.5: {found}")
    kind, value = next(iter(given.items()))
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{kind} must be a number, got {value!r}")
    if kind == "speedup" and not (value > 1 and math.isfinite(value)):
        raise ValueError(f"speedup is how many times as fast, more than 1, got {value}")
    if kind == "loss" and not (value >= 0 and math.isfinite(value)):
        raise ValueError(f"loss is the quality that may be lost, at least 0, got {value}")
    if kind == "memory" and not 0 < value < 1:
        raise ValueError(f"memory is the share of the cache's bytes that may be held, between 0 and 1, got {value}")
    return Goal(kind, float(value))
