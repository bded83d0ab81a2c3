"""HoliTom: segments in which many places stay the same, one token for each of those; the rest thinned by attention; and
once more inside the language model."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from tokred.core.checks import check_choice, check_count, check_number, check_ratio, check_share
from tokred.core.method import Parameters
from tokred.core.reduction import Reduction
from tokred.core.registry import register
from tokred.core.selection import besides, highest
from tokred.kernels.similarity_rows import best_match
from tokred.methods.vlm.fastv import AttendedBefore
from tokred.vlm.before_llm import VisualSite
from tokred.vlm.frames import ClipMethod, framed
from tokred.vlm.in_llm import LayerSite, check_layer
from tokred.vlm.tools.budget import Budget, as_budget, count_of
from tokred.vlm.tools.cluster import density_peaks
from tokred.vlm.tools.samples import stacked
from tokred.vlm.tools.scores import patch_scores
from tokred.vlm.tools.video import changes, gathered, numbered, shares


@register("holitom")
@dataclass(frozen=True)
class HoliTom(ClipMethod):
    """HoliTom's first stage, between vision tower and language model.

    A place is static from a frame to the next where its tokens are alike. The clip is cut into segments so that the
    most tokens are saved when every place that is static throughout a segment is kept once, as the mean over its
    frames. What that does not save of the budget is saved in space: in every frame the tokens stay that receive most
    of the tower's attention, and the static ones are clustered.

    The second stage, inside the language model, is :class:`tokred.HoliTomLayer`.

    Args:
        budget: tokens left of each clip, an integer or a share in (0, 1]; met up to rounding in every segment and
            frame.
        tau: cosine above which a place is static; the authors have 0.65 for a tenth of the tokens.
        contextual: share of a frame's budget for clusters of the tokens that attention leaves out, in [0, 1].
        beta: what the centre of a cluster counts for, in [0, 1]; the others share the rest. None: all alike.
        neighbours: points that the clusters' density is measured with.
        longest: frames of a segment, at least 2.

    Source: Shao et al., HoliTom, NeurIPS 2025 (arXiv 2505.21334), and its released code.
    """

    summary: ClassVar[str] = "static places of a video's segments once, the rest thinned by attention"
    source: ClassVar[str] = "Shao et al., NeurIPS 2025 (arXiv 2505.21334)"
    example: ClassVar[Parameters] = {"budget": 0.5}
    nothing: ClassVar[Parameters | None] = {"budget": 1.0}

    budget: Budget = 0.15
    tau: float = 0.8
    contextual: float = 0.0
    beta: float | None = 0.6
    neighbours: int = 7
    longest: int = 1024

    def __post_init__(self) -> None:
        super().__post_init__()
        as_budget(self.budget)
        check_number(self.tau, "tau")
        check_share(self.contextual, "contextual", zero=True)
        if self.beta is not None:
            check_share(self.beta, "beta", zero=True)
        check_count(self.neighbours, "neighbours", 1)
        check_count(self.longest, "longest", 2)

    @property
    def reads(self) -> frozenset[str]:
        """Frames of tokens, and what these receive of the tower's attention."""
        return frozenset({"x", "frames", "attention"})

    def kept(self, frames: int, cells: int) -> int:
        """The budget and what rounding may add: one a frame, and half a token a segment."""
        n = frames * cells
        wanted = self.budget if isinstance(self.budget, int) else n * self.budget
        return min(n, math.floor(wanted + 1.5 * frames))

    def count(self, n: int) -> int:
        """The budget, as a number of tokens."""
        return count_of(self.budget, n)

    def choose(self, site: VisualSite) -> Reduction:
        """Each clip by itself: segments, then each segment."""
        x, scores = framed(site), framed(site, patch_scores(site, "received"))
        static = 1 - changes(x) > self.tau
        return stacked([self.clip(*one) for one in zip(x, scores, static.cpu(), strict=True)])

    def clip(self, x: Tensor, scores: Tensor, static: Tensor) -> Reduction:
        """The reduction of one clip.

        Args:
            x: ``(T, N, C)`` float32.
            scores: ``(T, N)``.
            static: ``(T - 1, N)`` bool on the CPU: which places are alike in a frame and the next.
        """
        frames, cells = x.shape[:2]
        n = frames * cells
        saved, segments = segmented(static, self.longest)
        wanted = self.budget if isinstance(self.budget, int) else n * self.budget
        share = min(1.0, wanted / (n - saved))
        root = torch.full((n,), -1, device=x.device)
        weight = torch.ones(n, device=x.device)
        for first, last in segments:
            still = static[first:last].all(0) if last > first else torch.zeros(cells, dtype=torch.bool)
            same, moving = (mask.nonzero().squeeze(1).to(x.device) for mask in (still, ~still))
            frame = torch.arange(first, last + 1, device=x.device).unsqueeze(1)
            some = math.ceil(round(len(moving) * share, 9))
            for part in (self._moving(x, scores, frame, moving, some), self._static(x, frame, same, share)):
                for rows, into, counts in part:
                    root[rows], weight[rows] = into, counts
        return gathered(root, weight)

    def _moving(
        self, x: Tensor, scores: Tensor, frame: Tensor, place: Tensor, some: int
    ) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Tokens of places that change, root and weight of each: ``some`` a frame of ``frame`` ``(L, 1)``."""
        flat = frame * x.shape[1] + place
        best = round(some * (1 - self.contextual))
        rows = highest(scores[frame, place], best)[0]
        chosen = flat.gather(1, rows)
        yield chosen, chosen, torch.ones_like(chosen, dtype=torch.float32)
        if some > best:
            rest = flat.gather(1, besides(rows, flat.shape[1]))
            yield self._clustered(x.flatten(0, 1)[rest], rest, some - best)

    def _static(self, x: Tensor, frame: Tensor, place: Tensor, share: float) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Tokens of static places, root and weight of each: means over the frames, clustered."""
        some = round(round(len(place) * share, 9))
        if some:
            flat = frame * x.shape[1] + place
            _, into, weight = self._clustered(x[frame, place].mean(0, keepdim=True), flat[:1], some)
            yield flat, into.expand_as(flat), (weight / len(frame)).expand_as(flat)

    def _clustered(self, x: Tensor, rows: Tensor, some: int) -> tuple[Tensor, Tensor, Tensor]:
        """``some`` clusters of points ``(G, n, C)``, which are the tokens ``rows`` ``(G, n)``: those, their roots and
        weights."""
        if some >= rows.shape[1]:
            return rows, rows, torch.ones_like(rows, dtype=torch.float32)
        found = density_peaks(x, some, min(self.neighbours, some))
        return rows, rows.gather(1, found.centre).gather(1, found.group), shares(found.group, found.centre, self.beta)


