"""PyramidDrop: visual tokens leave stage by stage, at a few layers of the language model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tokred.core.place import Place
from tokred.core.reduction import Reduction
from tokred.core.registry import register
from tokred.vlm.in_llm import LayerMethod, LayerSite, check_depth, check_layer


@register("pyramiddrop")
@dataclass(frozen=True)
class PyramidDrop(LayerMethod):
    """Visual tokens that the prompt's last token attends to least leave, before each layer of ``layers``.

    Attention is that of the layer itself, by its own norm and projections, before it runs: one row of queries, so any
    attention kernel can run. Positions stay what they were (the released code numbers them anew after each drop).

    Args:
        layers: layers before which tokens leave, increasing; None: at 1/4, 1/2 and 3/4 of the depth (8, 16, 24 of 32),
            or as evenly for another number of ratios.
        ratios: share of the original visual tokens that is left after each, not increasing, in (0, 1]; ``int(n *
            ratio)`` stay.
        per_image: give every image of a sample its own share, instead of one ranking over all of them.

    Source: Xing et al., PyramidDrop, CVPR 2025, section 3, and its released code.
    """

    summary: ClassVar[str] = "visual tokens leave stage by stage, halving at every quarter of the language model"
    source: ClassVar[str] = "Xing et al., CVPR 2025 (arXiv 2410.17247)"

    layers: tuple[int, ...] | None = None
    ratios: tuple[float, ...] = (0.5, 0.25, 0.125)
    per_image: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "ratios", tuple(self.ratios))
        if not self.ratios or not all(0 < r <= 1 for r in self.ratios):
            raise ValueError(f"ratios must be shares in (0, 1], got {self.ratios}")
        if any(b > a for a, b in zip(self.ratios, self.ratios[1:], strict=False)):
            raise ValueError(f"ratios must not increase, got {self.ratios}")
        if self.layers is None:
            return
        object.__setattr__(self, "layers", tuple(self.layers))
        for layer in self.layers:
            check_layer(layer, "each of layers")
        if len(self.layers) != len(self.ratios):
            raise ValueError(f"{len(self.ratios)} ratios need as many layers, got {self.layers}")
        if any(b <= a for a, b in zip(self.layers, self.layers[1:], strict=False)):
            raise ValueError(f"layers must increase, got {self.layers}")

    @property
    def reads(self) -> frozenset[str]:
        """Hidden states, and a row of each layer's own attention."""
        return frozenset({"x", "rows"})

    def boundaries(self, depth: int) -> tuple[int, ...]:
        """The layers before which tokens leave, in a model of ``depth`` layers."""
        if self.layers is not None:
            return self.layers
        stages = len(self.ratios) + 1
        return tuple(depth * s // stages for s in range(1, stages))

    def check(self, depth: int) -> None:
        """The layers must exist.

        Raises:
            ValueError: they do not, or the model is too shallow for so many stages.
        """
        found = self.boundaries(depth)
        if self.layers is None and (found[0] < 1 or len(set(found)) < len(found)):
            raise ValueError(f"{len(self.ratios)} ratios need at least {len(self.ratios) + 1} layers, got {depth}")
        check_depth(found[-1], depth, "the last of layers")

    def counts(self, n: int) -> tuple[int, ...]:
        """Visual tokens of each stage, of ``n`` at the beginning."""
        return (n, *(_share(n, r) for r in self.ratios))

    def tokens(self, n: int, place: Place) -> int:
        """Tokens that a stage leaves of the ``n`` of the stage before, up to one token."""
        found = self.boundaries(place.depth)
        if place.layer not in found:
            return n
        stage = found.index(place.layer)
        before = self.ratios[stage - 1] if stage else 1.0
        return min(n, _share(n, self.ratios[stage] / before))

    def acts(self, n: int, place: Place) -> bool:
        """True at its layers, unless they leave what there is."""
        found = self.boundaries(place.depth)
        if place.layer not in found or n == 0:
            return False
        stage = found.index(place.layer)
        return self.ratios[stage] < (self.ratios[stage - 1] if stage else 1.0)

    def choose(self, site: LayerSite) -> Reduction:
        """Keep the visual tokens with the highest scores."""
        ratio = self.ratios[self.boundaries(site.depth).index(site.layer)]
        scores = site.row_scores(1, of="own")
        if self.per_image:
            return site.keep_visual(self._each(site, scores, ratio))
        counts = tuple(_share(n, ratio) for n in site.initial)
        return site.keep_visual(site.best_visual(scores, counts), counts)

    def _each(self, site: LayerSite, scores: Tensor, ratio: float) -> Tensor:
        """``(B, L)`` bool: the best of every image, by how many tokens it had at the beginning."""
        image, chosen = site.image, torch.zeros_like(site.visual)
        for i in range(int(image.max()) + 1):
            mine = site.visual & (image == i)
            at_first = site.image_counts(i)
            counts = tuple(_share(n, ratio) for n in at_first)
            chosen |= site.best(scores, mine, counts)
        return chosen


def _share(n: int, ratio: float) -> int:
    """``int(n * ratio)``, unharmed by what floats make of shares."""
    return int(round(n * ratio, 6))
