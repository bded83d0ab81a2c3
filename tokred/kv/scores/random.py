"""A random score: what every other has to beat."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from tokred.core.selection import hash_uniform
from tokred.kv.parts import Score
from tokred.kv.site import CacheSite


@dataclass(frozen=True)
class Random(Score):
    """Numbers that depend on seed, layer and token alone: the same for all heads and samples, at every step.

    Args:
        seed: which random choice.
    """

    name: ClassVar[str] = "random"

    seed: int = 0

    def __call__(self, site: CacheSite) -> Tensor:
        """Uniform in [0, 1)."""
        drawn = hash_uniform(site.seen, self.seed, site.layer, device=site.device).float()
        return drawn[site.token.clamp(max=site.seen - 1)].expand(site.extent)
