"""Methods as users give them, and settings that travel: ``make``, ``save``, ``load``, ``push_to_hub``."""

from tokred.settings.given import MethodLike, make, several
from tokred.settings.share import load, push_to_hub, save

__all__ = ["MethodLike", "load", "make", "push_to_hub", "save", "several"]
