"""ToMA: soft merging inside tiles of the image by two matrix products, destinations chosen to stand for all tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from tokred.core.checks import check_choice, check_count, check_ratio
from tokred.core.method import Parameters
from tokred.core.reduction import Reduction
from tokred.core.registry import register
from tokred.core.site import Site
from tokred.core.tiles import TileReduction, facility_location, soft_shares, tile_rows, tile_similarity, tile_sizes
from tokred.diffusion.method import AttentionMethod, check_sharing, removed
from tokred.diffusion.site import AttentionSite, Share, Sublayer, SublayerPlace

Cover = Literal["attention", "attention+mlp", "block"]
COVERS: dict[Cover, tuple[Sublayer, ...]] = {
    "attention": ("self",),
    "attention+mlp": ("self", "mlp"),
    "block": ("self", "cross", "mlp"),
}


@register("toma")
@dataclass(frozen=True)
class ToMA(AttentionMethod):
    """Token Merge with Attention; our reading of the paper, whose code was not read.

    Args:
        ratio: share of the tokens of each tile that is merged away, in [0, 1); at least one token a tile is left.
        max_downsample: act where the grid is at most so many times coarser than the denoiser's sample.
        tile: rows and columns of a tile; those at the edges are smaller (ours).
        tau: temperature of the shares; 0: each token goes to its most similar destination alone (ours).
        steps_destination: destinations are kept for so many denoising steps (ours).
        steps_plan: shares are kept for so many steps (ours). Above 1 it is read once a step what step it is.
        cover: around which sub-layers: ``"attention"``, ``"attention+mlp"`` or ``"block"``, cross-attention as well.
        share: ``"resolution"``: blocks of one resolution share a plan, ``"block"``: each has its own.
        first_full: so many steps at the start of an image run as they are; compiled forwards need 0 (ours).

    Source: ToMA: Token Merge with Attention for Diffusion Models, ICML 2025 (arXiv 2509.10918). The exact normalisation
    of the shares and what is marked above are ours.
    """

    summary: ClassVar[str] = "soft merging inside tiles of the image, by two matrix products"
    source: ClassVar[str] = "ToMA, ICML 2025 (arXiv 2509.10918)"
    example: ClassVar[Parameters] = {"ratio": 0.5, "max_downsample": 8, "tile": 4, "first_full": 0}

    remembers: ClassVar[bool] = True

    ratio: float = 0.5
    max_downsample: int = 2
    tile: int = 8
    tau: float = 0.1
    steps_destination: int = 10
    steps_plan: int = 5
    cover: Cover = "block"
    share: Share = "resolution"
    first_full: int = 2

    def __post_init__(self) -> None:
        check_ratio(self.ratio)
        for name in ("max_downsample", "tile", "steps_destination", "steps_plan"):
            check_count(getattr(self, name), name, 1)
        if self.tile > 32:
            raise ValueError(f"tile must be at most 32, got {self.tile}: every pair of a tile's tokens is compared")
        if isinstance(self.tau, bool) or not isinstance(self.tau, int | float) or not self.tau >= 0:
            raise ValueError(f"tau must be a number of at least 0, got {self.tau!r}")
        check_choice(self.cover, "cover", COVERS)
        check_sharing(self.share, self.refresh, self.first_full)

    @property
    def refresh(self) -> int:  # type: ignore[override]  # named as the card names it
        return self.steps_plan

    @property
    def reads(self) -> frozenset[str]:
        """The block's input, which is compared, and its grid."""
        return frozenset({"x", "grid"})

    @property
    def sublayers(self) -> tuple[Sublayer, ...]:
        return COVERS[self.cover]

    @property
    def idle(self) -> bool:
        """Nothing is merged at ratio 0, or in tiles of one token."""
        return self.ratio == 0 or self.tile == 1

    @property
    def advice(self) -> str:
        """Advice on ``max_downsample``."""
        return f"max_downsample is {self.max_downsample}: give a larger one"

    def left(self, place: SublayerPlace) -> int:
        """``round((1 - ratio) * n)`` of each tile's ``n`` tokens, at least one."""
        if self.idle or place.factor > self.max_downsample:
            return place.length
        return sum(tiles * self._slots(n) for tiles, n in tile_sizes(place.grid, self.tile))

    def _slots(self, n: int) -> int:
        return max(1, removed(n, 1 - self.ratio))

    def reduce(self, site: Site) -> Reduction:
        """Choose destinations, unless those of an earlier step still hold, and hand every token out to them."""
        site = self.site(site)
        b, n = site.shape
        if self.left(site.place) == n:
            return Reduction.identity((b,), n, site.device)
        with torch.no_grad():
            rows = tile_rows(site.grid, self.tile, site.device)
            similarity = [tile_similarity(site.x, own) for own in rows]
            chosen = self._chosen(site, similarity)
            share = [soft_shares(s, picks, self.tau) for s, picks in zip(similarity, chosen, strict=True)]
            return TileReduction.make(rows, chosen, share, n)

    def _chosen(self, site: AttentionSite, similarity: list[Tensor]) -> list[Tensor]:
        since, chosen = site.memory.get("chosen", (0, None))
        if chosen is None or site.count - since >= self.steps_destination:
            chosen = [facility_location(s, self._slots(s.shape[-1])) for s in similarity]
            site.memory["chosen"] = (site.count, chosen)
        found: list[Tensor] = chosen
        return found
