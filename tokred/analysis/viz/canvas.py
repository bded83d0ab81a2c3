"""Common ground of all figures: figures that need no screen, colours that everybody can tell apart, and saving."""

from __future__ import annotations

from pathlib import Path
from typing import Any

# Okabe and Ito's colours, which colour-blind readers can tell apart; markers differ too.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#7B5AA6", "#666666")


MARKERS = ("o", "s", "^", "D", "v", "P", "X", "h")


def check(what: str, extra: str = "bench") -> None:
    """Refuse to draw where matplotlib is missing.

    Args:
        what: is asked for, for the message.
        extra: of tokred that brings it.

    Raises:
        ImportError: it is.
    """
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise ImportError(f"{what} needs matplotlib: pip install 'tokred[{extra}]'") from error


def subplots(rows: int, columns: int, **options: Any) -> tuple[Any, Any]:
    """A figure with axes, made without pyplot: no window is opened, nothing has to be closed, and the back-end that the
    user has chosen stays.

    Args:
        rows, columns: of axes.
        options: of the figure (``figsize``, ``layout``, ``dpi``) and of its ``subplots``.

    Raises:
        ImportError: matplotlib is not installed.
    """
    check("a figure")
    from tokred.analysis.viz.shown import Shown

    own = {name: options.pop(name) for name in ("figsize", "layout", "dpi") if name in options}
    figure = Shown(**own)
    return figure, figure.subplots(rows, columns, **options)


def grid(rows: int, columns: int, cell: float = 1.9) -> tuple[Any, Any]:
    """A figure of ``rows x columns`` square axes for pictures."""
    size = (cell * columns, cell * rows + 0.7)
    return subplots(rows, columns, figsize=size, squeeze=False, layout="constrained")


def save(figure: Any, path: Path, dpi: int = 160) -> Path:
    """Write a figure."""
    figure.savefig(path, dpi=dpi, facecolor="white")
    return path
