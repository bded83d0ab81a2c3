"""EVS: tokens of a video that do not change from the frame before leave, and everybody keeps their position."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from tokred.core.checks import check_ratio
from tokred.core.method import Parameters
from tokred.core.reduction import Reduction
from tokred.core.registry import register
from tokred.core.selection import highest
from tokred.vlm.before_llm import VisualSite
from tokred.vlm.frames import ClipMethod, framed
from tokred.vlm.tools.budget import ratio_of
from tokred.vlm.tools.video import changes

# Above every change: one less a cosine is at most 2.
ALWAYS = 255.0


@register("evs")
@dataclass(frozen=True)
class EVS(ClipMethod):
    """Efficient Video Sampling, in the form that serving engines run: behind the projector.

    Every token is compared with that of the same place in the frame before, whether that one stays or not; those that
    change most stay, over the whole clip together, and the first frame always does.

    Args:
        ratio: share of a clip's tokens that leaves, in [0, 1); ``max(N, int(T * N * (1 - ratio)))`` of ``T`` frames of
            ``N`` tokens stay, truncated in floating point as the engines do.

    Source: NVIDIA, Efficient Video Sampling, 2025, and the implementations in serving engines.
    """

    summary: ClassVar[str] = "drop tokens of a video that do not change from the frame before"
    source: ClassVar[str] = "NVIDIA, 2025 (arXiv 2510.14624)"
    example: ClassVar[Parameters] = {"ratio": 0.5}
    nothing: ClassVar[Parameters | None] = {"ratio": 0.0}

    ratio: float = 0.75

    def __post_init__(self) -> None:
        super().__post_init__()
        check_ratio(self.ratio, "ratio")

    def kept(self, frames: int, cells: int) -> int:
        """The number that stays, which nothing but the shape decides."""
        # The very expression of the engines, which size prompts by it: 100 tokens at 0.9 leave 9.
        return max(cells, int(frames * cells * (1 - self.ratio)))

    def leaving(self, count: int, frames: int, cells: int) -> EVS:
        """Exactly so many, where these are more than a frame."""
        return replace(self, ratio=ratio_of(count, frames * cells))

    def count(self, n: int) -> int:
        """Of many frames."""
        return max(1, int(n * (1 - self.ratio)))

    def choose(self, site: VisualSite) -> Reduction:
        """Rank all tokens of the clip by how much they change."""
        x = framed(site)
        b, frames, cells = x.shape[:3]
        first = torch.full((b, 1, cells), ALWAYS, device=x.device)
        scores = torch.cat([first, changes(x)], 1).flatten(1)
        count = self.kept(frames, cells)
        if count == frames * cells:
            return Reduction.identity((b,), count, x.device)
        return site.keep(highest(scores, count)[0])
