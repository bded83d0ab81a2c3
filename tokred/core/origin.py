"""``Origin``: where a saved setting comes from, and how it was applied there."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Origin:
    """Where a setting was saved: the model that it acted on, and what ``tokred.apply`` was told beside the method.

    Attributes:
        tokred: version that wrote it.
        model: class of the part that was patched, with its package; None: the method was on no model.
        depth: its layers.
        where: names of the blocks that the method was restricted to; None: to none.
        expose, windows: as given to ``tokred.apply``.
    """

    tokred: str
    model: str | None = None
    depth: int = 0
    where: tuple[str, ...] | None = None
    expose: str = "auto"
    windows: str = "auto"

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON; a folder keeps the version beside them."""
        return {
            "model": self.model,
            "depth": self.depth,
            "where": None if self.where is None else list(self.where),
            "expose": self.expose,
            "windows": self.windows,
        }

    @classmethod
    def from_dict(cls, found: dict[str, Any], tokred: str) -> Origin:
        """The origin that :meth:`to_dict` wrote, of a folder written by this version of tokred.

        Raises:
            TypeError: it is of another form.
        """
        where = found.get("where")
        return cls(**{**found, "where": None if where is None else tuple(where), "tokred": tokred})

    def on(self, model: str, depth: int) -> bool:
        """True if the setting was made on such a model, or on none."""
        return self.model is None or (self.model, self.depth) == (model, depth)

    def beside(self, model: str, depth: int, tokred: str) -> str:
        """In words: what the setting was made for, and what it is applied to."""
        made = "on no model" if self.model is None else f"for {self.model} of {self.depth} layers"
        return (
            f"the setting was made {made} by tokred {self.tokred}, and this is {model} of {depth} layers under "
            f"tokred {tokred}"
        )
