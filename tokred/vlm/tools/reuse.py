"""Features of a tower that are used again: between reference frames only the patches that changed most are computed."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tokred.core.checks import check_count, check_ratio
from tokred.core.selection import highest
from tokred.vlm.tools.greedy import directions
from tokred.vlm.tools.video import apart


@dataclass(frozen=True)
class Reuse:
    """STC's cacher: how often a frame is computed as a whole, and how much of the others is taken from it.

    Args:
        share: of the tokens of a frame that are taken from the reference frame, in each block, in [0, 1).
        interval: every so many frames one is a reference, the first included; 1: every frame is.

    Source: Accelerating Streaming Video LLMs via Hierarchical Token Compression, CVPR 2026 (arXiv 2512.00891); written
    from its description.
    """

    share: float = 0.75
    interval: int = 4

    def __post_init__(self) -> None:
        check_ratio(self.share, "share")
        check_count(self.interval, "interval", 1)

    def refers(self, frame: int) -> bool:
        """True for a frame, counted from 0, that is a reference."""
        return frame % self.interval == 0

    def count(self, tokens: int) -> int:
        """Tokens that are computed anew, rounded down."""
        return int(round((1 - self.share) * tokens, 9))

    def stale(self, keys: Tensor, reference: Tensor, prefix: int = 0) -> Tensor:
        """``(B, k)`` int64 ascending: the tokens that are computed anew, those least like they were; ties to the lower.

        Args:
            keys: ``(B, S, C)`` of this frame, all heads joined.
            reference: the same of the reference frame.
            prefix: first tokens that are no patches (class token, registers), which are always among them.
        """
        s = keys.shape[1]
        count = self.count(s)
        changed = apart(directions(keys.detach()), directions(reference))
        if prefix:
            changed = torch.cat([torch.full_like(changed[:, :prefix], torch.inf), changed[:, prefix:]], 1)
            count = max(count, prefix)
        return highest(changed, count)[0]
