"""Groups of consecutive rows that become one each: how many there are, which rows stand for them, and the budget."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from tokred.core.reduction import Reduction
from tokred.errors import MissingInputError
from tokred.kv.fitting import FITTED, FITTED_KEYS
from tokred.kv.parts import Budget, Fate, check_count
from tokred.kv.select import Counts, keep
from tokred.kv.site import CacheSite, Place


@dataclass(frozen=True)
class Groups:
    """A prompt of ``n`` tokens as two parts, each in groups of ``factor`` tokens, and what is left over at its end.

    Args:
        factor: tokens of a group.
        image: first tokens, which are the first part; 0: there is one part.
        least: groups below which a part stays as it is.
    """

    factor: int = 5
    image: int = 0
    least: int = 1

    def __post_init__(self) -> None:
        check_count(self.factor, "factor", 1)
        check_count(self.image, "image")
        check_count(self.least, "least", 1)

    def parts(self, n: int) -> tuple[tuple[int, int], ...]:
        """First token and tokens of each part."""
        image = min(self.image, n)
        return ((0, image), (image, n - image)) if self.image else ((0, n),)

    def whole(self, n: int) -> int:
        """Groups of a part of ``n`` tokens."""
        count = n // self.factor
        return 0 if count < self.least else count

    def rows(self, n: int) -> int:
        """Rows that are left of a prompt."""
        return sum(length - self.whole(length) * (self.factor - 1) for _, length in self.parts(n))

    def stays(self, n: int) -> Tensor:
        """``[n]`` bool: the last token of each group, and tokens that are left over."""
        found = torch.ones(n, dtype=torch.bool)
        for start, length in self.parts(n):
            count = self.whole(length)
            found[start : start + count * self.factor] = (torch.arange(count * self.factor) + 1) % self.factor == 0
        return found


@dataclass(frozen=True)
class Grouped(Budget):
    """One row for each group of consecutive tokens, and one for each token that is left over.

    Args:
        factor, image, least: see :class:`Groups`.
    """

    why_no_limit: ClassVar[str | None] = "its rows are as many as its groups"

    factor: int = 5
    image: int = 0
    least: int = 1

    def __post_init__(self) -> None:
        Groups(self.factor, self.image, self.least)

    @property
    def groups(self) -> Groups:
        """The groups."""
        return Groups(self.factor, self.image, self.least)

    @property
    def amount(self) -> float | int | str:  # type: ignore[override]
        """The share of a long prompt."""
        return 1 / self.factor

    def of(self, amount: float | int | str) -> Budget:
        """Refused, unless it says the same.

        Raises:
            ValueError: the amount follows from the groups.
        """
        if amount == self.amount:
            return self
        raise ValueError(f"one row for each group of {self.factor} tokens is left: choose factor=, not {amount!r}")

    def mean(self, n: int, place: Place | None, depth: int) -> int:
        """Rows of a prompt of ``n`` tokens."""
        return self.groups.rows(n)


@dataclass(frozen=True)
class Replace(Fate):
    """They go, and those that stay are given the keys and values that the score has made of them and their group."""

    name: ClassVar[str] = "replace"
    rewrites: ClassVar[bool] = True

    def reduce(self, site: CacheSite, score: Tensor, guard: Tensor | None, counts: Counts) -> Reduction:
        """Keep the best rows; what they become has been noted beside."""
        if FITTED[0] not in site.notes:
            raise MissingInputError(
                "the fate 'replace' takes rows that a score has made, and had none: use 'fastcache'"
            )
        return keep(score, site.real, guard, counts, exact=site.slots is None or site.real is None)


def samples(site: CacheSite) -> list[tuple[slice, Tensor | None, int]]:
    """Samples that are alike: which, the rows ``[n]`` of their tokens in order (None: all), and how many tokens.

    Before anything has been evicted, so that all heads hold the same.
    """
    if site.real is None:
        return [(slice(None), None, site.extent[2])]
    rows = [one[0].nonzero().view(-1) for one in site.real]
    return [(slice(i, i + 1), at, len(at)) for i, at in enumerate(rows)]


def noted(notes: dict[str, Any], keys: Tensor, values: Tensor, weights: Tensor | None) -> None:
    """Note keys and values ``[B, Hk, K, D]`` that :class:`Replace` gives to the rows that stay."""
    notes.update(zip((*FITTED, FITTED_KEYS), (values, weights, keys), strict=True))
