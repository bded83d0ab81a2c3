"""Random-deep schedule: below a layer of the language model, random visual tokens stay, or none."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from tokred.core.checks import check_count, check_share
from tokred.core.method import Parameters
from tokred.core.place import Place
from tokred.core.reduction import Reduction
from tokred.core.registry import register
from tokred.core.selection import random_order
from tokred.vlm.in_llm import LayerMethod, LayerSite, check_depth, check_layer


@register("random_deep")
@dataclass(frozen=True)
class RandomDeep(LayerMethod):
    """Random visual tokens stay from one deep layer on, or none: where visual tokens say little any more, choosing
    among them is not worth its cost.

    Goes behind any method of the stage ``projector``: ``tokred.apply(model, "divprune budget=0.57 + random_deep")``.
    :func:`tokred.horizon` measures from which layer on a model does not need its visual tokens.

    Args:
        layer: before which tokens leave, at least 1; None: ``round(0.75 * depth)``.
        share: of the visual tokens that came here, how many stay; ``round(n * share)``, half up. 0: none, as below the
            horizon.
        seed: which random choice; the same for all samples that have as many tokens, whatever else is in the batch.

    Source: When Token Pruning is Worse than Random, CVPR 2026, the schedule; its settings were not published: the
    defaults are ours.
    """

    summary: ClassVar[str] = "below a deep layer keep random visual tokens, or none"
    source: ClassVar[str] = "When Token Pruning is Worse than Random, CVPR 2026 (arXiv 2512.07580)"
    example: ClassVar[Parameters] = {"layer": 2}
    nothing: ClassVar[Parameters | None] = {"share": 1.0}

    layer: int | None = None
    share: float = 0.5
    seed: int = 0

    def __post_init__(self) -> None:
        if self.layer is not None:
            check_layer(self.layer)
        check_share(self.share, "share", zero=True)
        check_count(self.seed, "seed")

    @property
    def reads(self) -> frozenset[str]:
        """Nothing but the tokens' number."""
        return frozenset({"x"})

    def check(self, depth: int) -> None:
        check_depth(self.at(depth), depth)

    def at(self, depth: int) -> int:
        """The layer before which tokens leave, of ``depth``; at least 1."""
        return max(1, round(0.75 * depth)) if self.layer is None else self.layer

    def left(self, n: int) -> int:
        """How many of ``n`` visual tokens stay."""
        return int(round(n * self.share, 9) + 0.5)

    def base_share(self, share: float, depth: int) -> float:
        """Share that a method before the language model has to keep, for a mean ``share`` over ``depth`` layers.

        Raises:
            ValueError: not even all of them are enough.
        """
        check_share(share, "share")
        layer = self.at(depth)
        found = share * depth / (layer + (depth - layer) * self.share)
        if found > 1:
            raise ValueError(
                f"a mean share of {share:g} cannot be reached: with all visual tokens in the first {layer} of {depth} "
                f"layers and {self.share:g} of them in the others it is {share / found:.4g}; give at most that, or a "
                "deeper layer"
            )
        return found

    def tokens(self, n: int, place: Place) -> int:
        return self.left(n) if place.layer == self.at(place.depth) else n

    def choose(self, site: LayerSite) -> Reduction:
        """Keep the first of a random order of each sample's visual tokens."""
        counts = tuple(map(self.left, site.counts))
        kept = torch.zeros_like(site.visual)
        for n in set(site.counts):
            rows = [i for i, count in enumerate(site.counts) if count == n]
            order = random_order(1, n, self.seed, site.layer, 0, site.device)[0, : self.left(n)]
            where = site.visual[rows].nonzero()[:, 1].view(len(rows), n)[:, order]
            kept[torch.tensor(rows, device=site.device).unsqueeze(1), where] = True
        return site.keep_visual(kept, counts)
