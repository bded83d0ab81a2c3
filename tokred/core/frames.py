"""Rows as a frame of pandas, which the core does without."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any


def frame(rows: Iterable[Mapping[str, Any]], columns: Iterable[str], owner: str) -> Any:
    """Rows as a ``pandas.DataFrame``.

    Args:
        rows: a mapping a row.
        columns: in this order; what rows have beside them is left out.
        owner: name of the class that has the rows, for the error.

    Raises:
        ImportError: pandas is not installed.
    """
    try:
        import pandas as pd
    except ImportError as error:
        raise ImportError(
            f"{owner}.to_pandas needs pandas: pip install 'tokred[bench]', or use {owner}.rows"
        ) from error
    return pd.DataFrame(list(rows), columns=list(columns))
