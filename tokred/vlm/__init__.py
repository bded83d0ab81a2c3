"""Vision-language models: the sites where visual tokens leave, and small helpers for the methods that act there."""

from __future__ import annotations

from tokred.vlm.before_llm import Tile, VisualSite
from tokred.vlm.clips import clips
from tokred.vlm.in_llm import LayerSite
from tokred.vlm.tools.reuse import Reuse

__all__ = ["LayerSite", "Reuse", "Tile", "VisualSite", "clips"]
