"""The tiny models of transformers' encoders, by the name that tests import them from."""

from __future__ import annotations

from typing import Any

from tokred.adapters.tiny.given import PATCH, SIZE, images, noisy, packed, texts, videos
from tokred.adapters.tiny.transformers import BERT, COMMON, FAMILIES, IMAGE, TEXT, VIDEO, Family, build, read

SIGLIP2: dict[str, Any] = {**COMMON, "patch_size": PATCH, "num_patches": 25}

__all__ = [
    "BERT", "COMMON", "FAMILIES", "IMAGE", "PATCH", "SIGLIP2", "SIZE", "TEXT", "VIDEO", "Family", "build", "images",
    "noisy", "packed", "read", "texts", "videos",
]  # fmt: skip
