"""EarlyTom: like frames of a clip become one inside the vision tower, and tokens of still and of changing frames are
chosen apart."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tokred.core.checks import check_blocks, check_count, check_flags, check_number, check_share
from tokred.core.method import Parameters
from tokred.core.place import MANY, Place
from tokred.core.reduction import Reduction
from tokred.core.registry import register
from tokred.core.selection import highest
from tokred.vlm.before_llm import VisualSite
from tokred.vlm.frames import cells_of
from tokred.vlm.shots import FrameMerger, Segments, Shots
from tokred.vlm.tools.budget import Budget, as_budget, count_of
from tokred.vlm.tools.greedy import directions
from tokred.vlm.tools.samples import stacked
from tokred.vlm.tools.video import gathered

Similar = Callable[[int, int], float]
# Cosines that differ by less are alike, so that equal frames merge in one way on every device.
CLOSE = 1e-6


@register("earlytom")
@dataclass(frozen=True)
class EarlyTom(FrameMerger):
    """EarlyTom: behind some blocks of the vision tower a clip is cut into segments of like frames, and neighbours in
    the middle of a segment become one, so that later blocks run on fewer frames. Before the language model the first
    and last frame of a segment keep the tokens that receive most of the tower's attention, those between them the best
    of every stretch of the frame.

    Args:
        budget: tokens left of each clip, an integer or a share in (0, 1]; met up to rounding in every frame.
        layers: blocks of the tower behind which frames merge, 0-based; the scores are the attention of the last.
        tau: a segment ends where a frame's running similarity to the segment's first falls below it; above 1 no frame
            is like another, and none merges.
        longest: frames of a segment at most (the authors' number less one); where it is less than 4 nothing merges.
        smooth: what the new frame counts for in the running similarity, in (0, 1].
        official: as the released code has it: of every segment of four or more frames one is lost, and equal
            similarities are told apart by rounding.

    Source: EarlyTom, CVPR 2026 (arXiv 2605.30010), and its released code.
    """

    summary: ClassVar[str] = "like frames become one inside the tower, then the best of still and of changing frames"
    source: ClassVar[str] = "CVPR 2026 (arXiv 2605.30010)"
    example: ClassVar[Parameters] = {"budget": 0.5, "layers": (0,)}
    nothing: ClassVar[Parameters | None] = {"budget": 1.0, "layers": (0,), "tau": 2.0}

    budget: Budget = 0.2
    layers: tuple[int, ...] = (8, 21, 23)
    tau: float = 0.5
    longest: int = 5
    smooth: float = 0.9
    official: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        as_budget(self.budget)
        found = check_blocks(self.layers, "layers")
        if not found:
            raise ValueError("layers must name at least one block of the vision tower, such as (8, 21, 23)")
        object.__setattr__(self, "layers", tuple(sorted({*found})))
        check_number(self.tau, "tau")
        check_count(self.longest, "longest", 1)
        check_share(self.smooth, "smooth")
        check_flags(official=self.official)

    def kept(self, frames: int, cells: int) -> int:
        """The budget, and what rounding may add: one token a frame."""
        n = frames * cells
        wanted = self.budget if isinstance(self.budget, int) else n * self.budget
        return min(n, math.floor(wanted + frames))

    def count(self, n: int) -> int:
        """The budget, as a number of tokens."""
        return count_of(self.budget, n)

    def acts(self, n: int, place: Place) -> bool:
        """Unless the settings keep all tokens and merge no frames."""
        return n > 1 and (self.count(MANY) < MANY or (self.tau <= 1 and self.longest >= 4))

    # ------------------------------------------------------------------ inside the tower

    def merge_frames(self, x: Tensor) -> Reduction:
        """Neighbours in the middle of each segment."""
        similar = similarities(x, self.longest)
        root, weight = list(range(len(x))), [1.0] * len(x)
        for first, last in running(similar, len(x), self.tau, self.longest, self.smooth):
            for frame, into, share in middle(similar, first, last, official=self.official):
                root[frame], weight[frame] = into, share
        if root == list(range(len(x))):
            return Reduction.identity((1,), len(x), x.device)
        return gathered(torch.tensor(root, device=x.device), torch.tensor(weight, device=x.device))

    def segments(self, x: Tensor) -> Segments:
        """Of the frames that are left, cut once more."""
        return tuple(running(similarities(x, self.longest), len(x), self.tau, self.longest, self.smooth))

    # ------------------------------------------------------------------ before the language model

    def choose(self, site: VisualSite) -> Reduction:
        """Each clip by itself."""
        return stacked([self.clip(shots, cells_of(site)) for shots in site.shots])

    def clip(self, shots: Shots, cells: int) -> Reduction:
        """The reduction of one clip.

        Args:
            shots: what became of its ``T`` frames in the tower, with scores.
            cells: tokens of a frame.
        """
        assert shots.scores is not None  # of every site
        device, frames, first = shots.scores.device, len(shots.root), shots.first
        n = frames * cells
        share = self.budget / n if isinstance(self.budget, int) else self.budget
        share = min(1.0, share * frames / len(first))
        still = torch.zeros(len(first), dtype=torch.bool)
        for begin, end in shots.segments:
            still[begin + 1 : end] = True
        keep = torch.zeros(len(first), cells, dtype=torch.bool, device=device)
        for rows, chosen in ((~still, self._changing), (still, self._still)):
            at = rows.nonzero().squeeze(1).to(device)
            if len(at):
                keep[at.unsqueeze(1), chosen(shots.scores[at], share)] = True
        # A token of a frame that went into another lives on in that frame's token of its place.
        into, place = shots.root.unsqueeze(1), torch.arange(cells, device=device)
        stays = (into >= 0) & keep[shots.slot]
        if len(first) == frames and bool(keep.all()):
            return Reduction.identity((1,), n, device)
        root = torch.where(stays, into * cells + place, -1)
        return gathered(root.flatten(), shots.weight.repeat_interleave(cells))

    def _changing(self, scores: Tensor, share: float) -> Tensor:
        """``(t, k)`` the best tokens of frames ``(t, N)`` that begin or end a segment."""
        return highest(scores, math.ceil(round(scores.shape[1] * share, 9)))[0]

    def _still(self, scores: Tensor, share: float) -> Tensor:
        """``(t, k)`` the best token of each stretch of frames ``(t, N)`` in the middle of a segment."""
        return windowed(scores, max(1, round(round(scores.shape[1] * share, 9))))


def similarities(x: Tensor, longest: int) -> Similar:
    """The similarity of two frames, the earlier one first: the mean over all places of the cosine of their tokens.

    Args:
        x: ``(T, S, C)``; waits for the device.
        longest: frames further apart are not asked about; one more than that are known.
    """
    frames, reach = len(x), min(longest, len(x) - 1)
    unit = directions(x.detach()).transpose(0, 1).contiguous()
    # Products of some frames and of those within reach: of long clips not all pairs.
    some, rows = max(16, reach), []
    for begin in range(0, frames, some):
        near = unit[:, begin : begin + some + reach]
        rows += torch.bmm(unit[:, begin : begin + some], near.mT).mean(0).tolist()
    return lambda i, j: float(rows[i][j - i // some * some])


def running(similar: Similar, frames: int, tau: float, longest: int, smooth: float) -> list[tuple[int, int]]:
    """First and last frame of each segment, as frames come: one ends before the frame at which the running similarity
    to its first frame is below a threshold, or which would be one too many.

    Args:
        similar: of two frames.
        frames: how many.
        tau: the threshold.
        longest: frames of a segment.
        smooth: what a frame counts for in the running similarity.
    """
    found, start, known = [], 0, 1.0
    for i in range(1, frames):
        known = smooth * similar(start, i) + (1 - smooth) * known
        if known < tau or i - start >= longest:
            found.append((start, i - 1))
            start, known = i, 1.0
    return [*found, (start, frames - 1)]


def middle(similar: Similar, first: int, last: int, *, official: bool = False) -> list[tuple[int, int, float]]:
    """Frames in the middle of a segment that become one, or are lost: frame, the one that it goes into (-1: none), and
    its share in it. Frames of which nothing is said stay as they are.

    Two neighbours become one where they are more alike than the segment's ends, and no less than the second of them is
    like the next.

    Args:
        similar: of two frames.
        first, last: frame of the segment.
        official: see :class:`EarlyTom`.
    """
    tau, close, found = similar(first, last), 0.0 if official else CLOSE, []
    end, k = last - 1, first + 1
    while k < end:
        own, final = similar(k, k + 1), k + 1 == end
        after = 0.0 if final else similar(k + 1, k + 2)
        if own > tau - close and (final or own > after - close):
            if final:
                share = 1.0 if official else 0.5
            else:
                # Shares are of what both have in common: none of frames that point apart.
                a, b = max(own, 0.0), max(after, 0.0)
                share = a / (a + b) if a + b else 0.5
            found += [(k, k, share), (k + 1, k, 1 - share)]
            k += 2
        else:
            k += 1
    if official and k == end > first + 1:
        found.append((end, -1, 0.0))
    return found


def windowed(scores: Tensor, count: int) -> Tensor:
    """``(t, count)`` int64 ascending: the best place of each of ``count`` stretches of consecutive places, the first
    ones a place longer where they do not divide; ties to the lower place.

    Args:
        scores: ``(t, N)``.
        count: at least 1, at most ``N``.
    """
    n = scores.shape[1]
    length, longer = divmod(n, count)
    number = torch.arange(count, device=scores.device)
    start = number * length + number.clamp_max(longer)
    at = start.unsqueeze(1) + torch.arange(length + 1, device=scores.device)
    inside = torch.arange(length + 1, device=scores.device) < length + (number < longer).long().unsqueeze(1)
    seen = scores[:, at.clamp_max(n - 1)].masked_fill(~inside, -torch.inf)
    best = highest(seen.flatten(0, 1), 1)[0].view(len(scores), count)
    return start + best
