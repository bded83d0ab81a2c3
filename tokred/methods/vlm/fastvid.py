"""FastVID: segments of a video; salient tokens of every frame, and anchors that the rest of their segment goes into."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from tokred.core.checks import check_count, check_number, check_share
from tokred.core.method import Parameters
from tokred.core.overlap import OverlapReduction
from tokred.core.reduction import Reduction
from tokred.core.registry import register
from tokred.core.selection import besides, highest
from tokred.kernels.gather_rows import gather_rows
from tokred.kernels.similarity_rows import best_match
from tokred.vlm.before_llm import VisualSite
from tokred.vlm.frames import ClipMethod, framed
from tokred.vlm.tools.cluster import density_peaks
from tokred.vlm.tools.samples import stacked
from tokred.vlm.tools.scores import patch_scores
from tokred.vlm.tools.video import cut, frame_similarity, numbered


@register("fastvid")
@dataclass(frozen=True)
class FastVID(ClipMethod):
    """FastVID: dynamic segments, salient tokens, density-based merging.

    The clip is cut where frames are unlike. Of every frame the most salient tokens stay as they are. In the last frame
    of a segment, and every so many before it, the densest of the others that lie apart are anchors; all other tokens
    of the segment go into the most similar anchor of each of those frames.

    Frames are compared by their mean token, and tokens are salient by what they receive of the tower's attention: the
    authors' fallback, since hosts do not run the pooling head of their towers.

    Args:
        budget: share of each frame's tokens that is left, in (0, 1]; at least one token a frame.
        segments: of a clip, at least, as far as it has frames.
        tau: cosine of two frames below which a segment ends.
        context: share of a frame's budget that goes to anchors, in [0, 1].
        step: frames from one with anchors to the next.
        beta: what an anchor counts for in its new value; its members, itself among them, share the rest.
        neighbours: points that density is measured with.

    Source: Shen et al., FastVID, NeurIPS 2025, and its released code.
    """

    summary: ClassVar[str] = "salient tokens of a video's frames, and anchors that their segment goes into"
    source: ClassVar[str] = "Shen et al., NeurIPS 2025 (arXiv 2503.11187)"
    example: ClassVar[Parameters] = {"budget": 0.5}
    nothing: ClassVar[Parameters | None] = {"budget": 1.0}

    budget: float = 0.1
    segments: int = 8
    tau: float = 0.9
    context: float = 0.4
    step: int = 4
    beta: float = 0.6
    neighbours: int = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        check_share(self.budget, "budget")
        check_share(self.context, "context", zero=True)
        check_share(self.beta, "beta", zero=True)
        check_number(self.tau, "tau")
        for name in ("segments", "step", "neighbours"):
            check_count(getattr(self, name), name, 1)

    @property
    def reads(self) -> frozenset[str]:
        """Frames of tokens, and what these receive of the tower's attention."""
        return frozenset({"x", "frames", "attention"})

    @property
    def drops(self) -> bool:
        """Where there are no anchors."""
        return self.context == 0

    def split(self, cells: int) -> tuple[int, int]:
        """Salient tokens of a frame of ``cells``, and its share of anchors."""
        total = max(1, int(round(cells * self.budget, 9)))
        context = int(round(total * self.context, 9))
        return total - context, context

    def anchors(self, frames: int, cells: int) -> tuple[list[int], int]:
        """Frames of a segment that have anchors, and how many each has."""
        salient, context = self.split(cells)
        some = [t for t in range(frames) if (frames - 1 - t) % self.step == 0]
        return some, min(context * frames // len(some), cells - salient)

    def kept(self, frames: int, cells: int) -> int:
        """The frames' budgets; where a segment cannot share its anchors out evenly, fewer."""
        return frames * sum(self.split(cells))

    def leaving(self, count: int, frames: int, cells: int) -> FastVID:
        """The same number of each frame, rounded down."""
        return replace(self, budget=min(1.0, (count // frames + 0.5) / cells))

    def count(self, n: int) -> int:
        """The budget, as a number of tokens."""
        return max(1, int(round(n * self.budget, 9)))

    def choose(self, site: VisualSite) -> Reduction:
        """Each clip by itself."""
        x, scores = framed(site), framed(site, patch_scores(site, "received"))
        if self.kept(*x.shape[1:3]) == site.shape[1]:
            return Reduction.identity((len(x),), site.shape[1], x.device)
        return stacked([self.clip(*one) for one in zip(x, scores, strict=True)])

    def clip(self, x: Tensor, scores: Tensor) -> Reduction:
        """The reduction of one clip.

        Args:
            x: ``(T, N, C)`` float32.
            scores: ``(T, N)``.
        """
        frames, cells, c = x.shape
        n, salient = frames * cells, self.split(cells)[0]
        flat = torch.arange(n, device=x.device).view(frames, cells)
        best = highest(scores, salient)[0]
        rest = besides(best, cells)
        own = flat.gather(1, best).view(-1, 1)
        slots = [(own, torch.ones_like(own, dtype=torch.float32))]
        for first, last in cut(frame_similarity(x), self.segments, self.tau):
            with_anchors, some = self.anchors(last + 1 - first, cells)
            if some:
                left, ids = rest[first : last + 1], flat[first : last + 1].gather(1, rest[first : last + 1])
                points = gather_rows(x[first : last + 1], left)
                for t in with_anchors:
                    centre = density_peaks(points[t : t + 1], some, self.neighbours).centre[0]
                    into = best_match(points.view(1, -1, c), points[t : t + 1, centre]).index[0]
                    slots.append(self.slots(ids[t, centre], into, ids.flatten()))
        return overlapping(slots, n)

    def slots(self, anchor: Tensor, into: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Members ``(A, 1 + K)`` of the slots of some anchors, each first, and what they count for.

        Args:
            anchor: ``(A,)`` int64 token of each.
            into: ``(m,)`` int64 the anchor that each of the rest goes into.
            ids: ``(m,)`` int64 which tokens these are.
        """
        members, rank = numbered(into, len(anchor))
        member = anchor.unsqueeze(1).repeat(1, 1 + int(members.max()))
        share = torch.zeros(member.shape, device=into.device)
        member[into, 1 + rank] = ids
        share[into, 1 + rank] = ((1 - self.beta) / members)[into]
        # Of two like anchors the second has no members, not even itself.
        share[:, 0] = torch.where(members > 0, self.beta, 1.0)
        return member, share


def overlapping(slots: list[tuple[Tensor, Tensor]], n: int) -> OverlapReduction:
    """The reduction of one clip of ``n`` tokens whose slots are sums of members ``(M, K)`` with shares, the first of
    which stands for the slot; several groups of slots, each as wide as it needs."""
    widest = max(member.shape[1] for member, _ in slots)
    pad = torch.nn.functional.pad
    member = torch.cat([pad(m, (0, widest - m.shape[1])) for m, _ in slots])
    share = torch.cat([pad(s, (0, widest - s.shape[1])) for _, s in slots])
    rows, order = member[:, 0].sort()
    member, share = member[order], share[order]
    place = torch.arange(n, device=rows.device)
    # The first slot of every token that stands for none; one slot more takes what is no member.
    slot = torch.arange(len(rows), device=rows.device).unsqueeze(1).expand_as(member)
    first = torch.full((n + 1,), len(rows), device=rows.device)
    first = first.scatter_reduce(0, torch.where(share > 0, member, n).flatten(), slot.flatten(), "amin")[:n]
    target = torch.where(first < len(rows), first, -1).scatter(0, rows, -1)
    return OverlapReduction(
        rows[None], place[None], target[None], n, mode="sum", by_size=False, member=member[None], share=share[None]
    )
