"""KNorm: rows with small keys stay."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from tokred.core.registry import register
from tokred.kv.parts import Score
from tokred.kv.preset import KVPreset
from tokred.kv.site import CacheSite


@dataclass(frozen=True)
class KeyNorm(Score):
    """Minus the length of the key, in float32: in half precision three quarters of the lengths tie.

    Source: Devoto et al., A Simple and Effective L2 Norm-Based Strategy for KV Cache Compression, arXiv 2406.11430.
    """

    name: ClassVar[str] = "key_norm"
    ordered: ClassVar[bool] = False

    def __call__(self, site: CacheSite) -> Tensor:
        length: Tensor = site.k.float().norm(dim=-1)
        return -length


@register("knorm")
@dataclass(frozen=True)
class KNorm(KVPreset):
    """Keys of small length receive much attention; needs no query, so it can act on chunks.

    Args:
        budget: what is kept: a share in (0, 1], tokens, bytes such as "64 MiB", or a budget of :mod:`tokred.kv`.
        turns: evict again at the end of later turns, or of each chunk of a prompt.

    Source: Devoto et al., arXiv 2406.11430, section 3.
    """

    summary: ClassVar[str] = "rows with the shortest keys"
    source: ClassVar[str] = "Devoto et al., EMNLP 2024 (arXiv 2406.11430)"

    turns: bool = False

    def make_score(self) -> Score:
        return KeyNorm()
