"""The tiny models of timm, and models of its own without weights; what the installed timm cannot build is skipped."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tokred.adapters.tiny import timm as tiny
from tokred.adapters.tiny.timm import FAMILIES, SIZE, images

__all__ = ["FAMILIES", "SIZE", "build", "images", "without_weights"]


def build(family: str, seed: int = 0) -> nn.Module:
    """A model in evaluation mode whose every parameter is random, so that no branch is zero."""
    try:
        return tiny.build(family, seed)
    except TypeError as error:
        pytest.skip(f"the installed timm cannot build this family itself: {error}")


def without_weights(name: str) -> nn.Module:
    """A model of timm's on the meta device, for questions about its structure."""
    import timm

    try:
        with torch.device("meta"):
            return timm.create_model(name)
    except RuntimeError as error:
        pytest.skip(f"the installed timm computes values while it builds {name}: {error}")
