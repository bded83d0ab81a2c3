"""Figures that notebooks show, whatever the back-end is: those of matplotlib are shown by pyplot's own alone."""

from __future__ import annotations

import io

from matplotlib.figure import Figure


class Shown(Figure):  # type: ignore[misc, unused-ignore]
    """A figure of matplotlib that knows how it looks."""

    def _repr_png_(self) -> bytes:
        """The picture, for IPython: without it a notebook would print the name of the class."""
        out = io.BytesIO()
        self.savefig(out, format="png", facecolor="white")
        return out.getvalue()
