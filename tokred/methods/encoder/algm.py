"""ALGM: merge uniform windows of the image in an early block, then pairs anywhere in a later one, above a threshold."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from tokred.core.checks import check_choice, check_count, check_flags
from tokred.core.matching import bipartite_uneven_matching
from tokred.core.method import Parameters
from tokred.core.place import Place
from tokred.core.ragged import bounds, pack, with_protected
from tokred.core.reduction import Reduction
from tokred.core.registry import register
from tokred.core.selection import ranked
from tokred.core.site import Site
from tokred.encoder.method import BlockMethod
from tokred.errors import MissingInputError
from tokred.kernels.similarity_rows import Windows, grid_regions, similarity_sum, unit


@register("algm")
@dataclass(frozen=True)
class ALGM(BlockMethod):
    """Adaptive local-then-global merging.

    In ``local_block`` the grid of patches is cut into windows of ``k x k``; a window whose tokens have a mean cosine to
    each other of ``T`` or more becomes one token. In ``global_block`` tokens are paired as :class:`tokred.ToMe` pairs
    them, and every pair of a similarity of ``theta`` or more merges. Both compare the tokens after attention.

    Args:
        T: threshold of the windows: 0.88 for ViT-S on ADE20k, 0.9 to 0.955 for other models and data. Above 1 no window
            merges.
        k: side of a window. What is left of a grid beyond its whole windows stays as it is (ours; the authors need
            grids that divide).
        theta: threshold of the pairs. None: mean plus standard deviation divided by the number of the block, counted
            from 1, both of the best scores of the sources. Above 1 no pair merges.
        local_block: block of the first step, 0-based.
        global_block: block of the second step, 0-based. None: 4 of 12 blocks and 6 of 24, as published, and 2 + depth /
            6 between and beyond (ours).
        count: ``"image"`` merges in each image what is above the threshold (ours); ``"batch"`` as many in all of them,
            the smallest number of any, with ``theta`` from the mean over the batch, as the authors do: an image's
            result then depends on its batch-mates.
        prop_attn: proportional attention. Off, as in the published results: the released code has the option but never
            adds the sizes.

    Source: Norouzi et al., ALGM: Adaptive Local-then-Global Token Merging for Efficient Semantic Segmentation with
    Plain Vision Transformers, CVPR 2024, section 3, and its released code.
    """

    summary: ClassVar[str] = "merge uniform windows early, then similar pairs anywhere, above thresholds"
    source: ClassVar[str] = "Norouzi et al., CVPR 2024 (arXiv 2406.09936)"
    example: ClassVar[Parameters] = {"T": 0.0, "theta": 0.3}
    nothing: ClassVar[Parameters | None] = {"T": 2, "theta": 2}
    uneven: ClassVar[bool] = True

    T: float = 0.88
    k: int = 2
    theta: float | None = None
    local_block: int = 0
    global_block: int | None = None
    count: Literal["image", "batch"] = "image"
    prop_attn: bool = False

    def __post_init__(self) -> None:
        check_flags(prop_attn=self.prop_attn)
        for name in ("T", "theta"):
            value = getattr(self, name)
            number = isinstance(value, int | float) and not isinstance(value, bool) and not math.isnan(value)
            if not number and not (name == "theta" and value is None):
                raise ValueError(f"{name} must be a number, got {value!r}")
        for name, low in (("k", 2), ("local_block", 0), ("global_block", 1)):
            value = getattr(self, name)
            if not (name == "global_block" and value is None):
                check_count(value, name, low)
        if self.global_block is not None and self.global_block <= self.local_block:
            raise ValueError(f"global_block must lie behind local_block {self.local_block}, got {self.global_block}")
        check_choice(self.count, "count", ("image", "batch"))

    @property
    def reads(self) -> frozenset[str]:
        """The tokens and the grid of their patches."""
        return frozenset({"x", "grid"})

    @property
    def proportional(self) -> bool:
        return self.prop_attn

    def check(self, depth: int) -> None:
        """Both blocks must exist, the local one before the global one."""
        for name, block in (("local_block", self.local_block), ("global_block", self.global_block)):
            if block is not None and block >= depth:
                raise ValueError(f"{name} is {block}, but the model has {depth} blocks (0 to {depth - 1})")
        if self.local_block >= self._global(depth) and depth > 1:
            raise ValueError(
                f"local_block is {self.local_block}, but of {depth} blocks {self._global(depth)} is the global one: "
                "give a smaller local_block, or global_block"
            )

    def tokens(self, n: int, place: Place) -> int:
        """At most ``n``: how many merge depends on the image."""
        return n

    def acts(self, n: int, place: Place) -> bool:
        """True in its two blocks, where a threshold can be reached."""
        if place.layer == self.local_block:
            return self.T <= 1
        return place.layer == self._global(place.depth) and (self.theta is None or self.theta <= 1)

    def reduce(self, site: Site) -> Reduction:
        """Windows in the first of the two blocks, pairs in the second."""
        if site.layer == self.local_block:
            return self._windows(site)
        return bipartite_uneven_matching(
            site.x.detach(),
            lambda score: self._pairs(score, site.layer),
            prefix=site.prefix,
            suffix=site.suffix,
            mask=site.mask,
        )

    def _global(self, depth: int) -> int:
        return self.global_block if self.global_block is not None else min(2 + depth // 6, depth - 1)

    def _windows(self, site: Site) -> Reduction:
        """Merged windows by falling similarity, then what has not merged, in the order of the image."""
        b, n = site.shape
        h, w = site.grid
        free = n - site.prefix - site.suffix
        if h * w != free:
            raise MissingInputError(f"{free} tokens are not a grid of {h} x {w}, whose windows local_block merges")
        place = torch.arange(free, device=site.device).expand(b, -1)
        cells = whole_windows(h, w, self.k, site.device)
        same = Reduction.identity((b,), n, site.device)
        if cells.shape[0] == 0:
            return same
        real = None if site.mask is None else site.mask[:, site.prefix : n - site.suffix]
        with torch.no_grad():
            mean = window_similarity(site.x[:, site.prefix : n - site.suffix].detach(), cells)
            if real is not None:
                mean = mean.masked_fill(~real[:, cells].all(-1), -torch.inf)
            number = (mean >= self.T).sum(1)
            if self.count == "batch":
                number = number.min().expand_as(number)
            low, high = bounds(number, cells.shape[0])
            if high == 0:
                return same
            first = cells[ranked(mean)[:, :high]]  # [B, high, k * k]
            merges = place[:, :high] < number.unsqueeze(1)
            gone = torch.zeros_like(place, dtype=torch.bool)
            gone = gone.scatter(1, first.flatten(1), merges.unsqueeze(-1).expand_as(first).flatten(1))
            rows = torch.cat([first[..., -1], place], 1)
            stays = torch.cat([merges, ~gone if real is None else ~gone & real], 1)
            lost = self.k * self.k - 1
            known = (free - high * lost, free - low * lost) if real is None else None
            rows, mask = pack(rows, stays, known, most=free)
            source = first[..., :-1]
            target = torch.where(merges, place[:, :high] + site.prefix, -1).unsqueeze(-1).expand_as(source).flatten(1)
        representative, mask = with_protected(rows + site.prefix, mask, n, site.prefix, site.suffix)
        source = source.flatten(1) + site.prefix
        return Reduction(representative, source, target, n, mask=mask, complete=low == high)

    def _pairs(self, score: Tensor, layer: int) -> Tensor:
        """``(B,)`` how many sources reach the threshold."""
        if self.theta is None:
            real = score > -torch.inf
            mean, deviation = _moments(score, real)
            if self.count == "batch":
                mean, deviation = mean.mean().expand_as(mean), deviation.mean().expand_as(mean)
            reached = score >= (mean + deviation / (layer + 1)).unsqueeze(1)
        else:
            reached = score >= self.theta
        number = reached.sum(1)
        return number.min().expand_as(number) if self.count == "batch" else number


def whole_windows(h: int, w: int, k: int, device: torch.device | str | None = None) -> Tensor:
    """``(W, k * k)`` int64: the patches of each window that lies in an ``h x w`` grid completely, row by row."""
    if min(h, w) < k:
        return torch.empty(0, k * k, dtype=torch.int64, device=device)
    cells = grid_regions(h, w, (k, k), device=device).a
    return cells.view(-(-h // k), -(-w // k), k * k)[: h // k, : w // k].flatten(0, 1)


def window_similarity(x: Tensor, cells: Tensor) -> Tensor:
    """The mean cosine between different tokens of each window.

    Args:
        x: ``(B, T, C)`` patches.
        cells: ``(W, k * k)`` positions.

    Returns:
        ``(B, W)`` float32.
    """
    members = cells.shape[1]
    windows = Windows(cells, cells, padded=False)
    total = similarity_sum(x, x, function="identity", windows=windows).sum(-1)
    own = unit(x).square().sum(-1)[:, cells].sum(-1)  # one for each token, but nothing for a zero one
    return ((total - own) / (members * (members - 1))).float()


def _moments(score: Tensor, real: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation (with Bessel's correction) of the real scores of each row, ``(B,)`` float64 each.

    In float64, so that padding behind the real ones cannot move a threshold past a score.
    """
    found = torch.where(real, score, 0).double()
    number = real.sum(1)
    mean = found.sum(1) / number.clamp_min(1)
    squares = torch.where(real, found - mean.unsqueeze(1), 0).square().sum(1)
    return mean, (squares / (number - 1).clamp_min(1)).sqrt()
