"""Slots, rows and bytes of every layer of a cache, after the last forward."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from tokred.core.report import OneReport
from tokred.core.site import Stage


@dataclass(frozen=True)
class CacheReport(OneReport):
    """The cache after the last forward of a model with a policy.

    Attributes:
        family: of the model.
        method: the policy.
        layers: slots seen, rows held, bytes, and the bytes that all slots would take, for each layer.
    """

    stage: ClassVar[Stage] = "cache"

    layers: tuple[Any, ...]

    @property
    def bytes(self) -> int:
        """Bytes that all layers hold."""
        return sum(row.bytes for row in self.layers)

    @property
    def dense_bytes(self) -> int:
        """Bytes without a policy."""
        return sum(row.dense_bytes for row in self.layers)

    @property
    def away_bytes(self) -> int:
        """Those of :attr:`bytes` that are kept in host memory, away from the device where their layer runs."""
        return sum(row.away_bytes for row in self.layers)

    @property
    def table(self) -> list[str]:
        lines = [f"{'layer':>5} {'tokens':>8} {'rows':>8} {'KiB':>10} {'of':>10}"]
        for row in self.layers:
            held, dense = row.bytes / 1024, row.dense_bytes / 1024
            lines.append(f"{row.layer:>5} {row.seen:>8} {row.rows:>8} {held:>10.1f} {dense:>10.1f}")
        return lines

    @property
    def summary(self) -> str:
        share = self.bytes / max(self.dense_bytes, 1)
        text = f"cache: {self.bytes / 1024:.1f} of {self.dense_bytes / 1024:.1f} KiB ({share:.0%})"
        return f"{text}, {self.away_bytes / 1024:.1f} of them in host memory" if self.away_bytes else text

    @property
    def own_rows(self) -> list[dict[str, Any]]:
        return [
            self.row(layer=row.layer, tokens_in=row.seen, rows=row.rows, bytes=row.bytes, dense_bytes=row.dense_bytes)
            for row in self.layers
        ]

    @property
    def totals(self) -> dict[str, Any]:
        return {"bytes": self.bytes, "dense_bytes": self.dense_bytes}
