"""CriticalKV: a score, weighted by what each value adds to the output."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from tokred.core.checks import check_share
from tokred.core.method import Parameters
from tokred.core.registry import register
from tokred.core.schedules import kept
from tokred.kv.parts import Score, as_part
from tokred.kv.preset import KVPreset
from tokred.kv.repeat import Repeats
from tokred.kv.select import Counts, kept_mask
from tokred.kv.site import CacheSite

# Rows whose projected values are made at once: bounds the memory.
_BLOCK = 1024


@dataclass(frozen=True)
class Critical(Score):
    """Half of the budget goes to the best rows of a score; the rest to the best of score times value.

    Args:
        inner: the score, an object or its name.
        first: share of the rows that the score alone gives away.
        epsilon: added to the score before it is multiplied.

    Source: Feng et al., CriticalKV, arXiv 2502.03805.
    """

    name: ClassVar[str] = "critical"
    reads: ClassVar[frozenset[str]] = frozenset({"v", "projection"})

    inner: Score | str = "window"
    first: float = 0.5
    epsilon: float = 1e-4

    def __post_init__(self) -> None:
        object.__setattr__(self, "inner", as_part(self.inner, Score, "inner"))  # type: ignore[type-abstract]
        check_share(self.first, "first")

    @property
    def wrapped(self) -> Score:
        assert isinstance(self.inner, Score)  # made so above
        return self.inner

    @property
    def accumulates(self) -> bool:  # type: ignore[override]
        return self.wrapped.accumulates

    @property
    def numbers(self) -> int:  # type: ignore[override]
        return self.wrapped.numbers

    @property
    def why_no_chunks(self) -> str | None:  # type: ignore[override]
        return self.wrapped.why_no_chunks

    @property
    def window(self) -> int:
        return self.wrapped.window

    @property
    def recent(self) -> int:
        return self.wrapped.recent

    @property
    def repeats(self) -> Repeats | None:
        return self.wrapped.repeats

    @property
    def needs(self) -> frozenset[str]:
        """The inner score's needs, values and the output projection."""
        return self.reads | self.wrapped.needs

    def note_bytes(self, heads: int, width: int) -> int:
        return self.wrapped.note_bytes(heads, width)

    def observe(self, site: CacheSite) -> None:
        self.wrapped.observe(site)

    def __call__(self, site: CacheSite) -> Tensor:
        """The inner score, by which heads share their budget."""
        return self.wrapped(site)

    def refine(self, site: CacheSite, score: Tensor, guard: Tensor | None, counts: Counts) -> Tensor:
        """The best by the score first, the others by score times value."""
        if isinstance(counts, Tensor):
            stage = (counts.double() * self.first).round(decimals=9).long().clamp(min=1)
        else:
            stage = torch.tensor([max(1, kept(c, self.first)) for c in counts], device=score.device)[:, None]
            stage = stage.expand(-1, site.heads)
        sure = kept_mask(score, site.real, guard, stage)
        return ((score + self.epsilon) * value_norms(site)).masked_fill(sure, torch.inf)


def value_norms(site: CacheSite) -> Tensor:
    """``[B, Hk, K]``: mean over the query heads of the L1 norm of each value after the output projection."""
    v = site.v
    _, heads, n, d = v.shape
    weight = site.projection.detach().float()
    per_head = weight.view(weight.shape[0], heads, -1, d).permute(1, 2, 0, 3).contiguous()  # [Hk, G, C, D]
    out = torch.empty(v.shape[:3], device=v.device)
    for start in range(0, n, _BLOCK):
        # A head at a time: plain products with a weight are faster than batched ones.
        for h, weights in enumerate(per_head):
            x = v[:, h, start : start + _BLOCK].float()
            found = [F.linear(x, w).abs_().sum(-1) for w in weights]
            out[:, h, start : start + _BLOCK] = torch.stack(found).mean(0)
    return out


@register("criticalkv")
@dataclass(frozen=True)
class CriticalKV(KVPreset):
    """Half of the budget by a score alone, the rest by score times the value's norm after the output projection.

    Args:
        budget: what is kept: a share in (0, 1], tokens, bytes such as "64 MiB", or a budget of :mod:`tokred.kv`.
        score: the score that is weighted, an object of :mod:`tokred.kv` or its name.
        first: share of the budget that the score alone gives away.
        epsilon: added to the score before it is weighted.

    Source: Feng et al., CriticalKV, arXiv 2502.03805, algorithm 1.
    """

    summary: ClassVar[str] = "a score, weighted by the value's share of the output"
    source: ClassVar[str] = "Feng et al., 2025 (arXiv 2502.03805)"
    example: ClassVar[Parameters] = {"budget": 9, "score": {"part": "window", "size": 4, "pool": 3}}

    score: Score | str = "window"
    first: float = 0.5
    epsilon: float = 1e-4

    def make_score(self) -> Score:
        return Critical(self.score, self.first, self.epsilon)