@register("holitom_layer")
@dataclass(frozen=True)
class HoliTomLayer(AttendedBefore):
    """HoliTom's second stage: before one decoder layer, the visual tokens that the prompt's last token attends to stay,
    and each of the others is merged into the most similar of them.

    Args:
        layer: first layer on the reduced set, at least 1; the authors have 18 of 28, and 60 of 80.
        ratio: share of the visual tokens that leave, in [0, 1); ``round(n * (1 - ratio))`` stay, at least one.
        merge: ``"sequential"``: one after the other, in the order of the prompt, each is averaged with what its target
            has become, so that late ones count more, as the released code has it; ``"mean"``: all of a target alike.

    Source: Shao et al., HoliTom, NeurIPS 2025 (arXiv 2505.21334), and its released code.
    """

    summary: ClassVar[str] = "before one decoder layer merge visual tokens into those that the last token attends to"
    source: ClassVar[str] = "Shao et al., NeurIPS 2025 (arXiv 2505.21334)"
    example: ClassVar[Parameters] = {"layer": 2}
    nothing: ClassVar[Parameters | None] = {"layer": 1, "ratio": 0.0}

    layer: int = 18
    ratio: float = 0.5
    merge: Literal["sequential", "mean"] = "sequential"

    def __post_init__(self) -> None:
        check_layer(self.layer)
        check_ratio(self.ratio, "ratio")
        check_choice(self.merge, "merge", ("sequential", "mean"))

    def choose(self, site: LayerSite) -> Reduction:
        """Choose, and merge the others by their hidden states as they come."""
        stays = site.best_visual(site.row_scores(1, of="before"), tuple(self.left(n) for n in site.counts))
        plan = site.keep_columns(stays | ~site.visual)
        if plan.trivial:
            return plan
        slot, lost = plan.index, site.visual & ~stays
        most = int(lost.sum(1).max())
        source, target, weight = [], [], torch.ones(site.shape, device=site.device)
        for i in range(len(lost)):
            columns, into = (mask[i].nonzero().squeeze(1) for mask in (lost, stays))
            found = columns[:0]
            if len(columns):
                found = best_match(site.x[i : i + 1, columns].float(), site.x[i : i + 1, into].float()).index[0]
                weight[i, columns], weight[i, into] = self.weights(found, len(into))
            source.append(F.pad(columns, (0, most - len(columns))))
            target.append(F.pad(slot[i, into][found], (0, most - len(columns)), value=-1))
        rows, slots = torch.stack(source), torch.stack(target)
        return replace(plan, source=rows, target=slots, weight=weight, mode="sum", by_size=False)

    def weights(self, into: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """Weights of merged tokens ``(m,)`` and of their ``count`` targets in the sums that the targets become.

        Args:
            into: ``(m,)`` int64 the target of each merged token, in the order of the prompt.
            count: of targets.
        """
        if self.merge == "mean":
            target = 1 / (1 + into.bincount(minlength=count).float())
            return target[into], target
        members, rank = numbered(into, count)
        # The k-th of m that go to a target is halved with all that come behind it: 2 ** (k - 1 - m).
        return torch.exp2((rank - members[into]).float()), torch.exp2(-members.float())


def segmented(static: Tensor, longest: int) -> tuple[int, list[tuple[int, int]]]:
    """How many tokens are saved at most by keeping static places once a segment, and the first and last frame of each.

    Args:
        static: ``(T - 1, N)`` bool on the CPU.
        longest: frames of a segment.
    """
    frames = len(static) + 1
    # Places that are static from frame s to frame s + 1 + i.
    saves = [static[s : s + longest - 1].cummin(0).values.sum(1).tolist() for s in range(frames - 1)]
    best, begins = [0] * (frames + 1), list(range(frames))
    for i in range(frames):
        best[i + 1] = best[i]
        for s in range(i - 1, max(-1, i - longest), -1):
            gain = best[s] + saves[s][i - s - 1] * (i - s)
            if gain > best[i + 1]:
                best[i + 1], begins[i] = gain, s
    found, last = [], frames - 1
    while last >= 0:
        found.append((begins[last], last))
        last = begins[last] - 1
    return best[-1], found[::-1]
