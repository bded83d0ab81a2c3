"""Tokens at the input of every decoder layer, of the last prefill: one way of counting for all methods."""

from __future__ import annotations

from typing import Any, NamedTuple

from tokred.core.method import Method


class LayerTokens(NamedTuple):
    """One decoder layer of the last prefill.

    Attributes:
        layer: which.
        columns: that it ran on, filler and padding counted.
        tokens: real ones of each sample.
        visual: and the visual ones among them.
    """

    layer: int
    columns: int
    tokens: tuple[int, ...]
    visual: tuple[int, ...]


class VisualReport(NamedTuple):
    """The last prefill of a model that is patched at the stages ``projector`` or ``layer``.

    Attributes:
        family: of the model.
        methods: that act on it, those of other stages included.
        before: tokens of the prompt, padding counted.
        layers: tokens at each decoder layer's input.
        more: reports of methods of other stages (tower, cache).
    """

    family: str
    methods: tuple[Method, ...]
    before: int
    layers: tuple[LayerTokens, ...]
    more: tuple[Any, ...] = ()

    @property
    def visual(self) -> float:
        """Visual tokens a sample and layer, on average over the samples that have any."""
        totals = [sum(column) for column in zip(*(row.visual for row in self.layers), strict=True)]
        some = [t for t in totals if t]
        return sum(some) / len(some) / len(self.layers) if some else 0.0

    def __str__(self) -> str:
        lines = [
            f"{', '.join(str(m) for m in self.methods)} on {self.family} (prompt of {self.before} tokens)",
            f"{'layer':>5} {'columns':>8} {'tokens':>8} {'visual':>8}",
        ]
        for row in self.layers:
            mean, seen = sum(row.tokens) / len(row.tokens), sum(row.visual) / len(row.visual)
            lines.append(f"{row.layer:>5} {row.columns:>8} {mean:>8.1f} {seen:>8.1f}")
        lines.append(f"visual tokens a layer: {self.visual:.1f}")
        return "\n".join([*lines, *(str(one) for one in self.more)])
