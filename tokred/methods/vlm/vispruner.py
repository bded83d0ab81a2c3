"""VisPruner: important image tokens by the class token's attention, and different ones among the rest."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tokred.core.checks import check_choice, check_count, check_share
from tokred.core.reduction import Reduction
from tokred.core.registry import register
from tokred.core.selection import ranked
from tokred.kernels.gather_rows import gather_rows
from tokred.kernels.similarity_rows import best_match
from tokred.vlm.before_llm import Budgeted, VisualSite
from tokred.vlm.tools.budget import Budget
from tokred.vlm.tools.greedy import directions
from tokred.vlm.tools.scores import ATTENTION, Attention, attention_reads, patch_scores


@register("vispruner")
@dataclass(frozen=True)
class VisPruner(Budgeted):
    """Important tokens and diverse tokens.

    The ``important_ratio`` of the budget goes to the tokens with the highest scores. The others, in the order of their
    scores, are thinned round by round: every second one is compared with all of the other half, and the ``step`` that
    find the most similar partner there leave, until what is left fits the budget.

    Args:
        budget: tokens kept of each image (of each crop, where the host has crops), an integer or a share in (0, 1].
        important_ratio: share of the budget for the important tokens, in [0, 1]; 1 is FasterVLM.
        step: tokens that leave in each round; larger steps need fewer rounds.
        attention: ``"class"``: of the class token, mean over heads; ``"received"``: the mean over all tokens, for
            towers without a class token (ours).

    Source: Zhang et al., Beyond Text-Visual Attention, ICCV 2025 (arXiv 2412.01818), section 3, and its released code.
    """

    summary: ClassVar[str] = "important image tokens by class attention, and different ones among the rest"
    source: ClassVar[str] = "Zhang et al., ICCV 2025 (arXiv 2412.01818)"

    budget: Budget = 64
    important_ratio: float = 0.5
    step: int = 8
    attention: Attention = "class"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_share(self.important_ratio, "important_ratio", zero=True)
        check_count(self.step, "step", 1)
        check_choice(self.attention, "attention", ATTENTION)

    @property
    def reads(self) -> frozenset[str]:
        """The tokens, what scores them, and the tower's features, which are compared."""
        return frozenset({"x", "tower"} | attention_reads(self.attention))

    def choose(self, site: VisualSite) -> Reduction:
        """Take the important tokens, thin the others."""
        n = site.shape[1]
        total = self.count(n)
        important = int(round(total * self.important_ratio, 9))
        order = ranked(patch_scores(site, self.attention))
        first, rest = order[:, :important], order[:, important:]
        rest = thinned(directions(site.tower), rest, total - important, self.step)
        return Reduction.keep(torch.cat([first, rest], 1).sort(dim=1).values, n)


def thinned(unit: Tensor, rest: Tensor, keep: int, step: int) -> Tensor:
    """Remove near-copies until ``keep`` tokens are left.

    Args:
        unit: ``(B, N, C)`` features of length one.
        rest: ``(B, R)`` int64 tokens, in the order of their scores: in each round those at even places leave where they
            are most similar to one at an odd place.
        keep: how many stay.
        step: how many leave a round; fewer where there are not so many.

    Returns:
        ``(B, keep)`` int64: the last round's even places that stayed, by falling similarity, then the odd ones.
    """
    if keep == 0:
        return rest[:, :0]
    while rest.shape[1] > keep:
        a, b = rest[:, 0::2], rest[:, 1::2]
        leave = min(step, rest.shape[1] - keep, a.shape[1])
        copies = best_match(gather_rows(unit, a), gather_rows(unit, b), metric="dot").score
        rest = torch.cat([a.gather(1, ranked(copies)[:, leave:]), b], 1)
    return rest
