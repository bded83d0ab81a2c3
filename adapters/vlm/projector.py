"""The adapter of the stage ``projector``."""

from tokred.adapters.vlm.host import match_projector as match

__all__ = ["match"]
