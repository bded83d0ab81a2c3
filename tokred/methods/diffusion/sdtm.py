"""SDTM: first whole windows of the image collapse to one token, later the MLP runs on fewer tokens alone."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tokred.core.checks import check_count, check_ratio
from tokred.core.method import Parameters
from tokred.core.reduction import Reduction
from tokred.core.registry import register
from tokred.core.selection import ranked
from tokred.core.site import Site
from tokred.diffusion.grid import check_cells, match_around, whole_cells
from tokred.diffusion.method import AttentionMethod, check_sharing, removed
from tokred.diffusion.site import AttentionSite, Share, Step, Sublayer, SublayerPlace
from tokred.kernels.similarity_rows import unit


@register("sdtm")
@dataclass(frozen=True)
class SDTM(AttentionMethod):
    """Structure-then-Detail Token Merging, in part: the stages, the ratio's curve, the windows' score, the tokens' age.

    Early steps collapse the 2 x 2 windows whose tokens are most alike, around attention and MLP. From ``switch`` on
    tokens are merged around the MLP alone; destinations are those that have gone longest without a slot of their own.
    Features kept from full steps, which the authors blend in, are not here.

    Args:
        ratio: middle of the curve ``(ratio - spread) + 2 * spread * cos(p * pi / 2)``, where ``p`` goes from 0 to 1 as
            the noise goes.
        spread: of the curve; ``ratio`` plus it stays below 1.
        switch: steps of the first stage.
        age: weight of the age, by its mean, beside the windows' similarity. The default is ours.
        max_downsample: act where the grid is at most so many times coarser than the denoiser's sample (ours).
        seed: of the member that stands for a window (ours).
        share: ``"resolution"``: blocks of one resolution share a plan (ours).

    Source: SDTM, Attend to Not Attended: Structure-then-Detail Token Merging for Post-training DiT Acceleration, CVPR
    2025 (arXiv 2505.11707).
    """

    summary: ClassVar[str] = "collapse windows in early steps, merge around the MLP in late ones"
    source: ClassVar[str] = "SDTM, CVPR 2025 (arXiv 2505.11707)"
    example: ClassVar[Parameters] = {"ratio": 0.5, "max_downsample": 8}
    remembers: ClassVar[bool] = True

    ratio: float = 0.5
    spread: float = 0.2
    switch: int = 20
    age: float = 0.01
    max_downsample: int = 2
    seed: int = 0
    share: Share = "block"

    def __post_init__(self) -> None:
        check_ratio(self.ratio)
        check_ratio(self.spread, "spread")
        if self.ratio + self.spread >= 1 or (self.spread > self.ratio and self.ratio > 0):
            raise ValueError(f"ratio and spread are {self.ratio} and {self.spread}; their curve must lie in [0, 1)")
        check_count(self.switch, "switch", 0)
        check_count(self.max_downsample, "max_downsample", 1)
        if isinstance(self.age, bool) or not isinstance(self.age, int | float) or not self.age >= 0:
            raise ValueError(f"age must be a number of at least 0, got {self.age!r}")
        check_sharing(self.share, 1)

    @property
    def reads(self) -> frozenset[str]:
        """The block's input, which is compared, and its grid."""
        return frozenset({"x", "grid"})

    @property
    def stepwise(self) -> bool:
        return True

    def curve(self, progress: float) -> float:
        """The ratio at a progress from 0 to 1."""
        if self.ratio == 0:
            return 0.0
        return (self.ratio - self.spread) + 2 * self.spread * math.cos(progress * math.pi / 2)

    def at(self, step: Step | None) -> AttentionMethod | None:
        """The stage, with the ratio of the step."""
        detail = step is not None and step.number >= self.switch
        now = self.ratio if step is None else self.curve(1 - step.noise)
        return SDTMStage(now, detail, self.age, self.max_downsample, self.seed, self.share)

    @property
    def sublayers(self) -> tuple[Sublayer, ...]:
        """The sub-layers of the first stage."""
        return ("self", "mlp")

    @property
    def idle(self) -> bool:
        """Nothing is merged at ratio 0."""
        return self.ratio == 0

    @property
    def advice(self) -> str:
        return f"max_downsample is {self.max_downsample}: give a larger one"

    def left(self, place: SublayerPlace) -> int:
        """Tokens that the first stage leaves, in the middle of the curve."""
        return SDTMStage(self.ratio, False, self.age, self.max_downsample).left(place)

    def reduce(self, site: Site) -> Reduction:
        """The first stage, in the middle of the curve."""
        return SDTMStage(self.ratio, False, self.age, self.max_downsample, self.seed).reduce(site)


