"""The tiny models whose blocks work on maps, and where their blocks stand."""

from __future__ import annotations

from torch import nn

from tokred.adapters.tiny.windows import FAMILIES, SIDE, SIZE, TIMM, WINDOW, build, images, read

__all__ = ["FAMILIES", "SIDE", "SIZE", "TIMM", "WINDOW", "build", "images", "layers", "read"]


def layers(model: nn.Module) -> list[nn.Module]:
    """All blocks, reducing or not."""
    for path in ("blocks", "layers", "vision_encoder.layers", "encoder.layer"):
        try:
            return list(model.get_submodule(path))
        except AttributeError:
            continue
    raise AssertionError(type(model))
