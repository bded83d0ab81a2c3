"""random and random_prune: the baselines that keep every other method honest."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from tokred.core.checks import check_integer
from tokred.core.matching import match_to
from tokred.core.method import Parameters
from tokred.core.place import Place
from tokred.core.reduction import Reduction
from tokred.core.registry import register
from tokred.core.selection import protected_rows, random_order
from tokred.core.site import Site
from tokred.encoder.method import Compared, Scheduled
from tokred.encoder.metric import Metric, read_metric
from tokred.encoder.padding import reduce_each


@register("random")
@dataclass(frozen=True)
class RandomMerge(Compared, Scheduled):
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
    example: ClassVar[Parameters] = {"r": 3}

    seed: int = 0
    prop_attn: bool = True
    metric: Metric = "k"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_integer(self.seed, "seed")

    def reduce(self, site: Site) -> Reduction:
        """Merge the first ``r`` tokens of a random order."""
        if site.mask is not None:
            return reduce_each(self, site, always=True)
        b, n = site.shape
        r = n - self.tokens(n, Place.of(site))
        if r == 0:
            return Reduction.identity((b,), n, site.device)
        free = n - site.prefix - site.suffix
        order = random_order(b, free, self.seed, site.layer, site.step, site.device) + site.prefix
        lead, tail = protected_rows(b, n, site.prefix, site.suffix, site.device)
        return match_to(read_metric(site, self.metric), order[:, :r], order[:, r:], lead=lead, tail=tail)


@register("random_prune")
@dataclass(frozen=True)
class RandomPrune(Scheduled):
    """Drop ``r`` random tokens per block; what any selection has to beat.

    Args:
        r: tokens removed per block; at most all unprotected ones but one.
        seed: which random choice, see :class:`RandomMerge`.
    """

    summary: ClassVar[str] = "drop r random tokens in every block (the floor)"
    source: ClassVar[str] = "baseline"
    example: ClassVar[Parameters] = {"r": 3}
    drops: ClassVar[bool] = True

    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_integer(self.seed, "seed")

    def most(self, n: int, place: Place) -> int:
        """All but one of the unprotected tokens."""
        return max(0, place.free(n) - 1)

    def reduce(self, site: Site) -> Reduction:
        """Keep the tokens of a random choice, in their order."""
        if site.mask is not None:
            return reduce_each(self, site, always=True)
        b, n = site.shape
        kept = self.tokens(n, Place.of(site))
        free = n - site.prefix - site.suffix
        order = random_order(b, free, self.seed, site.layer, site.step, site.device)[:, : free - (n - kept)]
        lead, tail = protected_rows(b, n, site.prefix, site.suffix, site.device)
        rows = order.sort(dim=1).values + site.prefix
        return Reduction.keep(torch.cat([lead, rows, tail], dim=1), n)
