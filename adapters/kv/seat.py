"""Messages on the way to the attention function: what a hook says of a module, and what the host calls it with."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor, nn

from tokred.adapters.contract import words
from tokred.adapters.kv.layer import TokLayer
from tokred.adapters.kv.masks import MaskSpec
from tokred.adapters.kv.rope import LayerRope
from tokred.adapters.linear import weight_of
from tokred.core.learned import Learned
from tokred.kv.site import CacheSite, Padding

PREFIX = "tokred:"
SEAT = "tokred_seat"


class Seat(NamedTuple):
    """A message from the hook on an attention module to the attention function.

    Attributes:
        layer: this module's layer of the cache; None without a cache, or where the layer is not compressed.
        implementation: the attention that the model had.
        depth: compressed layers.
        projection: name of the module's output projection, or None.
        rope: the layer's rotary embedding in this forward, or None.
        hidden: ``[B, M, C]`` what the module was given.
        learned: the policy's module, and where it leaves losses.
        borrows: whether the module has no rows of its own and attends to those of ``layer``, which has run before it.
        latents: whether the rows are latents, of which the module makes its keys and values.
        crosses: whether the rows are those of an encoder.
        rests: whether nobody will look at the rows in this forward, so that nothing is handed over for it.
        light: whether a token needs no more than the layer: all rows are at hand, and who looks at them looks at keys
            and queries alone.
    """

    layer: TokLayer | None
    implementation: str
    depth: int
    projection: str | None
    rope: LayerRope | None
    hidden: Tensor | None = None
    learned: Learned | None = None
    borrows: bool = False
    latents: bool = False
    crosses: bool = False
    rests: bool = False
    light: bool = False


class Call(NamedTuple):
    """One call of the attention function, queries and keys aside."""

    module: nn.Module
    spec: MaskSpec
    seat: Seat
    scaling: float | None
    dropout: float
    options: dict[str, Any]

    def site(self, kind: type[CacheSite], layer: TokLayer, query: Tensor, padding: Padding | None) -> CacheSite:
        """A layer of the cache as the policy sees it.

        Args:
            kind: of the site.
            layer: that has been attended to.
            query: ``[B, H, M, D]``, in the space of the keys that the layer shows.
            padding: which slots are real; None: all.
        """
        seat, width = self.seat, query.shape[1] * layer.newest[1].shape[3]
        keys, values = layer.shown()
        name = seat.projection
        return kind(
            q=query.detach(),
            k=keys,
            v=values,
            positions=layer.slots,
            seen=layer.seen,
            padding=padding,
            ragged=layer.ragged,
            weights=layer.weights,
            alpha=layer.engine.parts.fate.alpha,
            scale=self.scaling,
            softcap=self.softcap,
            sinks=self.sinks,
            rows=layer.rows,
            notes=layer.notes,
            projection=None if name is None else lambda: weight_of(getattr(self.module, name), width, query),
            rope=seat.rope,
            hidden=None if seat.hidden is None else seat.hidden.detach(),
            learned=seat.learned,
            layer=layer.index,
            depth=seat.depth,  # of what the policy acts on
        )

    @property
    def softcap(self) -> float | None:
        return words.SOFTCAP.of(self.options) or None

    @property
    def sinks(self) -> Tensor | None:
        found: Tensor | None = words.SINKS.part(self.module)
        return found
