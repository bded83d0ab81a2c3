"""Tokens at the input of every decoder layer, of the last prefill: one way of counting for all methods."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

from tokred.core.method import Method
from tokred.core.report import Report
from tokred.core.site import Stage


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


@dataclass(frozen=True)
class VisualReport(Report):
    """The last prefill of a model that is patched at the stages ``projector`` or ``layer``.

    Attributes:
        family: of the model.
        methods: that act on it, those of other stages included.
        before: tokens of the prompt, padding counted.
        layers: tokens at each decoder layer's input.
        more: reports of methods of other stages (tower, cache).
    """

    stage: ClassVar[Stage] = "layer"
    spans: ClassVar[bool] = True

    methods: tuple[Method, ...]
    before: int
    layers: tuple[LayerTokens, ...]

    @property
    def acting(self) -> Sequence[Method]:
        """Methods of the two stages, without those that act on the tower or the cache."""
        return tuple(m for m in self.methods if m.stage in ("projector", "layer"))

    @property
    def visual(self) -> float:
        """Visual tokens a sample and layer, on average over the samples that have any."""
        totals = [sum(column) for column in zip(*(row.visual for row in self.layers), strict=True)]
        some = [t for t in totals if t]
        return sum(some) / len(some) / len(self.layers) if some else 0.0

    @property
    def title(self) -> str:
        return f"{', '.join(str(m) for m in self.methods)} on {self.family} (prompt of {self.before} tokens)"

    @property
    def table(self) -> list[str]:
        lines = [f"{'layer':>5} {'columns':>8} {'tokens':>8} {'visual':>8}"]
        for row in self.layers:
            lines.append(f"{row.layer:>5} {row.columns:>8} {_mean(row.tokens):>8.1f} {_mean(row.visual):>8.1f}")
        return lines

    @property
    def summary(self) -> str:
        return f"visual tokens a layer: {self.visual:.1f}"

    @property
    def own_rows(self) -> list[dict[str, Any]]:
        """Columns as tokens: of the whole prompt, and of those that reach the layer; visual tokens of a sample."""
        return [
            self.row(layer=row.layer, tokens_in=self.before, tokens_out=row.columns, visual=_mean(row.visual))
            for row in self.layers
        ]

    @property
    def totals(self) -> dict[str, Any]:
        return {"before": self.before, "visual": self.visual}


def _mean(counts: Sequence[int]) -> float:
    return sum(counts) / len(counts)
