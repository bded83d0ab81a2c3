"""ToMe: in every block, merge the r most similar token pairs and keep track of what each token stands for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from tokred.core.checks import check_choice
from tokred.core.matching import bipartite_soft_matching
from tokred.core.reduction import Reduction
from tokred.core.registry import register
from tokred.core.schedules import schedule
from tokred.core.site import Site
from tokred.encoder.method import Compared, Scheduled
from tokred.encoder.metric import Metric, read_metric
from tokred.encoder.padding import reduce_each


@register("tome")
@dataclass(frozen=True)
class ToMe(Compared, Scheduled):
    """Token Merging.

    Args:
        r: tokens removed per block: an integer, a pair ``(r, inflect)``, or a list with one entry a block. Capped at
            half of the unprotected tokens of a block.
        prop_attn: proportional attention, the log of a token's size added to attention's logits. On for supervised
            weights (AugReg, SWAG, DeiT, CLIP); switch it off for off-the-shelf MAE weights.
        metric: what is compared: keys, queries or values (mean over heads), or the tokens themselves.
        split: ``"alternate"`` (by parity), or ``"sequential"`` (a baseline: about three points worse).
        mode: how merged tokens are combined: size-weighted ``"mean"``, ``"max"``, ``"mlerp"`` or ``"keep"``.

    Source: Bolya et al., Token Merging: Your ViT But Faster, ICLR 2023, section 3.
    """

    summary: ClassVar[str] = "merge the r most similar token pairs in every block"
    source: ClassVar[str] = "Bolya et al., ICLR 2023 (arXiv 2210.09461)"

    prop_attn: bool = True
    metric: Metric = "k"
    split: Literal["alternate", "sequential"] = "alternate"
    mode: Literal["mean", "max", "mlerp", "keep"] = "mean"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice(self.split, "split", ("alternate", "sequential"))
        check_choice(self.mode, "mode", ("mean", "max", "mlerp", "keep"))

    def reduce(self, site: Site) -> Reduction:
        """Match by parity and merge the most similar pairs."""
        if site.mask is not None:
            return reduce_each(self, site, always=True)
        return bipartite_soft_matching(
            read_metric(site, self.metric),
            schedule(self.r).at(site.layer, site.depth),
            prefix=site.prefix,
            suffix=site.suffix,
            split=self.split,
            mode=self.mode,
        )
