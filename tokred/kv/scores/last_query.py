"""The last query alone, averaged over all heads of the layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from tokred.kv.parts import Score
from tokred.kv.site import CacheSite


@dataclass(frozen=True)
class LastQuery(Score):
    """Attention of the newest query on every row; all heads of a layer agree, and the newest token is kept.

    Source: Oren et al., Transformers are Multi-State RNNs (TOVA), arXiv 2401.06104.
    """

    name: ClassVar[str] = "last_query"
    reads: ClassVar[frozenset[str]] = frozenset({"q", "k"})

    @property
    def window(self) -> int:
        """One query."""
        return 1

    @property
    def recent(self) -> int:
        """Its own token."""
        return 1

    def __call__(self, site: CacheSite) -> Tensor:
        """The last row of the attention."""
        return site.columns(1).mean(1, keepdim=True).expand(site.extent)
