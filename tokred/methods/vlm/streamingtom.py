"""StreamingTOM's temporal reduction: one number of tokens a frame, shared between what moved and what did not."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from tokred.core.checks import check_choice, check_number
from tokred.core.reduction import Reduction
from tokred.core.registry import register
from tokred.core.selection import ranked
from tokred.vlm.before_llm import ProjectorMethod, VisualSite
from tokred.vlm.causal import CausalMethod, State
from tokred.vlm.tools.cluster import density_peaks
from tokred.vlm.tools.greedy import directions
from tokred.vlm.tools.samples import stacked
from tokred.vlm.tools.video import apart, gathered

NEIGHBOURS = 7


@register("streamingtom")
@dataclass(frozen=True)
class StreamingTOM(CausalMethod):
    """Causal temporal reduction: the first stage of StreamingTOM, between vision tower and language model.

    A token is static where its cosine with the same place of the frame before, as that was before its reduction, is
    above ``tau``. Static and dynamic tokens share the budget in proportion. Of the dynamic ones those stay that receive
    most of the tower's attention; the static ones are clustered (density peaks) into means. The first frame is dynamic.

    The second stage, the memory of four bits, is ``"streamingtom_cache"``.

    Args:
        budget: tokens of each frame that stay, a number or a share, at least one; frames that have no more stay
            whole.
        tau: cosine above which a token is static; 1: none is.
        saliency: of dynamic tokens: ``"attention"``, what they receive in the tower; ``"norm"``, how long their
            features are, which needs no attention.

    Source: StreamingTOM, CVPR 2026 (arXiv 2510.18269); written from its description.
    """

    summary: ClassVar[str] = "of each frame as it comes, the salient of what moved, and clusters of what did not"
    source: ClassVar[str] = "StreamingTOM, CVPR 2026 (arXiv 2510.18269)"

    tau: float = 0.9
    saliency: Literal["attention", "norm"] = "attention"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number(self.tau, "tau")
        check_choice(self.saliency, "saliency", ("attention", "norm"))

    @property
    def reads(self) -> frozenset[str]:
        """The tower's attention where saliency is that."""
        return super().reads | ({"attention"} if self.saliency == "attention" else frozenset())

    def variants(self) -> Iterator[tuple[str, ProjectorMethod]]:
        """The length of features, where the tower's attention is not at hand."""
        if self.saliency == "attention":
            yield "saliency='norm'", StreamingTOM(self.budget, self.tau, "norm", positions=self.positions)

    def step(self, state: State, site: VisualSite) -> tuple[State, Reduction]:
        """Each sample by itself; waits for the device."""
        x = site.x.detach().float()
        b, n = x.shape[:2]
        count = self.count(n)
        if count == n:
            return (x,), Reduction.identity((b,), n, x.device)
        score = site.column_scores().mean(1) if self.saliency == "attention" else x.norm(dim=-1)
        if state:
            u, v = directions(x), directions(state[0])
            still = apart(u, v) < 1 - self.tau
        else:
            still = torch.zeros(b, n, dtype=torch.bool, device=x.device)
        return (x,), stacked([self.frame(x[i], score[i], still[i], count) for i in range(b)])

    def frame(self, x: Tensor, score: Tensor, still: Tensor, count: int) -> Reduction:
        """The reduction of one frame of one stream.

        Args:
            x: ``(N, C)`` float32.
            score: ``(N,)`` saliency.
            still: ``(N,)`` bool, which tokens are static.
            count: tokens that stay, fewer than ``N``.
        """
        n = len(x)
        static, moving = still.nonzero().squeeze(1), (~still).nonzero().squeeze(1)
        # Half and more of a token is one, in whole numbers.
        few = (2 * count * len(static) + n) // (2 * n)
        best = moving[ranked(score[moving])[: count - few]]
        root = torch.full((n,), -1, device=x.device)
        root[best] = best
        if few:
            found = density_peaks(x[static][None], few, min(few, NEIGHBOURS))
            root[static] = static[found.centre[0]][found.group[0]]
        return gathered(root)
