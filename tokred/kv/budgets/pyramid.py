"""Rows that fall linearly with depth."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from tokred.kv.parts import Budget, check_amount, check_count
from tokred.kv.site import Place


@dataclass(frozen=True)
class Pyramid(Budget):
    """Early layers, whose attention is spread out, keep more rows than late ones; the mean is the budget's.

    Where the slope does not fit between the window and the length, all layers keep the same.

    Args:
        amount: a share in (0, 1], tokens, or bytes; of all layers together as :class:`Uniform`'s.
        beta: how steep: the last layer keeps ``1 / beta`` of the mean beyond the window.
        window: newest tokens, which every layer keeps within its rows.

    Source: Cai et al., PyramidKV, arXiv 2406.02069, in the form of NVIDIA/kvpress.
    """

    name: ClassVar[str] = "pyramid"

    amount: float | int | str = 0.5
    beta: int = 20
    window: int = 64

    def __post_init__(self) -> None:
        check_amount(self.amount)
        check_count(self.beta, "beta", 1)
        check_count(self.window, "window")

    def share(self, n: int, place: Place | None, layer: int, depth: int) -> int:
        """Rows of ``layer`` of ``depth``."""
        mean = n * self.amount if isinstance(self.amount, float) else self.mean(n, place, depth)
        if place is not None and place.coming:
            # Under a hard limit no layer may take over what another still holds: the slope is that of any length.
            low, high = mean / self.beta, 2 * mean - mean / self.beta
            fits = depth > 1 and low >= self.window
            return min(n, int(high - layer * (high - low) / (depth - 1)) if fits else int(mean))
        if mean >= n:
            return n
        low, high = self.ends(n, float(mean))
        if depth < 2 or not n >= high >= low >= self.window:
            return max(1, round(mean))
        return round(high - layer * (high - low) / (depth - 1))

    def ends(self, n: int, mean: float) -> tuple[float, float]:
        """Rows of the last and the first layer.

        Source: NVIDIA/kvpress: the window is added to the mean before the slope is taken.
        """
        low = mean / self.beta
        high = 2 * mean - low
        if high >= n - self.window:
            high = n - self.window
            low = 2 * mean - high
        return low, high


def original_rows(capacity: int, n: int, window: int, beta: int, depth: int) -> list[int]:
    """Rows beside the window in each layer, in the integers of the first release.

    Args:
        capacity: rows of a layer on average, the window among them.
        n: tokens of the prompt.
        window: newest tokens, kept on top.
        beta: how steep.
        depth: layers.
    """
    if n < capacity:
        return [n - window] * depth
    if n < 2 * (capacity - window):
        return [capacity - window] * depth
    low = (capacity - window) // beta
    high = 2 * (capacity - window) - low
    if high >= n - window:
        high = n - window
        low = 2 * (capacity - window) - high
    step = (high - low) // max(depth - 1, 1)
    return [high - layer * step for layer in range(depth)]
