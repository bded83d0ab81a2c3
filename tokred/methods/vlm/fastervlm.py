"""FasterVLM: keep the image tokens that the vision tower's class token attends to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from tokred.core.checks import check_choice
from tokred.core.reduction import Reduction
from tokred.core.registry import register
from tokred.core.selection import highest
from tokred.vlm.before_llm import Budgeted, VisualSite
from tokred.vlm.tools.budget import Budget
from tokred.vlm.tools.scores import ATTENTION, Attention, attention_reads, patch_scores


@register("fastervlm")
@dataclass(frozen=True)
class FasterVLM(Budgeted):
    """Class-token attention and nothing else: no merging, no question.

    Args:
        budget: tokens kept of each image (of each crop, where the host has crops), an integer or a share in (0, 1].
        attention: ``"class"``: the class token's, mean over heads, in the layer of the tower whose features are used;
            ``"received"``: the mean over all tokens, for towers without a class token (ours).

    Source: Zhang et al., [CLS] Attention is All You Need for Training-Free Visual Token Pruning, 2024
    (arXiv 2412.01818, first version).
    """

    summary: ClassVar[str] = "keep the image tokens that the tower's class token attends to"
    source: ClassVar[str] = "Zhang et al., 2024 (arXiv 2412.01818, first version)"

    budget: Budget = 144
    attention: Attention = "class"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice(self.attention, "attention", ATTENTION)

    @property
    def reads(self) -> frozenset[str]:
        """The tokens and what scores them."""
        return frozenset({"x"} | attention_reads(self.attention))

    def choose(self, site: VisualSite) -> Reduction:
        """Keep the highest scores, in the order of the image."""
        n = site.shape[1]
        return Reduction.keep(highest(patch_scores(site, self.attention), self.count(n))[0], n)
