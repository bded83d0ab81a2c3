"""Intervals of means over samples, and of differences on the same samples; samples of one group count as one draw."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Hashable, Sequence
from math import fsum
from typing import NamedTuple

from tokred.bench.results import NORMAL, wilson

Groups = Sequence[Hashable] | None


class Estimate(NamedTuple):
    """A mean and its 95 % interval; the ends are None where a single value tells of none."""

    value: float
    low: float | None
    high: float | None

    def map(self, f: Callable[[float], float]) -> Estimate:
        """The same in other units: ``f`` of the value and of both ends."""
        return Estimate(f(self.value), *(None if v is None else f(v) for v in self[1:]))

    @property
    def sign(self) -> int:
        """1 or -1 where the whole interval lies above or below zero, else 0."""
        return 0 if self.low is None or self.high is None else (self.low > 0) - (self.high < 0)

    @property
    def half(self) -> float | None:
        """Half of the interval's width."""
        return None if self.low is None or self.high is None else (self.high - self.low) / 2


# Student's t at 97.5 %, for 1, 2, ... degrees of freedom.
_STUDENT = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131, 2.120,
    2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042,
)  # fmt: skip


def student(freedom: int) -> float:
    """Half of a 95 % interval in standard errors, when these come from few values themselves."""
    # Beyond the table the first term of the expansion is exact to three digits.
    return _STUDENT[freedom - 1] if freedom <= len(_STUDENT) else NORMAL + (NORMAL**3 + NORMAL) / (4 * freedom)


def estimate(values: Sequence[float], weights: Sequence[float], groups: Groups = None) -> Estimate:
    """Weighted mean with its interval: Wilson's for rights and wrongs, else by the standard error.

    With words as weights, and errors per word as values, it is the ratio of all errors to all words.

    Args:
        values: one a sample.
        weights: of the samples.
        groups: a key a sample. Samples with the same key belong together (windows of one text, questions about one
            picture): the standard error is that of the groups, and shares count as few samples as would have it.
    """
    mean, groups = _mean(values, weights), _several(groups)
    n = len(values) if groups is None else len(set(groups))
    if groups is not None and n < 2:
        return Estimate(mean, None, None)
    if _counted(values, weights):
        return Estimate(mean, *wilson(mean, len(values) if groups is None else _worth(values, groups)))
    if n < 2:
        return Estimate(mean, None, None)
    half = student(n - 1) * _error(values, weights, groups)
    return Estimate(mean, mean - half, mean + half)


def paired(values: Sequence[float], base: Sequence[float], weights: Sequence[float], groups: Groups = None) -> Estimate:
    """The mean difference to the base on the same samples, with its interval.

    Of rights and wrongs it is Agresti and Min's, which adds half a sample to each kind of disagreement: a few samples
    without any are no proof that there is none.

    Args:
        values, base: one a sample, in the same order.
        weights, groups: as in :func:`estimate`.
    """
    differences, groups = [v - b for v, b in zip(values, base, strict=True)], _several(groups)
    alone = groups is not None and len(set(groups)) < 2
    if alone or not (_counted(values, weights) and _counted(base, weights)):
        mean = _mean(differences, weights)
        # A difference of 0 or 1 is no right or wrong answer: Wilson's interval is none of its own.
        several = len(differences) > 1 and not alone
        half = _half(differences, weights, groups) if several else None
        return Estimate(mean, None, None) if half is None else Estimate(mean, mean - half, mean + half)
    won, lost = (differences.count(sign) / len(differences) for sign in (1.0, -1.0))
    n = len(differences) if groups is None else _worth(differences, groups)
    middle = (won - lost) * n / (n + 2)
    half = NORMAL * math.sqrt((won + lost) * n + 1 - ((won - lost) * n) ** 2 / (n + 2)) / (n + 2)
    return Estimate(won - lost, max(-1.0, middle - half), min(1.0, middle + half))


def _half(values: Sequence[float], weights: Sequence[float], groups: Groups) -> float:
    n = len(values) if groups is None else len(set(groups))
    return student(n - 1) * _error(values, weights, groups)


def _mean(values: Sequence[float], weights: Sequence[float]) -> float:
    return fsum(w * v for v, w in zip(values, weights, strict=True)) / fsum(weights)


def _counted(values: Sequence[float], weights: Sequence[float]) -> bool:
    return all(v in (0.0, 1.0) for v in values) and all(w == 1 for w in weights)


def _several(groups: Groups) -> Groups:
    """The groups; None where each sample is one of its own."""
    return None if groups is None or len(set(groups)) == len(groups) else groups


def _error(values: Sequence[float], weights: Sequence[float], groups: Groups) -> float:
    """Standard error of the weighted mean, linear in the residuals; those of a group are added first."""
    mean = _mean(values, weights)
    residuals = [w * (v - mean) for v, w in zip(values, weights, strict=True)]
    if groups is not None:
        parts: dict[Hashable, list[float]] = defaultdict(list)
        for key, residual in zip(groups, residuals, strict=True):
            parts[key].append(residual)
        residuals = [fsum(part) for part in parts.values()]
    n = len(residuals)
    return math.sqrt(fsum(r * r for r in residuals) * n / (n - 1)) / fsum(weights)


def _worth(values: Sequence[float], groups: Sequence[Hashable]) -> float:
    """How many independent samples would tell as much: all of them at most, a group each where all are alike."""
    n, count, ones = len(values), len(set(groups)), [1.0] * len(values)
    error = _error(values, ones, groups)
    if error == 0:
        return count
    # The error itself is uncertain with few groups, which Wilson's and Agresti and Min's intervals do not know.
    share = (_error(values, ones, None) / error * NORMAL / student(count - 1)) ** 2
    return n * min(1.0, share)
