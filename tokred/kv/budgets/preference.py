"""Layers share the cache by how spread out and how restless their attention is."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch

from tokred.kv.allocators import Allocator, Grant, Judged, Measured
from tokred.kv.parts import Budget, check_amount, check_count
from tokred.kv.site import CacheSite


@dataclass(frozen=True)
class Preference(Budget):
    """A layer's rows are proportional to its preference ``H ** (1 / tau1) * V ** (1 / tau2)``.

    ``H`` is the entropy of a window's attention over the earlier rows, ``V`` the variance over the window's queries.
    After each layer of the prompt the budget of the layers so far is shared out anew, and those that had more are cut
    again, so that the cache never holds more than all layers' budget.

    Args:
        amount: a share in (0, 1], tokens, or bytes.
        tau1, tau2: how much entropy and variance count; they are published per model and size of the cache.
        window: queries of the window, which every layer keeps on top of its share.

    Source: CAKE, ICLR 2025.
    """

    name: ClassVar[str] = "preference"
    deferred: ClassVar[bool] = True
    why_no_limit: ClassVar[str | None] = "layers that take rows over from others do so while those still hold a chunk's"
    reads: ClassVar[frozenset[str]] = frozenset({"q", "k"})

    amount: float | int | str = 0.5
    tau1: float = 1.6
    tau2: float = 0.4
    window: int = 32

    def __post_init__(self) -> None:
        check_amount(self.amount)
        check_count(self.window, "window", 2)
        if self.tau1 <= 0 or self.tau2 <= 0:
            raise ValueError(f"tau1 and tau2 must be positive, got {self.tau1} and {self.tau2}")

    @property
    def queries(self) -> int:
        return self.window

    def start(self, depth: int) -> Allocator:
        return Cascade(self)

    def preference(self, site: CacheSite) -> list[float]:
        """The preference of this layer, for each sample."""
        entropy, variance = self.measure(site)
        return [h ** (1 / self.tau1) * v ** (1 / self.tau2) for h, v in zip(entropy, variance, strict=True)]

    def measure(self, site: CacheSite) -> tuple[list[float], list[float]]:
        """Entropy and variance of the window's attention to the rows before it, for each sample."""
        found, m = site.statistics(self.window), self.window
        before = ~site.stands_behind(m).expand(site.shape[0], site.heads, -1)
        before = before if site.real is None else before & site.real
        seen = before.repeat_interleave(site.q.shape[1] // site.heads, 1)
        variance = ((found.sum_squares - found.sum**2 / m) / (m - 1)).clamp(min=0)
        both = torch.stack([found.entropy, variance]).masked_fill(~seen, 0.0).double().sum((2, 3))
        entropy, spread = both.tolist()
        return entropy, spread

    def divided(self, site: CacheSite, measured: Measured) -> tuple[int, ...]:
        """Rows of a layer, from the preferences of those so far."""
        means = [self.mean(n, site.place, site.depth) for n in self.length(site)]
        every = zip(measured, self.length(site), means, strict=True)
        return tuple(self.divide(list(found), n, mean, site.depth)[site.layer] for found, n, mean in every)

    def divide(self, preferences: list[float], n: int, mean: int, depth: int) -> tuple[int, ...]:
        """Rows of each layer seen so far, the window among them.

        Args:
            preferences: of the layers so far, at most ``depth``.
            n: tokens of the sample.
            mean: rows of a layer on average.
            depth: all layers.

        Returns:
            At most ``n`` each; what a clipped layer leaves is shared among the others.
        """
        pool, most = max(mean - self.window, 0) * depth, max(n - self.window, 0)
        shares = _clipped(preferences, pool, most)
        return tuple(min(n, self.window + s) for s in shares)


class Cascade(Allocator):
    """All layers so far share their budget anew whenever one more has been judged.

    Args:
        budget: measures preferences, and divides by them.
    """

    def __init__(self, budget: Preference) -> None:
        self.budget = budget
        self.begin()

    def begin(self) -> None:
        """Forget preferences and layers of the forward before."""
        self._preferences: dict[int, list[float]] = {}
        self._sites: dict[int, CacheSite] = {}

    def measure(self, site: CacheSite) -> None:
        """Preference of a layer, read off the attention of its newest queries."""
        self._preferences[site.layer] = self.budget.preference(site)

    def after_layer(self, layer: Judged) -> Mapping[int, Grant]:
        """This layer's rows, and fewer for those before it."""
        site = layer.site
        if layer.measured:
            return {site.layer: Grant(self.budget.divided(site, layer.measured))}
        if site.layer not in self._preferences:
            self.measure(site)
        self._sites[site.layer] = site.without_tensors()
        known = [i for i in sorted(self._preferences) if i <= site.layer]
        measured = tuple(zip(*(self._preferences[i] for i in known), strict=True))
        rows = {i: self.budget.divided(self._sites[i], measured) for i in known}
        return {i: Grant(r, measured=measured, final=False) for i, r in rows.items()}


def _clipped(weights: list[float], pool: int, most: int) -> list[int]:
    """``pool`` in proportion to the weights, rounded, none above ``most``."""
    clipped: set[int] = set()
    total = max(math.fsum(weights), 1e-300)
    while True:
        free = [i for i in range(len(weights)) if i not in clipped]
        left = pool - most * len(clipped)
        total = math.fsum(weights[i] for i in free)
        even = total <= 0
        shares = {i: left / len(free) if even else weights[i] / total * left for i in free}
        over = {i for i in free if shares[i] > most}
        if not over:
            return [most if i in clipped else round(shares[i]) for i in range(len(weights))]
        clipped |= over
