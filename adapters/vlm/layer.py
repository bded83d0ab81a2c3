"""The adapter of the stage ``layer``."""

from tokred.adapters.vlm.host import match_layer as match

__all__ = ["match"]
