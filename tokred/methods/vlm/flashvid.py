"""FlashVID: attended and different tokens of every frame stay, the rest joins along trees of likeness through time."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor

from tokred.core.checks import check_choice, check_count, check_number, check_share
from tokred.core.method import Parameters
from tokred.core.reduction import Reduction
from tokred.core.registry import register
from tokred.core.selection import besides, ranked
from tokred.kernels.gather_rows import gather_rows
from tokred.kernels.similarity_rows import best_match
from tokred.vlm.before_llm import VisualSite
from tokred.vlm.frames import ClipMethod, framed
from tokred.vlm.tools.cluster import density_peaks
from tokred.vlm.tools.greedy import directions
from tokred.vlm.tools.samples import stacked
from tokred.vlm.tools.scores import patch_scores
from tokred.vlm.tools.video import cut, frame_similarity, gathered

# Entries of distances that are held at once: frames are taken in blocks of so many.
_BLOCK = 1 << 22


@register("flashvid")
@dataclass(frozen=True)
class FlashVID(ClipMethod):
    """FlashVID before the language model.

    The clip is cut where frames are unlike. Of every frame tokens are picked one by one that are attended to and far
    from those picked before. Each of the others joins the most similar of the frame before where it is alike enough,
    so that trees through time become single tokens, the mean of all their members; and the roots of each frame are
    clustered down to the budget.

    Args:
        budget: share of each frame's tokens that is left, in (0, 1], up to rounding.
        expansion: factor of the budget, at least 1: what a later stage inside the language model takes away again.
        picked: share of a frame's budget that is picked, in [0, 1].
        tau: cosine above which a token joins one of the frame before.
        theta: cosine of the mean tokens of two frames below which a segment ends.
        segments: of a clip, at least, as far as it has frames.
        calibration: what a pick's distance is multiplied with: ``"attention"``, what the token receives in the tower;
            ``"relevance"``: that times its likeness to its segment's mean, where that is positive.
        clusters: ``"roots"``: the value of a cluster is the mean of its roots' values, as the released code has it;
            ``"tokens"``: of all their members.

    Source: FlashVID, ICLR 2026, and its released code.
    """

    summary: ClassVar[str] = "attended, different tokens of a video's frames, and trees of alike ones through time"
    source: ClassVar[str] = "FlashVID, ICLR 2026 (arXiv 2602.08024)"
    example: ClassVar[Parameters] = {"budget": 0.5}
    nothing: ClassVar[Parameters | None] = {"budget": 1.0}

    budget: float = 0.25
    expansion: float = 1.0
    picked: float = 0.7
    tau: float = 0.8
    theta: float = 0.9
    segments: int = 8
    calibration: Literal["attention", "relevance"] = "relevance"
    clusters: Literal["roots", "tokens"] = "roots"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_share(self.budget, "budget")
        if check_number(self.expansion, "expansion") < 1:
            raise ValueError(f"expansion must be at least 1, got {self.expansion!r}")
        check_share(self.picked, "picked", zero=True)
        check_number(self.tau, "tau")
        check_number(self.theta, "theta")
        check_count(self.segments, "segments", 1)
        check_choice(self.calibration, "calibration", ("attention", "relevance"))
        check_choice(self.clusters, "clusters", ("roots", "tokens"))

    @property
    def reads(self) -> frozenset[str]:
        """Frames of tokens, and what these receive of the tower's attention."""
        return frozenset({"x", "frames", "attention"})

    @property
    def drops(self) -> bool:
        """Where all of a budget is picked."""
        return self.picked == 1

    def split(self, cells: int) -> tuple[int, int]:
        """Picked tokens of a frame of ``cells``, and those that the others are joined to, on average."""
        total = min(cells, math.ceil(round(cells * self.budget * self.expansion, 9)))
        some = math.ceil(round(self.picked * total, 9))
        return some, total - some

    def kept(self, frames: int, cells: int) -> int:
        """The frames' budgets, and one a frame more that rounding may add."""
        some, others = self.split(cells)
        return frames * min(cells, some + others + (others > 0))

    def leaving(self, count: int, frames: int, cells: int) -> FlashVID:
        """The same number of each frame, rounded down, one at least."""
        return replace(self, budget=min(1.0, max(1, count // frames) / (cells * self.expansion)))

    def count(self, n: int) -> int:
        """The budget, as a number of tokens."""
        return sum(self.split(n))

    def choose(self, site: VisualSite) -> Reduction:
        """Each clip by itself."""
        x, scores = framed(site), framed(site, patch_scores(site, "received"))
        if sum(self.split(x.shape[2])) == x.shape[2]:
            return Reduction.identity((len(x),), site.shape[1], x.device)
        return stacked([self.clip(*one) for one in zip(x, scores, strict=True)])

    def clip(self, x: Tensor, scores: Tensor) -> Reduction:
        """The reduction of one clip.

        Args:
            x: ``(T, N, C)`` float32.
            scores: ``(T, N)``.
        """
        frames, cells, _ = x.shape
        some, others = self.split(cells)
        parts, mean = cut(frame_similarity(x), self.segments, self.theta), x.mean(1)
        weight = scores.float()
        if self.calibration == "relevance":
            lead = torch.cat([mean[a : b + 1].mean(0).expand(b + 1 - a, -1) for a, b in parts])
            weight = weight * (x * lead.unsqueeze(1)).sum(-1).clamp_min(0)
        rows = picks(x, weight, some).sort(dim=1).values
        left = besides(rows, cells)
        flat = torch.arange(frames * cells, device=x.device).view(frames, cells)
        root = torch.full((frames * cells,), -1, device=x.device)
        share = torch.ones(frames * cells, device=x.device)
        chosen = flat.gather(1, rows).flatten()
        root[chosen] = chosen
        if others and some < cells:
            ids, points = flat.gather(1, left), gather_rows(x, left)
            for a, b in parts:
                own = slice(a, b + 1)
                into, counts = self.joined(points[own], ids[own], others)
                root[ids[own].flatten()], share[ids[own].flatten()] = into, counts
        return gathered(root, share)

    def joined(self, points: Tensor, ids: Tensor, others: int) -> tuple[Tensor, Tensor]:
        """Roots ``(L * U,)``, as tokens of the clip, and weights of a segment's tokens that were not picked.

        Args:
            points: ``(L, U, C)``.
            ids: ``(L, U)`` int64 which tokens these are.
            others: how many are left of a frame, on average.
        """
        length, width, c = points.shape
        tree = trees(points, self.tau, length * (width - others))
        stands = tree == torch.arange(length * width, device=tree.device)
        size = torch.zeros(len(tree), device=tree.device).scatter_add_(
            0, tree, torch.ones_like(tree, dtype=torch.float32)
        )
        value = torch.zeros(len(tree), c, device=tree.device).index_add_(0, tree, points.flatten(0, 1))
        value = value / size.clamp_min(1).unsqueeze(1)
        per_frame = stands.view(length, width).sum(1).tolist()
        # Where each root goes, and the part of it there: roots of different frames never meet.
        share, ends, part = others * length / sum(per_frame), tree.clone(), torch.ones_like(size)
        for t, count in enumerate(per_frame):
            wanted = math.ceil(round(share * count, 9))
            if wanted < count:
                here = t * width + stands[t * width : (t + 1) * width].nonzero().squeeze(1)
                found = density_peaks(value[here][None], wanted, min(wanted, 7))
                group = found.group[0]
                ends[here] = here[found.centre[0]][group]
                one = torch.ones_like(size[here]) if self.clusters == "roots" else size[here]
                total = torch.zeros(wanted, device=tree.device).scatter_add_(0, group, one)
                part[here] = one / total[group]
        return ids.flatten()[ends[tree]], 1 / size[tree] * part[tree]


def picks(x: Tensor, weight: Tensor, count: int) -> Tensor:
    """``(F, count)`` int64: tokens of each frame, in the order in which they are picked.

    The first has the greatest distance to its nearest other token, times its weight; then always the one with the
    greatest distance to the nearest picked one, times its weight. Distances are one less a cosine.

    Args:
        x: ``(F, N, C)``.
        weight: ``(F, N)``, not negative.
        count: 0 to ``N``.
    """
    frames, n = weight.shape
    if count == 0 or n == 1:
        return torch.zeros(frames, min(count, 1), dtype=torch.long, device=x.device)
    step, found = max(1, _BLOCK // n**2), []
    for some in range(0, frames, step):
        u, w = directions(x[some : some + step]), weight[some : some + step]
        far = (1 - u @ u.mT).clamp_min(0)
        far.diagonal(dim1=1, dim2=2).fill_(torch.inf)
        near, taken = far.amin(2), torch.zeros_like(w, dtype=torch.bool)
        order: list[Tensor] = []
        for _ in range(count):
            pick = (w * near).masked_fill(taken, -torch.inf).argmax(1, keepdim=True)
            row = far.gather(1, pick.unsqueeze(2).expand(-1, 1, n)).squeeze(1)
            taken = taken.scatter(1, pick, True)
            # Behind the first pick distances count to picked ones alone.
            near = (torch.minimum(near, row) if order else row).masked_fill(taken, 0)
            order.append(pick)
        found.append(torch.cat(order, 1))
    return torch.cat(found)


def trees(points: Tensor, tau: float, most: int) -> Tensor:
    """``(L * U,)`` int64: the root of each token, itself for roots: where alike ones of the frame before lead to.

    Args:
        points: ``(L, U, C)`` tokens of a segment.
        tau: cosine above which a token has a parent in the frame before, the most similar there.
        most: links, the strongest; of those that are alike the first.
    """
    length, width, _ = points.shape
    own = torch.arange(length * width, device=points.device).view(length, width)
    if length == 1:
        return own.flatten()
    found = best_match(points[1:], points[:-1])
    linked = found.score > tau
    rank = torch.empty_like(own[1:]).flatten()
    order = ranked(found.score.masked_fill(~linked, -torch.inf).flatten())
    rank[order] = torch.arange(len(order), device=order.device)
    linked &= (rank < most).view(length - 1, width)
    root = [own[0]]
    for t in range(1, length):
        root.append(torch.where(linked[t - 1], root[-1][found.index[t - 1]], own[t]))
    return torch.cat(root)
