"""How little a key resembles the mean key."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor

from tokred.kv.parts import Score
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