@dataclass(frozen=True)
class SDTMStage(AttentionMethod):
    """One stage of :class:`SDTM` at one step.

    Args:
        ratio: share of tokens merged away.
        detail: the late stage.
        age, max_downsample, seed, share: of the method.
    """

    name: ClassVar[str] = "sdtm"
    remembers: ClassVar[bool] = True

    ratio: float
    detail: bool
    age: float = 0.01
    max_downsample: int = 2
    seed: int = 0
    share: Share = "block"

    @property
    def idle(self) -> bool:
        """Nothing is merged at ratio 0."""
        return self.ratio == 0

    @property
    def sublayers(self) -> tuple[Sublayer, ...]:
        """Attention and MLP, then the MLP alone."""
        return ("mlp",) if self.detail else ("self", "mlp")

    def left(self, place: SublayerPlace) -> int:
        """``N - round(ratio * N)``; in the first stage by whole windows, of which each loses three."""
        n = place.length
        r = removed(n, self.ratio)
        if r == 0 or place.factor > self.max_downsample:
            return n
        return max(n - r, 1) if self.detail else n - 3 * min(whole_cells(place.grid, (2, 2)), removed(r, 1 / 3))

    def reduce(self, site: Site) -> Reduction:
        """Collapse windows, or merge around the tokens that were longest without a slot."""
        site = self.site(site)
        b, n = site.shape
        left = self.left(site.place)
        if left == n:
            return Reduction.identity((b,), n, site.device)
        with torch.no_grad():
            since = site.memory.get("since")
            since = torch.zeros(b, n, device=site.device) if since is None else since
            relative = since / since.mean(1, keepdim=True).clamp_min(1e-6)
            if self.detail:
                count = min(left, max(1, n // 4))
                rows = ranked(relative)[:, :count].sort(dim=1).values
                plan = match_around(site.x, rows, torch.ones(b, n, dtype=torch.bool, device=site.device), left)
            else:
                plan = self._windows(site, relative, (n - left) // 3)
            alone = (plan.sizes() == 1).float()
            stays = torch.zeros(b, n, device=site.device).scatter(1, plan.representative, alone)
            site.memory["since"] = (since + 1) * (1 - stays)
            return plan

    def _windows(self, site: AttentionSite, relative: Tensor, windows: int) -> Reduction:
        b, n = site.shape
        rows, columns = check_cells(site.grid, (2, 2))
        offsets = (site.uniform(rows * columns, self.seed) * 4).to(torch.int64)
        wide, device = site.grid[1], site.device
        y, x = torch.arange(rows, device=device).unsqueeze(1) * 2, torch.arange(columns, device=device) * 2
        corner = (y * wide + x).flatten()
        members = corner.unsqueeze(1) + torch.tensor([0, 1, wide, wide + 1], device=device)  # [W, 4]
        vectors = unit(site.x.detach()).index_select(1, members.flatten()).reshape(b, len(members), 4, -1)
        alike = vectors.sum(2).square().sum(-1) / 16  # mean cosine of all pairs, self-pairs included
        score = alike + self.age * relative.index_select(1, members.flatten()).reshape(b, -1, 4).mean(2)
        chosen = ranked(score)[:, :windows].sort(dim=1).values  # [B, W']
        member = members[chosen]  # [B, W', 4]
        stands = offsets[chosen].unsqueeze(-1)
        first = member.gather(-1, stands)
        others = torch.arange(3, device=device)
        others = member.gather(-1, others + (others >= stands))
        gone = torch.zeros(b, n, dtype=torch.uint8, device=device).scatter(1, others.flatten(1), 1)
        kept = gone.argsort(dim=1, stable=True)[:, : n - 3 * windows]
        slot = torch.zeros(b, n, dtype=torch.int64, device=device)
        slot = slot.scatter(1, kept, torch.arange(kept.shape[1], device=device).expand(b, -1))
        target = slot.gather(1, first.expand(-1, -1, 3).flatten(1))
        return Reduction(kept, others.flatten(1), target, n, mode="keep", by_size=False, complete=True)
