"""H2O: the rows that have received most attention, and the newest."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from tokred.core.registry import register
from tokred.kernels.column_scores import column_scores
from tokred.kv.parts import Pair, Score
from tokred.kv.preset import KVPreset
from tokred.kv.site import CacheSite

MASS = "mass"
# Weights below are taken for zero; float32 keeps 2 ** -24.
_NOTHING = 2.0**-34


@dataclass(frozen=True)
class ColumnSum(Score):
    """The sum over all queries seen of the attention on each row.

    Args:
        decay: factor on what was received before, for each later query; 1: none.
        group: over the query heads of a key/value head.

    Source: Zhang et al., H2O, NeurIPS 2023 (arXiv 2306.14048); with decay Liu et al., ZeroMerge (arXiv 2503.10714).
    """

    name: ClassVar[str] = "column_sum"
    reads: ClassVar[frozenset[str]] = frozenset({"q", "k"})
    accumulates: ClassVar[bool] = True
    numbers: ClassVar[int] = 1
    ordered: ClassVar[bool] = False

    decay: float = 1.0
    group: str = "sum"

    def __post_init__(self) -> None:
        if not 0 < self.decay <= 1:
            raise ValueError(f"decay must lie in (0, 1], got {self.decay!r}")
        if self.group not in ("sum", "mean", "max"):
            raise ValueError(f"group must be 'sum', 'mean' or 'max', got {self.group!r}")

    def observe(self, site: CacheSite) -> None:
        """Add the attention of this forward's queries."""
        m = site.q.shape[2]
        last, weight = None, None
        if self.decay != 1 and m > 1:
            # What older queries say is lost in the rounding of the sum.
            count = m if site.loose else min(m, math.ceil(math.log(_NOTHING) / math.log(self.decay)))
            last = count if count < m else None
            weight = self.decay ** site.behind(count).float()
        received = site.columns(last, weight=weight, group=self.group).float()
        before = site.rows.get(MASS)
        if before is not None:
            before = before if self.decay == 1 else before * self.decay ** site.arrived(m)
            received = before + received
        site.rows[MASS] = received

    def quick(self, q: Tensor, k: Tensor, slots: Tensor, scale: float | None, rows: dict[str, Tensor]) -> Tensor | None:
        """The sum, with the attention of one query more."""
        return self._more(rows, column_scores(q, k, scale=scale, group=self.group)) if MASS in rows else None

    def attend(self, q: Tensor, k: Tensor, v: Tensor, scale: float | None, rows: dict[str, Tensor]) -> Pair | None:
        """The attention, whose weights are what is added up."""
        if MASS not in rows:
            return None
        b, h, _, d = q.shape
        # The kernel that hands weights out makes a log-sum-exp too, which nobody wants here: a fifth more time.
        folded = q.reshape(b, k.shape[1], h // k.shape[1], d) * (d**-0.5 if scale is None else scale)
        weights = (folded @ k.mT).softmax(-1)  # [B, Hk, G, K]
        received = weights.amax(2) if self.group == "max" else getattr(weights, self.group)(2)
        return (weights @ v).reshape(b, h, 1, v.shape[3]), self._more(rows, received)

    def _more(self, rows: dict[str, Tensor], received: Tensor) -> Tensor:
        """The sum, with what one query more has ``[B, Hk, K]`` for each row."""
        before, received = rows[MASS], received.float()
        rows[MASS] = before.mul(self.decay).add_(received) if self.decay != 1 else before + received
        return rows[MASS]

    def __call__(self, site: CacheSite) -> Tensor:
        """The sum that :meth:`observe` has added up."""
        return site.rows[MASS]


@register("h2o")
@dataclass(frozen=True)
class H2O(KVPreset):
    """Heavy hitters by accumulated attention, and a recent window; one row goes for each that comes.

    Args:
        budget: what is kept: a share in (0, 1], tokens, bytes such as "64 MiB", or a budget of :mod:`tokred.kv`.
            It counts the prompt's tokens, and is held during generation.
        recent: share of the kept rows that are the newest (a whole number: tokens).
        every: generated tokens between evictions.

    Source: Zhang et al., H2O, NeurIPS 2023, section 4; scores are summed over the heads of a group (ours).
    """

    summary: ClassVar[str] = "accumulated attention and the newest tokens, at every step"
    source: ClassVar[str] = "Zhang et al., NeurIPS 2023 (arXiv 2306.14048)"

    recent: float | int = 0.5
    every: int = 1

    def make_score(self) -> Score:
        return ColumnSum()
