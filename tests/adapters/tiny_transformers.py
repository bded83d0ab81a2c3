"""The tiny models of transformers' encoders, by the name that tests import them from."""

from __future__ import annotations

from tokred.adapters.tiny.given import PATCH, SIZE
from tokred.adapters.tiny.transformers import FAMILIES, TEXT, Family, build, read

__all__ = ["FAMILIES", "PATCH", "SIZE", "TEXT", "Family", "build", "read"]
