"""diffusers: UNets (SD 1.x, 2.x, SDXL, unconditional), DiT, PixArt, SD 3 and 3.5, Flux; of clips
CogVideoX, Wan, HunyuanVideo."""

from __future__ import annotations

from tokred.adapters.diffusion.host import DenoiserHost, match, part_of

__all__ = ["DenoiserHost", "match", "part_of"]
