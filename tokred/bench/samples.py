"""Values of single samples, kept beside a table of results, so that any two rows can be compared on the same samples.

A line a row of the table, in JSON: what the row is, and the values. The line is written before the row is.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tokred.bench.scoring import Tally


def beside(table: Path) -> Path:
    """The file of samples of a table: ``quality.samples.jsonl`` of ``quality.csv``."""
    return table.with_suffix(".samples.jsonl")


def write(path: Path, head: Mapping[str, Any], tally: Tally) -> None:
    """Add a line; of lines with the same ``head`` the last one holds."""
    path.parent.mkdir(parents=True, exist_ok=True)
    line = json.dumps({"row": {name: str(value) for name, value in head.items()}, **asdict(tally)})
    # After an interruption in the middle of a line, a new one begins.
    torn = path.exists() and path.stat().st_size > 0 and _last(path) != b"\n"
    with path.open("a", encoding="utf8") as f:
        f.write(f"\n{line}\n" if torn else f"{line}\n")


def _last(path: Path) -> bytes:
    with path.open("rb") as f:
        f.seek(-1, 2)
        return f.read(1)


def read(
    path: Path, head: Mapping[str, Any], by: Sequence[str] = ("method", "setting")
) -> dict[tuple[str, ...], Tally]:
    """The samples of rows.

    Args:
        path: of the file; there may be none.
        head: fields that a row has to have.
        by: fields that tell the rows apart.
    """
    wanted = {name: str(value) for name, value in head.items()}
    return {
        tuple(row.get(name, "") for name in by): tally
        for row, tally in _lines(path)
        if all(row.get(name) == value for name, value in wanted.items())
    }


def _lines(path: Path) -> Iterator[tuple[dict[str, str], Tally]]:
    if not path.exists():
        return
    with path.open(encoding="utf8") as f:
        for text in f:
            try:
                line = json.loads(text)
                row = line.pop("row")
            except (ValueError, KeyError):
                continue  # torn by an interruption, before its row was in the table
            yield row, Tally(**line)
