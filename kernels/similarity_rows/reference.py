"""The definition of the operator, in plain torch over the whole similarity matrix.

Short rather than fast: this is what the other paths are compared with, in float64. ``torch_path`` is what runs.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from tokred.kernels.dispatch import accumulator_dtype

NORM_FLOOR = 1e-6


def unit(x: Tensor) -> Tensor:
    """Rows divided by ``max(norm, 1e-6)``; a zero row stays zero."""
    norm: Tensor = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return x / norm.clamp_min(NORM_FLOOR)


def similarity(a: Tensor, b: Tensor, metric: str) -> Tensor:
    """``(..., Na, Nb)``, higher is closer: cosine, dot product, or the negative Euclidean distance."""
    dtype = accumulator_dtype(a.dtype)
    a, b = a.to(dtype), b.to(dtype)
    if metric == "cosine":
        return unit(a) @ unit(b).mT
    if metric == "dot":
        return a @ b.mT
    distance: Tensor = torch.linalg.vector_norm(a.unsqueeze(-2) - b.unsqueeze(-3), dim=-1)
    return -distance


def pairs(a: Tensor, b: Tensor, a_mask: Tensor | None, b_mask: Tensor | None, exclude_self: bool) -> Tensor:
    """Which pairs take part, ``(..., Na, Nb)``."""
    takes_part = torch.ones(*a.shape[:-1], b.shape[-2], dtype=torch.bool, device=a.device)
    if a_mask is not None:
        takes_part = takes_part & a_mask.unsqueeze(-1)
    if b_mask is not None:
        takes_part = takes_part & b_mask.unsqueeze(-2)
    if exclude_self:
        takes_part = takes_part & ~torch.eye(a.shape[-2], dtype=torch.bool, device=a.device)
    return takes_part


def transform(s: Tensor, function: str, margin: float, alpha: float) -> Tensor:
    """The function that ``similarity_sum`` adds up; ``count`` is the indicator of ``s >= margin``."""
    if function == "elu":
        return torch.nn.functional.elu(s - margin, alpha)
    if function == "relu":
        return torch.relu(s - margin)
    if function == "identity":
        return s - margin
    if function == "count":
        return (s >= margin).to(s.dtype)
    sigma = 1 - margin
    return torch.exp(-(((1 - s) / sigma) ** 2) / 2) / (sigma * math.sqrt(2 * math.pi))


def top(
    a: Tensor,
    b: Tensor,
    k: int,
    metric: str,
    a_mask: Tensor | None = None,
    b_mask: Tensor | None = None,
    exclude_self: bool = False,
) -> tuple[Tensor, Tensor]:
    """The ``k`` best scores and their indices, ``(..., Na, k)``, in descending order, ties by the lower index."""
    s = similarity(a, b, metric).masked_fill(~pairs(a, b, a_mask, b_mask, exclude_self), -torch.inf)
    score, index = s.sort(dim=-1, descending=True, stable=True)
    score, index = score[..., :k], index[..., :k]
    return score, index.masked_fill(score == -torch.inf, 0)


def total(
    a: Tensor,
    b: Tensor,
    function: str,
    margin: float,
    alpha: float,
    metric: str,
    a_mask: Tensor | None = None,
    b_mask: Tensor | None = None,
) -> Tensor:
    """The sum over the partners of every row, ``(..., Na)``."""
    values = transform(similarity(a, b, metric), function, margin, alpha)
    return values.masked_fill(~pairs(a, b, a_mask, b_mask, False), 0).sum(-1)
