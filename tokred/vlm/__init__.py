"""Vision-language models: the sites where visual tokens leave, and small helpers for the methods that act there."""

from __future__ import annotations

from tokred.vlm.layer_site import LayerSite
from tokred.vlm.site import Tile, VisualSite

__all__ = ["LayerSite", "Tile", "VisualSite"]
