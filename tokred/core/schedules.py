"""How much each layer removes: constants, lists, inflected ramps, keep shares and per-layer budgets.

A schedule is hashable and answers for one layer at a time, so methods can hold it in a frozen dataclass.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Constant:
    """The same amount in every layer."""

    value: int

    @property
    def shorthand(self) -> int:
        """The form in which users write it; likewise below."""
        return self.value

    def at(self, layer: int, depth: int) -> int:
        """Amount at ``layer`` of ``depth``."""
        return self.value

    def check(self, depth: int) -> None:
        """Any depth fits."""


@dataclass(frozen=True)
class Inflect:
    """A linear ramp around ``value``: ``inflect`` -1 decreases to zero, +1 increases from zero, 0 is constant.

    Truncates toward zero as the published schedules do, so ``(8, -1)`` on 24 layers removes 181 tokens, not 192.

    Source: Bolya et al., Token Merging, ICLR 2023, section 4.3.
    """

    value: int
    inflect: float

    @property
    def shorthand(self) -> tuple[int, float]:
        return self.value, int(self.inflect) if self.inflect == int(self.inflect) else self.inflect

    def at(self, layer: int, depth: int) -> int:
        """Amount at ``layer`` of ``depth``; a single layer gets ``value``."""
        if depth <= 1:
            return self.value
        low = int(self.value * (1 - self.inflect))
        high = 2 * self.value - low
        return int(low + (high - low) / (depth - 1) * layer)

    def check(self, depth: int) -> None:
        """Any depth fits."""


@dataclass(frozen=True)
class PerLayer:
    """One amount a layer; layers beyond the end get 0."""

    values: tuple[int, ...]

    @property
    def shorthand(self) -> list[int]:
        return list(self.values)

    def at(self, layer: int, depth: int) -> int:
        """Amount at ``layer``."""
        return self.values[layer] if layer < len(self.values) else 0

    def check(self, depth: int) -> None:
        """Refuse a list longer than the model is deep."""
        if len(self.values) > depth:
            raise ValueError(f"the schedule has {len(self.values)} entries, but the model has {depth} blocks")


Schedule = Constant | Inflect | PerLayer
ScheduleLike = int | tuple[int, float] | Sequence[int] | Schedule


def schedule(value: ScheduleLike, name: str = "r") -> Schedule:
    """Read a schedule as users write it.

    Args:
        value: an integer (every layer); a pair ``(r, inflect)`` as a tuple, with ``inflect`` in [-1, 1]; or a list with
            one entry a layer (a list of two numbers is a list, never a pair).
        name: the argument's name, for the message.

    Raises:
        TypeError: an entry is not an integer, or ``value`` is none of these forms.
        ValueError: an entry is negative, or ``inflect`` lies outside [-1, 1].
    """
    if isinstance(value, Constant | Inflect | PerLayer):
        return value
    if isinstance(value, tuple):
        if len(value) != 2:
            raise TypeError(
                f"{name} as a tuple must be a pair (r, inflect), got {value!r}; use a list for one entry a layer"
            )
        r, inflect = value
        if isinstance(inflect, bool) or not isinstance(inflect, int | float) or not -1 <= inflect <= 1:
            raise ValueError(f"the inflection of {name} must be a number in [-1, 1], got {inflect!r}")
        return Inflect(_amount(r, name), float(inflect))
    if isinstance(value, Sequence) and not isinstance(value, str):
        return PerLayer(tuple(_amount(v, f"{name}[{i}]") for i, v in enumerate(value)))
    return Constant(_amount(value, name))


def _amount(value: object, name: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an integer, got {value!r} of type {type(value).__name__}")
    if value < 0:
        raise ValueError(f"{name} must not be negative, got {value}")
    return value


def amounts(value: ScheduleLike, depth: int) -> list[int]:
    """The whole schedule for a model of ``depth`` layers."""
    s = schedule(value)
    s.check(depth)
    return [s.at(layer, depth) for layer in range(depth)]


def whole(n: Any) -> int:
    """``n`` as a number: ``torch.jit.trace`` hands out lengths as tensors, which are fixed by then anyway."""
    return int(n)


def kept(n: int, share: float) -> int:
    """``floor(n * share)`` without the surprise of floating error (0.07 * 100 is 7.000000000000001)."""
    return math.floor(round(whole(n) * share, 9))


def kept_ceil(n: int, share: float) -> int:
    """``ceil(n * share)``, likewise."""
    return math.ceil(round(whole(n) * share, 9))


QUARTERS = (0.25, 0.5, 0.75)


def is_listed(blocks: tuple[int, ...] | None, layer: int, depth: int, shares: tuple[float, ...] = QUARTERS) -> bool:
    """True if a method that acts in a few blocks acts in this one.

    Args:
        blocks: the user's list, or None for the method's own places.
        layer, depth: which block, of how many.
        shares: the method's own places as shares of the depth; the default is blocks 3, 6 and 9 of 12.
    """
    if blocks is not None:
        return layer in blocks
    return depth > 1 and layer in {round(depth * share) for share in shares}
