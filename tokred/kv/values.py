"""Lengths of what values add to the residual stream."""

from __future__ import annotations

import torch
from torch import Tensor

from tokred.kv.site import CacheSite


def value_lengths(site: CacheSite) -> Tensor:
    """``[B, H, K]`` float32: for each query head the length of its row's value after the output projection."""
    v = site.v.float()
    b, heads, n, d = v.shape
    weight = site.projection.detach().float()
    each = weight.view(weight.shape[0], -1, d).transpose(0, 1)  # [H, C, D]
    # The length of W v, from the matrix of W's columns with one another: C is much wider than D.
    square = (each.mT @ each).view(heads, -1, d, d)
    out = torch.empty(b, *square.shape[:2], n, device=v.device)
    for g in range(square.shape[1]):
        out[:, :, g] = ((v @ square[:, g]) * v).sum(-1)
    return out.clamp(min=0).sqrt().flatten(1, 2)
