"""AsymRnR: fewer queries, and fewer keys and values, each matched for themselves in every head of a denoiser."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch

from tokred.core.checks import check_choice, check_count, check_ratio
from tokred.core.method import Parameters
from tokred.core.reduction import Reduction
from tokred.core.registry import register
from tokred.core.selection import hash_uniform
from tokred.core.site import Site
from tokred.diffusion.grid import clip_destinations, match_cells, whole_cells
from tokred.diffusion.method import AttentionMethod, check_sharing, removed
from tokred.diffusion.site import Part, Side, SublayerPlace

METRICS = ("distance", "cosine", "dot")


@register("asymrnr")
@dataclass(frozen=True)
class AsymRnR(AttentionMethod):
    """Asymmetric Reduction and Restoration: inside self-attention, after norms and rotary embedding, in every head.

    ``kv=0`` reduces queries alone, ``q=0`` keys and values alone.

    Args:
        q: share of the queries of the image that is left out, in [0, 1). Each gets a copy of another one's output.
        kv: share of its keys and values.
        cell: frames, rows and columns of a cell, which has one destination; cells are cut to the frames that there are.
        metric: what is compared by: ``"distance"`` (Euclidean), ``"cosine"`` or ``"dot"``. Queries are matched by
            themselves, keys as their values are.
        combine: ``"replace"``: the destination stands for its sources; ``"mean"``: they are averaged (rotated ones of
            far places, too).
        size_bias: add the log of its size to the scores of each key; with ``combine="mean"`` only (ours).
        seed: of the destinations, which depend on it and the step alone: the same in all blocks and heads.
        refresh: plans are kept for so many denoising steps; the authors have 3 for HunyuanVideo and Mochi, 5 for
            CogVideoX, 1 for distilled models.
        first_full: so many steps at the start of an image run as they are; compiled forwards need 0 (ours).

    The authors' shares by layer and step come from measured tables, which are not here: choose blocks by ``where``.

    Source: Sun et al., AsymRnR: Video Diffusion Transformers Acceleration with Asymmetric Reduction and Restoration,
    ICML 2025 (arXiv 2412.11706). Tokens behind the last whole cell are sources (there: at a random end).
    """

    summary: ClassVar[str] = "fewer queries, and fewer keys and values, by plans of their own in every head"
    source: ClassVar[str] = "AsymRnR, ICML 2025 (arXiv 2412.11706)"
    example: ClassVar[Parameters] = {"q": 0.4, "kv": 0.5, "first_full": 0}
    nothing: ClassVar[Parameters | None] = {"q": 0, "kv": 0}
    part: ClassVar[Part] = "heads"

    q: float = 0.3
    kv: float = 0.5
    cell: tuple[int, int, int] = (2, 2, 2)
    metric: Literal["distance", "cosine", "dot"] = "distance"
    combine: Literal["replace", "mean"] = "replace"
    size_bias: bool = False
    seed: int = 0
    refresh: int = 3
    first_full: int = 2

    def __post_init__(self) -> None:
        for name in ("q", "kv"):
            check_ratio(getattr(self, name), name)
        object.__setattr__(self, "cell", tuple(self.cell))
        if len(self.cell) != 3:
            raise ValueError(f"cell must name frames, rows and columns, got {self.cell!r}")
        for side in self.cell:
            check_count(side, "cell", 1)
        check_choice(self.metric, "metric", METRICS)
        check_choice(self.combine, "combine", ("replace", "mean"))
        if self.size_bias and self.combine != "mean":
            raise ValueError("size_bias is for combine='mean': a key that replaces others is no mean of them")
        check_sharing("block", self.refresh, self.first_full)

    @property
    def reads(self) -> frozenset[str]:
        """Queries and values, which are compared, and the grid."""
        return frozenset({"q", "v", "grid"})

    @property
    def proportional(self) -> bool:
        return self.size_bias

    @property
    def idle(self) -> bool:
        """Nothing is left out at shares of 0."""
        return self.q == 0 and self.kv == 0

    def left(self, place: SublayerPlace) -> int:
        """The smaller of both sides."""
        return min(self.side("queries", place), self.side("keys", place))

    def side(self, side: Side, place: SublayerPlace) -> int:
        """``N - round(ratio * N)``, at least one a cell; all where the grid is smaller than a cell."""
        r, cells = removed(place.length, self.q if side == "queries" else self.kv), self._cells(place)
        return max(place.length - r, cells) if r and cells else place.length

    def _cells(self, place: SublayerPlace) -> int:
        t, *cell = self.fitted(place)
        return (place.frames // t) * whole_cells(place.grid, (cell[0], cell[1]))

    def fitted(self, place: SublayerPlace) -> tuple[int, int, int]:
        """The cell, cut to the frames that there are."""
        t, y, x = self.cell
        return min(t, place.frames), y, x

    def reduce(self, site: Site) -> Reduction:
        """Match the side that is asked for in every head."""
        site = self.site(site)
        place, metric = site.place, site.q if site.side == "queries" else site.v
        b, heads, n, _ = metric.shape
        r = n - self.side(site.side, place)
        if r == 0:
            return Reduction.identity((b, heads), n, metric.device)
        cell = self.fitted(place)
        drawn = hash_uniform(self._cells(place), self.seed, 0, site.key, device=metric.device)  # type: ignore[arg-type]
        offsets = (drawn * (cell[0] * cell[1] * cell[2])).to(torch.int64)
        split = clip_destinations((place.frames, *place.grid), cell, offsets, metric.device)
        mode = "keep" if self.combine == "replace" else "mean"
        plan = match_cells(metric.flatten(0, 1), *split, r, by=self.metric, mode=mode)
        parts = {name: getattr(plan, name).unflatten(0, (b, heads)) for name in ("representative", "source", "target")}
        return replace(plan, **parts)
