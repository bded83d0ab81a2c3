"""Random eviction: what any choice has to beat."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from tokred.core.registry import register
from tokred.core.selection import hash_uniform
from tokred.kv.parts import Score
from tokred.kv.preset import KVPreset
from tokred.kv.site import CacheSite


@dataclass(frozen=True)
class Random(Score):
    """Numbers that depend on seed, layer and token alone: the same for all heads and samples, at every step.

    Args:
        seed: which random choice.
    """

    name: ClassVar[str] = "random"
    ordered: ClassVar[bool] = False

    seed: int = 0

    def __call__(self, site: CacheSite) -> Tensor:
        """Uniform in [0, 1)."""
        drawn = hash_uniform(site.seen, self.seed, site.layer, device=site.device).float()
        return drawn[site.token.clamp(max=site.seen - 1)].expand(site.extent)


@register("random_evict")
@dataclass(frozen=True)
class RandomEvict(KVPreset):
    """Random rows stay, the same for all heads and samples.

    Args:
        budget: what is kept: a share in (0, 1], tokens, bytes such as "64 MiB", or a budget of :mod:`tokred.kv`.
        seed: which random choice.
        sinks, recent: first and newest tokens that stay.

    Source: baseline.
    """

    summary: ClassVar[str] = "random rows of the cache (the floor)"
    source: ClassVar[str] = "baseline"

    seed: int = 0
    sinks: int = 0
    recent: int = 1

    def make_score(self) -> Score:
        return Random(self.seed)
