"""Rows of a cache that a generated token attends to: the site before one decoder layer while it decodes, and the base
of methods that choose there."""

from __future__ import annotations

from abc import abstractmethod
from typing import ClassVar, NamedTuple

from torch import Tensor

from tokred.core.place import Place
from tokred.core.reduction import Reduction
from tokred.vlm.in_llm import LayerMethod, LayerSite


class StepSite(NamedTuple):
    """One generated token of every sample, before the layer from which on it attends to fewer rows.

    Attributes:
        received: ``(B, P)`` float32, what it gave to the visual rows of the cache in the layer before, mean over heads;
            0 on other rows.
        visual: ``(B, P)`` bool, the visual rows.
        counts: visual rows of each sample.
        last: ``(B, P)`` of the token before that chose: what it gave, and the visual rows that it attended to; None:
            it is the first.
    """

    received: Tensor
    visual: Tensor
    counts: tuple[int, ...]
    last: tuple[Tensor, Tensor] | None


class StepMethod(LayerMethod):
    """Base of methods that leave the prompt whole, and choose which visual rows each generated token attends to.

    Attributes:
        layer: first layer that attends to fewer rows.
        ratio: share of the visual rows that a generated token does not attend to.
        evict: whether rows that the first generated token does not attend to are freed for good.
    """

    decodes: ClassVar[bool] = True
    layer: int
    ratio: float
    evict: bool

    @property
    def reads(self) -> frozenset[str]:
        """A row of the attention of the layer before."""
        return frozenset({"x", "rows_before"})

    def tokens(self, n: int, place: Place) -> int:
        """All of a prompt."""
        return n

    def removes(self, depth: int, layers: object = None) -> bool:
        """True if rows are left out while it decodes."""
        return self.ratio > 0

    def choose(self, site: LayerSite) -> Reduction:
        """Nothing of a prompt leaves."""
        return Reduction.identity((site.shape[0],), site.shape[1], site.device)

    @abstractmethod
    def rows(self, site: StepSite) -> tuple[Tensor, Tensor]:
        """``(B, P)`` bool, the visual rows that the token attends to; and those that it would hand on as chosen."""
