"""The tiny models of timm, and models of its own without weights; what the installed timm cannot build is skipped."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tokred.adapters.tiny import timm as tiny
from tokred.adapters.tiny.timm import FAMILIES, SIZE, images

__all__ = ["FAMILIES", "SIZE", "build", "images", "needs", "without_weights"]


def needs(*names: str) -> None:
    """Skip the test where the installed timm has not all of these architectures: they are younger."""
    import timm

    missing = sorted(set(names) - set(timm.list_models()))
    if missing:
        pytest.skip(f"timm {timm.__version__} has no {', '.join(missing)}")


def build(family: str, seed: int = 0) -> nn.Module:
    """A model in evaluation mode whose every parameter is random, so that no branch is zero."""
    try:
        return tiny.build(family, seed)
    except TypeError as error:
        pytest.skip(f"the installed timm cannot build this family itself: {error}")


def without_weights(name: str) -> nn.Module:
    """A model of timm's, on the meta device where the installed timm can, for questions about its structure."""
    import timm

    try:
        with torch.device("meta"):
            return timm.create_model(name)
    except RuntimeError:  # timm before 1.0.24 computes values while it builds
        return timm.create_model(name)
