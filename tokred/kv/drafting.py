"""``DraftRows``: which rows of a cache a draft is made over, and how newer ones push out the least of them.

Source: Wu et al., TokenSwift, ICML 2025 (arXiv 2502.18890), by the rule of its code.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tokred.core.checks import check_count


@dataclass(frozen=True)
class DraftRows:
    """The first rows of a cache, those that the last query asks for most, and in the places of these the newest.

    Args:
        budget: rows of each key/value head.
        start: first rows, which always stay.
    """

    budget: int = 4096
    start: int = 16

    def __post_init__(self) -> None:
        check_count(self.start, "start", 0)
        check_count(self.budget, "budget", 1)
        if self.budget <= self.start:
            raise ValueError(f"budget must be larger than start={self.start}, got {self.budget}")

    @property
    def room(self) -> int:
        """Rows that are chosen, and newer ones take the places of."""
        return self.budget - self.start

    def select(self, q: Tensor, keys: Tensor) -> Tensor:
        """``[B, Hk, budget]`` int64: the first rows, then the chosen ones by descending score, ties to the older.

        Args:
            q: ``[B, H, D]`` of the newest token. Products with it are summed over the heads of a key/value head, as
                they are: without a scale, and without a softmax.
            keys: ``[B, Hk, n, D]``.

        Raises:
            ValueError: there are fewer rows than the budget.
        """
        b, h, n, _ = keys.shape
        if n < self.budget:
            raise ValueError(f"budget is {self.budget}, but there are {n} rows: no more than these can be chosen")
        # The sum of products is the product with the sum. Selection is in float32, whatever the model runs in.
        asked = q.float().view(b, h, -1, q.shape[-1]).sum(2, keepdim=True)
        score = (asked @ keys[:, :, self.start :].float().mT)[:, :, 0]
        best = score.sort(stable=True, dim=-1, descending=True).indices[..., : self.room] + self.start
        first = torch.arange(self.start, device=keys.device).expand(b, h, -1)
        return torch.cat([first, best], -1)

    def places(self, since: int, count: int) -> list[int]:
        """Where of ``budget`` places newer rows go.

        Args:
            since: rows that have come since the choice, before these.
            count: how many come now, in order; no more than :attr:`room`.
        """
        # From the end, where the least of those that were chosen stand; then round and round.
        return [self.budget - 1 - (since + i) % self.room for i in range(count)]

    def due(self, since: int) -> bool:
        """True if ``since`` rows that have come have pushed out all that were chosen."""
        return since > self.room
