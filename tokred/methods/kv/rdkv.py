"""RDKV: which rows go, and in how many bits the others are held, as one choice."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor

from tokred.core.checks import check_share
from tokred.core.method import Parameters
from tokred.core.registry import register
from tokred.kv.budgets import Water
from tokred.kv.parts import Budget, Score, check_count
from tokred.kv.policy import BudgetLike, as_budget
from tokred.kv.pooling import check_pool
from tokred.kv.preset import Preset
from tokred.kv.site import CacheSite
from tokred.kv.stores import Zones


@dataclass(frozen=True)
class WindowSum(Score):
    """The attention of the newest queries on each row, added up, and averaged over neighbours.

    Args:
        size: queries, and newest tokens that stay.
        pool: rows of an average, odd; at both ends rows are mirrored.

    Source: Zhang et al., RDKV (arXiv 2605.08317).
    """

    name: ClassVar[str] = "window_sum"
    reads: ClassVar[frozenset[str]] = frozenset({"q", "k"})

    size: int = 32
    pool: int = 5

    def __post_init__(self) -> None:
        check_count(self.size, "window", 1)
        check_pool(self.pool, "avg")

    @property
    def window(self) -> int:
        return self.size

    @property
    def recent(self) -> int:
        return self.size

    def __call__(self, site: CacheSite) -> Tensor:
        """Columns, summed over the heads of a group."""
        return site.alone(self._averaged, site.columns(self.size, group="sum"))

    def _averaged(self, x: Tensor) -> Tensor:
        side = min(self.pool // 2, x.shape[-1] - 1)
        return F.avg_pool1d(F.pad(x, (side, side), mode="reflect"), 2 * side + 1, 1) if side else x


@register("rdkv")
@dataclass(frozen=True)
class RDKV(Preset):
    """Bits are shared out among rows by the attention they received: many are evicted, the others held in 2 to 16.

    Args:
        budget: rows that would take as much in 16 bits: a share in (0, 1], tokens, or :class:`tokred.kv.Water`.
        window: queries that choose, and newest tokens that stay.
        pool: rows of an average, odd.
        sinks: first tokens that stay.
        k_share: of the bits that are for keys.
        later: bits of the values of what is generated, see :class:`tokred.kv.Zones`.

    Source: Zhang et al., RDKV (arXiv 2605.08317).
    """

    summary: ClassVar[str] = "bits shared out among rows: none, two, four, eight or all"
    source: ClassVar[str] = "Zhang et al., arXiv 2605.08317"
    example: ClassVar[Parameters] = {"budget": 6, "window": 4, "pool": 3}
    nothing: ClassVar[Parameters | None] = {"budget": 1.0}

    budget: BudgetLike = 0.1
    window: int = 32
    pool: int = 5
    sinks: int = 0
    k_share: float = 0.5
    later: int = 4

    def __post_init__(self) -> None:
        check_share(self.k_share, "k_share")
        object.__setattr__(self, "budget", self.make_budget())
        if self.store is None:
            object.__setattr__(self, "store", Zones(self.later))
        super().__post_init__()

    def make_score(self) -> Score:
        return WindowSum(self.window, self.pool)

    def make_budget(self) -> Budget:
        found = as_budget(self.budget)
        return found if isinstance(found, Water) else Water(found.amount, self.k_share, window=self.window)
