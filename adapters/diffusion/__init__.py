"""diffusers: denoisers whose attention may run on fewer tokens of the image."""

from __future__ import annotations

from tokred.adapters.diffusion.host import DenoiserHost, match, part_of

__all__ = ["DenoiserHost", "match", "part_of"]
