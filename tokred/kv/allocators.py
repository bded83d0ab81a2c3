"""``Allocator``: which layer holds how many rows, while the layers of a forward are judged one after the other.

A budget makes one for each cache. The engine tells it of every layer that has been judged, and of the forward's end;
it answers with the layers that can be cut now.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

from torch import Tensor

from tokred.kv.site import CacheSite

if TYPE_CHECKING:
    from tokred.kv.parts import Budget

# What was measured of the layers so far, for each sample; stays with a layer until its budget is decided anew.
Measured = tuple[tuple[float, ...], ...]
# Of each layer that measured its residual stream: a sum ``[B]`` over tokens, and how many there were.
Streams = Mapping[int, tuple[Tensor, Tensor]]


class Judged(NamedTuple):
    """A layer whose rows have scores.

    Attributes:
        site: of the layer. At the end of a forward it has no queries any more.
        score: ``[B, Hk, K]`` float32.
        guarded: takes rows to keep for each sample, and gives bool that broadcasts to the scores: what stays anyway.
        measured: what the layer was granted by when its budget was decided last; empty where it is decided anew.
    """

    site: CacheSite
    score: Tensor
    guarded: Callable[[tuple[int, ...]], Tensor]
    measured: Measured = ()


class Grant(NamedTuple):
    """Rows that a layer may hold.

    Attributes:
        rows: of each sample, per head on average.
        counts: ``[B, Hk]`` int64 rows of each head, where these are decided too; None: the budget divides them.
        measured: to be kept with the layer, see :class:`Judged`.
        final: whether this forward can bring no other grant for the layer, so that its scores need not be kept.
    """

    rows: tuple[int, ...]
    counts: Tensor | None = None
    measured: Measured = ()
    final: bool = True


class Allocator(ABC):
    """Base of all allocators; lives as long as its cache, and starts each forward anew."""

    def begin(self) -> None:  # noqa: B027 - most keep nothing from layer to layer
        """A forward begins: forget what one that broke off has left."""

    def measure(self, site: CacheSite) -> None:  # noqa: B027 - most measure nothing
        """Look at a layer right after its attention, where its score comes later and its queries go before."""

    @abstractmethod
    def after_layer(self, layer: Judged) -> Mapping[int, Grant]:
        """A layer has been judged: grants by layer, for this one or for any that was judged before it."""

    def after_forward(self, layers: Sequence[Judged], streams: Streams) -> Mapping[int, Grant]:
        """All layers have been judged: grants for those that have none.

        Args:
            layers: those without a final grant, in order; at least one.
            streams: of layers, where the budget reads the residual stream.
        """
        return {}


class AtOnce(Allocator):
    """Every layer for itself, as soon as it has been judged.

    Args:
        budget: whose :meth:`tokred.kv.Budget.rows` and ``heads`` decide.
    """

    def __init__(self, budget: Budget) -> None:
        self.budget = budget

    def after_layer(self, layer: Judged) -> Mapping[int, Grant]:
        return {layer.site.layer: Grant(self.budget.rows(layer.site))}
