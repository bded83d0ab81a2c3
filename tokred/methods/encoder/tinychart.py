"""TinyChart: ToMe with the same r in every block, so that a chart in high resolution costs what a small one does."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from tokred.core.checks import check_choice
from tokred.core.matching import raster_order
from tokred.core.method import Parameters
from tokred.core.reduction import Reduction
from tokred.core.registry import register
from tokred.core.schedules import ScheduleLike
from tokred.core.site import Site
from tokred.encoder.padding import reduce_each
from tokred.methods.encoder.tome import ToMe


@register("tinychart")
@dataclass(frozen=True)
class TinyChart(ToMe):
    """TinyChart's visual token merging: :class:`tokred.ToMe` with its settings, and a choice of the output's order.

    Args:
        r: tokens removed per block. 84 is for 54 x 54 patches (768 pixels, patch 14) and 26 or 27 blocks.
        prop_attn: proportional attention.
        metric: what is compared; this and the next two as in :class:`tokred.ToMe`.
        split: see there.
        mode: see there.
        order: ``"merge"``, as matching leaves the tokens, which is what TinyChart's language model was trained on; or
            ``"raster"`` (ours), tokens sorted by the first patch that each stands for, for models that were trained on
            tokens in the order of the image.

    Source: Zhang et al., TinyChart: Efficient Chart Understanding with Program-of-Thoughts Learning and Visual Token
    Merging, EMNLP 2024, section 3; the matching is that of Bolya et al., ICLR 2023.
    """

    summary: ClassVar[str] = "ToMe with a constant r for charts of high resolution, in merge or raster order"
    source: ClassVar[str] = "Zhang et al., EMNLP 2024 (arXiv 2404.16635)"
    example: ClassVar[Parameters] = {"r": 4, "order": "raster"}
    usual: ClassVar[Parameters] = {}

    r: ScheduleLike = 84
    order: Literal["merge", "raster"] = "merge"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice(self.order, "order", ("merge", "raster"))

    def reduce(self, site: Site) -> Reduction:
        """Match by parity, merge the most similar pairs, order."""
        if site.mask is not None:
            return reduce_each(self, site, always=True)
        step = super().reduce(site)
        return raster_order(step, site.suffix) if self.order == "raster" else step
