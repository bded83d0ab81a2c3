"""Random values for models that would otherwise start with zeros, or with attention that is the same everywhere."""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import nn

ModelT = TypeVar("ModelT", bound=nn.Module)


def scattered(model: ModelT, norms: str = "norm", keep: str = "") -> ModelT:
    """The model in evaluation mode, every parameter random, so that no branch is zero.

    Args:
        model: changed in place.
        norms: one-dimensional weights with this in their name get one added; "": none do.
        keep: parameters with this in their name stay as they are; "": none do.
    """
    with torch.no_grad():
        for name, p in model.named_parameters():
            if keep and keep in name:
                continue
            p.copy_(torch.randn_like(p) * (0.15 if p.ndim > 1 else 0.3))
            if norms and p.ndim == 1 and norms in name and name.endswith("weight"):
                p.add_(1)
    return model.eval()


def livelier(model: ModelT) -> ModelT:
    """Larger matrices: with the usual ones attention is nearly even, and nothing would depend on which tokens stay."""
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim == 2:
                p.mul_(4)
    return model
