"""V-CAST: budgets of frames by how sharply the video turns there, tokens by direction and length."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from tokred.core.checks import check_choice, check_number
from tokred.core.method import Parameters
from tokred.core.reduction import Reduction
from tokred.core.registry import register
from tokred.vlm.before_llm import VisualSite
from tokred.vlm.frames import ClipMethod, framed
from tokred.vlm.tools.budget import Budget, as_budget, count_of
from tokred.vlm.tools.greedy import directions
from tokred.vlm.tools.video import chosen, within

EPSILON = 1e-6


@register("vcast")
@dataclass(frozen=True)
class VCAST(ClipMethod):
    """V-CAST: where the path of a video's frames turns, more tokens stay.

    A frame is the direction of its mean token. The turn at a frame is one less the cosine between the steps to it and
    from it; the first and last frame have 1. Budgets are one token each, and the rest in proportion to a softmax of
    the turns. In each frame the tokens stay whose direction is far from the frame's and whose length is large.

    Args:
        budget: tokens kept of each clip, an integer or a share in (0, 1]; at least one a frame.
        temperature: of the softmax over frames, above 0.
        leftover: what rounding down leaves of the budget goes ``"each"``: one by one to the frames with the largest
            fractions (ours, as the paper's proportions ask for), or ``"one"``: all to the frame with the largest,
            until that is whole, as the released code has it.

    Source: V-CAST, 2026, and its released code.
    """

    summary: ClassVar[str] = "budgets of frames by how sharply the video turns, tokens by direction and length"
    source: ClassVar[str] = "V-CAST, 2026 (arXiv 2603.27650)"
    example: ClassVar[Parameters] = {"budget": 0.5}
    nothing: ClassVar[Parameters | None] = {"budget": 1.0}

    budget: Budget = 0.25
    temperature: float = 0.7
    leftover: Literal["each", "one"] = "each"

    def __post_init__(self) -> None:
        super().__post_init__()
        as_budget(self.budget)
        if check_number(self.temperature, "temperature") <= 0:
            raise ValueError(f"temperature must be above 0, got {self.temperature!r}")
        check_choice(self.leftover, "leftover", ("each", "one"))

    def kept(self, frames: int, cells: int) -> int:
        """The budget, at least one a frame; all of a clip of one frame."""
        n = frames * cells
        if frames == 1:
            return n
        if isinstance(self.budget, int):
            return min(n, max(frames, self.budget))
        return min(n, max(frames, round(round(n * self.budget, 9))))

    def count(self, n: int) -> int:
        """The budget, as a number of tokens."""
        return count_of(self.budget, n)

    def choose(self, site: VisualSite) -> Reduction:
        """Budgets, then tokens."""
        x = framed(site)
        b, frames, cells = x.shape[:3]
        total = self.kept(frames, cells)
        if total == frames * cells:
            return Reduction.identity((b,), frames * cells, x.device)
        mean = directions(x.mean(2))
        budgets = self.budgets((turns(mean) / self.temperature).softmax(1), total, cells)
        odd = 1 - (directions(x) * mean.unsqueeze(2)).sum(-1)
        length = torch.linalg.vector_norm(x, dim=-1)
        low, high = length.amin(2, keepdim=True), length.amax(2, keepdim=True)
        rank = within(odd + (length - low) / (high - low + EPSILON))
        return site.keep(chosen((rank < budgets.unsqueeze(2)).flatten(1), total))

    def budgets(self, weight: Tensor, total: int, cells: int) -> Tensor:
        """``(B, T)`` int64 that add up to ``total``, from 1 to ``cells`` each.

        Args:
            weight: ``(B, T)`` of the frames, adding up to 1.
            total: of a clip, ``T`` to ``T * cells``.
            cells: tokens of a frame.
        """
        b, frames = weight.shape
        raw = weight * (total - frames)
        # A hair above, so that a product that is whole but for rounding counts as whole.
        whole = (raw + EPSILON).floor().clamp(max=cells - 1)
        order = (whole - raw).argsort(dim=1, stable=True)
        # A table of all places that are left, in the order in which they are filled.
        room = (cells - 1 - whole).gather(1, order).unsqueeze(2) > torch.arange(cells - 1, device=weight.device)
        turn = room.mT if self.leftover == "each" else room
        left = (total - frames - whole.sum(1)).view(b, 1)
        flat = turn.flatten(1)
        filled = (flat & (flat.cumsum(1) <= left)).view(turn.shape)
        more = filled.sum(1 if self.leftover == "each" else 2)
        return (1 + whole).long().scatter_add(1, order, more)


def turns(mean: Tensor) -> Tensor:
    """``(B, T)`` float32 in [0, 2]: one less the cosine of the steps to and from each frame; 1 at the ends.

    Args:
        mean: ``(B, T, C)`` directions of the frames, two or more.
    """
    step = mean.diff(dim=1)
    norm = torch.linalg.vector_norm(step, dim=-1)
    inner = 1 - (step[:, 1:] * step[:, :-1]).sum(-1) / (norm[:, 1:] * norm[:, :-1]).clamp_min(EPSILON)
    return torch.nn.functional.pad(inner, (1, 1), value=1.0)
