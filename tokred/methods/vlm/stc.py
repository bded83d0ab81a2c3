"""STC's pruner: of each frame as it comes, the tokens that are far from what the last frames were on average."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tokred.core.checks import check_count, check_share
from tokred.core.reduction import Reduction
from tokred.core.registry import register
from tokred.core.selection import highest
from tokred.vlm.before_llm import VisualSite
from tokred.vlm.causal import CausalMethod, State
from tokred.vlm.tools.greedy import directions
from tokred.vlm.tools.video import apart


@register("stc")
@dataclass(frozen=True)
class STC(CausalMethod):
    """Streaming token compression, the half behind the tower: tokens are ranked by two novelties, and dropped.

    One is the distance (one less the cosine) from the mean of the last frames' means, the other that from the mean of
    the token's own frame. Means are of all tokens of a frame, before it is pruned.

    The half inside the tower, features of unchanged patches that are used again, is the option ``reuse`` of
    :func:`tokred.stream`.

    Args:
        budget: tokens of each frame that stay, a number or a share, at least one; frames that have no more stay
            whole.
        alpha: weight of the distance from the last frames; the distance from the own frame has the rest. The first
            frame has no other.
        window: frames whose means are remembered.

    Source: Accelerating Streaming Video LLMs via Hierarchical Token Compression, CVPR 2026 (arXiv 2512.00891); written
    from its description.
    """

    summary: ClassVar[str] = "of each frame as it comes, what is far from the last frames' mean and from its own"
    source: ClassVar[str] = "STC, CVPR 2026 (arXiv 2512.00891)"

    budget: int | float = 60
    alpha: float = 0.5
    window: int = 8

    def __post_init__(self) -> None:
        super().__post_init__()
        check_share(self.alpha, "alpha", zero=True)
        check_count(self.window, "window", 1)

    def step(self, state: State, site: VisualSite) -> tuple[State, Reduction]:
        """Rank the tokens, then remember the frame's mean."""
        x = site.x.detach().float()
        b, n = x.shape[:2]
        count, mean = self.count(n), x.mean(1, keepdim=True)
        past = torch.cat([state[0], mean], 1) if state else mean
        after = (past[:, -self.window :].contiguous(),)
        if count == n:
            return after, Reduction.identity((b,), n, x.device)
        return after, site.keep(highest(self.novelty(x, state[0] if state else None), count)[0])

    def novelty(self, x: Tensor, history: Tensor | None) -> Tensor:
        """``(B, N)`` float32: the weighted sum of both distances.

        Args:
            x: ``(B, N, C)`` float32.
            history: ``(B, h, C)`` means of the last frames; None: there are none.
        """
        u = directions(x)
        own = apart(u, directions(x.mean(1, keepdim=True)).expand_as(u))
        if history is None:
            return own
        past = apart(u, directions(history.mean(1, keepdim=True)).expand_as(u))
        return self.alpha * past + (1 - self.alpha) * own
