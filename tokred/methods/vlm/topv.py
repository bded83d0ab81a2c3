"""TopV: visual tokens by what an optimal transport sends from a layer's input to its output."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tokred.core.checks import check_count, check_share
from tokred.core.method import Parameters
from tokred.core.place import Place
from tokred.core.reduction import Reduction
from tokred.core.registry import register
from tokred.core.selection import besides, highest
from tokred.kernels.gather_rows import gather_rows
from tokred.methods.vlm.saint_vlm import visual_columns
from tokred.vlm.in_llm import LayerMethod, LayerSite, check_depth
from tokred.vlm.tools.budget import Budget, as_budget, count_of
from tokred.vlm.tools.places import grid_places
from tokred.vlm.tools.transport import BLOCK, transport


@register("topv")
@dataclass(frozen=True)
class TopV(LayerMethod):
    """Token pruning by optimal transport, once, behind an early layer, without attention maps.

    Sources are the visual tokens at the input of the layer, targets those behind the norm that follows its attention.
    Moving a source to a target costs the distance of their features, of their places, and the target's distance from
    the middle of the image; a source is worth the most mass that it sends to one target. Some of those that would leave
    are taken back, evenly spaced.

    No code has been released, and the paper leaves scales open: cost, weights and importance are our reading, and no
    published figure speaks for it.

    Args:
        budget: visual tokens kept of each sample, an integer or a share in (0, 1].
        layer: decoder layer whose input and norm are read, 0-based; tokens leave behind it.
        alpha: weight of the distance of features, divided by the largest.
        beta: weight of the distance of places: one less a Gaussian of width ``sigma``, in sides of the image. Every
            image of a sample has places of its own.
        gamma: weight of the distance from the middle, divided by the largest. It and ``beta`` count only where the
            grid of every image is known; in sites made by hand, where the visual tokens are whole images of the site's
            grid, or of a square one.
        sigma: see above.
        eps: weight of entropy.
        iterations: of Sinkhorn.
        recover: share of the budget for tokens that are taken back, in [0, 1].

    Source: after Yang et al., TopV, CVPR 2025 (arXiv 2503.18278).
    """

    summary: ClassVar[str] = "visual tokens by optimal transport through an early layer, without attention maps"
    source: ClassVar[str] = "after Yang et al., CVPR 2025 (arXiv 2503.18278)"
    example: ClassVar[Parameters] = {"layer": 0, "budget": 5}
    nothing: ClassVar[Parameters | None] = {"budget": 1.0}

    budget: Budget = 0.5
    layer: int = 2
    alpha: float = 1.0
    beta: float = 0.1
    gamma: float = 0.1
    sigma: float = 0.5
    eps: float = 0.1
    iterations: int = 3
    recover: float = 0.1

    def __post_init__(self) -> None:
        as_budget(self.budget)
        check_count(self.layer, "layer")
        for name, least in (("alpha", True), ("beta", True), ("gamma", True), ("sigma", False), ("eps", False)):
            value = getattr(self, name)
            fits = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
            if not fits or value < 0 or (value == 0 and not least):
                raise ValueError(f"{name} must be {'at least' if least else 'above'} 0, got {value!r}")
        check_count(self.iterations, "iterations", 1)
        check_share(self.recover, "recover", zero=True)

    @property
    def reads(self) -> frozenset[str]:
        """Hidden states, and what entered the layer and left the norm behind its attention."""
        return frozenset({"x", "stream"})

    def check(self, depth: int) -> None:
        """The layer must exist, and have one behind it."""
        check_depth(self.layer + 1, depth, "layer + 1, where tokens leave,")

    def tokens(self, n: int, place: Place) -> int:
        """The budget behind its layer."""
        return count_of(self.budget, n) if place.layer == self.layer + 1 else n

    def choose(self, site: LayerSite) -> Reduction:
        """Send, rank, take some back; sample by sample."""
        counts = tuple(count_of(self.budget, n) for n in site.counts)
        before, after = site.stream
        columns, last = visual_columns(site, max(site.counts)), site.last
        chosen = torch.zeros(site.shape, dtype=torch.bool, device=site.device)
        for i, (n, count) in enumerate(zip(site.counts, counts, strict=True)):
            if n:
                mine = columns[i : i + 1, :n]
                source, target = (gather_rows(t[i : i + 1], mine).float() for t in (before, after))
                value = self.importance(source, target, _places(site, i, mine[0]))
                kept = self.select(value.masked_fill(last.gather(1, columns)[i : i + 1, :n], torch.inf), count)
                chosen[i, mine[0, kept[0]]] = True
        return site.keep_visual(chosen, counts)

    def importance(self, source: Tensor, target: Tensor, place: Tensor | None = None) -> Tensor:
        """``(B, N)`` float32: the most mass that each source sends to one target.

        Args:
            source, target: ``(B, N, C)`` float32.
            place: ``(N, 2)`` float32 rows and columns in [0, 1]; None: places cost nothing.
        """
        n = source.shape[1]
        # Distances do not depend on the origin; from the middle of the targets, products lose little to cancellation.
        origin = target.mean(1, keepdim=True)
        source, target = source - origin, target - origin
        step = max(1, BLOCK // n)
        whole = _distance(source, target) if step >= n else None

        def apart(first: int, end: int) -> Tensor:
            return _distance(source[:, first:end], target) if whole is None else whole[:, first:end]

        most = torch.stack([apart(i, i + step).amax((1, 2)) for i in range(0, n, step)]).amax(0)[:, None, None]
        most = most.clamp_min(torch.finfo(torch.float32).tiny)
        middle = None
        if place is not None:
            middle = (place - 0.5).norm(dim=-1)
            middle = middle / middle.max().clamp_min(torch.finfo(torch.float32).tiny)

        def cost(first: int, end: int) -> Tensor:
            found = self.alpha * apart(first, end) / most
            if place is not None and middle is not None:
                far = (place[first:end].unsqueeze(1) - place).square().sum(-1)
                found = found + self.beta * (1 - torch.exp(-far / (2 * self.sigma**2))) + self.gamma * middle
            return found

        return transport(cost, n, n, eps=self.eps, rounds=self.iterations)

    def select(self, importance: Tensor, count: int) -> Tensor:
        """``(B, count)`` int64 ascending: the most important tokens, and evenly spaced ones of the others.

        Args:
            importance: ``(B, N)``.
            count: how many, at most ``N``.
        """
        n = importance.shape[1]
        back = min(round(count * self.recover), count - 1)
        first = highest(importance, count - back)[0]
        if back == 0:
            return first
        rest = besides(first, n)
        every = rest.shape[1] // back
        return torch.cat([first, rest[:, : every * back : every]], 1).sort(dim=1).values


def _places(site: LayerSite, i: int, columns: Tensor) -> Tensor | None:
    """``(n, 2)`` places of some columns of one sample, each in its own image; None where they are not known."""
    if site.placed:
        place = site.place
        return None if place is None else place[i, columns]
    number = site.image[i, columns]
    count = torch.bincount(number).tolist()
    found = [places(site._grid, n, site.device) for n in count if n]
    if not found or any(one is None for one in found):
        return None
    whole = torch.cat([one for one in found if one is not None])
    return torch.empty_like(whole).index_copy(0, number.argsort(stable=True), whole)


def places(grid: tuple[int, int] | None, n: int, device: torch.device | str | None = None) -> Tensor | None:
    """``(n, 2)`` float32 rows and columns between 0 and 1 of images one after the other; None where they form no grid.

    Args:
        grid: rows and columns of an image; None: square.
        n: tokens.
        device: where they are wanted.
    """
    side = math.isqrt(n)
    rows, columns = (side, side) if grid is None else grid
    if rows * columns == 0 or n % (rows * columns):
        return None
    return grid_places(rows, columns, device).repeat(n // (rows * columns), 1)


def _distance(a: Tensor, b: Tensor) -> Tensor:
    return torch.cdist(a, b, compute_mode="use_mm_for_euclid_dist")
