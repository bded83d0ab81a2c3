"""The tokens that every sub-layer of a denoiser ran on, of the last forward."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

from tokred.core.report import OneReport
from tokred.core.site import Stage


class SublayerReport(NamedTuple):
    """One sub-layer of the last forward of a denoiser.

    Attributes:
        name: in the denoiser.
        role: ``"self"``, ``"cross"`` or ``"mlp"``.
        tokens: of the image.
        left: tokens (with methods of keys and values: keys) that it ran on.
        block: number of the block that it belongs to.
    """

    name: str
    role: str
    tokens: int
    left: int
    block: int = 0


@dataclass(frozen=True)
class DenoiserReport(OneReport):
    """The last forward of a patched denoiser."""

    stage: ClassVar[Stage] = "attention"

    sublayers: tuple[SublayerReport, ...]

    @property
    def reduced(self) -> int:
        """Number of sub-layers that ran on fewer tokens."""
        return sum(row.left < row.tokens for row in self.sublayers)

    @property
    def table(self) -> list[str]:
        counts: dict[tuple[str, int, int], int] = {}
        for row in self.sublayers:
            key = (row.role, row.tokens, row.left)
            counts[key] = counts.get(key, 0) + 1
        lines = [f"{'sub-layer':>9} {'count':>6} {'tokens':>16}"]
        for (role, tokens, left), count in sorted(counts.items(), key=lambda c: (-c[0][1], c[0][0])):
            lines.append(f"{role:>9} {count:>6} {f'{tokens} -> {left}':>16}")
        return lines

    @property
    def summary(self) -> str:
        return f"reduced: {self.reduced} of {len(self.sublayers)} sub-layers"

    @property
    def own_rows(self) -> list[dict[str, Any]]:
        return [
            self.row(layer=row.block, name=row.name, role=row.role, tokens_in=row.tokens, tokens_out=row.left)
            for row in self.sublayers
        ]

    @property
    def totals(self) -> dict[str, Any]:
        return {"reduced": self.reduced, "sublayers": len(self.sublayers)}
