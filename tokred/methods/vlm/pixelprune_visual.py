"""PixelPrune before the language model: visual tokens whose pixels their neighbours tell leave the prompt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from tokred.core.method import Parameters
from tokred.core.place import Place
from tokred.core.ragged import pack
from tokred.core.reduction import Reduction
from tokred.core.registry import register
from tokred.methods.encoder.pixelprune import Distance, PixelPrune, Scan
from tokred.vlm.before_llm import ProjectorMethod, VisualSite


@register("pixelprune_visual")
@dataclass(frozen=True)
class PixelPruneVisual(ProjectorMethod):
    """PixelPrune's second half: the tokens of cells that :class:`tokred.PixelPrune` left out of the vision tower leave
    the prompt, too.

    By itself the tower sees everything. Given together with ``pixelprune`` of the same settings, cells are predicted
    from the same pixels, so that both leave out the same ones. Those that stay keep their positions.

    Args:
        tau, metric, scan, anchored, min_keep, std: as of :class:`tokred.PixelPrune`.

    Source: PixelPrune, 2026 (arXiv 2604.00886).
    """

    summary: ClassVar[str] = "drop image tokens whose pixels their neighbours tell"
    source: ClassVar[str] = "2026 (arXiv 2604.00886)"
    example: ClassVar[Parameters] = {"tau": 0.9, "metric": "mae", "min_keep": 0.3}
    nothing: ClassVar[Parameters | None] = {"min_keep": 1.0}

    tau: float = 0.0
    metric: Distance = "max"
    scan: Scan = "loco"
    anchored: bool = True
    min_keep: float = 0.0
    std: float | Sequence[float] = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "std", self.predictor.std)

    @property
    def predictor(self) -> PixelPrune:
        """The method whose decisions these are."""
        return PixelPrune(
            self.tau, self.metric, self.scan, self.anchored, min_keep=self.min_keep, std=self.std
        )  # fmt: skip

    @property
    def reads(self) -> frozenset[str]:
        """The tokens' pixels and their grid."""
        return frozenset({"x", "grid", "pixels"})

    def count(self, n: int) -> int:
        """At most all of them: the count depends on the picture."""
        return n

    def acts(self, n: int, place: Place) -> bool:
        """Unless everything stays."""
        return self.min_keep < 1 and place.free(n) > 1

    def choose(self, site: VisualSite) -> Reduction:
        """Predict every token's pixels, and keep those that were not foreseen."""
        (b, n), (rows, columns) = site.shape, site.grid
        frames = () if site.frames is None else (site.frames,)
        kept = self.predictor.predict(site.pixels.reshape(b, *frames, rows, columns, -1))[0].flatten(1)
        left, mask = pack(torch.arange(n, device=site.device).expand(b, -1), kept.to(site.device))
        if left.shape[1] == n and mask is None:
            return Reduction.identity((b,), n, site.device)
        return site.keep(left, mask)
