"""Rows as a frame of pandas, which the core does without, and as a table of HTML for notebooks."""

from __future__ import annotations

import html
from collections.abc import Iterable, Mapping, Sequence
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


def page(title: str, heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table of HTML below its title, which scrolls where it is wider than the page.

    Args:
        title: a line above the table, rather than a caption, which a narrow page would cut; empty: none.
        heads: of the columns.
        rows: cells; a row with fewer than there are heads has a remark in its last one.
    """
    top = "".join(f"<th>{html.escape(head)}</th>" for head in heads)
    body = ""
    for row in rows:
        *cells, last = (html.escape(cell) for cell in row)
        missing = len(heads) - len(row)
        wide = f' colspan="{missing + 1}" style="white-space: normal"' if missing else ""
        body += f"<tr>{''.join(f'<td>{cell}</td>' for cell in cells)}<td{wide}>{last}</td></tr>"
    above = f"<p><strong>{html.escape(title)}</strong></p>" if title else ""
    table = f"<table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table>"
    return f'{above}<div style="overflow-x: auto; white-space: nowrap">{table}</div>'
