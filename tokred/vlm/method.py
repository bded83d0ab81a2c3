"""``VisualMethod``: what methods before and inside a language model share: how many tokens they leave, and where."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable

from tokred.core.method import MANY, Method


class VisualMethod(Method):
    """Base of the stages ``projector`` and ``layer``."""

    @abstractmethod
    def tokens(self, n: int, *, layer: int, depth: int, prefix: int = 0, suffix: int = 0) -> int:
        """How many of ``n`` tokens remain after this layer; where the count depends on the image, at most so many."""

    def acts(self, n: int, *, layer: int, depth: int, prefix: int = 0, suffix: int = 0) -> bool:
        """Whether :meth:`reduce` is called at this layer at all. By default :meth:`tokens` decides; methods whose count
        depends on the image say so here."""
        return self.tokens(n, layer=layer, depth=depth, prefix=prefix, suffix=suffix) != n

    def removes(self, depth: int, layers: Iterable[int] | None = None) -> bool:
        """Whether it acts anywhere on more tokens than any budget in numbers holds."""
        places = range(depth) if layers is None else layers
        return any(self.acts(MANY, layer=layer, depth=depth) for layer in places)
