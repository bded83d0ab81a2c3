"""Random pruning around a denoiser's attention: the baseline that a choice of tokens has to beat."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from tokred.core.checks import check_count, check_ratio
from tokred.core.method import Parameters
from tokred.core.reduction import Reduction
from tokred.core.registry import register
from tokred.core.selection import ranked
from tokred.core.site import Site
from tokred.diffusion.method import AttentionMethod, check_sharing
from tokred.diffusion.site import Share, SublayerPlace


@register("random_latent_prune")
@dataclass(frozen=True)
class RandomLatentPrune(AttentionMethod):
    """Random tokens take no part in self-attention and get nothing from it; the same ones in every sample.

    Args:
        ratio: share of tokens left out, in [0, 1).
        max_downsample: act where the grid is at most so many times coarser than the denoiser's sample.
        seed: of the choice, which depends on it, the step and the block alone.
        share: ``"resolution"``: blocks of one resolution leave out the same tokens.
        refresh: a plan is kept for so many denoising steps.

    Source: a baseline of ours.
    """

    summary: ClassVar[str] = "baseline: random tokens take no part in a denoiser's self-attention"
    source: ClassVar[str] = "baseline"
    example: ClassVar[Parameters] = {"ratio": 0.5, "max_downsample": 8}

    ratio: float = 0.5
    max_downsample: int = 1
    seed: int = 0
    share: Share = "block"
    refresh: int = 1

    def __post_init__(self) -> None:
        check_ratio(self.ratio)
        check_count(self.max_downsample, "max_downsample", 1)
        check_sharing(self.share, self.refresh)

    @property
    def reads(self) -> frozenset[str]:
        """The grid, for how coarse it is."""
        return frozenset({"grid"})

    @property
    def idle(self) -> bool:
        """Nothing is left out at ratio 0."""
        return self.ratio == 0

    @property
    def advice(self) -> str:
        return f"max_downsample is {self.max_downsample}: give a larger one"

    def left(self, place: SublayerPlace) -> int:
        """``N`` less ``int(N * ratio)``."""
        if place.factor > self.max_downsample:
            return place.length
        return place.length - int(place.length * self.ratio)

    def reduce(self, site: Site) -> Reduction:
        """Keep those of the highest random numbers, in their order."""
        site = self.site(site)
        b, n = site.shape
        left = self.left(site.place)
        if left == n:
            return Reduction.identity((b,), n, site.device)
        kept = ranked(site.uniform(n, self.seed))[:left].sort().values
        return Reduction.keep(kept.expand(b, -1), n)
