"""Taking the patch of a model with vision off again; apart from the rest, which needs transformers."""

from __future__ import annotations

from torch import nn

SETTINGS = "_tokred_vlm"


def unpatch_visual(module: nn.Module) -> None:
    """Take off what stands on the instance; hooks are removed with all others."""
    for key, value in list(module.__dict__.items()):
        if type(value).__module__.startswith("tokred.adapters.vlm."):
            del module.__dict__[key]
