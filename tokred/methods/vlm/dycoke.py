"""DyCoke: of every four frames of a video one stays whole, the others keep what changes most; while it decodes, every
token attends to the visual rows of the cache that it asks for."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor

from tokred.core.checks import check_choice, check_flags, check_number, check_ratio
from tokred.core.method import Parameters
from tokred.core.reduction import Reduction
from tokred.core.registry import register
from tokred.core.selection import best_among
from tokred.vlm.before_llm import VisualSite
from tokred.vlm.decoding import StepMethod, StepSite
from tokred.vlm.frames import ClipMethod, framed
from tokred.vlm.in_llm import check_depth, check_layer
from tokred.vlm.tools.budget import ratio_of
from tokred.vlm.tools.greedy import directions
from tokred.vlm.tools.video import apart, chosen, within


@register("dycoke")
@dataclass(frozen=True)
class DyCoke(ClipMethod):
    """DyCoke's first stage, between vision tower and language model; tokens are dropped, not averaged.

    The second and fourth of four frames are compared with the frame before, the third with the first, always by their
    original tokens at the same place, and keep the ``int((1 - ratio) * N)`` that are least alike.

    The second stage, which chooses rows of the cache anew while it decodes, is :class:`tokred.DyCokeDecode`.

    Args:
        ratio: share of the tokens that leaves a reduced frame, in [0, 1).
        groups: ``"whole"``: as above, to the end of the clip; ``"official"``: as the released code has it, where the
            last four frames keep two whole ones, and the last of an odd number of frames leaves altogether.

    Source: Tao et al., DyCoke, CVPR 2025, and its released code.
    """

    summary: ClassVar[str] = "of four frames of a video one whole, of the others what changes most"
    source: ClassVar[str] = "Tao et al., CVPR 2025 (arXiv 2411.15024)"
    example: ClassVar[Parameters] = {"ratio": 0.5}
    nothing: ClassVar[Parameters | None] = {"ratio": 0.0}

    ratio: float = 0.7
    groups: Literal["whole", "official"] = "whole"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_ratio(self.ratio, "ratio")
        check_choice(self.groups, "groups", ("whole", "official"))

    def counts(self, frames: int, cells: int) -> list[int]:
        """Tokens that stay of each frame."""
        few = int(round((1 - self.ratio) * cells, 9))
        found = [cells if t % 4 == 0 else few for t in range(frames)]
        if self.groups == "official" and frames > 1:
            found = [cells if t % 2 == 0 and t % 4 and t - 2 >= frames - 4 else n for t, n in enumerate(found)]
            if frames % 2:
                found[-1] = 0
        return found

    def kept(self, frames: int, cells: int) -> int:
        """The number that stays, which nothing but the shape decides."""
        return sum(self.counts(frames, cells))

    def leaving(self, count: int, frames: int, cells: int) -> DyCoke:
        """Equal parts for the reduced frames, of what whole ones do not have of it."""
        least = replace(self, ratio=ratio_of(0, cells)).counts(frames, cells)
        few = (count - sum(least)) // max(1, least.count(0))
        return replace(self, ratio=ratio_of(max(0, min(few, cells)), cells))

    def count(self, n: int) -> int:
        """Of many frames: a whole one in four."""
        return max(1, int(n * (1 - 0.75 * self.ratio)))

    def choose(self, site: VisualSite) -> Reduction:
        """Compare each reduced frame with its own."""
        x = framed(site)
        b, frames, cells = x.shape[:3]
        counts = self.counts(frames, cells)
        if sum(counts) == frames * cells:
            return Reduction.identity((b,), frames * cells, x.device)
        with_frame = torch.tensor([max(0, t - (2 if t % 2 == 0 else 1)) for t in range(frames)], device=x.device)
        u = directions(x)
        rank = within(apart(u, u[:, with_frame]))
        limit: Tensor = torch.tensor(counts, device=x.device)
        return site.keep(chosen((rank < limit.view(1, -1, 1)).flatten(1), sum(counts)))


@register("dycoke_decode")
@dataclass(frozen=True)
class DyCokeDecode(StepMethod):
    """DyCoke's second stage: the prompt runs whole, and every generated token attends, from one layer on, to the visual
    rows of the cache alone that it attended to most in the layer before.

    As long as what a token gives to the visual rows is like what the token before gave, that one's rows are attended to
    again. Nothing is deleted, so that a row may come back; and no memory or time is saved, unless ``evict`` is set.

    Args:
        layer: first layer that attends to fewer rows, at least 1.
        ratio: share of the visual rows that is left out, in [0, 1); ``int(n * (1 - ratio))`` stay.
        threshold: cosine of what two tokens in a row give, from which on the second takes the first one's rows over;
            above 1: every token chooses.
        alike: what a token does that is so alike: ``"keep"`` those rows, as the paper has it, or attend to the
            ``"whole"`` cache, as the released code does.
        evict: the first generated token chooses for all, and the other rows are deleted from ``layer`` on.

    Source: Tao et al., DyCoke, CVPR 2025, and its released code.
    """

    summary: ClassVar[str] = "generated tokens attend to the visual rows of the cache that they ask for"
    source: ClassVar[str] = "Tao et al., CVPR 2025 (arXiv 2411.15024)"
    example: ClassVar[Parameters] = {"layer": 2}
    nothing: ClassVar[Parameters | None] = {"layer": 1, "ratio": 0.0}

    layer: int = 3
    ratio: float = 0.7
    threshold: float = 0.9
    alike: Literal["keep", "whole"] = "keep"
    evict: bool = False

    def __post_init__(self) -> None:
        check_layer(self.layer)
        check_ratio(self.ratio, "ratio")
        check_number(self.threshold, "threshold")
        check_choice(self.alike, "alike", ("keep", "whole"))
        check_flags(evict=self.evict)

    def check(self, depth: int) -> None:
        check_depth(self.layer, depth)

    def rows(self, site: StepSite) -> tuple[Tensor, Tensor]:
        """The rows that were attended to most, or those of the token before."""
        few = [int(round(n * (1 - self.ratio), 9)) for n in site.counts]
        new = best_among(site.received, site.visual, few)
        if site.last is None:
            return new, new
        given, chosen = site.last
        again = torch.cosine_similarity(site.received, given, dim=1).unsqueeze(1) >= self.threshold
        handed = torch.where(again, chosen, new)
        return (handed if self.alike == "keep" else torch.where(again, site.visual, new)), handed
