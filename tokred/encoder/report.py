"""Tokens, multiply-adds and token sizes of every block, of the last forward."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

from tokred.core.report import OneReport
from tokred.core.site import Stage


def place(where: str) -> str:
    """Words for where tokens are reduced."""
    words = {"mid": "in the middle of each block", "end": "at the end of each block", "inside": "inside each block"}
    return words[where]


class LayerReport(NamedTuple):
    """One block of the last forward."""

    layer: int
    tokens_in: int
    tokens_out: int
    macs: int
    mean_size: float
    largest_size: float
    macs_unpatched: int = 0
    name: str = ""


@dataclass(frozen=True)
class BlockReport(OneReport):
    """The last forward of a model whose blocks are patched. ``macs`` counts the blocks, for one sample."""

    stage: ClassVar[Stage] = "block"

    where: str
    layers: tuple[LayerReport, ...]
    macs: int
    macs_unpatched: int

    @property
    def title(self) -> str:
        return f"{super().title} (reduced {place(self.where)})"

    @property
    def table(self) -> list[str]:
        lines = [f"{'block':>5} {'tokens':>12} {'GMACs':>8} {'mean size':>10} {'largest':>8}"]
        for row in self.layers:
            tokens = f"{row.tokens_in} -> {row.tokens_out}"
            lines.append(
                f"{row.layer:>5} {tokens:>12} {row.macs / 1e9:>8.3f} {row.mean_size:>10.2f} {row.largest_size:>8.0f}"
            )
        return lines

    @property
    def summary(self) -> str:
        share = self.macs / self.macs_unpatched
        return f"blocks: {self.macs / 1e9:.3f} of {self.macs_unpatched / 1e9:.3f} GMACs a sample ({share:.0%})"

    @property
    def own_rows(self) -> list[dict[str, Any]]:
        return [self.row(**row._asdict()) for row in self.layers]

    @property
    def totals(self) -> dict[str, Any]:
        return {"where": self.where, "macs": self.macs, "macs_unpatched": self.macs_unpatched}
