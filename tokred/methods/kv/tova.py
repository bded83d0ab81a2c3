"""TOVA: the last query decides, at every step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from tokred.core.registry import register
from tokred.kv.parts import Score
from tokred.kv.preset import KVPreset
from tokred.kv.site import CacheSite


@dataclass(frozen=True)
class LastQuery(Score):
    """Attention of the newest query on every row; all heads of a layer agree, and the newest token is kept.

    Source: Oren et al., Transformers are Multi-State RNNs (TOVA), arXiv 2401.06104.
    """

    name: ClassVar[str] = "last_query"
    reads: ClassVar[frozenset[str]] = frozenset({"q", "k"})
    ordered: ClassVar[bool] = False

    @property
    def window(self) -> int:
        return 1

    @property
    def recent(self) -> int:
        return 1

    def __call__(self, site: CacheSite) -> Tensor:
        """The last row of the attention."""
        return site.columns(1).mean(1, keepdim=True).expand(site.extent)


@register("tova")
@dataclass(frozen=True)
class TOVA(KVPreset):
    """All heads of a layer keep the rows that the newest query attends to; the lowest goes at every step.

    Args:
        budget: what is kept: a share in (0, 1], tokens, bytes such as "64 MiB", or a budget of :mod:`tokred.kv`.
        every: generated tokens between evictions.

    Source: Oren et al., Transformers are Multi-State RNNs, section 3.3.
    """

    summary: ClassVar[str] = "the last query decides for all heads, at every step"
    source: ClassVar[str] = "Oren et al., 2024 (arXiv 2401.06104)"

    every: int = 1

    def make_score(self) -> Score:
        return LastQuery()
