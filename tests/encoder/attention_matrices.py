"""Sites whose attention is a given matrix."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import tokred


def matrix_site(*heads: Any, **more: Any) -> tokred.Site:
    """A site whose attention is this: one matrix of rows a head, each row one in sum.

    Queries are unit vectors and keys hold the logarithms, so that their products are the logits.
    """
    a = torch.tensor(heads, dtype=torch.float64)
    a = a[None] if a.ndim == 3 else a  # [B, H, N, N]
    b, h, n, _ = a.shape
    q = torch.eye(n, dtype=torch.float64).expand(b, h, n, n).contiguous()
    k = a.clamp_min(1e-30).log().mT.contiguous()
    x: Tensor = more.pop("x", torch.zeros(b, n, 2))
    return tokred.Site(x=x, q=q, k=k, v=k, scale=1.0, **more)
