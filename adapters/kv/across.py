"""Attention of a decoder to the rows of an encoder's tokens, and the policy that acts on them.

All rows come with the first forward, and each query sees them all. So they are judged once, when the decoder has asked
as many queries as the policy wants to hear.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tokred.adapters.kv.layer import TokLayer
from tokred.adapters.kv.masks import MaskSpec
from tokred.adapters.kv.products import attend, stock
from tokred.adapters.kv.seat import Call
from tokred.core.attention import Attention
from tokred.errors import UnsupportedModelError
from tokred.kernels.decode_attention import visible_positions
from tokred.kv.site import CacheSite

# Queries ``[B, H, M, D]`` so far, while a policy waits for more.
ASKED = "asked"


class CrossSite(CacheSite):
    """Rows of an encoder's tokens, and queries of another sequence: each sees every row, and no row is newest."""

    crosses = True

    def queries(self, last: int | None = None) -> Tensor:
        """``[B, H, M, D]`` all queries, or the ``last``."""
        return self.q if last is None else self.q[:, :, -last:]

    @property
    def loose(self) -> bool:
        """False: padding of the encoder's tokens says nothing about queries."""
        return False

    def stands_behind(self, count: int | tuple[int, ...]) -> Tensor:
        """``[1, 1, 1]`` False: no row is among the newest."""
        return torch.zeros(1, 1, 1, dtype=torch.bool, device=self.device)

    def behind(self, count: int) -> Tensor:
        """``[1, count]`` int64: how many queries are newer than each of the newest ``count``."""
        return torch.arange(count - 1, -1, -1, device=self.device)[None]

    def arrived(self, count: int) -> int:
        """Queries among the newest ``count``."""
        return count

    def _attend(
        self, last: int | None, candidates: Tensor | None = None, causal: bool = True
    ) -> tuple[Attention, Tensor | None]:
        """Attention of the queries to all rows, which stand as they are."""
        real, weights = self.real, self.weights
        if candidates is not None:
            real = candidates if real is None else real & candidates
        bias = None if weights is None else self.alpha * weights.log()
        terms: dict[str, Any] = {"bias": bias, "scale": self.scale, "mask": real, "softcap": self.softcap}
        return Attention(self.queries(last), self.k, causal=False, **terms), None


def across(call: Call, layer: TokLayer, query: Tensor, mask: MaskSpec | None) -> tuple[Tensor, Tensor | None]:
    """Attention of the decoder's queries to what is held of the encoder's rows; then the policy may act, once.

    Raises:
        UnsupportedModelError: the layer has no rows.
    """
    key, value = layer.keys, layer.values
    if key is None or value is None:
        raise UnsupportedModelError(f"{type(call.module).__name__} did not add the encoder's rows to its cache")
    came, layer.waiting = layer.waiting, False
    implementation = call.seat.implementation
    if not layer.compressed:
        seen = None if mask is None else mask.stock(implementation)
        out = stock(call.module, implementation, query, key, value, seen, call.scaling, call.dropout, call.options)
    else:
        # Rows of padding have left first, so only empty ones are hidden.
        held = layer.positions if layer.ragged else None
        shown = None if held is None else visible_positions(held, None, None)[:, :, None]
        bias = None
        if layer.weights is not None:
            bias = (layer.engine.parts.fate.alpha * layer.weights.log())[:, :, None]
        out = attend(query, key, value, shown, bias, call.scaling, call.softcap, call.dropout), None
    with torch.no_grad():
        _judge(call, layer, query, mask, came)
    return out


def _judge(call: Call, layer: TokLayer, query: Tensor, mask: MaskSpec | None, came: bool) -> None:
    """Let the policy act, if the queries that it wants have been asked.

    Args:
        call, layer, query, mask: as :func:`across` has them.
        came: whether the rows have come with this forward.
    """
    engine = layer.engine
    if engine.idle or layer.clock.prompt >= 0:
        if came:
            layer.settle(_site(call, layer, query, mask) if layer.store.reads else None)
        return
    earlier = layer.notes.pop(ASKED, None)
    asked = query.detach() if earlier is None else torch.cat([earlier, query.detach()], 2)
    if asked.shape[2] >= max(engine.parts.score.window, engine.parts.budget.queries, 1):
        engine.observe(layer, _site(call, layer, asked, mask), 0)
        return
    layer.notes[ASKED] = asked


def _site(call: Call, layer: TokLayer, asked: Tensor, mask: MaskSpec | None) -> CacheSite:
    return call.site(CrossSite, layer, asked, None if mask is None else mask.padding(layer.seen))
