"""random and random_prune: the baselines that keep every other method honest."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from tokred.core.checks import check_choice
from tokred.core.matching import match_to, mergeable
from tokred.core.method import Method, Settings
from tokred.core.padding import reduce_each
from tokred.core.reduction import Reduction
from tokred.core.registry import register
from tokred.core.schedules import ScheduleLike, schedule
from tokred.core.selection import protected_rows, random_order
from tokred.core.site import Site
from tokred.encoder.metric import METRICS, Metric, read_metric


@register("random")
@dataclass(frozen=True)
class RandomMerge(Method):
    """``r`` random tokens merge into their most similar token among the rest.

    Random numbers are a function of (seed, layer, position): the same at every call and for every sample of a batch.

    Args:
        r: tokens removed per block, as in :class:`tokred.ToMe`.
        seed: which random choice.
        prop_attn: proportional attention.
        metric: what is compared.

    Source: Bolya et al., Token Merging, ICLR 2023, released code (random_bipartite_soft_matching).
    """

    summary: ClassVar[str] = "r random tokens merge into their most similar one (ToMe's baseline)"
    source: ClassVar[str] = "Bolya et al., ICLR 2023, released code"
    example: ClassVar[Settings] = {"r": 3}
    nothing: ClassVar[Settings | None] = {"r": 0}
    usual: ClassVar[Settings] = {"r": 8}

    r: ScheduleLike = 0
    seed: int = 0
    prop_attn: bool = True
    metric: Metric = "k"

    def __post_init__(self) -> None:
        object.__setattr__(self, "r", schedule(self.r))
        check_choice(self.metric, "metric", METRICS)

    @property
    def reads(self) -> frozenset[str]:
        """The tokens, and what is compared."""
        return frozenset({"x", self.metric})

    @property
    def proportional(self) -> bool:
        """As ``prop_attn`` says."""
        return self.prop_attn

    def check(self, depth: int) -> None:
        """A list may not be longer than the model is deep."""
        schedule(self.r).check(depth)

    def tokens(self, n: int, *, layer: int, depth: int, prefix: int = 0, suffix: int = 0) -> int:
        """``n`` less this layer's ``r``, capped as ToMe's."""
        return n - min(schedule(self.r).at(layer, depth), mergeable(n, prefix, suffix))

    def reduce(self, site: Site) -> Reduction:
        """Merge the first ``r`` tokens of a random order."""
        if site.mask is not None:
            return reduce_each(self, site, always=True)
        b, n = site.shape
        r = n - self.tokens(n, layer=site.layer, depth=site.depth, prefix=site.prefix, suffix=site.suffix)
        if r == 0:
            return Reduction.identity((b,), n, site.device)
        free = n - site.prefix - site.suffix
        order = random_order(b, free, self.seed, site.layer, site.step, site.device) + site.prefix
        lead, tail = protected_rows(b, n, site.prefix, site.suffix, site.device)
        return match_to(read_metric(site, self.metric), order[:, :r], order[:, r:], lead=lead, tail=tail)


@register("random_prune")
@dataclass(frozen=True)
class RandomPrune(Method):
    """Drop ``r`` random tokens per block; what any selection has to beat.

    Args:
        r: tokens removed per block; at most all unprotected ones but one.
        seed: which random choice, see :class:`RandomMerge`.
    """

    summary: ClassVar[str] = "drop r random tokens in every block (the floor)"
    source: ClassVar[str] = "baseline"
    example: ClassVar[Settings] = {"r": 3}
    nothing: ClassVar[Settings | None] = {"r": 0}
    usual: ClassVar[Settings] = {"r": 8}
    drops: ClassVar[bool] = True

    r: ScheduleLike = 0
    seed: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "r", schedule(self.r))

    def check(self, depth: int) -> None:
        """A list may not be longer than the model is deep."""
        schedule(self.r).check(depth)

    def tokens(self, n: int, *, layer: int, depth: int, prefix: int = 0, suffix: int = 0) -> int:
        """``n`` less this layer's ``r``; one unprotected token always stays."""
        return n - min(schedule(self.r).at(layer, depth), max(0, n - prefix - suffix - 1))

    def reduce(self, site: Site) -> Reduction:
        """Keep the tokens of a random choice, in their order."""
        if site.mask is not None:
            return reduce_each(self, site, always=True)
        b, n = site.shape
        kept = self.tokens(n, layer=site.layer, depth=site.depth, prefix=site.prefix, suffix=site.suffix)
        free = n - site.prefix - site.suffix
        order = random_order(b, free, self.seed, site.layer, site.step, site.device)[:, : free - (n - kept)]
        lead, tail = protected_rows(b, n, site.prefix, site.suffix, site.device)
        rows = order.sort(dim=1).values + site.prefix
        return Reduction.keep(torch.cat([lead, rows, tail], dim=1), n)
