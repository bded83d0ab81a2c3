"""KeyMerge: keys and values merged by similarity into few destinations, and weighed by how many they stand for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from tokred.core.checks import check_choice, check_count, check_ratio
from tokred.core.method import Parameters
from tokred.core.reduction import Reduction
from tokred.core.registry import register
from tokred.core.site import Site
from tokred.diffusion.grid import cell_destinations, check_cells, match_around, match_cells, typical_tokens
from tokred.diffusion.method import AttentionMethod, check_sharing
from tokred.diffusion.site import Part, Share, SublayerPlace

CHOICES = ("typical", "first", "random")


@register("keymerge")
@dataclass(frozen=True)
class KeyMerge(AttentionMethod):
    """Merging for self-attention that leaves queries alone and tells attention how many tokens each key stands for.

    As ToMeSD with three changes: queries stay, so that every token gets an output of its own; the log of its size is
    added to the scores of each key, so that a lone token that matters is not outweighed, nor a merged one forgotten;
    and cells are larger, so that there are fewer destinations, which makes matching cheap and leaves more tokens alone,
    the odd ones among them.

    Args:
        ratio: share of the keys merged away, in [0, 1). At most ``1 - 1 / (cell * cell)`` of them can be.
        cell: rows and columns of a cell, which has one destination.
        max_downsample: act where the grid is at most so many times coarser than the denoiser's sample.
        queries: merge the queries as well, so that attention runs on fewer tokens as a whole: faster still, and further
            from the unmerged image.
        choice: which token of a cell is its destination: ``"typical"`` the one most like the mean of the cell, of each
            image's own, so that no odd token gets others merged into it; ``"first"`` the top left one; ``"random"``.
        seed: of the random choice, which depends on it, the step and the block alone.
        share: ``"resolution"``: blocks of one resolution share a plan; ``"block"``: each has its own.
        refresh: a plan is kept for so many denoising steps. Above 1 it is read once a step what step it is.
        first_full: so many steps at the start of an image run as they are.

    Source: ours, after Bolya and Hoffman, Token Merging for Fast Stable Diffusion, CVPR 2023 workshops; the weights are
    those of Bolya et al., Token Merging, ICLR 2023, section 3.
    """

    summary: ClassVar[str] = "merge keys and values by similarity, weighed by their sizes; queries stay"
    source: ClassVar[str] = "tokred"
    example: ClassVar[Parameters] = {"ratio": 0.75, "cell": 2, "max_downsample": 8}

    ratio: float = 0.75
    cell: int = 4
    max_downsample: int = 2
    queries: bool = False
    choice: Literal["typical", "first", "random"] = "typical"
    seed: int = 0
    share: Share = "resolution"
    refresh: int = 1
    first_full: int = 0

    def __post_init__(self) -> None:
        check_ratio(self.ratio)
        for name in ("cell", "max_downsample"):
            check_count(getattr(self, name), name, 1)
        check_choice(self.choice, "choice", CHOICES)
        check_sharing(self.share, self.refresh, self.first_full)

    @property
    def part(self) -> Part:  # type: ignore[override]  # a parameter decides here
        """Keys and values, or whole tokens."""
        return "tokens" if self.queries else "kv"

    @property
    def proportional(self) -> bool:
        return True

    @property
    def reads(self) -> frozenset[str]:
        """The block's input, which is compared, and its grid."""
        return frozenset({"x", "grid"})

    @property
    def idle(self) -> bool:
        """Nothing is merged at ratio 0, or where every token is a destination."""
        return self.ratio == 0 or self.cell == 1

    @property
    def advice(self) -> str:
        return f"max_downsample is {self.max_downsample}: give a larger one"

    def left(self, place: SublayerPlace) -> int:
        """``N`` less ``int(N * ratio)``, at least one a cell."""
        r = int(place.length * self.ratio)
        if r == 0 or self.idle or place.factor > self.max_downsample:
            return place.length
        rows, columns = check_cells(place.grid, self._fitted(place))
        return max(place.length - r, rows * columns)

    def _fitted(self, place: SublayerPlace) -> tuple[int, int]:
        return min(self.cell, place.grid[0]), min(self.cell, place.grid[1])

    def reduce(self, site: Site) -> Reduction:
        """Match every source with its most similar destination, and merge the most similar ones."""
        site = self.site(site)
        b, n = site.shape
        r = n - self.left(site.place)
        if r == 0:
            return Reduction.identity((b,), n, site.device)
        cell = self._fitted(site.place)
        if self.choice == "typical":
            anyone = torch.ones(b, n, dtype=torch.bool, device=site.device)
            return match_around(site.x, typical_tokens(site.x, site.grid, cell), anyone, n - r)
        rows, columns = check_cells(site.grid, cell)
        offsets = None
        if self.choice == "random":
            offsets = (site.uniform(rows * columns, self.seed) * (cell[0] * cell[1])).to(torch.int64)
        return match_cells(site.x, *cell_destinations(site.grid, cell, offsets, site.device), r)
