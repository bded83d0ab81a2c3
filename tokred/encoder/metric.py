"""The vectors by which methods compare tokens."""

from __future__ import annotations

from typing import Literal, get_args

from torch import Tensor

from tokred.core.site import Site
from tokred.kernels.dispatch import accumulator_dtype

Metric = Literal["k", "q", "v", "x"]
METRICS: tuple[str, ...] = get_args(Metric)


def head_mean(t: Tensor) -> Tensor:
    """``(B, H, N, D)`` to the mean over heads ``(B, N, D)`` in the type of the sums, which half precision would round
    to other choices; ``(B, N, C)`` as it is."""
    if t.ndim != 4:
        return t
    dtype, heads = accumulator_dtype(t.dtype), t.shape[1]
    if heads % 2:
        return t.to(dtype).mean(1)
    # A sum over a strided dimension is not vectorised on a CPU, an addition is: half of the work goes there.
    half = t[:, : heads // 2].to(dtype) + t[:, heads // 2 :]
    return half.sum(1) / heads


def read_metric(site: Site, metric: Metric) -> Tensor:
    """The vectors that are compared, ``(B, N, D)``."""
    found: Tensor = getattr(site, metric)
    return head_mean(found)
