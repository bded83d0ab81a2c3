"""VidCom2: every frame of a video has a budget by how unusual it is, and keeps its most unusual tokens."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from tokred.core.checks import check_flags, check_ratio, check_share
from tokred.core.method import Parameters
from tokred.core.ragged import pack
from tokred.core.reduction import Reduction
from tokred.core.registry import register
from tokred.core.selection import ranked
from tokred.vlm.before_llm import VisualSite
from tokred.vlm.frames import ClipMethod, framed
from tokred.vlm.tools.budget import ratio_of
from tokred.vlm.tools.greedy import directions
from tokred.vlm.tools.video import within

# Widths of the kernels whose sum says how near a token is to a mean.
WIDTHS = (0.125, 0.25, 0.5, 1.0, 2.0)


@register("vidcom2")
@dataclass(frozen=True)
class VidCom2(ClipMethod):
    """Video Compression Commander: no attention, only distances from means.

    In the quieter half of the channels (least variance over the clip) each token's direction is compared with the mean
    of the clip and with the mean of its frame, by a sum of Gaussian kernels; near to both is redundant. A frame whose
    tokens are far from the clip's mean gets up to twice the budget of the others, and in each frame the least
    redundant tokens stay.

    Args:
        ratio: share of a clip's tokens that leaves, in [0, 1).
        channels: share of the channels that is looked at, in (0, 1]; at least one is.
        temperature: of the softmax over frames; the lower, the more one frame gets of what is shared out.
        exact: exactly ``max(T, int(T * N * (1 - ratio)))`` tokens stay, as serving engines need it: the most redundant
            of the clip leave, or the least redundant come back, until it is so. False: what rounding and bounds of the
            frames' budgets leave, as the authors have it.
        floor: with ``exact``, no frame loses its last token to that (ours); False: as the engines do it, where a frame
            can.

    Source: Liu et al., Video Compression Commander, EMNLP 2025, and a serving engine's implementation.
    """

    summary: ClassVar[str] = "budgets of frames by how unusual they are, tokens by their distance from means"
    source: ClassVar[str] = "Liu et al., EMNLP 2025 (arXiv 2505.14454)"
    example: ClassVar[Parameters] = {"ratio": 0.5}
    nothing: ClassVar[Parameters | None] = {"ratio": 0.0}

    ratio: float = 0.75
    channels: float = 0.5
    temperature: float = 0.01
    exact: bool = True
    floor: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_ratio(self.ratio, "ratio")
        check_share(self.channels, "channels")
        check_share(self.temperature, "temperature")
        check_flags(exact=self.exact, floor=self.floor)

    def kept(self, frames: int, cells: int) -> int:
        """The number that stays where that is exact; a frame's budget is at most all of it elsewhere."""
        if not self.exact:
            return frames * cells
        return max(frames, min(int(frames * cells * (1.0 - self.ratio)), frames * cells))

    def leaving(self, count: int, frames: int, cells: int) -> VidCom2:
        """Exactly so many with ``exact``, where these are one a frame or more."""
        return replace(self, ratio=ratio_of(count, frames * cells))

    def count(self, n: int) -> int:
        """Of many tokens a frame."""
        return max(1, int(n * (1.0 - self.ratio)))

    def choose(self, site: VisualSite) -> Reduction:
        """Budgets, then tokens, then the exact count."""
        x = framed(site)
        b, frames, cells = x.shape[:3]
        clip, redundancy = self.redundancy(x)
        rank = within(-redundancy)
        stays = (rank < self.budgets(clip).unsqueeze(2)).flatten(1)
        if not self.exact:
            rows = torch.arange(frames * cells, device=x.device).expand(b, -1)
            return site.keep(*pack(rows, stays))
        # Who goes first when there are too many, and comes first when there are too few, is one order: the kept before
        # the others, the least redundant of each first.
        group = 2 - stays.long()
        if self.floor:
            group = torch.where((rank == 0).flatten(1), 0, group)
        order = ranked(-redundancy.flatten(1))
        order = order.gather(1, group.gather(1, order).argsort(dim=1, stable=True))
        return site.keep(order[:, : self.kept(frames, cells)].sort(dim=1).values)

    def redundancy(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """``(B, T, N)`` nearness to the clip's mean, and that plus the nearness to the frame's.

        Args:
            x: ``(B, T, N, C)`` float32.
        """
        flat = x.flatten(1, 2)
        some = max(1, int(x.shape[-1] * self.channels))
        quiet = ranked(-flat.var(1, correction=0))[:, :some].sort(dim=1).values
        u = directions(x.gather(3, quiet[:, None, None].expand(*x.shape[:3], -1)))
        clip = _near(u, u.mean((1, 2), keepdim=True))
        return clip, clip + _near(u, u.mean(2, keepdim=True))

    def budgets(self, clip: Tensor) -> Tensor:
        """``(B, T)`` int64 how many tokens each frame keeps, at least one.

        Args:
            clip: ``(B, T, N)`` nearness to the clip's mean.
        """
        frames, cells = clip.shape[1:]
        share = (-clip.mean(2) / self.temperature).softmax(1)
        keep = ((1.0 - self.ratio) * (1 + share - 1 / frames)).clamp(max=1)
        return (keep * cells).round().clamp(1, cells).long()


def _near(u: Tensor, centre: Tensor) -> Tensor:
    """``(B, T, N)``: the sum of the kernels of the squared distance to a centre that broadcasts."""
    square = (u - centre).square().sum(-1)
    found: Tensor = torch.stack([torch.exp(square / (-2 * w)) for w in WIDTHS]).sum(0)
    return found
