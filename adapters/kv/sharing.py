"""Layers that attend to the rows of an earlier layer: it decides about them, and the others see what it saw."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from tokred.adapters.contract import words
from tokred.adapters.kv.reasons import SHARED
from tokred.kv.engine import Engine


class Lent(NamedTuple):
    """Rows of a layer as its own queries saw them, before the policy acted on them.

    Attributes:
        keys, values: ``[B, Hk, K, D]``.
        positions: ``[B, Hk, K]`` slots of the rows; None: row ``i`` is slot ``i``.
        weights: ``[B, Hk, K]``, how many tokens each row stands for; None: one each.
        compressed, ragged, seen, settled, engine: as the layer has them.
        first: slot of the first query.
        queries: how many there were.
    """

    keys: Tensor
    values: Tensor
    positions: Tensor | None
    weights: Tensor | None
    compressed: bool
    ragged: bool
    seen: int
    settled: int
    engine: Engine
    first: int
    queries: int


def owners(kinds: list[str], text: object) -> dict[int, int]:
    """For each layer that shares rows the layer that has them: the last one before of the same kind that has its own.

    Args:
        kinds: of the cache of each layer, as :func:`tokred.adapters.kv.reasons.layer_kinds` has them.
        text: configuration of the decoder.
    """
    types = words.KINDS.part(text) or []
    found: dict[int, int] = {}
    last: dict[str, int] = {}
    for i, (kind, own) in enumerate(zip(kinds, types, strict=False)):
        if kind != SHARED:
            last[own] = i
        elif own in last:
            found[i] = last[own]
    return found
