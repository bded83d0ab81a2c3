"""Common ground of all figures: matplotlib without a screen, colours that everybody can tell apart, and saving."""

from __future__ import annotations

from pathlib import Path
from typing import Any

# Okabe and Ito's colours, which colour-blind readers can tell apart; markers differ too.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#7B5AA6", "#666666")


MARKERS = ("o", "s", "^", "D", "v", "P", "X", "h")


def pyplot() -> Any:
    """matplotlib's pyplot with a back-end that needs no screen."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def grid(rows: int, columns: int, cell: float = 1.9) -> tuple[Any, Any]:
    """A figure of ``rows x columns`` square axes for pictures."""
    size = (cell * columns, cell * rows + 0.7)
    figure, axes = pyplot().subplots(rows, columns, figsize=size, squeeze=False, layout="constrained")
    return figure, axes


def save(figure: Any, path: Path, dpi: int = 160) -> Path:
    """Write a figure and free it."""
    figure.savefig(path, dpi=dpi, facecolor="white")
    pyplot().close(figure)
    return path
