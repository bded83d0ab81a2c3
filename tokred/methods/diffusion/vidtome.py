"""VidToMe: merge the tokens of a clip into those of a few of its frames, then these into fewer, down to one frame."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from tokred.core.checks import check_count, check_ratio
from tokred.core.method import Parameters
from tokred.core.reduction import Reduction
from tokred.core.registry import register
from tokred.core.site import Site
from tokred.diffusion.grid import match_cells
from tokred.diffusion.method import AttentionMethod, check_sharing
from tokred.diffusion.site import Share, SublayerPlace


@register("vidtome")
@dataclass(frozen=True)
class VidToMe(AttentionMethod):
    """Video Token Merging, within one clip.

    Every pass takes each ``stride``-th frame, from a drawn one on, and merges the share ``ratio`` of all other frames'
    tokens into the most similar tokens of these. The next pass does the same with the frames that were taken, until one
    is left. A token that is merged is left out, and gets a copy of what its destination got.

    Args:
        ratio: share of the other frames' tokens that is merged in each pass, in [0, 1).
        stride: of the frames that are taken; at most as many as there are.
        max_downsample: act where the grid is at most so many times coarser than the denoiser's sample.
        seed: of the draw of frames, which depends on it, the step and the block alone (ours).
        share: ``"resolution"``: blocks of one resolution share a plan (ours).
        refresh: a plan is kept for so many denoising steps (ours).
        first_full: so many steps at the start of an image run as they are; compiled forwards need 0 (ours).

    For denoisers that see a clip as one sequence. Merging with earlier chunks of a longer video, and one plan for all
    samples, are not here. Frames behind the last whole stride are never taken (ours), so the count is always the same.

    Source: Li et al., VidToMe: Video Token Merging for Zero-Shot Video Editing, CVPR 2024 (arXiv 2312.10656).
    """

    summary: ClassVar[str] = "merge the tokens of a clip into those of a few of its frames"
    source: ClassVar[str] = "Li et al., VidToMe, CVPR 2024 (arXiv 2312.10656)"
    example: ClassVar[Parameters] = {"ratio": 0.9, "max_downsample": 8, "first_full": 0}

    ratio: float = 0.9
    stride: int = 4
    max_downsample: int = 2
    seed: int = 0
    share: Share = "block"
    refresh: int = 1
    first_full: int = 2

    def __post_init__(self) -> None:
        check_ratio(self.ratio)
        for name in ("stride", "max_downsample"):
            check_count(getattr(self, name), name, 1)
        check_sharing(self.share, self.refresh, self.first_full)

    @property
    def reads(self) -> frozenset[str]:
        """The block's input, which is compared, and the frames."""
        return frozenset({"x", "grid", "frames"})

    @property
    def idle(self) -> bool:
        """Nothing is merged at ratio 0, or where every frame is taken."""
        return self.ratio == 0 or self.stride == 1

    @property
    def advice(self) -> str:
        return f"max_downsample is {self.max_downsample}, and at least two frames are needed"

    def passes(self, frames: int) -> Iterator[tuple[int, int, int]]:
        """Frames, stride and frames taken in each pass."""
        while frames > 1 and self.stride > 1:
            step = min(self.stride, frames)
            yield frames, step, frames // step
            frames //= step

    def left(self, place: SublayerPlace) -> int:
        """``N`` less ``int(ratio * sources)`` of every pass."""
        if self.idle or place.factor > self.max_downsample:
            return place.length
        n = place.grid[0] * place.grid[1]
        gone = sum(int((frames - taken) * n * self.ratio) for frames, _, taken in self.passes(place.frames))
        return place.length - gone

    def reduce(self, site: Site) -> Reduction:
        """Merge over the frames, pass after pass."""
        site = self.site(site)
        b, length = site.shape
        place = site.place
        total = Reduction.identity((b,), length, site.device)
        if self.left(place) == length:
            return total
        n = place.grid[0] * place.grid[1]
        metric, before = site.x, 0
        draws = site.uniform(length.bit_length(), self.seed)
        for i, (frames, step, taken) in enumerate(self.passes(place.frames)):
            first = (draws[i] * step).to(torch.int64)
            chosen = torch.zeros(frames, dtype=torch.uint8, device=site.device)
            chosen = chosen.scatter(0, torch.arange(taken, device=site.device) * step + first, 1)
            order = (chosen.argsort(stable=True).unsqueeze(1) * n + torch.arange(n, device=site.device)).flatten()
            sources, destinations = order[: (frames - taken) * n], order[(frames - taken) * n :]
            r = int(len(sources) * self.ratio)
            if r == 0:
                break
            plan = match_cells(metric, sources, destinations, r, mode="keep")
            total = _then(total, plan, before)
            metric = plan.gather(metric)[:, len(sources) - r :]
            before += len(sources) - r
        return total


def _then(total: Reduction, plan: Reduction, before: int) -> Reduction:
    """``total``, then ``plan`` for all but its first ``before`` slots."""
    if total.trivial:
        return plan
    b = plan.batch[0]
    lead = torch.arange(before, device=plan.representative.device).expand(b, -1)
    shifted = replace(
        plan,
        representative=torch.cat([lead, plan.representative + before], 1),
        source=plan.source + before,
        target=plan.target + before,
        length=plan.length + before,
    )
    return total.then(shifted)
