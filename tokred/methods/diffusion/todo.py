"""ToDo: keys and values of a denoiser's self-attention down-sampled on the grid of the image, queries left alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from tokred.core.checks import check_choice, check_count, check_share
from tokred.core.method import Parameters
from tokred.core.reduction import Reduction
from tokred.core.registry import register
from tokred.core.site import Site
from tokred.diffusion.grid import cell_destinations, kept_lines, match_cells, pool_cells
from tokred.diffusion.method import AttentionMethod, check_sharing
from tokred.diffusion.site import AttentionSite, Part, Share, Step, SublayerPlace

MODES = ("nearest", "nearest-exact", "average", "max")


@register("todo")
@dataclass(frozen=True)
class ToDo(AttentionMethod):
    """Token Downsampling.

    Args:
        factors: by depth (a number: for the first alone): the first for attention at the resolution of the denoiser's
            sample, the second at half of it, and so on; beyond the last: 1. At factor ``f`` one key in ``f * f`` is
            left. SDXL has no attention at its sample's resolution: its finest is the second.
        mode: which key stands for a cell: ``"nearest"`` the top left one, ``"nearest-exact"`` the one below and right
            of the middle, ``"average"`` and ``"max"`` pool them.
        phase: which token of the cell is kept with ``"nearest"``, counted row by row from 0; or ``"cycle"``: another
            one at every step, drawn by ``seed`` and step (ours, as the whole parameter).
        seed: for ``phase="cycle"``.
        refresh: a plan is kept for so many denoising steps; matters for ``phase="cycle"`` and ``secondary`` (ours).
        switch: level of the noise, from 1 at the start to 0, down to which this is done; below it ``secondary``. 0: all
            along. The authors' library has 0.2.
        stop: level down to which anything is done.
        secondary: ``"similarity"``: each key is merged into its most similar among one of each cell, so that as many
            are left; None: nothing is reduced any more.

    Nothing depends on the image, so all blocks of one resolution share a plan. Reductions of grids that the factor does
    not divide drop rows or columns unevenly and add no bias for it, as the authors' code does.

    Source: Smith, Saxena and Saha, ToDo: Token Downsampling for Efficient Generation of High-Resolution Images, 2024
    (arXiv 2402.13573).
    """

    summary: ClassVar[str] = "down-sample keys and values of a denoiser's self-attention on the image's grid"
    source: ClassVar[str] = "Smith et al., 2024 (arXiv 2402.13573)"
    example: ClassVar[Parameters] = {"factors": (2, 2, 2)}
    nothing: ClassVar[Parameters | None] = {"factors": 1}
    part: ClassVar[Part] = "kv"
    near: ClassVar[bool] = True

    factors: tuple[int, ...] = (2, 1)
    mode: Literal["nearest", "nearest-exact", "average", "max"] = "nearest"
    phase: int | Literal["cycle"] = 0
    seed: int = 0
    refresh: int = 1
    switch: float = 0.0
    stop: float = 0.0
    secondary: Literal["similarity"] | None = "similarity"

    @property
    def share(self) -> Share:  # type: ignore[override]  # not a parameter here
        return "resolution"

    def __post_init__(self) -> None:
        factors: object = self.factors
        given = (factors,) if isinstance(factors, int) else tuple(self.factors)
        if not given:
            raise ValueError("factors must name at least one factor")
        for factor in given:
            check_count(factor, "factors", 1)
        object.__setattr__(self, "factors", given)
        check_choice(self.mode, "mode", MODES)
        self._check_phase()
        check_sharing("resolution", self.refresh)
        for name in ("switch", "stop"):
            check_share(getattr(self, name), name, zero=True)
        if self.secondary not in ("similarity", None):
            raise ValueError(f"secondary is {self.secondary!r}; allowed are 'similarity', None")

    @property
    def stepwise(self) -> bool:
        """True if it switches or stops before the end."""
        return self.switch > 0 or self.stop > 0

    def at(self, step: Step | None) -> AttentionMethod | None:
        """This method, its late phase or nothing, by the level of the noise."""
        if step is None or not self.stepwise:
            return self
        if step.noise <= self.stop:
            return None
        similar = None if self.secondary is None else SimilarKeys(self.factors, self.seed, self.refresh)
        return self if step.noise > self.switch else similar

    def _check_phase(self) -> None:
        if self.phase == "cycle":
            pass
        elif not isinstance(self.phase, int) or isinstance(self.phase, bool):
            raise TypeError(f"phase must be an integer or 'cycle', got {self.phase!r}")
        else:
            smallest = min((f for f in self.factors if f > 1), default=1)
            if not 0 <= self.phase < smallest**2:
                raise ValueError(f"phase must lie in [0, {smallest**2}) for factors {self.factors}, got {self.phase}")
        if self.phase != 0 and self.mode != "nearest":
            raise ValueError(f"phase is for mode 'nearest', got {self.phase!r} with {self.mode!r}")

    @property
    def reads(self) -> frozenset[str]:
        """The grid and nothing else."""
        return frozenset({"grid"})

    @property
    def idle(self) -> bool:
        """Nothing is left out at factor 1."""
        return max(self.factors) == 1

    @property
    def advice(self) -> str:
        """Advice on the depths that the factors name."""
        return f"factors are {self.factors}, finest first: name one for a coarser resolution, such as {(1, 2)}"

    def factor(self, place: SublayerPlace) -> int:
        """The factor at a place."""
        depth = (place.factor - 1).bit_length()
        return self.factors[depth] if depth < len(self.factors) else 1

    def left(self, place: SublayerPlace) -> int:
        """``(h // f) * (w // f)``; all where the grid is smaller than the factor."""
        f = self.factor(place)
        if f > min(place.grid):
            return place.length
        return len(kept_lines(place.grid[0], f)) * len(kept_lines(place.grid[1], f))

    def reduce(self, site: Site) -> Reduction:
        """The kept keys, the same in every sample."""
        site = self.site(site)
        b, n = site.shape
        f = self.factor(site.place)
        if self.left(site.place) == n:
            return Reduction.identity((b,), n, site.device)
        if self.mode in ("average", "max"):
            return pool_cells(site.grid, f, b, "mean" if self.mode == "average" else "max", site.device)
        exact = self.mode == "nearest-exact"
        (y, x), device = (kept_lines(side, f, exact=exact) for side in site.grid), site.device
        down, across = self._shift(site, f)
        rows = (torch.tensor(y, device=device) + down).clamp_max(site.grid[0] - 1)
        columns = (torch.tensor(x, device=device) + across).clamp_max(site.grid[1] - 1)
        kept = (rows.unsqueeze(1) * site.grid[1] + columns).reshape(-1)
        return Reduction.keep(kept.expand(b, -1), n)

    def _shift(self, site: AttentionSite, f: int) -> tuple[int | Tensor, int | Tensor]:
        if self.phase == "cycle":
            # One draw for all resolutions: their grids shift together.
            drawn = (AttentionSite(site.x, site.place, step=site.key).uniform(1, self.seed) * f * f).to(torch.int64)
            return drawn // f, drawn % f
        return self.phase // f, self.phase % f


@dataclass(frozen=True)
class SimilarKeys(AttentionMethod):
    """The late phase of :class:`ToDo`: keys merged by similarity into one of each cell, drawn anew at every step.

    Args:
        factors, seed, refresh: of the method.
    """

    name: ClassVar[str] = "todo"
    part: ClassVar[Part] = "kv"

    factors: tuple[int, ...]
    seed: int = 0
    refresh: int = 1
    share: Share = "resolution"

    @property
    def idle(self) -> bool:
        """Nothing is merged at factor 1."""
        return max(self.factors) == 1

    def left(self, place: SublayerPlace) -> int:
        return ToDo(self.factors).left(place)

    def reduce(self, site: Site) -> Reduction:
        """Match all keys with those that were drawn."""
        site = self.site(site)
        b, n = site.shape
        f, left = ToDo(self.factors).factor(site.place), self.left(site.place)
        if left == n:
            return Reduction.identity((b,), n, site.device)
        offsets = (site.uniform(left, self.seed) * f * f).to(torch.int64)
        sources, destinations = cell_destinations(site.grid, (f, f), offsets, site.device)
        return match_cells(site.x, sources, destinations, len(sources))
