"""The norm of the key: small keys receive much attention."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from tokred.kv.parts import Score
from tokred.kv.site import CacheSite


@dataclass(frozen=True)
class KeyNorm(Score):
    """Minus the length of the key, in float32: in half precision three quarters of the lengths tie.

    Source: Devoto et al., A Simple and Effective L2 Norm-Based Strategy for KV Cache Compression, arXiv 2406.11430.
    """

    name: ClassVar[str] = "key_norm"

    def __call__(self, site: CacheSite) -> Tensor:
        """``-|k|``."""
        length: Tensor = site.k.float().norm(dim=-1)
        return -length
