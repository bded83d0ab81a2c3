"""PPT: at a few blocks decide, image by image, whether to prune unimportant tokens or to merge similar ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from tokred.core.checks import check_blocks, check_blocks_exist, check_choice, check_flags
from tokred.core.matching import bipartite_soft_matching, mergeable, without_padding
from tokred.core.method import Parameters
from tokred.core.place import Place
from tokred.core.reduction import Reduction
from tokred.core.registry import register
from tokred.core.schedules import ScheduleLike, is_listed, schedule
from tokred.core.selection import protected_rows, ranked
from tokred.core.site import Site
from tokred.encoder.importance import class_value
from tokred.encoder.method import BlockMethod
from tokred.encoder.metric import METRICS, Metric, read_metric
from tokred.encoder.padding import reduce_each

THRESHOLD = 7e-5
# The same switch for any number of tokens: the published one was set at 196 patches.
RELATIVE_THRESHOLD = 196**2 * THRESHOLD


@register("ppt")
@dataclass(frozen=True)
class PPT(BlockMethod):
    """Token pruning and pooling.

    Patches are scored by class attention times value norm. Where the scores of an image spread widely the ranking can
    be trusted to name empty tokens, and its last ``r`` are pruned; where they are flat no token is clearly useless, but
    many are alike, and ``r`` pairs are merged as in :class:`tokred.ToMe`. Both leave ``n - r`` tokens, so both plans
    are made for the whole batch and one of them is chosen per image, without a word from the device to the host.

    Args:
        r: tokens removed in each listed block: an integer, a pair ``(r, inflect)``, or a list with one entry for every
            block of the model, listed or not. Capped at half of the unprotected tokens of a block.
        threshold: variance of the scores from which on an image is pruned; 0 prunes always, ``inf`` pools always. None:
            7e-5, the authors' for DeiT-S off the shelf (6e-5 for fine-tuning), or with ``relative`` 2.69.
        blocks: blocks that reduce, 0-based. None: at a quarter, half and three quarters of the depth (3, 6, 9 of 12).
        relative: compare the variance times the square of the number of patches, which stays as tokens go (ours; the
            plain variance grows as there are fewer, so that later blocks prune more easily).
        route: ``"image"`` decides for every image; ``"batch"`` once for the whole batch, by the mean of the images'
            variances (ours; an image's result then depends on its batch-mates).
        sort: pruned images keep their tokens in the order of the sequence (ours) instead of that of the scores, which
            decides what a later block pairs.
        prop_attn: proportional attention.
        metric: what is compared when merging.

    Source: Wu et al., PPT: Token Pruning and Pooling for Efficient Vision Transformers, 2023, section 3.
    """

    summary: ClassVar[str] = "per image, prune unimportant tokens or merge similar ones"
    source: ClassVar[str] = "Wu et al., 2023 (arXiv 2310.01812)"
    example: ClassVar[Parameters] = {"r": 4}
    nothing: ClassVar[Parameters | None] = {"r": 0}
    drops: ClassVar[bool] = True

    r: ScheduleLike = 50
    threshold: float | None = None
    blocks: tuple[int, ...] | None = None
    relative: bool = False
    route: Literal["image", "batch"] = "image"
    sort: bool = False
    prop_attn: bool = True
    metric: Metric = "k"

    def __post_init__(self) -> None:
        check_flags(relative=self.relative, sort=self.sort, prop_attn=self.prop_attn)
        object.__setattr__(self, "r", schedule(self.r))
        object.__setattr__(self, "blocks", check_blocks(self.blocks))
        number = isinstance(self.threshold, int | float) and not isinstance(self.threshold, bool)
        if self.threshold is not None and not (number and self.threshold >= 0):
            raise ValueError(f"threshold must be a number of at least 0, or None, got {self.threshold!r}")
        check_choice(self.route, "route", ("image", "batch"))
        check_choice(self.metric, "metric", METRICS)

    @property
    def reads(self) -> frozenset[str]:
        """The tokens, what scores them, and what is compared."""
        return frozenset({"x", "class_attention", "v", self.metric})

    @property
    def proportional(self) -> bool:
        return self.prop_attn

    def check(self, depth: int) -> None:
        """A list may not be longer than the model is deep, and every listed block must exist."""
        schedule(self.r).check(depth)
        check_blocks_exist(self.blocks, depth)

    def tokens(self, n: int, place: Place) -> int:
        """``n`` less this layer's ``r``, capped, in a listed block."""
        if not is_listed(self.blocks, place.layer, place.depth):
            return n
        return n - min(schedule(self.r).at(place.layer, place.depth), mergeable(n, place.prefix, place.suffix))

    def reduce(self, site: Site) -> Reduction:
        """Score the patches, make both plans, choose one for each image."""
        if site.mask is not None and self.route == "image":
            return reduce_each(self, site, always=True)
        b, n = site.shape
        r = min(schedule(self.r).at(site.layer, site.depth), mergeable(n, site.prefix, site.suffix))
        if r == 0:
            return Reduction.identity((b,), n, site.device)
        pooled = bipartite_soft_matching(
            read_metric(site, self.metric), r, prefix=site.prefix, suffix=site.suffix, mask=site.mask
        )
        real = None if site.mask is None else site.mask[:, site.prefix : n - site.suffix]
        with torch.no_grad():
            scores = class_value(site)
            prune = self.prunes(scores, real).unsqueeze(1)
            # Padding goes before any real token.
            order = ranked(scores if real is None else scores.masked_fill(~real, -1))
            kept = order[:, : order.shape[1] - r] + site.prefix
            if self.sort:
                kept = kept.sort(dim=1).values
            lead, tail = protected_rows(b, n, site.prefix, site.suffix, site.device)
            representative = torch.where(prune, torch.cat([lead, kept, tail], 1), pooled.representative)
            target = pooled.target.masked_fill(prune, -1)
        return without_padding(Reduction(representative, pooled.source, target, n), site.mask)

    def prunes(self, scores: Tensor, real: Tensor | None = None) -> Tensor:
        """The decision of each image: True prunes, False pools.

        Args:
            scores: ``(B, T)`` float32 scores of the patches, each row one in sum; not half precision, in which the
                variance lies at the edge of the normal numbers.
            real: ``(B, T)`` bool, False on padding, or None.

        Returns:
            ``(B,)`` bool.
        """
        if real is None:
            count = torch.full_like(scores[:, 0], scores.shape[1])
            variance = scores.var(dim=1) if scores.numel() else count
        else:
            count = real.sum(1).float()
            apart = (scores - 1 / count.clamp_min(1).unsqueeze(1)).masked_fill(~real, 0)
            variance = apart.square().sum(1) / (count - 1).clamp_min(1)
        spread = variance * count.square() if self.relative else variance
        if self.route == "batch":
            spread = spread.mean(0, keepdim=True).expand_as(spread)
        limit = self.threshold
        if limit is None:
            limit = RELATIVE_THRESHOLD if self.relative else THRESHOLD
        return spread >= limit
