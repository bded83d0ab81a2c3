"""The newest rows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from tokred.kv.parts import Score
from tokred.kv.site import CacheSite


@dataclass(frozen=True)
class Recency(Score):
    """The newer the better; with sinks this is StreamingLLM with true positions.

    Source: Xiao et al., StreamingLLM, ICLR 2024 (arXiv 2309.17453), the eviction alone.
    """

    name: ClassVar[str] = "recency"

    def __call__(self, site: CacheSite) -> Tensor:
        """The number of the token."""
        return site.token.double().expand(site.extent)
