"""Methods whose counts differ from image to image, by what the images hold (beams repeat samples)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from tokred.core.place import Place
from tokred.core.reduction import Reduction
from tokred.vlm.before_llm import Budgeted
from tokred.vlm.in_llm import LayerMethod


@dataclass(frozen=True)
class Uneven(Budgeted):
    """Other numbers for other images: the first tokens."""

    name: ClassVar[str] = "uneven"
    budget: int | float = 0.5

    def choose(self, site: Any) -> Reduction:
        counts = 3 + 5 * (site.x[:, :1, 0] > 0).long() + torch.tensor([[i] for i in site.image])
        kept = torch.arange(12).expand(len(counts), -1)
        real = kept < counts
        return Reduction.keep(torch.where(real, kept, 0), site.shape[1], real)


@dataclass(frozen=True)
class UnevenMean(Uneven):
    """The same, and the first token becomes the mean of itself and of all that leave."""

    name: ClassVar[str] = "uneven_mean"

    def choose(self, site: Any) -> Reduction:
        index = super().choose(site).index
        return Reduction.from_index(index.clamp_min(0), int(index.max()) + 1)


@dataclass(frozen=True)
class UnevenLayer(LayerMethod):
    """The same inside the language model, at two layers."""

    name: ClassVar[str] = "uneven_layer"

    def tokens(self, n: int, place: Place) -> int:
        return n // 2 if place.layer in (1, 3) else n

    def choose(self, site: Any) -> Reduction:
        more = (site.x[:, -1, 0] > 0).tolist()
        counts = tuple(max(0, n // 2 + 2 * m - 1) for n, m in zip(site.counts, more, strict=True))
        return site.keep_visual(site.best_visual(site.x.float().norm(dim=-1), counts))
