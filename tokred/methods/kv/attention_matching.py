"""Attention Matching: few rows, fitted so that attention comes out as over all of them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tokred.core.attention import Attention
from tokred.core.checks import check_choice
from tokred.core.method import Parameters
from tokred.core.registry import register
from tokred.kv.fitting import REFERENCE, Fit
from tokred.kv.parts import Fate, Score, check_count
from tokred.kv.policy import BudgetLike
from tokred.kv.preset import KVPreset
from tokred.kv.repeat import Repeats
from tokred.kv.select import Counts
from tokred.kv.site import CacheSite

SOURCES = ("repeat", "prompt")


@dataclass(frozen=True)
class Matched(Score):
    """The root mean square of the attention that reference queries pay to each row, among the rows that may go.

    Args:
        queries: "repeat": those of the context while it is read again; "prompt": those of the prompt's last forward,
            whatever the order of its tokens.
        most: queries at most, evenly chosen.
        chunk, sinks: of the repetition, see :class:`tokred.kv.Reconstruction`.

    Source: Zweiger et al., Fast KV Compaction via Attention Matching, arXiv 2602.16284, section 3.
    """

    name: ClassVar[str] = "matched"
    reads: ClassVar[frozenset[str]] = frozenset({"q", "k", "v"})
    why_no_chunks: ClassVar[str | None] = "its fit is to the whole context"

    queries: str = "repeat"
    most: int = 4096
    chunk: int = 2048
    sinks: int = 4

    def __post_init__(self) -> None:
        check_choice(self.queries, "queries", SOURCES)
        check_count(self.most, "most", 1)
        check_count(self.chunk, "chunk", 1)
        check_count(self.sinks, "sinks")

    @property
    def accumulates(self) -> bool:  # type: ignore[override]
        return self.queries == "repeat"

    @property
    def repeats(self) -> Repeats | None:
        return Repeats(self.chunk, self.sinks, keep=self.most) if self.queries == "repeat" else None

    def __call__(self, site: CacheSite) -> Tensor:
        """By all rows; :meth:`refine` knows which may go."""
        if self.queries == "prompt":
            q = site.q
            meant = torch.ones(q.shape[0], q.shape[2], dtype=torch.bool, device=q.device)
            if site.padding is not None:
                meant = site.padding.mask[:, -q.shape[2] :]
            some = torch.linspace(0, q.shape[2] - 1, min(self.most, q.shape[2]), device=q.device).round().long()
            found = q.index_select(2, some), meant.index_select(1, some)
            site.notes.update(zip(REFERENCE, found, strict=True))
        return self._received(site, None)

    def refine(self, site: CacheSite, score: Tensor, guard: Tensor | None, counts: Counts) -> Tensor:
        return self._received(site, guard)

    def _received(self, site: CacheSite, guard: Tensor | None) -> Tensor:
        if REFERENCE[0] not in site.notes:  # a prompt of sinks alone, of which nothing was repeated
            return torch.zeros(site.extent, device=site.device)
        q, meant = (site.notes[name] for name in REFERENCE)
        free, real = None if guard is None else ~guard, site.real
        mask = free if real is None else real if free is None else real & free
        bias = None if site.weights is None else site.weights.log()
        attention = Attention(q, site.k, mask=mask, scale=site.scale, softcap=site.softcap, bias=bias, votes=meant)
        found = attention.statistics(group="mean").sum_squares
        score: Tensor = (found / meant.sum(1).clamp(min=1)[:, None, None]).sqrt()
        return score


@register("attention_matching")
@dataclass(frozen=True)
class AttentionMatching(KVPreset):
    """Rows that reference queries attend to stay, with weights and values by which attention comes out as over all.

    Args:
        budget: what is kept: a share in (0, 1], tokens, bytes such as "64 MiB", or a budget of :mod:`tokred.kv`.
        queries: "repeat" the context, or the "prompt" itself: what the fit is to serve.
        most_queries: queries at most, evenly chosen.
        chunk: tokens that one forward repeats.
        sinks, recent: first and newest tokens, which stay as they are, outside of the fit.
        bound, steps, ridge, direct: of the fit, see :class:`tokred.kv.Fit`.

    Source: Zweiger et al., Fast KV Compaction via Attention Matching, arXiv 2602.16284, the form with the highest keys.
    """

    summary: ClassVar[str] = "rows that stay are fitted to what all of them did"
    source: ClassVar[str] = "Zweiger et al., 2026 (arXiv 2602.16284)"
    example: ClassVar[Parameters] = {"budget": 9, "queries": "prompt", "sinks": 1, "recent": 1}

    budget: BudgetLike = 0.1
    queries: str = "repeat"
    most_queries: int = 4096
    chunk: int = 2048
    sinks: int = 4
    recent: int = 8
    bound: float = math.exp(3)
    steps: int = 2
    ridge: float = 1e-6
    direct: bool = False

    def make_score(self) -> Score:
        return Matched(self.queries, self.most_queries, self.chunk, self.sinks)

    def make_fate(self) -> Fate:
        return Fit(self.bound, self.steps, self.ridge, self.direct)
