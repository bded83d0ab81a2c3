"""``Place``: the layer that a method is asked about; and the base of methods that answer by it."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable
from typing import NamedTuple

from tokred.core.method import Method
from tokred.core.site import Site

# As many tokens as no budget in numbers holds: whether settings remove anything must not depend on the input.
MANY = 1 << 20


class Place(NamedTuple):
    """The layer that a method is asked about.

    Attributes:
        layer: which layer, 0-based.
        depth: of how many.
        prefix: protected tokens in front, such as the class token.
        suffix: protected tokens at the end.
    """

    layer: int
    depth: int
    prefix: int = 0
    suffix: int = 0

    @classmethod
    def of(cls, site: Site) -> Place:
        """The place that a site stands at."""
        return cls(site.layer, site.depth, site.prefix, site.suffix)

    @property
    def protected(self) -> int:
        """Tokens that are never reduced."""
        return self.prefix + self.suffix

    def free(self, n: int) -> int:
        """How many of ``n`` tokens may be reduced."""
        return n - self.prefix - self.suffix


class PlacedMethod(Method):
    """Base of methods that say for every layer how many tokens they leave."""

    @abstractmethod
    def tokens(self, n: int, place: Place) -> int:
        """How many of ``n`` tokens remain after this layer; where the count depends on the image, at most so many."""

    def acts(self, n: int, place: Place) -> bool:
        """True if :meth:`reduce` is called at this place at all.

        Where it is not, an adapter runs the host's own block, so that "nothing to remove" is the identity bit for bit;
        the same goes for a method that answers with :meth:`tokred.Reduction.identity`. By default :meth:`tokens`
        decides; methods whose count depends on the image override this.
        """
        return self.tokens(n, place) != n

    def removes(self, depth: int, layers: Iterable[int] | None = None) -> bool:
        """True if the method acts somewhere, on more tokens than any budget in numbers holds."""
        return any(self.acts(MANY, Place(layer, depth)) for layer in (range(depth) if layers is None else layers))
