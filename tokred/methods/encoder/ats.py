"""ATS: sample tokens from the distribution of their scores: few where it is peaked, many where it is flat."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tokred.core.checks import check_blocks, check_blocks_exist
from tokred.core.method import Parameters
from tokred.core.place import Place
from tokred.core.ragged import pack, with_protected
from tokred.core.reduction import Reduction
from tokred.core.registry import register
from tokred.core.site import Site
from tokred.encoder.importance import class_value
from tokred.encoder.method import BlockMethod

FEWEST = 8  # tokens that a share leaves at least, as the authors' code has it
Number = int | float | None


@register("ats")
@dataclass(frozen=True)
class ATS(BlockMethod):
    """Adaptive token sampling.

    The scores (class attention times value norm) of an image's patches, in ascending order and summed up, are a
    distribution function. It is read at evenly spaced levels; every patch that a level falls on is kept, however often.
    Peaked scores collapse many levels on one patch, so that the number of tokens follows the image.

    The authors select rows of the attention matrix with their residual. Such a row still gathers from every token of
    its block, so selecting rows equals pruning between attention and MLP, which is where this method acts.

    Args:
        n: how many tokens a listed block leaves at most, protected ones included; without those it is the number of
            levels. None: as many as the model started with, which caps nothing: the count follows the scores alone. A
            share in (0, 1] counts from the tokens of the image at that block (at least 8). A list has one entry for
            every block of the model, listed or not.
        blocks: blocks that sample, 0-based. None: from a quarter of the depth on (3 to 11 of 12).

    Source: Fayyaz et al., Adaptive Token Sampling for Efficient Vision Transformers, ECCV 2022, section 3.
    """

    summary: ClassVar[str] = "sample tokens by the distribution of their scores, as many as the image needs"
    source: ClassVar[str] = "Fayyaz et al., ECCV 2022 (arXiv 2111.15667)"
    nothing: ClassVar[Parameters | None] = {"blocks": ()}
    drops: ClassVar[bool] = True
    uneven: ClassVar[bool] = True

    n: Number | Sequence[Number] = None
    blocks: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if isinstance(self.n, tuple | list):
            object.__setattr__(self, "n", tuple(_checked(v, f"n[{i}]") for i, v in enumerate(self.n)))
        else:
            _checked(self.n, "n")
        object.__setattr__(self, "blocks", check_blocks(self.blocks))

    @property
    def reads(self) -> frozenset[str]:
        """The tokens, and what scores them."""
        return frozenset({"x", "class_attention", "v"})

    def check(self, depth: int) -> None:
        """A list has one entry a block, and every listed block must exist."""
        if isinstance(self.n, tuple) and len(self.n) != depth:
            raise ValueError(f"n has {len(self.n)} entries, but the model has {depth} blocks")
        check_blocks_exist(self.blocks, depth)

    def tokens(self, n: int, place: Place) -> int:
        """At most so many: the cap, and in any case one less, since no level falls on the lowest score."""
        free = place.free(n)
        layer, depth = place.layer, place.depth
        listed = depth > 1 and layer >= round(depth / 4) if self.blocks is None else layer in self.blocks
        if not listed or free < 2:
            return n
        cap = self._at(layer)
        return place.protected + min(free - 1, _levels(n if cap is None else cap, n, place.protected))

    def _at(self, layer: int) -> Number:
        return self.n[layer] if isinstance(self.n, tuple) else self.n  # type: ignore[return-value]

    def reduce(self, site: Site) -> Reduction:
        """Score the patches, read their distribution at the levels, keep what they fall on in ascending score."""
        b, n = site.shape
        protected = site.prefix + site.suffix
        if n - protected < 2:
            return Reduction.identity((b,), n, site.device)
        real = None if site.mask is None else site.mask[:, site.prefix : n - site.suffix]
        cap = self._at(site.layer)
        with torch.no_grad():
            scores = class_value(site)
            most = _levels(site.length if cap is None else cap, n, protected)
            levels: int | Tensor = most
            if cap is None and site.totals is not None:
                levels = (site.totals - protected).clamp(min=1)
            if isinstance(cap, float) and real is not None:
                # A share of the image's own tokens: its batch-mates must not matter.
                own = (real.sum(1) + protected).double() * cap
                levels = (own.round().clamp(min=FEWEST) - protected).clamp(min=1).long()
            order, chosen = sample(scores, levels, most, real)
            rows, mask = pack(order + site.prefix, chosen, most=min(n - protected - 1, most))
            kept, mask = with_protected(rows, mask, n, site.prefix, site.suffix)
        return Reduction.keep(kept, n, mask=mask)


def sample(scores: Tensor, levels: int | Tensor, most: int, real: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Read the distribution of the scores at evenly spaced levels.

    With ``F`` the cumulative sum of the ascending scores, shifted and scaled to [0, 1], and ``f`` its smallest value
    above zero, the levels go from ``f`` to 1; each falls on the token with the nearest ``F`` (the lower one where two
    are as near). A single level is 1, so that the token with the top score is always chosen.

    Args:
        scores: ``(B, T)`` float32, not negative, each row one in sum.
        levels: how many levels, at least 1: for all samples, or ``(B,)`` int64.
        most: the largest of them.
        real: ``(B, T)`` bool, False on padding, which is never chosen and moves no level; or None.

    Returns:
        The tokens ``(B, T)`` int64 in ascending order of score (ties: lower position first; padding last), and which of
        them, in that order, are chosen, bool.
    """
    b, t = scores.shape
    order = (scores if real is None else scores.masked_fill(~real, torch.inf)).argsort(dim=1, stable=True)
    # Summed as integers, exactly: neither the order of summation nor the padding of a batch can move a level.
    mass = ((scores if real is None else scores.masked_fill(~real, 0)) * 2.0**60).long().gather(1, order).cumsum(1)
    mass = mass - mass[:, :1]
    f = mass.float() / mass[:, -1:].clamp_min(1).float()
    if real is not None:
        real = real.gather(1, order)
        f = f.masked_fill(~real, torch.inf)
    first = f.masked_fill(f <= 0, torch.inf).amin(1, keepdim=True).clamp(max=1)

    count = torch.full_like(order[:, :1], levels) if isinstance(levels, int) else levels.unsqueeze(1)
    step = torch.arange(most, device=scores.device).expand(b, -1)
    # A single level is 1, and levels beyond a sample's last repeat it.
    share = torch.where(step + 1 < count, step / (count - 1).clamp_min(1), 1.0).to(f.dtype)
    y = torch.lerp(first, torch.ones_like(first), share)

    # The two neighbours of each level in F, instead of its distance to every token.
    above = torch.searchsorted(f, y).clamp(max=t - 1)
    below = (above - 1).clamp(min=0)
    pick = torch.where(y - f.gather(1, below) <= f.gather(1, above) - y, below, above)
    pick = torch.searchsorted(f, f.gather(1, pick)).clamp(max=t - 1)  # the first among equals
    chosen = torch.zeros_like(order, dtype=torch.bool).scatter(1, pick, 1)
    return order, chosen if real is None else chosen & real


def _levels(cap: int | float, n: int, protected: int) -> int:
    """Levels of a cap: what it leaves beside the protected tokens; a share counts from ``n``."""
    total = max(FEWEST, round(cap * n)) if isinstance(cap, float) else cap
    return max(1, total - protected)


def _checked(value: object, name: str) -> Number:
    if value is None or (isinstance(value, int) and not isinstance(value, bool) and value >= 2):
        return value
    if isinstance(value, float) and 0 < value <= 1:
        return value
    raise ValueError(f"{name} must be None, an integer of at least 2, or a share (a float) in (0, 1], got {value!r}")
