"""PruneVid: static places of a video's segments become one token, and what is alike in a frame clusters; inside the
language model the question's attention then keeps a share of each set."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import groupby
from typing import ClassVar

import torch
from torch import Tensor

from tokred.core.checks import check_count, check_flags, check_number, check_share
from tokred.core.method import Parameters
from tokred.core.place import Place
from tokred.core.reduction import Reduction
from tokred.core.registry import register
from tokred.core.selection import ranked
from tokred.methods.vlm.fastv import AttendedBefore
from tokred.vlm.before_llm import VisualSite
from tokred.vlm.frames import ClipMethod, framed
from tokred.vlm.in_llm import LayerSite, check_layer
from tokred.vlm.tools.cluster import density_peaks
from tokred.vlm.tools.greedy import directions
from tokred.vlm.tools.samples import stacked
from tokred.vlm.tools.scores import peaks, question_rows
from tokred.vlm.tools.video import gathered, numbered

# The set of each token, by its name in ``site.rows``.
_SET = "prunevid"


@register("prunevid")
@dataclass(frozen=True)
class PruneVid(ClipMethod):
    """PruneVid before the language model.

    Frames are clustered by their mean tokens, and runs of a cluster are segments. A place whose tokens are alike in all
    pairs of a segment's frames, on average, is static and becomes their mean. The static places of a segment, and the
    others of each frame, are then clustered, each cluster its mean.

    The second stage, inside the language model, is :class:`tokred.PruneVidLayer`.

    Args:
        tau: mean cosine above which a place is static; 1 or more: none is.
        segments: clusters of frames, as a share of the frames, in (0, 1].
        clusters: of tokens, as a share of them, in (0, 1]; 1: none are made.
        neighbours: points that density is measured with.
        least: sets of so many tokens or fewer are not clustered.

    Source: Huang et al., PruneVid, Findings of ACL 2025, section 3.
    """

    summary: ClassVar[str] = "static places of a video's segments become one token, alike ones of a frame cluster"
    source: ClassVar[str] = "Huang et al., ACL 2025 Findings (arXiv 2412.16117)"
    example: ClassVar[Parameters] = {"clusters": 0.5, "least": 2}
    nothing: ClassVar[Parameters | None] = {"tau": 1.0, "clusters": 1.0}

    tau: float = 0.8
    segments: float = 0.25
    clusters: float = 0.5
    neighbours: int = 7
    least: int = 14

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number(self.tau, "tau")
        check_share(self.segments, "segments")
        check_share(self.clusters, "clusters")
        check_count(self.neighbours, "neighbours", 1)
        check_count(self.least, "least", 1)

    @property
    def reads(self) -> frozenset[str]:
        """Frames of tokens, and that the set of each goes on with it."""
        return frozenset({"x", "frames", "carried"})

    def kept(self, frames: int, cells: int) -> int:
        """The most that any number of static places leaves, which two frames or more share."""
        shared = (self.left(same) / 2 + self.left(cells - same) for same in range(1, cells + 1))
        return math.floor(frames * max(self.left(cells), *shared))

    def left(self, n: int) -> int:
        """Tokens that are left of a set of ``n``."""
        return n if n <= self.least else max(1, int(round(n * self.clusters, 9)))

    def count(self, n: int) -> int:
        """Of many tokens a frame."""
        return self.left(n)

    def acts(self, n: int, place: Place) -> bool:
        """Unless nothing is static and nothing is clustered."""
        return n > 1 and (self.clusters < 1 or self.tau < 1)

    def choose(self, site: VisualSite) -> Reduction:
        """Each clip by itself; the set of each token is written down for the second stage."""
        found = [self.clip(one) for one in framed(site)]
        site.rows[_SET] = torch.stack([sets for _, sets in found])
        return stacked([step for step, _ in found])

    def clip(self, x: Tensor) -> tuple[Reduction, Tensor]:
        """The reduction of one clip ``(T, N, C)`` float32, and ``(T * N,)`` int64 which set each token is of."""
        frames, cells = x.shape[:2]
        flat = torch.arange(frames * cells, device=x.device).view(frames, cells)
        root = torch.full((frames * cells,), -1, device=x.device)
        # Numbered by frames: what moves in one, and what stays the same in the segment that begins with one.
        sets = 2 * torch.arange(frames, device=x.device).unsqueeze(1).repeat(1, cells) + 1
        for first, last in self.runs(x):
            some = x[first : last + 1]
            still = steady(some) > self.tau if self.tau < 1 and last > first else torch.zeros(cells, dtype=torch.bool)
            same, moving = (mask.nonzero().squeeze(1).to(x.device) for mask in (still, ~still))
            own = flat[first : last + 1]
            sets[first : last + 1, same] = 2 * first
            if len(same):
                # All frames of a place go with it, to where its cluster stands in the first.
                root[own[:, same]] = own[0, same][self.grouped(some[:, same].mean(0, keepdim=True))].expand(
                    len(own), -1
                )
            if len(moving):
                root[own[:, moving]] = own[:, moving].gather(1, self.grouped(some[:, moving]))
        return gathered(root), sets.flatten()

    def grouped(self, x: Tensor) -> Tensor:
        """``(G, n)`` int64: for each point of ``(G, n, C)`` the one that stands for its cluster."""
        groups, n = x.shape[:2]
        some = self.left(n)
        if some == n:
            return torch.arange(n, device=x.device).expand(groups, -1)
        found = density_peaks(x, some, min(self.neighbours, n))
        return found.centre.gather(1, found.group)

    def runs(self, x: Tensor) -> list[tuple[int, int]]:
        """First and last frame of each segment of a clip ``(T, N, C)``; waits for the device."""
        frames = len(x)
        some = max(1, int(round(frames * self.segments, 9)))
        labels = refined(density_peaks(x.mean(1)[None], some, min(self.neighbours, frames)).group[0].tolist())
        return [(start, start + length - 1) for _, start, length in _runs(labels)]


@register("prunevid_layer")
@dataclass(frozen=True)
class PruneVidLayer(AttendedBefore):
    """PruneVid inside the language model: the question's attention keeps a share of every set of tokens.

    Sets are those of :class:`tokred.PruneVid` before the language model: the static tokens of each segment, and the
    others of each frame. Without it every frame of a clip is a set, and every image.

    Args:
        layer: first layer on the reduced set, at least 1; the authors prune behind their layer 10, which is 11 here.
        alpha: share of each set that stays, rounded down, in (0, 1]; of each picture at least one token does.
        evict: free what leaves in the caches of earlier layers too, once the prompt has run, so that all layers hold
            rows of the same tokens.

    Source: Huang et al., PruneVid, Findings of ACL 2025, section 3.
    """

    summary: ClassVar[str] = "before one decoder layer keep a share of each set of tokens, by the question's attention"
    source: ClassVar[str] = "Huang et al., ACL 2025 Findings (arXiv 2412.16117)"
    example: ClassVar[Parameters] = {"layer": 2}
    nothing: ClassVar[Parameters | None] = {"layer": 1, "alpha": 1.0}

    layer: int = 11
    alpha: float = 0.4
    evict: bool = True

    def __post_init__(self) -> None:
        check_layer(self.layer)
        check_share(self.alpha, "alpha")
        check_flags(evict=self.evict)

    @property
    def reads(self) -> frozenset[str]:
        """Hidden states, rows of the attention of the layer before, and the set of each token."""
        return super().reads | {"carried"}

    @property
    def evicts(self) -> bool:
        """As asked for, where anything leaves."""
        return self.evict and self.alpha < 1

    def left(self, n: int) -> int:
        """Of one set."""
        return max(1, int(round(n * self.alpha, 9))) if n else 0

    def choose(self, site: LayerSite) -> Reduction:
        """Keep what any token of the question attends to most in any head, of each set."""
        scores, stays = peaks(site, question_rows(site), of="before"), torch.zeros_like(site.visual)
        sets = 2 * site.moment[..., 0] + 1
        if _SET in site.rows:
            sets = torch.where(site.rows[_SET] < 0, sets, site.rows[_SET])
        # More than there are sets of any picture.
        key = site.image * (2 * site.moment[..., 0].max() + 3) + sets
        for i, mine in enumerate(site.visual):
            at = mine.nonzero().squeeze(1)
            at = at[ranked(scores[i, at][None])[0]]
            chosen = self.first(key[i, at])
            picture = site.image[i, at].unique(return_inverse=True)[1]
            some = picture.new_zeros(len(at)).index_add(0, picture, chosen.long())
            _, rank = numbered(picture, len(at))
            stays[i, at] = chosen | ((rank == 0) & (some[picture] == 0))
        return site.keep_visual(stays)

    def first(self, sets: Tensor) -> Tensor:
        """``(n,)`` bool: the first share of each set, rounded down.

        Args:
            sets: ``(n,)`` int64, the set of each token, the best of all tokens first.
        """
        group = sets.unique(return_inverse=True)[1]
        members, rank = numbered(group, len(sets))
        found: Tensor = rank < (members.double() * self.alpha + 5e-10).long()[group]
        return found


def steady(x: Tensor) -> Tensor:
    """``(N,)`` float32: the mean cosine of all pairs of different frames at each place of ``(W, N, C)``."""
    w, u = len(x), directions(x)
    # The square of the sum has all ordered pairs in it, those of a frame with itself too.
    own = u.square().sum(-1).sum(0)
    total: Tensor = u.sum(0).square().sum(-1) - own
    return total / (w * (w - 1))


def refined(labels: list[int]) -> list[int]:
    """Labels of frames in runs: of each cluster its longest run stays, unless that is a single frame; frames between
    take the label of the longer neighbouring run, the left one where they are alike, 0 where there is none."""
    runs = _runs(labels)
    longest = {label: max(n for other, _, n in runs if other == label) for label in set(labels)}
    stays = [(start, n) for label, start, n in runs if n == longest[label] > 1]
    found: list[int | None] = [None] * len(labels)
    for start, n in stays:
        found[start : start + n] = labels[start : start + n]
    where = 0
    while where < len(found):
        if found[where] is not None:
            where += 1
            continue
        end = where
        while end < len(found) and found[end] is None:
            end += 1
        left, right = found[where - 1] if where else None, found[end] if end < len(found) else None
        fill = _longer(left, _length(found[:where][::-1]), right, _length(found[end:]))
        found[where:end] = [fill] * (end - where)
        where = end
    return [0 if label is None else label for label in found]


def _runs(labels: list[int]) -> list[tuple[int, int, int]]:
    """Label, start and length of each run."""
    found, start = [], 0
    for label, run in groupby(labels):
        length = len(list(run))
        found.append((label, start, length))
        start += length
    return found


def _length(labels: list[int | None]) -> int:
    """Of the run that they begin with."""
    return next((i for i, label in enumerate(labels) if label != labels[0]), len(labels))


def _longer(left: int | None, before: int, right: int | None, behind: int) -> int:
    if left is None or right is None:
        only = right if left is None else left
        return 0 if only is None else only
    return left if before >= behind else right
