"""DivPrune: keep the image tokens that lie farthest apart."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from tokred.core.checks import check_choice, is_count
from tokred.core.reduction import Reduction
from tokred.core.registry import register
from tokred.vlm.before_llm import Budgeted, VisualSite
from tokred.vlm.tools.budget import Budget
from tokred.vlm.tools.greedy import DENSE, Distance, farthest_points


@register("divprune")
@dataclass(frozen=True)
class DivPrune(Budgeted):
    """Diversity-based visual token pruning: a greedy answer to the max-min diversity problem.

    The first token is the one whose nearest other token is farthest; then always the one that is farthest from its
    nearest chosen token. Neither attention nor the question plays a part.

    Args:
        budget: tokens kept of each image (of each crop, where the host has crops), an integer or a share in (0, 1].
        metric: ``"cos"``, one minus the cosine of projected features; ``"l1"`` or ``"l2"``.
        init: the first token: ``"isolated"`` as above, ``"medoid"``, the one with the least sum of distances, or the
            number of a token.

    Source: Alvar et al., DivPrune, CVPR 2025, section 3 (algorithm 1).
    """

    summary: ClassVar[str] = "keep the image tokens that lie farthest apart (max-min diversity)"
    source: ClassVar[str] = "Alvar et al., CVPR 2025 (arXiv 2503.02175)"

    budget: Budget = 0.098
    metric: Distance = "cos"
    init: int | Literal["isolated", "medoid"] = "isolated"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice(self.metric, "metric", ("cos", "l1", "l2"))
        if not is_count(self.init):
            check_choice(self.init, "init (unless the number of a token)", ("isolated", "medoid"))

    @property
    def reads(self) -> frozenset[str]:
        return frozenset({"x"})

    def choose(self, site: VisualSite) -> Reduction:
        """Pick the farthest tokens one by one."""
        n = site.shape[1]
        picks = farthest_points(site.x, self.count(n), metric=self.metric, start=self.init, dense=DENSE)
        return Reduction.keep(picks.sort(dim=1).values, n)
