"""Scores pooled along the rows, so that neighbours stay together."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from tokred.kv.newest import as_they_stand, ordered
from tokred.kv.parts import check_count
from tokred.kv.site import CacheSite

POOLINGS = ("avg", "max", "none")


def pooled(site: CacheSite, values: Tensor, width: int, pooling: str) -> Tensor:
    """``[B, Hk, K]`` pooled along the rows, with stride one; zeros outside count."""
    if width == 1 or pooling == "none":
        return values
    if site.order is None:
        # Padding, if any, stands before the real rows and holds zeros, as the outside does.
        return pooled_columns(values, width, pooling)
    assert site.real is not None  # or there would be no order
    found = ordered(values.masked_fill(~site.real, 0.0), site.order)
    return as_they_stand(pooled_columns(found, width, pooling), site.order)


def pooled_columns(x: Tensor, width: int, pooling: str) -> Tensor:
    """``[B, H, N]`` pooled along the last dimension, with stride one; zeros outside count."""
    if width == 1 or pooling == "none":
        return x
    if pooling == "avg":
        return F.avg_pool1d(x, width, 1, width // 2)
    return F.max_pool1d(x, width, 1, width // 2)


def check_pool(width: int, pooling: str) -> None:
    """Refuse an even width or an unknown pooling.

    Raises:
        ValueError: naming what was given.
    """
    check_count(width, "pool", 1)
    if width % 2 == 0:
        raise ValueError(f"pool must be odd, got {width}")
    if pooling not in POOLINGS:
        raise ValueError(f"pooling must be one of {', '.join(POOLINGS)}, got {pooling!r}")
