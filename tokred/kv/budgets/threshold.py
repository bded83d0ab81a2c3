"""Whatever scores above a threshold: as many rows as there are."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tokred.kv.parts import Budget, check_amount, check_count
from tokred.kv.select import Counts
from tokred.kv.site import CacheSite, Place


@dataclass(frozen=True)
class Threshold(Budget):
    """A row stays if its score is at least ``tau``; how many that are, the text decides, head by head.

    First and newest tokens that the policy never evicts are not judged. For scores that a row is given once, such as a
    predicted one or the length of its key: then it does not matter how often rows are judged. Sums of attention grow
    with every query, and no threshold fits them for long.

    Args:
        tau: the threshold, in units of the score; ``-inf`` keeps everything.
        least: rows that each head keeps whatever they score.
        most: rows that each head keeps at most, or bytes of all layers of a sample; then the lowest scores go too.
            None: memory is not bounded.

    Source: as in Łańcucki et al., Dynamic Memory Sparsification, arXiv 2506.05345, and Jegou and Jeblick, KVzap, arXiv
    2601.07891; the bounds are ours.
    """

    name: ClassVar[str] = "threshold"
    headwise: ClassVar[bool] = True

    tau: float = -4.0
    least: int = 1
    most: int | str | None = None

    def __post_init__(self) -> None:
        if isinstance(self.tau, bool) or not isinstance(self.tau, int | float) or math.isnan(self.tau):
            raise ValueError(f"tau must be a number in units of the score, or -inf, got {self.tau!r}")
        check_count(self.least, "least")
        if self.most is None:
            return
        if isinstance(self.most, float):
            raise TypeError(f"most must be tokens (1024) or bytes ('64 MiB'), got {self.most!r}")
        check_amount(self.most, "most")
        if isinstance(self.most, int) and self.most < self.least:
            raise ValueError(f"most must be at least least={self.least}, got {self.most}")

    @property
    def amount(self) -> float | int | str:  # type: ignore[override]
        """The bound, if there is one; else all rows."""
        return 1.0 if self.most is None else self.most

    def of(self, amount: float | int | str) -> Threshold:
        """This threshold under another bound."""
        if isinstance(amount, float):
            return Threshold(self.tau, self.least)
        return Threshold(self.tau, self.least, amount)

    @property
    def full(self) -> bool:
        """True if every row scores high enough, and nothing bounds them."""
        return self.tau == -math.inf and self.most is None

    @property
    def why_no_limit(self) -> str | None:  # type: ignore[override]
        """Without a bound of its own it is refused under another's, which would decide instead of the threshold."""
        return "without most= its rows are as many as score high" if self.most is None else None

    def mean(self, n: int, place: Place | None, depth: int) -> int:
        """Rows at most."""
        return n if self.most is None else super().mean(n, place, depth)

    def length(self, site: CacheSite) -> tuple[int, ...]:
        """All tokens so far: rows are judged by themselves, whatever share of a prompt they are."""
        return site.lengths

    def heads(self, site: CacheSite, score: Tensor, guard: Tensor | None, counts: tuple[int, ...]) -> Counts:
        """Rows of each head that reach the threshold or are guarded, within the bounds."""
        high = score >= self.tau
        stays = high if guard is None else high | guard
        real = torch.ones_like(stays) if site.real is None else site.real.expand_as(stays)
        stays = stays & real
        held = real.sum(-1)
        found = torch.maximum(stays.sum(-1), held.clamp(max=self.least))
        if self.most is not None:
            found = torch.minimum(found, torch.tensor(counts, device=score.device)[:, None])
        if bool((found >= held).all()):  # nothing to copy, which is so at most steps
            return site.held
        return found
