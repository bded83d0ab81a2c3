"""LagKV: rows that stand out in the frame of the tokens that follow them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tokred.core.method import Parameters
from tokred.core.registry import register
from tokred.kv.parts import Score, check_count
from tokred.kv.preset import KVPreset
from tokred.kv.site import CacheSite


@dataclass(frozen=True)
class LagRelative(Score):
    """Keys and values, scaled by the next partition's extremes: rows that spread over the channels matter.

    A channel that is constant in the next partition scales to 0 (our reading; the reference divides by zero).

    Args:
        lag: tokens of a partition.
        sinks: first tokens, which are kept.
        cross_scoring: compare raw scores across partitions, instead of ranks within them.

    Source: LagKV, arXiv 2504.04704.
    """

    name: ClassVar[str] = "lag_relative"
    reads: ClassVar[frozenset[str]] = frozenset({"k", "v"})

    lag: int = 128
    sinks: int = 4
    cross_scoring: bool = False

    def __post_init__(self) -> None:
        check_count(self.lag, "lag", 1)
        check_count(self.sinks, "sinks")

    def __call__(self, site: CacheSite) -> Tensor:
        """Ones for sinks, the last partition and the remainder."""
        return site.alone(self._score, site.k, site.v)

    def _score(self, k: Tensor, v: Tensor) -> Tensor:
        n, s, lag = k.shape[2], self.sinks, self.lag
        score = torch.ones(k.shape[:3], device=k.device)
        if n < s + 2 * lag:
            position = torch.arange(n, device=k.device)
            ramp = (position / max(n - s, 1)).clamp(max=1.0)
            return score * torch.where(position < s, 1.0, ramp)
        parts = (n - s) // lag
        inside = slice(s, s + parts * lag)
        found = (_relative(k[:, :, inside], lag) + _relative(v[:, :, inside], lag)) / 2  # [B, Hk, P - 1, lag]
        if not self.cross_scoring:
            found = found.argsort(dim=-1, stable=True).argsort(dim=-1, stable=True) / lag
        score[:, :, s : s + (parts - 1) * lag] = found.flatten(2).float()
        return score


def _relative(x: Tensor, lag: int) -> Tensor:
    """``[B, Hk, P * lag, D]`` to the softmax over each of the first ``P - 1`` partitions."""
    b, heads, n, d = x.shape
    cut = x.float().reshape(b, heads, n // lag, lag, d)
    this, following = cut[:, :, :-1], cut[:, :, 1:]
    low, high = following.amin(3, keepdim=True), following.amax(3, keepdim=True)
    width = high - low
    scaled = torch.where(width > 0, (this - low) / torch.where(width > 0, width, 1.0), 0.0)
    return scaled.std(-1).softmax(-1)


@register("lagkv")
@dataclass(frozen=True)
class LagKV(KVPreset):
    """Keys and values, scaled by the extremes of the next partition; sinks and the last partitions stay.

    Args:
        budget: what is kept: a share in (0, 1], tokens, bytes such as "64 MiB", or a budget of :mod:`tokred.kv`.
        lag: tokens of a partition.
        sinks: first tokens, which stay.
        cross_scoring: compare scores across partitions, instead of ranks within them.

    Source: LagKV, arXiv 2504.04704, section 3.
    """

    summary: ClassVar[str] = "rows that stand out against the next partition"
    source: ClassVar[str] = "LagKV, 2025 (arXiv 2504.04704)"
    example: ClassVar[Parameters] = {"budget": 9, "lag": 4, "sinks": 2}

    lag: int = 128
    sinks: int = 4
    cross_scoring: bool = False

    def make_score(self) -> Score:
        return LagRelative(self.lag, self.sinks, self.cross_scoring)
