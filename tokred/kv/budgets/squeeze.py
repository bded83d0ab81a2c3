"""Layers whose attention hardly changes the hidden state get less."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from tokred.core.checks import check_share
from tokred.errors import TokredError
from tokred.kv.allocators import Allocator, Grant, Judged, Measured, Streams
from tokred.kv.parts import Budget, check_amount, check_count
from tokred.kv.site import CacheSite


@dataclass(frozen=True)
class Squeeze(Budget):
    """Layers are grouped by the cosine between the stream before and after attention; the highest group gets less.

    The budget is known after the last layer of the prompt, so the prompt's whole cache is held until then.

    Args:
        amount: a share in (0, 1], tokens, or bytes; the mean over layers.
        factor: what the layers of the highest group keep of the mean (the paper's p).
        groups: clusters of layers.
        least: rows that every layer keeps.

    Source: Wang et al., SqueezeAttention, ICLR 2025 (arXiv 2404.04793), the paper's form; sums are exact (ours).
    """

    name: ClassVar[str] = "squeeze"
    deferred: ClassVar[bool] = True
    reads: ClassVar[frozenset[str]] = frozenset({"stream"})

    amount: float | int | str = 0.2
    factor: float = 0.35
    groups: int = 3
    least: int = 5

    def __post_init__(self) -> None:
        check_amount(self.amount)
        check_share(self.factor, "factor")
        check_count(self.groups, "groups", 2)
        check_count(self.least, "least", 1)

    def start(self, depth: int) -> Allocator:
        return Grouped(self, depth)

    def divided(self, site: CacheSite, measured: Measured) -> tuple[int, ...]:
        """Rows of a layer, from the cosines of all."""
        place, depth = site.place, site.depth
        totals = [self.total(n, place, depth) for n in self.length(site)]
        every = zip(measured, self.length(site), totals, strict=True)
        return tuple(self.divide(list(cosines), n, total)[site.layer] for cosines, n, total in every)

    def divide(self, cosines: list[float], n: int, total: int) -> tuple[int, ...]:
        """Rows of every layer for a sample of ``n`` tokens, which add up to ``total`` (all tokens, if that is less)."""
        depth = len(cosines)
        total = min(depth * n, total)
        mean = total / depth
        if len(set(cosines)) < self.groups:
            return spread_exactly([mean] * depth, total, min(self.least, n), n)
        labels = _labels(tuple(cosines), self.groups)
        top = [label == self.groups - 1 for label in labels]
        few = sum(top)
        low = self.factor * mean
        high = (total - few * low) / (depth - few)
        return spread_exactly([low if t else high for t in top], total, min(self.least, n), n)


class Grouped(Allocator):
    """Layers wait for the end of the prompt's forward, when the cosines of all are known; later they keep to it.

    Args:
        budget: groups layers, and divides.
        depth: layers that have to measure.
    """

    def __init__(self, budget: Squeeze, depth: int) -> None:
        self.budget = budget
        self.depth = depth

    def after_layer(self, layer: Judged) -> Mapping[int, Grant]:
        """Rows by what was measured before; none yet where it is decided anew."""
        site = layer.site
        return {site.layer: Grant(self.budget.divided(site, layer.measured))} if layer.measured else {}

    def after_forward(self, layers: Sequence[Judged], streams: Streams) -> Mapping[int, Grant]:
        """One budget for the batch, from the mean over samples.

        Raises:
            TokredError: a layer has not measured its residual stream.
        """
        if len(streams) != self.depth:
            raise TokredError(f"{len(streams)} of {self.depth} layers measured their residual stream")
        cosines = tuple(float((s / n).mean()) for _, (s, n) in sorted(streams.items()))
        grants = {}
        for layer in layers:
            measured = (cosines,) * layer.site.shape[0]
            grants[layer.site.layer] = Grant(self.budget.divided(layer.site, measured), measured=measured)
        return grants


@functools.lru_cache(maxsize=64)
def _labels(values: tuple[float, ...], groups: int) -> list[int]:
    """Labels of :func:`cluster`, kept: all layers ask for the same, at every step."""
    return cluster(list(values), groups)


def cluster(values: list[float], groups: int) -> list[int]:
    """Exact one-dimensional k-means: the label of each value, ascending by centre.

    Dynamic programming over the sorted values; among equal optima the split with the lowest boundaries.
    """
    order = sorted(range(len(values)), key=lambda i: (values[i], i))
    x = [values[i] for i in order]
    n = len(x)
    s1, s2 = [0.0], [0.0]
    for v in x:
        s1.append(s1[-1] + v)
        s2.append(s2[-1] + v * v)

    def cost(i: int, j: int) -> float:
        return max(0.0, s2[j] - s2[i] - (s1[j] - s1[i]) ** 2 / (j - i))

    best = [[cost(0, j) if j else 0.0 for j in range(n + 1)]]
    cut: list[list[int]] = [[0] * (n + 1)]
    for g in range(1, groups):
        row, where = [float("inf")] * (n + 1), [0] * (n + 1)
        for j in range(g + 1, n + 1):
            for i in range(g, j):
                c = best[g - 1][i] + cost(i, j)
                if c < row[j] - 1e-15:
                    row[j], where[j] = c, i
        best.append(row)
        cut.append(where)
    labels, j = [0] * n, n
    for g in range(groups - 1, -1, -1):
        i = cut[g][j] if g else 0
        for p in range(i, j):
            labels[order[p]] = g
        j = i
    return labels


def spread_exactly(wanted: list[float], total: int, least: int, most: int) -> tuple[int, ...]:
    """Whole numbers in [least, most] near ``wanted`` that add up to ``total``, where the bounds allow it.

    What clipping frees or takes is spread over those that are not clipped, largest remainder first, then the first.
    """
    values = [min(max(w, least), most) for w in wanted]
    for _ in range(len(values)):
        gap = total - sum(values)
        free = [i for i, v in enumerate(values) if (v < most if gap > 0 else v > least)]
        if abs(gap) < 1e-9 or not free:
            break
        for i in free:
            values[i] = min(max(values[i] + gap / len(free), least), most)
    whole = [int(v + 1e-9) for v in values]
    rest = sorted(range(len(values)), key=lambda i: (whole[i] - values[i], i))
    missing = total - sum(whole)
    while missing > 0 and any(w < most for w in whole):
        for i in rest:
            if missing > 0 and whole[i] < most:
                whole[i] += 1
                missing -= 1
    return tuple(whole)
