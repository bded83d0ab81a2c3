"""TokenTM as a pruning score: class attention times what the layer makes of each token."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from tokred.core.checks import check_blocks, check_blocks_exist, check_flags, check_share
from tokred.core.method import Parameters
from tokred.core.place import Place
from tokred.core.reduction import Reduction
from tokred.core.registry import register
from tokred.core.schedules import is_listed, kept_ceil
from tokred.core.selection import highest, protected_rows
from tokred.core.site import Site
from tokred.encoder.importance import tokentm_score
from tokred.encoder.method import BlockMethod


@register("tokentm")
@dataclass(frozen=True)
class TokenTMPrune(BlockMethod):
    """Keep the patches whose class attention times transformation weight is highest.

    The paper explains what a model looked at; to prune by its weights, layer by layer and without the roll-out through
    the layers before, is ours.

    Args:
        keep: share of the patches that each listed block keeps, in (0, 1].
        blocks: blocks that reduce, 0-based. None: at a quarter, half and three quarters of the depth (3, 6, 9 of 12).
        length_only: weigh by the change of length alone.
        direction_only: weigh by the change of direction alone.

    Source: Wu et al., Token Transformation Matters, CVPR 2024 (arXiv 2403.14552); its use for pruning is ours.
    """

    summary: ClassVar[str] = "keep the patches with the highest class attention times token transformation"
    source: ClassVar[str] = "Wu et al., CVPR 2024 (arXiv 2403.14552); its use for pruning is ours"
    example: ClassVar[Parameters] = {"keep": 0.6, "blocks": (1,)}
    nothing: ClassVar[Parameters | None] = {"keep": 1.0}
    drops: ClassVar[bool] = True

    keep: float = 0.7
    blocks: tuple[int, ...] | None = None
    length_only: bool = False
    direction_only: bool = False

    def __post_init__(self) -> None:
        check_flags(length_only=self.length_only, direction_only=self.direction_only)
        check_share(self.keep, "keep (the kept share)")
        object.__setattr__(self, "blocks", check_blocks(self.blocks))
        if self.length_only and self.direction_only:
            raise ValueError("length_only and direction_only exclude each other: nothing would be left of the weight")

    @property
    def reads(self) -> frozenset[str]:
        """The tokens, the class token's attention, and what the layer makes of each token alone."""
        return frozenset({"x", "class_attention", "transform"})

    def check(self, depth: int) -> None:
        """Every listed block must exist."""
        check_blocks_exist(self.blocks, depth)

    def tokens(self, n: int, place: Place) -> int:
        """Protected tokens, and ``ceil(keep * T)`` of the ``T`` patches."""
        free = place.free(n)
        return n - free + kept_ceil(free, self.keep) if is_listed(self.blocks, place.layer, place.depth) else n

    def reduce(self, site: Site) -> Reduction:
        """Score, keep the highest in their order."""
        b, n = site.shape
        free = n - site.prefix - site.suffix
        k = kept_ceil(free, self.keep)
        if k == free:
            return Reduction.identity((b,), n, site.device)
        with torch.no_grad():
            scores = tokentm_score(site, length_only=self.length_only, direction_only=self.direction_only)
            lead, tail = protected_rows(b, n, site.prefix, site.suffix, site.device)
            if site.mask is None:
                rows, _ = highest(scores, k)
                return Reduction.keep(torch.cat([lead, rows + site.prefix, tail], 1), n)
            # Each sample keeps the share of its own tokens.
            real = site.mask[:, site.prefix : n - site.suffix]
            count = (real.sum(1, keepdim=True).double() * self.keep).round(decimals=9).ceil().long()
            rows, alive = highest(scores.masked_fill(~real, -torch.inf), k, count)
            assert alive is not None  # a count was given
            kept = torch.cat([lead, rows + site.prefix, tail], 1)
            mask = torch.cat([site.mask[:, : site.prefix], alive, site.mask[:, n - site.suffix :]], 1)
        return Reduction.keep(kept, n, mask=mask)
