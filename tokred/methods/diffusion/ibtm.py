"""IBTM: merge a denoiser's tokens where guidance changed little in the step before, and spare those that it changed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tokred.core.checks import check_count, check_ratio, check_share
from tokred.core.method import Parameters
from tokred.core.reduction import Reduction
from tokred.core.registry import register
from tokred.core.selection import ranked
from tokred.core.site import Site
from tokred.diffusion.grid import match_around
from tokred.diffusion.method import AttentionMethod, check_sharing, removed
from tokred.diffusion.site import AttentionSite, Share, Step, Sublayer, SublayerPlace
from tokred.errors import MissingInputError
from tokred.methods.diffusion.tomesd import ToMeSD


@register("ibtm")
@dataclass(frozen=True)
class IBTM(AttentionMethod):
    """Importance-based token merging; our reading of the paper, whose code was not read.

    The importance of a token is how much classifier-free guidance changed the prediction for it in the step before. The
    first step of an image merges as ToMeSD.

    Args:
        ratio: share of tokens merged away around a sub-layer, in [0, 1).
        pool: share of the tokens that count as important: destinations are among them, and so is every token that stays
            alone. It grows where more tokens than that are left.
        max_downsample: act where the grid is at most so many times coarser than the denoiser's sample: 1, 2, 4, 8.
        sx, sy: there are ``round(N / (sx * sy))`` destinations (ours), at most as many as tokens are left.
        use_rand: draw the destinations from the pool; False: take the most important tokens (ours).
        merge_attn, merge_crossattn, merge_mlp: around which sub-layers.
        seed: of the draw, which depends on it, the step and the block alone (ours).
        share: ``"resolution"``: blocks of one resolution share a plan (ours).
        refresh: a plan is kept for so many denoising steps (ours).

    Both halves of guidance have the same destinations and the same protected tokens, run together or one after the
    other. Without guidance the second step raises.

    Source: Importance-Based Token Merging for Efficient Image and Video Generation, ICCV 2025 (arXiv 2411.16720); mean
    absolute values, and what is marked above, are ours.
    """

    summary: ClassVar[str] = "merge a denoiser's tokens but for those that guidance changed most"
    source: ClassVar[str] = "IBTM, ICCV 2025 (arXiv 2411.16720)"
    example: ClassVar[Parameters] = {"ratio": 0.5, "max_downsample": 8, "merge_crossattn": True, "merge_mlp": True}

    ratio: float = 0.5
    pool: float = 0.5
    max_downsample: int = 1
    sx: int = 2
    sy: int = 2
    use_rand: bool = True
    merge_attn: bool = True
    merge_crossattn: bool = False
    merge_mlp: bool = False
    seed: int = 0
    share: Share = "block"
    refresh: int = 1

    def __post_init__(self) -> None:
        check_ratio(self.ratio)
        check_share(self.pool, "pool")
        for name in ("sx", "sy"):
            check_count(getattr(self, name), name, 1)
        check_sharing(self.share, self.refresh)
        self.beginning  # noqa: B018 - the rest is checked there

    @property
    def beginning(self) -> ToMeSD:
        """The method of the first step of an image."""
        same = ("ratio", "max_downsample", "sx", "sy", "use_rand", "merge_attn", "merge_crossattn", "merge_mlp", "seed")
        return ToMeSD(**{name: getattr(self, name) for name in (*same, "share", "refresh")})

    @property
    def reads(self) -> frozenset[str]:
        """The block's input, which is compared, its grid, and what guidance did."""
        return frozenset({"x", "grid", "guidance"})

    @property
    def stepwise(self) -> bool:
        return True

    def at(self, step: Step | None) -> AttentionMethod | None:
        """ToMeSD in the first step."""
        return self.beginning if step is not None and step.number == 0 else self

    @property
    def sublayers(self) -> tuple[Sublayer, ...]:
        return self.beginning.sublayers

    @property
    def idle(self) -> bool:
        """Nothing is merged at ratio 0."""
        return self.ratio == 0

    @property
    def advice(self) -> str:
        return self.beginning.advice

    def left(self, place: SublayerPlace) -> int:
        """``N - round(ratio * N)``."""
        n = place.length
        return n if place.factor > self.max_downsample else max(1, n - removed(n, self.ratio))

    def reduce(self, site: Site) -> Reduction:
        """Protect the important tokens, and merge the others into some of these."""
        site = self.site(site)
        b, n = site.shape
        left = self.left(site.place)
        if left == n:
            return Reduction.identity((b,), n, site.device)
        order = ranked(self._importance(site))
        pool = order[:, : max(removed(n, self.pool), left)]
        protected = torch.zeros(b, n, dtype=torch.bool, device=site.device).scatter(1, pool, True)
        count = min(max(1, removed(n, 1 / (self.sx * self.sy))), left)
        if self.use_rand:
            order = ranked(torch.where(protected, site.uniform(n, self.seed), -1.0))
        return match_around(site.x, order[:, :count].sort(dim=1).values, protected, left)

    def _importance(self, site: AttentionSite) -> Tensor:
        try:
            return site.guidance
        except MissingInputError:
            raise MissingInputError(
                f"{self.name!r} reads what guidance changed in the step before, and that step ran without guidance (or "
                "with more than two branches): give a guidance_scale above 1, or use 'tomesd', which needs none"
            ) from None
