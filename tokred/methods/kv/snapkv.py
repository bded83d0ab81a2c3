"""SnapKV: the last queries of the prompt choose what stays."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tokred.core.method import Parameters
from tokred.core.registry import register
from tokred.kv.parts import Score, check_count
from tokred.kv.pooling import check_pool, pooled
from tokred.kv.preset import KVPreset
from tokred.kv.site import CacheSite


@dataclass(frozen=True)
class Window(Score):
    """Mean attention of the last ``window`` queries, pooled along the sequence; the window itself is kept.

    Args:
        size: queries of the window.
        pool: width of the pooling, odd; 1: none.
        pooling: "avg" (zeros outside counted) or "max".
        group: "mean", "sum" or "max" over the query heads of a key/value head, after pooling.

    Source: Li et al., SnapKV, NeurIPS 2024 (arXiv 2404.14469).
    """

    name: ClassVar[str] = "window"
    reads: ClassVar[frozenset[str]] = frozenset({"q", "k"})

    size: int = 64
    pool: int = 5
    pooling: str = "avg"
    group: str = "mean"

    def __post_init__(self) -> None:
        check_count(self.size, "the window", 1)
        check_pool(self.pool, self.pooling)
        if self.group not in ("sum", "mean", "max"):
            raise ValueError(f"group must be 'sum', 'mean' or 'max', got {self.group!r}")

    @property
    def window(self) -> int:
        return self.size

    @property
    def recent(self) -> int:
        return self.size

    def __call__(self, site: CacheSite) -> Tensor:
        """Columns before the window, pooled."""
        inside = site.stands_behind(self.size)
        # Averages may be taken over heads first, which is the smaller work; maxima may not.
        late = self.pooling == "max" and self.pool > 1
        received = site.columns(self.size, group="none" if late else self.group) / self.size
        if not late:
            return pooled(site, received.masked_fill(inside, 0.0), self.pool, self.pooling)
        b, h, n = received.shape
        grouped = received.view(b, site.heads, h // site.heads, n).masked_fill(inside.unsqueeze(2), 0.0)
        found = [pooled(site, grouped[:, :, i], self.pool, self.pooling) for i in range(h // site.heads)]
        stacked = torch.stack(found)
        return {"sum": stacked.sum(0), "mean": stacked.mean(0), "max": stacked.amax(0)}[self.group]


@register("snapkv")
@dataclass(frozen=True)
class SnapKV(KVPreset):
    """Rows that the window's queries attend to, pooled so that neighbours stay together, and the window itself.

    Args:
        budget: what is kept: a share in (0, 1], tokens, bytes such as "64 MiB", or a budget of :mod:`tokred.kv`.
        window: queries that choose, and newest tokens that stay.
        pool: width of the pooling, odd.
        pooling: "avg" or "max".
        turns: choose again at the end of later turns, or of each chunk of a prompt.

    Source: Li et al., SnapKV, NeurIPS 2024, section 4; means instead of sums over the window, which rank alike.
    """

    summary: ClassVar[str] = "the last queries of the prompt choose, pooled"
    source: ClassVar[str] = "Li et al., NeurIPS 2024 (arXiv 2404.14469)"
    example: ClassVar[Parameters] = {"budget": 9, "window": 4, "pool": 3}

    window: int = 64
    pool: int = 5
    pooling: str = "avg"
    turns: bool = False

    def make_score(self) -> Score:
        return Window(self.window, self.pool, self.pooling)
