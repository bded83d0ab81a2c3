"""KeyDiff: rows whose keys differ from the mean key stay."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor

from tokred.core.method import Parameters
from tokred.core.registry import register
from tokred.kv.parts import Score
from tokred.kv.preset import KVPreset
from tokred.kv.site import CacheSite


@dataclass(frozen=True)
class KeyDifference(Score):
    """Minus the cosine between a key and the mean of the normalised keys.

    Source: Park et al., KeyDiff, arXiv 2504.15364.
    """

    name: ClassVar[str] = "key_difference"

    def __call__(self, site: CacheSite) -> Tensor:
        """The mean is over real rows alone."""
        unit = F.normalize(site.k.float(), dim=-1)
        real = site.real
        if real is None:
            anchor = unit.mean(2, keepdim=True)
        else:
            weight = real.unsqueeze(-1).float()
            anchor = (unit * weight).sum(2, keepdim=True) / weight.sum(2, keepdim=True).clamp(min=1)
        return -(unit * F.normalize(anchor, dim=-1)).sum(-1)


@register("keydiff")
@dataclass(frozen=True)
class KeyDiff(KVPreset):
    """Distinctive keys; needs no query, and its paper's use is chunk by chunk under a limit of memory.

    Args:
        budget: what is kept: a share in (0, 1], tokens, bytes such as "64 MiB", or a budget of :mod:`tokred.kv`.
        turns: evict at the end of each chunk of a prompt and of later turns (the paper's use).

    Source: Park et al., KeyDiff, arXiv 2504.15364, section 3.
    """

    summary: ClassVar[str] = "rows whose keys differ most from the mean key"
    source: ClassVar[str] = "Park et al., 2025 (arXiv 2504.15364)"
    example: ClassVar[Parameters] = {"budget": 9, "turns": False}

    turns: bool = True

    def make_score(self) -> Score:
        return KeyDifference()
