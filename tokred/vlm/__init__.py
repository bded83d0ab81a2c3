"""Vision-language models: the sites where visual tokens leave, and small helpers for the methods that act there."""

from __future__ import annotations

from tokred.vlm.site import LayerSite, Tile, VisualSite

__all__ = ["LayerSite", "Tile", "VisualSite"]
