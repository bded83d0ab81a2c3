"""A report of what a stream has seen and holds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tokred.adapters.kv.cache import LayerRows
from tokred.core.method import Method


@dataclass(frozen=True)
class StreamReport:
    """A stream as it is now.

    Attributes:
        family: of the model.
        methods: that act on the stream.
        frames: seen.
        seen: visual tokens of all frames, before any left.
        kept: visual tokens that entered the cache.
        layers: slots, rows and bytes of each layer's cache.
        state_bytes: of what the method remembers between two frames.
        tower_bytes: of the tower's features of the last reference frame.
    """

    family: str
    methods: tuple[Method, ...]
    frames: int
    seen: int
    kept: int
    layers: tuple[LayerRows, ...]
    state_bytes: int
    tower_bytes: int

    @property
    def rows(self) -> int:
        """Rows that the fullest layer holds."""
        return max((row.rows for row in self.layers), default=0)

    @property
    def cache_bytes(self) -> int:
        """Bytes of all layers' rows."""
        return sum(row.bytes for row in self.layers)

    @property
    def nbytes(self) -> int:
        """Bytes of everything that is held between two frames."""
        return self.cache_bytes + self.state_bytes + self.tower_bytes

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "family": self.family,
            "methods": [one.to_dict() for one in self.methods],
            "frames": self.frames,
            "seen": self.seen,
            "kept": self.kept,
            "rows": self.rows,
            "cache_bytes": self.cache_bytes,
            "state_bytes": self.state_bytes,
            "tower_bytes": self.tower_bytes,
        }

    def __str__(self) -> str:
        what = " + ".join(map(repr, self.methods)) or "everything stays"
        share = f" ({100 * self.kept / self.seen:.0f}%)" if self.seen else ""
        return (
            f"{what} on {self.family}\n"
            f"{self.frames} frames, {self.seen} visual tokens, {self.kept} entered the cache{share}\n"
            f"{self.rows} rows held, {self.cache_bytes / 1024:.1f} KiB; state {self.state_bytes / 1024:.1f} KiB; "
            f"tower {self.tower_bytes / 1024:.1f} KiB"
        )
