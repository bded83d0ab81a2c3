"""What methods inside a language model share: their stage, and which layers they act before."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import ClassVar

import torch

from tokred.core.place import Place, PlacedMethod
from tokred.core.reduction import Reduction
from tokred.core.site import Site, Stage
from tokred.vlm.in_llm import LayerSite


class LayerMethod(PlacedMethod):
    """Base of methods at the stage ``layer``: visual tokens leave before some decoder layers.

    ``n`` is always the number of visual tokens of a sample (of the one that has most).

    Attributes:
        visual: whether visual tokens leave, in forwards that bring some; otherwise any token of a prompt may, and ``n``
            counts all of them.
    """

    stage: ClassVar[Stage] = "layer"
    visual: ClassVar[bool] = True
    lacks: ClassVar[Mapping[str, str]] = {
        "positions": (
            "no positions to count anew: tokens that leave inside the language model have been seen at their places "
            "by the layers before, and the others keep theirs; methods of the stage 'projector', such as 'divprune', "
            "take positions='repack'"
        )
    }

    @abstractmethod
    def choose(self, site: LayerSite) -> Reduction:
        """Decide; called where the method acts, and no gradient is recorded."""

    def reduce(self, site: Site) -> Reduction:
        """Keep some of the visual tokens, and all others; the prompt's last token stays, visual or not.

        Raises:
            TypeError: the site is of another stage.
        """
        if not isinstance(site, LayerSite):
            raise TypeError(f"{self.name!r} acts on a LayerSite, got {type(site).__name__}")
        n = max(site.counts if self.visual else site.real, default=0)
        if n == 0 or not self.acts(n, Place(site.layer, site.depth)):
            return Reduction.identity((site.shape[0],), site.shape[1], site.device)
        with torch.no_grad(), torch.autocast(site.device.type, enabled=False):
            step = self.choose(site)
            return site.with_last(step) if any(site.ends) else step


def check_layer(value: object, name: str = "layer") -> None:
    """Refuse what is no decoder layer before which tokens can leave.

    Raises:
        ValueError: with what was given.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(
            f"{name} must be a layer's number, at least 1 (tokens that leave before layer 0 are for methods of the "
            f"stage 'projector'), got {value!r}"
        )


def check_depth(layer: int, depth: int, name: str = "layer") -> None:
    """Refuse a layer that the model does not have.

    Raises:
        ValueError: with the layers it has.
    """
    if layer >= depth:
        raise ValueError(f"{name} is {layer}, but the model has {depth} decoder layers (0 to {depth - 1})")
