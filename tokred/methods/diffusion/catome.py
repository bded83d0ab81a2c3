"""CA-ToMe: ToMeSD that merges by a threshold, as many tokens as the image allows, and keeps its pairs for steps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from tokred.core.method import Parameters
from tokred.core.reduction import Reduction
from tokred.core.registry import register
from tokred.core.site import Site
from tokred.diffusion.grid import cell_destinations, match_above, whole_cells
from tokred.diffusion.method import AttentionMethod, check_sharing
from tokred.diffusion.site import Share, Sublayer, SublayerPlace
from tokred.methods.diffusion.tomesd import ToMeSD


@register("catome")
@dataclass(frozen=True)
class CAToMe(AttentionMethod):
    """Cached Adaptive Token Merging; our reading of a description, without its code.

    Args:
        threshold: every source more similar (cosine) to its best destination is merged, in (-1, 1]; 1: none. The
            default is ours.
        max_downsample: act where the grid is at most so many times coarser than the denoiser's sample: 1, 2, 4, 8.
        sx, sy: columns and rows of a cell, which has one destination.
        use_rand: a random destination in each cell; False: the top left one.
        merge_attn, merge_crossattn, merge_mlp: around which sub-layers.
        seed: of the destinations, which depend on it, the step and the block alone (ours).
        share: ``"resolution"``: blocks of one resolution share a plan (ours).
        refresh: pairs are kept for so many denoising steps. The default is ours.
        first_full: so many steps at the start of an image run as they are (ours).

    Samples of a batch keep different numbers: attention is given a mask for what is missing. Finding the numbers waits
    for the device, once a plan.

    Source: CA-ToMe, Cached Adaptive Token Merging, 2025 (arXiv 2501.00946).
    """

    summary: ClassVar[str] = "merge a denoiser's tokens above a similarity, with pairs kept over steps"
    source: ClassVar[str] = "CA-ToMe, 2025 (arXiv 2501.00946)"
    example: ClassVar[Parameters] = {
        "threshold": -0.99,
        "max_downsample": 8,
        "merge_crossattn": True,
        "merge_mlp": True,
    }
    nothing: ClassVar[Parameters | None] = {"threshold": 1}

    threshold: float = 0.9
    max_downsample: int = 1
    sx: int = 2
    sy: int = 2
    use_rand: bool = True
    merge_attn: bool = True
    merge_crossattn: bool = False
    merge_mlp: bool = False
    seed: int = 0
    share: Share = "block"
    refresh: int = 5
    first_full: int = 0

    def __post_init__(self) -> None:
        known = isinstance(self.threshold, int | float) and not isinstance(self.threshold, bool)
        if not known or not -1 < self.threshold <= 1:
            raise ValueError(f"threshold must lie in (-1, 1], got {self.threshold!r}")
        check_sharing(self.share, self.refresh, self.first_full)
        self._split  # noqa: B018 - the rest is checked there

    @property
    def _split(self) -> ToMeSD:
        same = ("max_downsample", "sx", "sy", "use_rand", "merge_attn", "merge_crossattn", "merge_mlp", "seed")
        return ToMeSD(**{name: getattr(self, name) for name in same})

    @property
    def reads(self) -> frozenset[str]:
        """The block's input, which is compared, and its grid."""
        return frozenset({"x", "grid"})

    @property
    def sublayers(self) -> tuple[Sublayer, ...]:
        return self._split.sublayers

    @property
    def idle(self) -> bool:
        """Nothing is merged above a cosine of 1."""
        return self.threshold >= 1 or self.sx * self.sy == 1

    @property
    def advice(self) -> str:
        """Advice on ``max_downsample`` and ``threshold``."""
        return f"max_downsample is {self.max_downsample} and threshold {self.threshold}: give a larger, a lower one"

    def left(self, place: SublayerPlace) -> int:
        """At least one token a cell: how many remain depends on the image. All where the grid is smaller than one."""
        if self.idle or place.factor > self.max_downsample:
            return place.length
        return whole_cells(place.grid, (self.sy, self.sx)) or place.length

    def reduce(self, site: Site) -> Reduction:
        """Merge every source that has a similar destination."""
        site = self.site(site)
        b, n = site.shape
        if self.left(site.place) == n:
            return Reduction.identity((b,), n, site.device)
        split = cell_destinations(site.grid, (self.sy, self.sx), self._split.offsets(site), site.device)
        return match_above(site.x, *split, self.threshold)
