"""Zero-TPrune: page rank on the attention graph finds unimportant tokens, key similarity finds near-copies."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from tokred.core.checks import check_blocks, check_blocks_exist, check_choice, check_count, check_number, check_share
from tokred.core.method import Parameters
from tokred.core.place import Place
from tokred.core.reduction import Reduction
from tokred.core.registry import register
from tokred.core.schedules import kept_ceil
from tokred.core.selection import highest, protected_rows, ranked
from tokred.core.site import Site
from tokred.encoder.method import BlockMethod, Where
from tokred.encoder.metric import head_mean
from tokred.kernels.gather_rows import gather_rows
from tokred.kernels.similarity_rows import best_match

# Blocks 1, 3, 6, 9 and 11 of 12, counted from 1, as shares of the depth.
PLACES = (0.0, 2 / 12, 5 / 12, 8 / 12, 10 / 12)


@register("zero_tprune")
@dataclass(frozen=True)
class ZeroTPrune(BlockMethod):
    """Zero-shot pruning by the attention graph.

    After each listed block: rank the patches by one round of votes (I'), drop the ``r_s`` of the less important half
    that have the nearest copy in the other half (S), rank the survivors again by page rank and keep the share ``rho``
    (I). The released settings are not known: retention, places and ``r_s`` are recollections and choices of ours, as is
    the scale to which the head filter's thresholds refer.

    Args:
        blocks: blocks followed by a pruning layer, 0-based. None: 0, 2, 5, 8 and 10 of 12, by share of other depths; in
            a shallow model, where several fall on one block, the lowest ``rho`` and the highest ``r_s`` count.
        rho: share of the survivors that the I stage keeps, in (0, 1]; one number, or one per listed block.
        r_s: patches that the S stage drops, at most half of them; one number, or one per listed block.
        T: rounds of the I stage in the first, the middle and the last third of the model.
        T_prime: rounds of the I' stage.
        v_min, v_max: heads whose patch scores, scaled to mean 1, have a variance outside these bounds are not counted.
        cls_boost: what the class token starts with, where a patch starts with 1. None: the root of the number of
            tokens. Without a class token all start alike.
        heads: keys that are compared: ``"concat"``, those of all heads side by side, or their ``"mean"``.
        tolerance: a head's page rank is settled when a round changes it by less, summed over the tokens; 0: never. On a
            CPU rounds after the last head has settled are not run; elsewhere looking would wait for the device, so
            they are run and not used. Results are the same.

    Source: Wang, Dedhia and Jha, Zero-TPrune, CVPR 2024, section 3; our reading where it leaves things open.
    """

    summary: ClassVar[str] = "drop near-copies among the unimportant, then what page rank on attention finds least"
    source: ClassVar[str] = "Wang et al., CVPR 2024 (arXiv 2305.17328)"
    example: ClassVar[Parameters] = {"blocks": (1,), "rho": 0.6, "r_s": 2}
    nothing: ClassVar[Parameters | None] = {"rho": 1.0, "r_s": 0}
    drops: ClassVar[bool] = True
    where: ClassVar[Where] = "end"

    blocks: tuple[int, ...] | None = None
    rho: float | tuple[float, ...] = (1.0, 0.9, 0.8, 0.7, 1.0)
    r_s: int | tuple[int, ...] = 10
    T: tuple[int, int, int] = (30, 5, 1)
    T_prime: int = 1
    v_min: float = 0.01
    v_max: float = 0.7
    cls_boost: float | None = None
    heads: Literal["concat", "mean"] = "concat"
    tolerance: float = 1e-4

    def __post_init__(self) -> None:
        object.__setattr__(self, "blocks", check_blocks(self.blocks))
        count = len(PLACES if self.blocks is None else self.blocks)
        for name in ("rho", "r_s"):
            value = getattr(self, name)
            values = tuple(value) if isinstance(value, Sequence) and not isinstance(value, str) else value
            object.__setattr__(self, name, values)
            if isinstance(values, tuple) and len(values) != count:
                raise ValueError(f"{name} has {len(values)} entries for {count} blocks; give one number, or one each")
        for share in self.rho if isinstance(self.rho, tuple) else (self.rho,):
            check_share(share, "rho (the kept share)")
        for r in self.r_s if isinstance(self.r_s, tuple) else (self.r_s,):
            check_count(r, "r_s")
        if isinstance(self.T, str) or not isinstance(self.T, Sequence) or len(self.T) != 3:
            raise ValueError(f"T must be three numbers (first, middle and last third of the model), got {self.T!r}")
        object.__setattr__(self, "T", tuple(self.T))
        for rounds in (*self.T, self.T_prime):
            check_count(rounds, "T and T_prime", 1)
        for name in ("v_min", "v_max", "tolerance"):
            check_number(getattr(self, name), name)
        if self.cls_boost is not None:
            check_number(self.cls_boost, "cls_boost")
        if not 0 <= self.v_min <= self.v_max:
            raise ValueError(f"v_min and v_max must be 0 <= v_min <= v_max, got {self.v_min!r} and {self.v_max!r}")
        if self.cls_boost is not None and not 0 < self.cls_boost < math.inf:
            raise ValueError(f"cls_boost must be a positive number or None, got {self.cls_boost!r}")
        check_choice(self.heads, "heads", ("concat", "mean"))
        if not 0 <= self.tolerance < math.inf:
            raise ValueError(f"tolerance must not be negative, got {self.tolerance!r}")

    @property
    def reads(self) -> frozenset[str]:
        """The tokens, the attention's columns, and the keys."""
        return frozenset({"x", "k", "attention"})

    def check(self, depth: int) -> None:
        """Every listed block must exist."""
        check_blocks_exist(self.blocks, depth)

    def stages(self, layer: int, depth: int) -> tuple[float, int]:
        """``rho`` and ``r_s`` after this block; 1 and 0 where no pruning layer follows it."""
        places = self.blocks if self.blocks is not None else tuple(round(depth * p) for p in PLACES if depth > 1)
        at = [i for i, place in enumerate(places) if place == layer]
        if not at:
            return 1.0, 0
        rho = min(self.rho[i] for i in at) if isinstance(self.rho, tuple) else self.rho
        return rho, max(self.r_s[i] for i in at) if isinstance(self.r_s, tuple) else self.r_s

    def tokens(self, n: int, place: Place) -> int:
        """Protected tokens, and ``ceil(rho * (patches - r_s))``."""
        rho, r = self.stages(place.layer, place.depth)
        free = place.free(n)
        return n - free + kept_ceil(free - min(r, free // 2), rho)

    def reduce(self, site: Site) -> Reduction:
        """Drop near-copies, then the least important of the survivors; what stays keeps its order."""
        b, n = site.shape
        free = n - site.prefix - site.suffix
        rho, r = self.stages(site.layer, site.depth)
        r = min(r, free // 2)
        if kept_ceil(free - r, rho) == free:
            return Reduction.identity((b,), n, site.device)
        mask = site.mask
        real = None if mask is None else mask[:, site.prefix : n - site.suffix]
        with torch.no_grad():
            lead, tail = protected_rows(b, n, site.prefix, site.suffix, site.device)
            count = None if real is None else real.sum(1, keepdim=True)
            rows, alive = torch.arange(free, device=site.device).expand(b, -1), real
            if r:
                drawn = self.importances(site, self.T_prime)
                stays = self._distinct(site, drawn if real is None else drawn.masked_fill(~real, -torch.inf), r, count)
                if real is not None and count is not None:
                    stays, count = stays & real, count - (count // 2).clamp(max=r)
                rows, alive = highest(stays.int(), free - r, count)
            if rho < 1:
                part = site
                if r:
                    everyone = torch.cat([lead, rows + site.prefix, tail], 1)
                    part = site.among(everyone, _with_protected(mask, alive, site.prefix, n - site.suffix))
                least = self.importances(part, self.T[3 * site.layer // max(site.depth, 1)])
                if alive is not None and count is not None:
                    least = least.masked_fill(~alive, -torch.inf)
                    count = (count.double() * rho).round(decimals=9).ceil().long()
                chosen, alive = highest(least, kept_ceil(free - r, rho), count)
                rows = rows.gather(1, chosen)
            kept = torch.cat([lead, rows + site.prefix, tail], 1)
        return Reduction.keep(kept, n, mask=_with_protected(mask, alive, site.prefix, n - site.suffix))

    def importances(self, site: Site, rounds: int) -> Tensor:
        """``(B, T)`` importance of the unprotected tokens after so many rounds of votes; zero on padding.

        A token counts for as much as the tokens that attend to it: ``s <- A^T s``, as the paper's algorithm has it (the
        element form printed there transposes it).
        """
        free = slice(site.prefix, site.shape[1] - site.suffix)
        scores = site.attention.power(self.start(site), rounds, tolerance=self.tolerance)[..., free]
        return emphasise(scores, self.v_min, self.v_max, None if site.mask is None else site.mask[:, free])

    def start(self, site: Site) -> Tensor:
        """``(B, N)`` what the tokens start with, one in sum: all alike, the class token more."""
        b, n = site.shape
        start = torch.ones(b, n, device=site.device) if site.mask is None else site.mask.float()
        if site.class_token:
            start[:, 0] = start.sum(1).sqrt() if self.cls_boost is None else self.cls_boost
        return start / start.sum(1, keepdim=True).clamp_min(1e-12)

    def _distinct(self, site: Site, importance: Tensor, r: int, count: Tensor | None) -> Tensor:
        """``(B, T)`` bool: False for the ``r`` of the less important half that have the nearest copy in the other half.

        With ``count``, the number ``(B, 1)`` of real tokens, at most half of those; padding has the lowest importance.
        """
        free = slice(site.prefix, site.shape[1] - site.suffix)
        keys = (head_mean(site.k) if self.heads == "mean" else site.k.transpose(1, 2).flatten(2))[:, free]
        order = ranked(importance)
        t = order.shape[1]
        if count is None:
            upper, lower = order[:, : t - t // 2], order[:, t - t // 2 :].sort(dim=1).values
            score = best_match(gather_rows(keys, lower), gather_rows(keys, upper)).score
            return torch.ones_like(order, dtype=torch.bool).scatter(1, lower.gather(1, ranked(score)[:, :r]), 0)
        column = torch.arange(t, device=order.device).expand_as(order)
        place = torch.empty_like(order).scatter(1, order, column)
        middle = count - count // 2
        score = best_match(keys, keys, a_mask=(place >= middle) & (place < count), b_mask=place < middle).score
        return torch.empty_like(order, dtype=torch.bool).scatter(1, ranked(score), column >= (count // 2).clamp(max=r))


def emphasise(scores: Tensor, v_min: float, v_max: float, real: Tensor | None = None) -> Tensor:
    """One importance per token from those of the heads: the root mean square over heads that tell tokens apart.

    Args:
        scores: ``(B, H, T)``, not negative.
        v_min, v_max: a head counts if the variance of its scores, scaled to mean 1, lies between; if none does, all do.
        real: ``(B, T)`` bool, False on padding, which must score 0; None: all are real.

    Returns:
        ``(B, T)``.

    Source: Wang, Dedhia and Jha, Zero-TPrune, CVPR 2024, section 3.2 (EIR and VHF); the scale is ours.
    """
    weight = torch.ones_like(scores[:, :1]) if real is None else real.unsqueeze(1).to(scores.dtype)
    number = weight.sum(-1, keepdim=True).clamp_min(1)
    mean = scores.sum(-1, keepdim=True) / number
    relative = (scores / mean.clamp_min(1e-30) - 1).square() * weight
    variance = relative.sum(-1, keepdim=True) / number
    counted = (variance >= v_min) & (variance <= v_max)
    counted = counted | ~counted.any(1, keepdim=True)
    return ((scores.square() * counted).sum(1) / counted.sum(1)).sqrt()


def _with_protected(mask: Tensor | None, real: Tensor | None, prefix: int, end: int) -> Tensor | None:
    if mask is None or real is None:
        return None
    return torch.cat([mask[:, :prefix], real, mask[:, end:]], 1)
