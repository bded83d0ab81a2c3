"""FastV: after a few layers of the language model, keep the visual tokens that the last prompt token attends to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from tokred.core.checks import check_choice, check_share
from tokred.core.method import Parameters
from tokred.core.place import Place
from tokred.core.reduction import Reduction
from tokred.core.registry import register
from tokred.vlm.in_llm import LayerMethod, LayerSite, check_depth, check_layer
from tokred.vlm.tools.scores import question_rows


class AttendedBefore(LayerMethod):
    """Base of methods by which a share of the visual tokens goes before one decoder layer, by what was attended to in
    the layer before it; a subclass has the two fields, with defaults and checks of its own."""

    layer: int
    ratio: float

    @property
    def reads(self) -> frozenset[str]:
        """Hidden states, and rows of the attention of the layer before."""
        return frozenset({"x", "rows_before"})

    def check(self, depth: int) -> None:
        check_depth(self.layer, depth)

    def left(self, n: int) -> int:
        """How many of ``n`` visual tokens stay, at least one."""
        return max(1, round(round(n * (1 - self.ratio), 9))) if n else 0

    def tokens(self, n: int, place: Place) -> int:
        return self.left(n) if place.layer == self.layer else n


@register("fastv")
@dataclass(frozen=True)
class FastV(AttendedBefore):
    """Visual tokens that get little attention in the layer before ``layer`` leave there, once, in the prompt.

    Decode steps go on with what is left: the first ``layer`` layers hold all tokens in their caches, the others fewer,
    and positions stay what they were.

    Args:
        layer: first layer on the reduced set (the paper's K), at least 1.
        ratio: share of the visual tokens that leave (the paper's R), in [0, 1); ``round(n * (1 - ratio))`` stay, half
            to even.
        query: whose attention counts: ``"last"``, that of the prompt's last token (the released code), or ``"mean"``,
            the mean over all tokens of the prompt that come after the sample's last visual token (the paper says: over
            all tokens that attend to it).
        heads: ``"mean"`` or ``"max"`` over the heads.

    Source: Chen et al., An Image is Worth 1/2 Tokens After Layer 2, ECCV 2024, section 4, and its released code.
    """

    summary: ClassVar[str] = "after layer K keep the visual tokens that the last prompt token attends to"
    source: ClassVar[str] = "Chen et al., ECCV 2024 (arXiv 2403.06764)"
    example: ClassVar[Parameters] = {"layer": 2}
    nothing: ClassVar[Parameters | None] = {"ratio": 0.0}

    layer: int = 2
    ratio: float = 0.5
    query: Literal["last", "mean"] = "last"
    heads: Literal["mean", "max"] = "mean"

    def __post_init__(self) -> None:
        check_layer(self.layer)
        check_share(self.ratio, "ratio", zero=True)
        if self.ratio == 1:
            raise ValueError("ratio is 1, which leaves no visual token; it must lie in [0, 1)")
        check_choice(self.query, "query", ("last", "mean"))
        check_choice(self.heads, "heads", ("mean", "max"))

    def choose(self, site: LayerSite) -> Reduction:
        """Keep the visual tokens with the highest scores."""
        # The last token votes even where an image ends the prompt.
        rows = question_rows(site) if self.query == "mean" else 1
        scores = site.row_scores(rows, of="before", heads=self.heads)
        counts = tuple(self.left(n) for n in site.counts)
        return site.keep_visual(site.best_visual(scores, counts), counts)
