"""The tiny models of open_clip, by the name that tests import them from."""

from __future__ import annotations

from tokred.adapters.tiny.open_clip import CUSTOM, FAMILIES, PATCH, SIZE, TEXT, VISION, build, inputs, outputs

__all__ = ["CUSTOM", "FAMILIES", "PATCH", "SIZE", "TEXT", "VISION", "build", "inputs", "outputs"]
