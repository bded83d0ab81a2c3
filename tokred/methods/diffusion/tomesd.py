"""ToMeSD: merge the tokens of a denoiser around its attention, one destination per cell of the image."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tokred.core.checks import check_count, check_ratio
from tokred.core.method import Parameters
from tokred.core.reduction import Reduction
from tokred.core.registry import register
from tokred.core.site import Site
from tokred.diffusion.grid import cell_destinations, match_cells, whole_cells
from tokred.diffusion.method import AttentionMethod, check_sharing
from tokred.diffusion.site import AttentionSite, Share, Sublayer, SublayerPlace


@register("tomesd")
@dataclass(frozen=True)
class ToMeSD(AttentionMethod):
    """Token Merging for Stable Diffusion.

    Args:
        ratio: share of tokens merged away around a sub-layer, in [0, 1). At most ``1 - 1 / (sx * sy)`` of them can be.
        max_downsample: act where the grid is at most so many times coarser than the denoiser's sample: 1, 2, 4, 8.
            1 reaches 5 of the 16 blocks of SD 1.x and none of SDXL, which needs 2.
        sx: columns of a cell.
        sy: rows of a cell.
        use_rand: another token of each cell is its destination at every step and block; False: the top left one.
        merge_attn: around self-attention.
        merge_crossattn: around cross-attention.
        merge_mlp: around the MLP.
        seed: of the choice of destinations, which depends on it, the step and the block alone (ours).
        share: ``"resolution"``: blocks of one resolution share a plan, which saves matching (ours).
        refresh: a plan is kept for so many denoising steps (ours). Above 1 it is read once a step what step it is.

    Source: Bolya and Hoffman, Token Merging for Fast Stable Diffusion, CVPR 2023 workshops (arXiv 2303.17604).
    """

    summary: ClassVar[str] = "merge a denoiser's tokens around attention, a destination per cell of the image"
    source: ClassVar[str] = "Bolya and Hoffman, CVPR 2023 workshops (arXiv 2303.17604)"
    example: ClassVar[Parameters] = {"ratio": 0.5, "max_downsample": 8, "merge_crossattn": True, "merge_mlp": True}

    ratio: float = 0.5
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
        for name in ("sx", "sy"):
            check_count(getattr(self, name), name, 1)
        if self.max_downsample not in (1, 2, 4, 8):
            raise ValueError(f"max_downsample is {self.max_downsample!r}; allowed are 1, 2, 4, 8")
        if not self.sublayers:
            raise ValueError("one of merge_attn, merge_crossattn and merge_mlp must be true")
        check_sharing(self.share, self.refresh)

    @property
    def reads(self) -> frozenset[str]:
        """The block's input, which is compared, and its grid."""
        return frozenset({"x", "grid"})

    @property
    def sublayers(self) -> tuple[Sublayer, ...]:
        wanted: tuple[tuple[Sublayer, bool], ...] = (
            ("self", self.merge_attn),
            ("cross", self.merge_crossattn),
            ("mlp", self.merge_mlp),
        )
        return tuple(name for name, on in wanted if on)

    @property
    def idle(self) -> bool:
        """Nothing is merged at ratio 0, or where every token is a destination."""
        return self.ratio == 0 or self.sx * self.sy == 1

    @property
    def advice(self) -> str:
        return f"max_downsample is {self.max_downsample}: give a larger one"

    def left(self, place: SublayerPlace) -> int:
        """``N`` less ``int(N * ratio)``, at least one token a cell; all where the grid is smaller than a cell."""
        r = int(place.length * self.ratio)
        if r == 0 or self.idle or place.factor > self.max_downsample:
            return place.length
        cells = whole_cells(place.grid, (self.sy, self.sx))
        return max(place.length - r, cells) if cells else place.length

    def offsets(self, site: AttentionSite) -> Tensor | None:
        """Number of the token in each cell that is its destination, ``(cells,)`` int64; None: the top left ones."""
        if not self.use_rand:
            return None
        cells = whole_cells(site.grid, (self.sy, self.sx))
        return (site.uniform(cells, self.seed) * (self.sx * self.sy)).to(torch.int64)

    def reduce(self, site: Site) -> Reduction:
        """Match every source with its most similar destination, and merge the most similar ones."""
        site = self.site(site)
        b, n = site.shape
        r = n - self.left(site.place)
        if r == 0:
            return Reduction.identity((b,), n, site.device)
        sources, destinations = cell_destinations(site.grid, (self.sy, self.sx), self.offsets(site), site.device)
        return match_cells(site.x, sources, destinations, r)
