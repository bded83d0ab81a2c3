"""``Report``: the last forward of a patched model, in one form for all stages: text, rows, a table of pandas, HTML."""

from __future__ import annotations

import html
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from tokred.core.frames import frame, page
from tokred.core.method import Method
from tokred.core.site import STAGES, Stage

# Columns of every row, whatever the stage; a stage that has nothing to say about one leaves None.
COLUMNS = (
    "stage", "method", "layer", "name", "role", "tokens_in", "tokens_out", "visual", "mean_size", "largest_size",
    "macs", "macs_unpatched", "rows", "bytes", "dense_bytes",
)  # fmt: skip


@dataclass(frozen=True)
class Report(ABC):
    """The last forward of a patched model.

    Attributes:
        family: of the model.
        more: reports of methods that act on the same model at other stages.
    """

    stage: ClassVar[Stage]
    # Whether it tells of the whole model, of which other stages patch a part (the tower, the cache).
    spans: ClassVar[bool] = False

    family: str
    more: tuple[Report, ...] = field(default=(), kw_only=True)

    @property
    @abstractmethod
    def acting(self) -> Sequence[Method]:
        """The methods that this report is about."""

    @property
    @abstractmethod
    def title(self) -> str:
        """Methods and model, in one line."""

    @property
    @abstractmethod
    def summary(self) -> str:
        """All layers, in one line."""

    @property
    @abstractmethod
    def table(self) -> list[str]:
        """The layers as text, one a line, below a line of heads."""

    @property
    @abstractmethod
    def own_rows(self) -> list[dict[str, Any]]:
        """Rows of this stage alone."""

    @property
    @abstractmethod
    def totals(self) -> dict[str, Any]:
        """Numbers of all layers together."""

    @property
    def parts(self) -> tuple[Report, ...]:
        """This report and those of the other stages, in the order of the stages."""
        return tuple(sorted((self, *self.more), key=lambda one: STAGES.index(one.stage)))

    @property
    def rows(self) -> list[dict[str, Any]]:
        """A row a layer, of all stages in their order, with the keys of :data:`COLUMNS`; what a stage does not count is
        None."""
        return [row for part in self.parts for row in part.own_rows]

    def row(self, **values: Any) -> dict[str, Any]:
        """One row, with None for what is not given."""
        method = "+".join(m.name or type(m).__name__ for m in self.acting)
        return dict.fromkeys(COLUMNS) | {"stage": self.stage, "method": method} | values

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON: ``family``, ``methods``, ``totals``, ``rows`` of this stage, and ``more``."""
        return {
            "family": self.family,
            "stage": self.stage,
            "methods": [method.to_dict() for method in self.acting],
            "totals": self.totals,
            "rows": self.own_rows,
            "more": [one.to_dict() for one in self.more],
        }

    def to_pandas(self) -> Any:
        """:attr:`rows` as a ``pandas.DataFrame``.

        Raises:
            ImportError: pandas is not installed.
        """
        return frame(self.rows, COLUMNS, "Report")

    def __str__(self) -> str:
        own = [self.title, *self.table, self.summary]
        return "\n".join([*own, *(str(one) for one in self.more)])

    def _repr_html_(self) -> str:
        """A table for notebooks, of the columns that say something."""
        found = [c for c in COLUMNS[2:] if any(row[c] is not None for row in self.own_rows)]
        heads = [name.replace("_", " ") for name in found]
        body = [[_cell(row[name]) for name in found] for row in self.own_rows]
        own = page(self.title, heads, body) + f"<p>{html.escape(self.summary)}</p>"
        return own + "".join(one._repr_html_() for one in self.more)


@dataclass(frozen=True)
class OneReport(Report):
    """The last forward of a model on which one method acts at the report's stage.

    Attributes:
        family: of the model.
        method: that acts.
        more: reports of methods that act on the same model at other stages.
    """

    method: Method

    @property
    def acting(self) -> Sequence[Method]:
        return (self.method,)

    @property
    def title(self) -> str:
        return f"{self.method} on {self.family}"


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.2f}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)


def joined(reports: Sequence[Report]) -> Report:
    """One report of a model that is patched at several stages: the one that spans the model, else the first, holds the
    others."""
    from dataclasses import replace

    main = next((one for one in reports if one.spans), reports[0])
    others = tuple(one for one in reports if one is not main)
    return replace(main, more=others) if others else main
