"""DyCoke's temporal stage: of every four frames of a video one stays whole, the others keep what changes most."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from tokred.core.checks import check_choice, check_ratio
from tokred.core.method import Parameters
from tokred.core.reduction import Reduction
from tokred.core.registry import register
from tokred.vlm.before_llm import VisualSite
from tokred.vlm.frames import ClipMethod, framed
from tokred.vlm.tools.greedy import directions
from tokred.vlm.tools.video import apart, chosen, within


@register("dycoke")
@dataclass(frozen=True)
class DyCoke(ClipMethod):
    """DyCoke's first stage, between vision tower and language model; tokens are dropped, not averaged.

    The second and fourth of four frames are compared with the frame before, the third with the first, always by their
    original tokens at the same place, and keep the ``int((1 - ratio) * N)`` that are least alike.

    The second stage, which chooses rows of the cache anew while it decodes, is not here.

    Args:
        ratio: share of the tokens that leaves a reduced frame, in [0, 1).
        groups: ``"whole"``: as above, to the end of the clip; ``"official"``: as the released code has it, where the
            last four frames keep two whole ones, and the last of an odd number of frames leaves altogether.

    Source: Tao et al., DyCoke, CVPR 2025, and its released code.
    """

    summary: ClassVar[str] = "of four frames of a video one whole, of the others what changes most"
    source: ClassVar[str] = "Tao et al., CVPR 2025 (arXiv 2411.15024)"
    example: ClassVar[Parameters] = {"ratio": 0.5}
    nothing: ClassVar[Parameters | None] = {"ratio": 0.0}

    ratio: float = 0.7
    groups: Literal["whole", "official"] = "whole"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_ratio(self.ratio, "ratio")
        check_choice(self.groups, "groups", ("whole", "official"))

    def counts(self, frames: int, cells: int) -> list[int]:
        """Tokens that stay of each frame."""
        few = int(round((1 - self.ratio) * cells, 9))
        found = [cells if t % 4 == 0 else few for t in range(frames)]
        if self.groups == "official" and frames > 1:
            found = [cells if t % 2 == 0 and t % 4 and t - 2 >= frames - 4 else n for t, n in enumerate(found)]
            if frames % 2:
                found[-1] = 0
        return found

    def kept(self, frames: int, cells: int) -> int:
        """The number that stays, which nothing but the shape decides."""
        return sum(self.counts(frames, cells))

    def count(self, n: int) -> int:
        """Of many frames: a whole one in four."""
        return max(1, int(n * (1 - 0.75 * self.ratio)))

    def choose(self, site: VisualSite) -> Reduction:
        """Compare each reduced frame with its own."""
        x = framed(site)
        b, frames, cells = x.shape[:3]
        counts = self.counts(frames, cells)
        if sum(counts) == frames * cells:
            return Reduction.identity((b,), frames * cells, x.device)
        with_frame = torch.tensor([max(0, t - (2 if t % 2 == 0 else 1)) for t in range(frames)], device=x.device)
        u = directions(x)
        rank = within(apart(u, u[:, with_frame]))
        limit: Tensor = torch.tensor(counts, device=x.device)
        return site.keep(chosen((rank < limit.view(1, -1, 1)).flatten(1), sum(counts)))
