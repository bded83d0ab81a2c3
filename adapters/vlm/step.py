"""What decoder layers run on: columns that are left, and how many."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

from tokred.adapters.vlm.pack import gather_columns


class LayerCount(NamedTuple):
    """Tokens at the input of one decoder layer: the columns it ran on, and the real and visual ones of each sample."""

    columns: int
    real: tuple[int, ...]
    visual: tuple[int, ...]


class Step:
    """What is left from one layer on.

    Attributes:
        columns: ``(B, M)`` which of layer 0's columns of this forward.
        valid: ``(B, M)`` bool, False on filler.
        visual: ``(B, M)`` bool.
        real, counts: real and visual tokens of each sample.
        ragged: whether any is filler or padding.
    """

    def __init__(
        self, columns: Tensor, valid: Tensor, visual: Tensor, real: tuple[int, ...], counts: tuple[int, ...]
    ) -> None:
        self.columns = columns
        self.valid = valid
        self.visual = visual
        self.real = real
        self.counts = counts
        self.ragged = min(real) < columns.shape[1]
        self._moved: dict[Any, Any] = {}

    def move(self, value: Any, dim: int) -> Any:
        """``value`` (a tensor, or a tuple of them) at the columns that are left, made once for all layers."""
        if value is None:
            return None
        if isinstance(value, tuple):
            return tuple(self.move(one, dim) for one in value)
        key = (id(value), dim)
        if key not in self._moved:
            self._moved[key] = (value, gather_columns(value, self.columns, dim))
        return self._moved[key][1]
