"""Rows of tokens that left inside the language model, freed in the caches of the layers before as well."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from torch import Tensor

from tokred.adapters.contract import words
from tokred.adapters.vlm.columns import Group, gather_columns

if TYPE_CHECKING:
    from transformers import Cache


def evened(cache: Cache, groups: list[Group]) -> list[Group]:
    """The groups of a cache all of whose layers hold what the last of them does; rows of the others are freed.

    Args:
        cache: after a forward, each layer with the rows that its group tells about.
        groups: by first layer, at most one of them of layer 0; where layers in between dropped other tokens, or a
            policy holds the rows, nothing is freed, and these are returned.
    """
    inner = [g for g in groups if g.first > 0]
    layers = words.LAYERS.need(cache)
    # A policy has chosen rows of its own, by a count that must not change behind it.
    if len(inner) != 1 or any(hasattr(layer, "clock") for layer in layers):
        return groups
    last = inner[0]
    for layer in layers[: last.first]:
        taken(layer, last.columns)
    outer = next((g for g in groups if g.first == 0), None)
    if outer is None:
        return [replace(last, first=0)]
    return [replace(last, first=0, columns=outer.columns.gather(1, last.columns), width=outer.width)]


def taken(layer: Any, columns: Tensor) -> None:
    """Hold the rows ``columns`` ``(B, M)`` of a layer of a cache alone; layers that hold states keep them."""
    for word in (words.KEYS, words.VALUES):
        rows = word.part(layer)
        if isinstance(rows, Tensor) and rows.ndim == 4:
            some = gather_columns(rows.transpose(1, 2), columns.to(rows.device))
            word.set(layer, some.transpose(1, 2).contiguous())
