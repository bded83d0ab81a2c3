"""EViT: keep the patches that the class token attends to, fuse the rest into one token."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch

from tokred.core.checks import check_blocks, check_blocks_exist, check_flags, check_share
from tokred.core.method import Parameters
from tokred.core.place import Place
from tokred.core.reduction import Reduction
from tokred.core.registry import register
from tokred.core.schedules import is_listed, kept_ceil
from tokred.core.selection import protected_rows, ranked
from tokred.core.site import Site
from tokred.encoder.method import BlockMethod
from tokred.encoder.padding import reduce_each


@register("evit")
@dataclass(frozen=True)
class EViT(BlockMethod):
    """Expediting vision transformers via token reorganisation.

    Args:
        kappa: share of the patches that each listed block keeps, in (0, 1].
        blocks: blocks that reduce, 0-based. None: at a quarter, half and three quarters of the depth (3, 6, 9 of 12).
        fuse: replace the dropped patches by one token, the sum of them weighted by the class attention.
        normalise: divide that sum by the sum of its weights (ours; the authors leave it short).

    Source: Liang et al., Not All Patches Are What You Need, ICLR 2022, section 3.
    """

    summary: ClassVar[str] = "keep the patches the class token attends to, fuse the rest into one"
    source: ClassVar[str] = "Liang et al., ICLR 2022 (arXiv 2202.07800)"
    example: ClassVar[Parameters] = {"kappa": 0.6, "blocks": (1,)}
    nothing: ClassVar[Parameters | None] = {"kappa": 1.0}
    drops: ClassVar[bool] = True

    kappa: float = 0.7
    blocks: tuple[int, ...] | None = None
    fuse: bool = True
    normalise: bool = False

    def __post_init__(self) -> None:
        check_flags(fuse=self.fuse, normalise=self.normalise)
        check_share(self.kappa, "kappa (the kept share)")
        object.__setattr__(self, "blocks", check_blocks(self.blocks))

    @property
    def reads(self) -> frozenset[str]:
        """The tokens and the class token's attention."""
        return frozenset({"x", "class_attention"})

    def check(self, depth: int) -> None:
        """Every listed block must exist."""
        check_blocks_exist(self.blocks, depth)

    def tokens(self, n: int, place: Place) -> int:
        """Prefix, kept patches, and the fused token where something was dropped."""
        free = place.free(n)
        k = kept_ceil(free, self.kappa)
        if not is_listed(self.blocks, place.layer, place.depth) or k >= free:
            return n
        return n - free + k + (1 if self.fuse else 0)

    def reduce(self, site: Site) -> Reduction:
        """Rank the patches by class attention, keep the first, fuse or drop the others."""
        if site.mask is not None:
            return reduce_each(self, site, always=True)
        b, n = site.shape
        free = n - site.prefix - site.suffix
        k = kept_ceil(free, self.kappa)
        if k >= free:
            return Reduction.identity((b,), n, site.device)
        attention = site.class_attention
        order = ranked(attention[:, site.prefix : n - site.suffix].detach()) + site.prefix
        lead, tail = protected_rows(b, n, site.prefix, site.suffix, site.device)
        chosen, rest = order[:, :k], order[:, k:]
        if not self.fuse:
            return Reduction.keep(torch.cat([lead, chosen, tail], 1), n)
        # The fused token is represented by the most attended of the patches it is made of.
        target = torch.full_like(rest[:, 1:], site.prefix + k)
        weight = torch.ones_like(attention).scatter(1, rest, attention.gather(1, rest))
        if self.normalise:
            weight = weight.scatter(1, rest, (w := attention.gather(1, rest)) / w.sum(1, keepdim=True).clamp_min(1e-12))
        representative = torch.cat([lead, chosen, rest[:, :1], tail], 1)
        return Reduction(representative, rest[:, 1:], target, n, weight=weight, mode="sum")


def warm_up(step: int, target: float, *, start: int, total: int) -> float:
    """Keep share during training: 1 until ``start``, then a cosine down to ``target`` at ``start + total``.

    Args:
        step: iteration, counted from 0.
        target: keep share that training ends with.
        start: iterations that keep everything (10 epochs from scratch; 0 when fine-tuning).
        total: iterations of the descent (100 epochs from scratch; 0 when fine-tuning).

    Source: released code of EViT.
    """
    if step < start:
        return 1.0
    if total <= 0 or step >= start + total:
        return target
    return target + (1 - target) * (math.cos(math.pi * (step - start) / total) + 1) / 2
